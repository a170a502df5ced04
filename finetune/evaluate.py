"""Exact evaluation, on any number of ranks."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.transforms import normalize
from launch.world import World, sum_over_ranks


@dataclass(frozen=True)
class Score:
    """Accuracies in 0 to 1, mean cross entropy, and the number of images they are over."""

    top1: float
    top5: float
    loss: float
    images: int


@torch.no_grad()
def evaluate(
    models: dict[str, nn.Module],
    batches: Iterable[dict[str, Tensor]],
    world: World,
    mean: Tensor,
    std: Tensor,
    autocast: bool,
) -> dict[str, Score]:
    """Score classifiers on every sample of a split, each counted once.

    Label -1 is a batch's filling, or an image in place of a damaged one: it does not count. Every rank calls this, with
    its own part of the samples, and gets the same scores.
    """
    training = {name: model.training for name, model in models.items()}
    sums = torch.zeros(len(models), 4, dtype=torch.float64, device=world.device)  # top-1, top-5, loss, images
    for model in models.values():
        model.eval()
    for batch in batches:
        label = batch["label"].to(world.device)
        image = normalize(batch["image"].to(world.device), mean, std)
        for row, model in zip(sums, models.values(), strict=True):
            with torch.autocast(world.device.type, torch.bfloat16, enabled=autocast):
                logits = model(image)
            row += count_hits(logits.float(), label)
    for name, model in models.items():
        model.train(training[name])
    rows = sum_over_ranks(sums).tolist()
    return {
        name: Score(top1 / images, top5 / images, loss / images, int(images))
        for name, (top1, top5, loss, images) in zip(models, rows, strict=True)
    }


def count_hits(logits: Tensor, label: Tensor) -> Tensor:
    """Sums over a batch: right at first, right among five, cross entropy, images. Label -1 does not count."""
    real = label >= 0
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (best == label[:, None]) & real[:, None]
    losses = F.cross_entropy(logits, label.clamp(min=0), reduction="none") * real
    return torch.stack([hits[:, 0].sum(), hits.sum(), losses.sum(), real.sum()]).double()
