"""Cheap checks of a run's inputs, before torch is imported."""

from pathlib import Path

from configs.checks import check_weights
from configs.schema import Finetune, Pretrain
from data.folder import is_collection
from data.remote import is_url
from data.shards import read_index
from models.sizes import resolve


def check_inputs(config: Pretrain | Finetune) -> None:
    """Raise `UserError` for an unknown model name, or where --init or data.path does not exist."""
    if config.model.name is not None:
        resolve(config.model)
    if config.init != "none":
        check_weights(config.init)
    if not (is_url(config.data.path) or is_collection(config.data.path)):
        read_index(Path(config.data.path))
