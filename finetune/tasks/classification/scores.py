"""Predictions of a classifier for a split, and their scores."""

from dataclasses import asdict, dataclass, fields

import numpy as np
import torch.nn.functional as F
from torch import Tensor

TOP = 5
BINS = 15  # of confidence, as in 1706.04599


@dataclass(frozen=True)
class Score:
    """Accuracies in 0 to 1, mean cross entropy, and the number of images they are over."""

    top1: float
    top5: float
    loss: float
    images: int


@dataclass(frozen=True)
class Bin:
    """Images whose confidence is above `low` and at most `high`; their means, None where there are no images."""

    low: float
    high: float
    images: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Predictions:
    """N samples of a split, in its order.

    Args:
        sample: [N] number of the sample
        label: [N]
        best: [N, 5] the likeliest classes, the first one first; fewer columns if there are fewer classes
        confidence: [N] softmax probability of the likeliest
        loss: [N] cross entropy
    """

    sample: np.ndarray
    label: np.ndarray
    best: np.ndarray
    confidence: np.ndarray
    loss: np.ndarray

    def scores(self) -> dict[str, float]:
        """The fields of `score` by name."""
        return asdict(self.score())

    def score(self) -> Score:
        """Means over the samples."""
        hits = self.best == self.label[:, None]
        loss = float(self.loss.mean(dtype=np.float64))
        return Score(float(hits[:, 0].mean()), float(hits.any(1).mean()), loss, len(self.label))

    def confusions(self) -> tuple[np.ndarray, np.ndarray]:
        """Pairs [P, 2] of a class and what it was taken for, the most frequent first; how often, [P]."""
        wrong = self.best[:, 0] != self.label
        pairs, times = np.unique(np.stack([self.label, self.best[:, 0]], 1)[wrong], axis=0, return_counts=True)
        order = np.argsort(-times, kind="stable")
        return pairs[order], times[order]

    def calibration(self) -> list[Bin]:
        """How often the likeliest class is right, by its confidence: bins of equal width (1706.04599, section 3)."""
        right = self.best[:, 0] == self.label
        number = np.ceil(np.nan_to_num(self.confidence.astype(np.float64)) * BINS).astype(int) - 1  # NaN: in no bin
        bins = []
        for i in range(BINS):
            inside = number == i
            means = (
                float(x[inside].mean(dtype=np.float64)) if inside.any() else None for x in (self.confidence, right)
            )
            bins.append(Bin(i / BINS, (i + 1) / BINS, int(inside.sum()), *means))
        return bins


def calibration_error(bins: list[Bin]) -> float:
    """Expected calibration error (1706.04599, equation 3): |accuracy - confidence| of a bin, mean over the images."""
    gaps = (bin.images * abs(bin.accuracy - bin.confidence) for bin in bins if bin.images)
    return sum(gaps) / max(1, sum(bin.images for bin in bins))


def collect(logits: Tensor, batch: dict[str, Tensor]) -> Predictions:
    """A batch's predictions, from logits [B, classes].

    Label -1 marks padding of a batch and images in place of damaged ones: they are left out.
    """
    logits = logits.float()
    real = batch["label"] >= 0
    logits, label = logits[real.to(logits.device)], batch["label"][real]
    best = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
    confidence = logits.softmax(1).gather(1, best[:, :1])[:, 0]
    loss = F.cross_entropy(logits, label.to(logits.device), reduction="none")
    return Predictions(*(x.cpu().numpy() for x in (batch["sample"][real], label, best.int(), confidence, loss)))


def join(parts: list[Predictions]) -> Predictions:
    """The predictions of batches or ranks as one, in the order of the samples."""
    order = np.argsort(np.concatenate([part.sample for part in parts]))
    return Predictions(
        *(np.concatenate([getattr(part, field.name) for part in parts])[order] for field in fields(Predictions))
    )
