"""What several tasks do before training: build their model, look for a target."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from configs.errors import UserError
from configs.sections import FinetuneModel
from data.folder import Folder
from data.shards import Split
from models.convnext import ConvNeXt

Model = TypeVar("Model", bound=ConvNeXt)


def build_model(settings: FinetuneModel, make: Callable[[float, str], Model]) -> Model:
    """The model that `make` builds from drop path and activation checkpointing; a frozen encoder has neither."""
    if not settings.freeze_encoder:
        return make(settings.drop_path, settings.recompute)
    model = make(0.0, "none")
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    return model


def any_target(images: Split | Folder, read_target: Callable[[bytes], Any], holds: Callable[[Any], bool]) -> bool:
    """Whether `holds` is true of the target of any image; damaged targets are passed over."""
    for sample in range(len(images)):
        with suppress(UserError):
            if holds(read_target(images.read_target(sample))):
                return True
    return False
