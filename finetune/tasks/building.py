"""Building the model of a task."""

from collections.abc import Callable
from typing import TypeVar

from configs.sections import FinetuneModel
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
