"""Cheap checks of a run's inputs, before torch is imported."""

from importlib.util import find_spec
from pathlib import Path

from configs.checks import check_weights
from configs.errors import UserError
from configs.schema import Finetune, Pretrain
from data.folder import is_collection
from data.remote import is_url
from data.shard_index import read_index
from models.sizes import resolve


def check_inputs(config: Pretrain | Finetune) -> None:
    """Raise `UserError` for an unknown model name, a tracker that is not installed, or missing --init or data.path."""
    if config.model.name is not None:
        resolve(config.model)
    for name in config.run.trackers:
        if find_spec(name) is None:
            way_out = f"pip install {name}, or leave it out of run.trackers"
            raise UserError(f"run.trackers has {name}, which is not installed: {way_out}")
    if config.init != "none":
        check_weights(config.init)
    if not (is_url(config.data.path) or is_collection(config.data.path)):
        read_index(Path(config.data.path))
