"""Predictions of a classifier for a split, and their scores."""

from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor

METRICS = {  # scores that may select the best weights, and how they are shown
    "top1": "top-1", "top5": "top-5", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1", "loss": "loss",
}  # fmt: skip
TOP = 5
BINS = 15  # of confidence, as in arXiv 1706.04599


@dataclass(frozen=True)
class Bin:
    """Images with confidence above `low` and at most `high`; means are None if there are none."""

    low: float
    high: float
    images: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Predictions:
    """Predictions for N samples of a split, in its order."""

    sample: np.ndarray  # [N] index in the split
    label: np.ndarray  # [N]
    best: np.ndarray  # [N, min(5, classes)] likeliest classes in descending order
    confidence: np.ndarray  # [N] softmax probability of the likeliest class
    loss: np.ndarray  # [N] cross entropy

    def scores(self) -> dict[str, float]:
        """Shares from 0 to 1 (accuracies and the F1 score of classes with images), mean cross entropy, images."""
        hits = self.best == self.label[:, None]
        top1, top5 = float(hits[:, 0].mean()), float(hits.any(1).mean())
        images = np.bincount(self.label)
        found = np.bincount(self.best[:, 0], minlength=len(images))[: len(images)]
        right, present = np.bincount(self.label, hits[:, 0]), images > 0
        recall, f1 = right[present] / images[present], 2 * right[present] / (images + found)[present]
        means = {"balanced_accuracy": float(recall.mean()), "macro_f1": float(f1.mean())}
        loss = float(self.loss.mean(dtype=np.float64))
        return {"top1": top1, "top5": top5, **means, "loss": loss, "images": len(self.label)}

    def confusions(self) -> tuple[np.ndarray, np.ndarray]:
        """(pairs [P, 2] of class and wrong prediction, counts [P]), the most frequent first."""
        wrong = self.best[:, 0] != self.label
        pairs, counts = np.unique(np.stack([self.label, self.best[:, 0]], 1)[wrong], axis=0, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return pairs[order], counts[order]

    def calibration(self) -> list[Bin]:
        """Accuracy by confidence, in bins of equal width (1706.04599, section 3)."""
        right = self.best[:, 0] == self.label
        number = np.ceil(np.nan_to_num(self.confidence.astype(np.float64)) * BINS).astype(int) - 1  # NaN is in no bin
        bins = []
        for i in range(BINS):
            inside = number == i
            confidence, accuracy = self.confidence[inside], right[inside]
            means = (float(x.mean(dtype=np.float64)) if len(x) else None for x in (confidence, accuracy))
            bins.append(Bin(i / BINS, (i + 1) / BINS, len(accuracy), *means))
        return bins


def calibration_error(bins: list[Bin]) -> float:
    """Expected calibration error (1706.04599, equation 3): mean over images of their bin's |accuracy - confidence|."""
    gaps = (bin.images * abs(bin.accuracy - bin.confidence) for bin in bins if bin.images)
    return sum(gaps) / max(1, sum(bin.images for bin in bins))


def collect(logits: Tensor, batch: dict[str, Tensor]) -> Predictions:
    """Predictions from logits [B, classes], without images of label -1 (padding, replacements of damaged images)."""
    logits = logits.float()
    real = batch["label"] >= 0
    logits, label = logits[real.to(logits.device)], batch["label"][real]
    best = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
    confidence = logits.softmax(1).gather(1, best[:, :1])[:, 0]
    loss = F.cross_entropy(logits, label.to(logits.device), reduction="none")
    return Predictions(*(x.cpu().numpy() for x in (batch["sample"][real], label, best.int(), confidence, loss)))
