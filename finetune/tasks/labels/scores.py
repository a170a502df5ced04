"""Predictions of several labels for a split, and their scores. L is the number of labels."""

import math
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from finetune.tasks.image_task import scored

METRICS = {"map": "mAP", "f1_micro": "micro F1", "f1_macro": "macro F1", "loss": "loss"}


@dataclass(frozen=True)
class Predictions:
    """Predictions for N samples of a split, in its order."""

    sample: np.ndarray  # [N] index in the split
    label: np.ndarray  # bool [N, L]
    probability: np.ndarray  # [N, L]
    loss: np.ndarray  # [N] binary cross entropy, mean over the labels
    threshold: tuple[float, ...] | None  # of each label; None = the best for these predictions

    @property
    def finite(self) -> bool:
        """Whether all outputs are finite, so that there are scores."""
        return bool(np.isfinite(self.loss).all() and np.isfinite(self.probability).all())

    def thresholds(self) -> tuple[float, ...]:
        """Probability from which each label is predicted."""
        if self.threshold is not None:
            return self.threshold
        return tuple(best_threshold(self.label[:, i], self.probability[:, i]) for i in range(self.label.shape[1]))

    def predicted(self) -> np.ndarray:
        """Bools [N, L]."""
        return self.probability >= np.array(self.thresholds())

    def average_precision(self) -> np.ndarray:
        """Average precision of each label [L]; NaN for labels without an image."""
        from sklearn.metrics import average_precision_score  # slow to import

        present = self.label.any(0)
        values = np.full(len(present), math.nan)
        for i in np.flatnonzero(present):
            values[i] = average_precision_score(self.label[:, i], self.probability[:, i])
        return values

    def f1(self) -> np.ndarray:
        """F1 score of each label [L]; 0 for labels that neither apply nor are predicted."""
        predicted = self.predicted()
        both = (predicted & self.label).sum(0)
        return 2 * both / np.maximum(1, predicted.sum(0) + self.label.sum(0))

    def scores(self) -> dict[str, float]:
        """Mean average precision and mean F1 of labels with images, F1 over all decisions, loss."""
        loss, images = float(self.loss.mean(dtype=np.float64)), len(self.label)
        if not self.finite:
            return {"map": math.nan, "f1_micro": math.nan, "f1_macro": math.nan, "loss": math.nan, "images": images}
        predicted, present = self.predicted(), self.label.any(0)
        map_, macro = (
            float(values[present].mean()) if present.any() else 0.0 for values in (self.average_precision(), self.f1())
        )
        micro = float(2 * (predicted & self.label).sum() / max(1, predicted.sum() + self.label.sum()))
        return {"map": map_, "f1_micro": micro, "f1_macro": macro, "loss": loss, "images": images}


def best_threshold(label: np.ndarray, probability: np.ndarray) -> float:
    """The threshold with the best F1, between two probabilities; .5 for a label without an image."""
    order = np.argsort(-probability, kind="stable")
    sorted_, right = probability[order].astype(np.float64), np.cumsum(label[order])
    if not len(order) or right[-1] == 0:
        return 0.5
    last = np.append(sorted_[1:] < sorted_[:-1], True)  # equal ones are predicted together
    f1 = np.where(last, 2 * right / (np.arange(1, len(order) + 1) + right[-1]), -1)
    best = int(f1.argmax())
    return float((sorted_[best] + (sorted_[best + 1] if best + 1 < len(sorted_) else 0)) / 2)


def collect(logits: Tensor, batch: dict[str, Tensor], threshold: tuple[float, ...] | None) -> Predictions:
    """Predictions from logits [B, L], without images that do not count."""
    counted = scored(batch)
    logits = logits[counted.to(logits.device)].float()
    label = batch["label"][counted]
    loss = F.binary_cross_entropy_with_logits(logits, label.to(logits.device), reduction="none").mean(1)
    arrays = (x.cpu().numpy() for x in (batch["sample"][counted], label > 0.5, logits.sigmoid(), loss))
    return Predictions(*arrays, threshold)
