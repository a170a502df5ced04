"""Predicting a split with one or several models, on any number of ranks, for any task."""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from data.transforms import normalize
from launch.training.precision import autocast
from launch.training.world import World, gather


class Collector(Protocol):
    """The part of a task that turns a model's outputs into predictions."""

    def collect(self, output: Any, batch: dict[str, Tensor]) -> Any:
        """Predictions for a batch."""

    def join(self, parts: list) -> Any:
        """Predictions for a split from those of its batches, or of all ranks."""


@torch.no_grad()
def output_of(model: nn.Module, image: Tensor, mean: Tensor, std: Tensor, precision: str) -> Tensor:
    """A model's output for images [B, C, H, W] as loaded, on its device; the model is in evaluation mode.

    Args:
        mean: [C] of the channels
        std: [C]
        precision: fp32, bf16 or fp16
    """
    with autocast(image.device, precision):
        return model(normalize(image, mean, std))


def predict(
    task: Collector,
    models: dict[str, nn.Module],
    batches: Iterable[dict[str, Tensor]],
    world: World,
    mean: Tensor,
    std: Tensor,
    precision: str,
) -> dict[str, Any]:
    """Predictions of several models for a split, each sample once; every rank gets the same.

    Args:
        models: by name; their mode stays as it is
        batches: of this rank's part of the samples
        mean: [C] of the channels
        std: [C]
        precision: fp32, bf16 or fp16
    """
    modes = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    parts: dict[str, list] = {name: [] for name in models}
    for batch in batches:
        image = batch["image"].to(world.device, non_blocking=True)
        for name, model in models.items():
            parts[name].append(task.collect(output_of(model, image, mean, std, precision), batch))
    for name, model in models.items():
        model.train(modes[name])
    return {name: task.join(gather(task.join(found))) for name, found in parts.items()}
