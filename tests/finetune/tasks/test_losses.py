"""Losses by hand and by timm."""

import numpy as np
import pytest
import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from finetune.tasks.losses import ClassLoss, balanced_weights, label_loss

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
CLASS = torch.tensor([0, 1, 2, 3, 0, 0])


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_classes(smoothing):
    soft = ClassLoss("softmax", smoothing, None)(LOGITS, CLASS)
    assert soft == LabelSmoothingCrossEntropy(smoothing)(LOGITS, CLASS) if smoothing else True
    alike = ClassLoss("softmax", smoothing, np.ones(4))(LOGITS, CLASS)
    assert torch.allclose(alike, F.cross_entropy(LOGITS, CLASS, label_smoothing=smoothing))
    bce = ClassLoss("bce", smoothing, None)(LOGITS, CLASS)
    assert torch.allclose(bce, BinaryCrossEntropy(smoothing)(LOGITS, CLASS))


def test_shares_after_mixup_are_targets_too():
    shares = F.one_hot(CLASS, 4).float()
    for kind in ("softmax", "bce", "focal"):
        loss = ClassLoss(kind, 0, np.array([1.0, 2, 3, 4]))
        assert torch.allclose(loss(LOGITS, CLASS), loss(LOGITS, shares))


def test_focal_loss_by_hand():
    p = LOGITS.softmax(1)[torch.arange(6), CLASS]
    expected = (-((1 - p) ** 2) * p.log()).mean()
    assert torch.allclose(ClassLoss("focal", 0, None)(LOGITS, CLASS), expected)


def test_weights_of_classes():
    weights = balanced_weights(np.bincount(CLASS), 1)
    assert weights.tolist() == pytest.approx([0.5, 1.5, 1.5, 1.5]) and balanced_weights(np.ones(3), 0) is None
    expected = F.cross_entropy(LOGITS, CLASS, torch.tensor(weights, dtype=torch.float32), reduction="none").mean()
    assert torch.allclose(ClassLoss("softmax", 0, weights)(LOGITS, CLASS), expected)
    assert np.isfinite(balanced_weights(np.array([3, 0]), 1)).all()


def test_labels():
    target = (LOGITS.flip(0) > 0).float()
    assert torch.allclose(label_loss("bce", 0, LOGITS, target, None).mean(), BinaryCrossEntropy(0)(LOGITS, target))
    weighted = label_loss("bce", 0, LOGITS, target, torch.tensor([2.0, 1, 1, 1]))
    plain = label_loss("bce", 0, LOGITS, target, None)
    assert torch.allclose(weighted, plain * torch.where((target > 0) & (torch.arange(4) == 0), 2, 1))
    focal = label_loss("focal", 0, LOGITS, target, None)
    assert torch.allclose(focal, sigmoid_focal_loss(LOGITS, target, alpha=-1, gamma=2), atol=1e-6)
