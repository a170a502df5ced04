"""Losses of classifiers, one value per image or per output; soft targets."""

import numpy as np
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor

FOCUS = 2.0  # gamma of the focal loss (1708.02002, section 3.2)


class ClassLoss:
    """Loss of logits [B, K] for classes [B], or for their shares [B, K] after mixup.

    `kind` is softmax (cross entropy), bce (timm's, 2110.00476) or focal (1708.02002, on the softmax). `weights` [K]
    multiply the loss of an image by the weight of its class.
    """

    def __init__(self, kind: str, smoothing: float, weights: np.ndarray | None):
        self.kind, self.smoothing, self.weights = kind, smoothing, weights
        self.bce = BinaryCrossEntropy(smoothing=0, reduction="none")

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        classes = logits.shape[1]
        if self.kind == "softmax" and self.weights is None:
            plain = LabelSmoothingCrossEntropy(self.smoothing) if target.ndim == 1 else SoftTargetCrossEntropy()
            return plain(logits, target)
        if target.ndim == 1:
            target = F.one_hot(target, classes) * (1 - self.smoothing) + self.smoothing / classes
        target = target.to(logits.dtype)
        if self.kind == "bce":
            loss = self.bce(logits, target).mean(1)
        else:
            log = logits.log_softmax(1)
            focus = (1 - log.exp()) ** FOCUS if self.kind == "focal" else 1
            loss = -(target * focus * log).sum(1)
        if self.weights is not None:
            loss = loss * (target @ torch.as_tensor(self.weights, dtype=loss.dtype, device=loss.device))
        return loss.mean()


def label_loss(kind: str, smoothing: float, logits: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    """Loss [B, L] of independent labels [B, L], 0 or 1: timm's bce, or focal (1708.02002).

    `weights` [L] multiply the loss of labels that are 1.
    """
    if kind == "bce":
        return BinaryCrossEntropy(smoothing, reduction="none", pos_weight=weights, smooth_dense=True)(logits, target)
    target = target * (1 - smoothing) + 0.5 * smoothing
    weighted = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weights, reduction="none")
    p = logits.sigmoid()
    return weighted * (target - p).abs() ** FOCUS


def balanced_weights(counts: np.ndarray, power: float) -> np.ndarray | None:
    """Weights of classes with so many images, n ** -power, with mean 1 over the images; None for power 0."""
    if power == 0:
        return None
    weights = np.maximum(counts, 1).astype(np.float64) ** -power
    return weights * counts.sum() / (weights * counts).sum()
