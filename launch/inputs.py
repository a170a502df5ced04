"""Cheap checks of a run's inputs, before torch is imported."""

from pathlib import Path

from configs.errors import UserError
from configs.schema import Finetune, Pretrain
from data.remote import is_url
from data.shards import read_index
from models.sizes import resolve


def check_inputs(config: Pretrain | Finetune) -> None:
    """Raise `UserError` for an unknown model name, or where --init or data.path does not exist."""
    if config.model.name is not None:
        resolve(config.model)
    if config.init != "none" and not Path(config.init).exists():
        raise UserError(f"--init {config.init} does not exist: give a weight file, or none to start from scratch")
    if not is_url(config.data.path):
        read_index(Path(config.data.path))
