"""Predictions and scores, computed by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, recall_score

from finetune.inference import join, predict
from finetune.tasks.classification import scores
from finetune.tasks.classification.scores import Predictions, calibration_error
from launch.training.world import World

LOGITS = torch.tensor([[9.0, 5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7]])
LABELS = torch.tensor([0, 6, 1, -1])  # right, right, sixth best, padding
TASK = SimpleNamespace(run=lambda model, image, batch: model(image), collect=scores.collect, join=join)
STATISTICS = torch.zeros(1), torch.ones(1)


class Table(torch.nn.Module):
    """Returns the logits of an image, whose pixel is its index."""

    def forward(self, image):
        return LOGITS[image.flatten().mul(255).round().long()]


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr("finetune.inference.gather", lambda value: [value])
    return World(0, 1, torch.device("cpu"))


def batch(order):
    """A batch of the four images in some order."""
    order = torch.tensor(order)
    return {"image": order.to(torch.uint8).view(-1, 1, 1, 1), "label": LABELS[order], "sample": order}


def predictions(label, first, confidence):
    label, first = np.array(label), np.array(first)
    loss = np.zeros(len(label), np.float32)
    return Predictions(np.arange(len(label)), label, first[:, None], np.array(confidence, np.float32), loss)


def test_scores_by_hand(alone):
    model = Table().train()
    found = predict(TASK, {"raw": model}, [batch([3, 2]), batch([1, 0])], alone, *STATISTICS, "fp32")["raw"]
    assert model.training
    assert found.sample.tolist() == [0, 1, 2] and found.label.tolist() == [0, 6, 1]  # in order, without the filling
    assert found.best[0].tolist() == [0, 1, 2, 3, 4] and found.best[1].tolist() == [6, 5, 4, 3, 2]
    expected = torch.softmax(LOGITS[:3], 1)
    assert found.confidence == pytest.approx(expected.amax(1).numpy(), rel=1e-6)
    assert found.loss == pytest.approx(-expected.log()[torch.arange(3), LABELS[:3]].numpy(), rel=1e-6)
    loss = pytest.approx(found.loss.mean(), rel=1e-6)
    means = {"balanced_accuracy": pytest.approx(2 / 3), "macro_f1": pytest.approx(5 / 9)}
    shares = {"top1": pytest.approx(2 / 3), "top5": pytest.approx(2 / 3)}
    assert found.scores() == {**shares, **means, "loss": loss, "images": 3}


def test_means_over_classes_are_those_of_sklearn():
    label, first = np.random.default_rng(0).integers(1, 9, size=(2, 100))
    label[label == 3] = 4  # a class that is only predicted
    found = predictions(label, first, np.ones(100)).scores()
    for key, function in (("balanced_accuracy", recall_score), ("macro_f1", f1_score)):
        assert found[key] == pytest.approx(function(label, first, labels=np.unique(label), average="macro"), abs=1e-6)


def test_ranks_are_joined_in_the_order_of_the_samples(alone, monkeypatch):
    """Two ranks with every other sample each; gathering gives all of them."""
    parts = []
    monkeypatch.setattr("finetune.inference.gather", lambda value: parts.append(value) or parts)
    for rank in (1, 0):
        part = predict(TASK, {"": Table()}, [batch([rank, rank + 2])], alone, *STATISTICS, "fp32")[""]
    assert part.sample.tolist() == [0, 1, 2] and part.label.tolist() == [0, 6, 1]


def test_confusions_the_most_frequent_first():
    pairs, times = predictions([0, 1, 2, 2, 2, 0], [0, 2, 1, 1, 2, 1], [1] * 6).confusions()
    assert pairs.tolist() == [[2, 1], [0, 1], [1, 2]] and times.tolist() == [2, 1, 1]
    pairs, times = predictions([0, 1], [0, 1], [1, 1]).confusions()
    assert len(pairs) == len(times) == 0


def test_calibration_by_hand():
    """A bin includes its upper edge, so confidence 1 is in the last one."""
    found = predictions([0, 0, 0, 0, 0], [0, 1, 0, 0, 1], [0.1875, 0.125, 0.96875, 1.0, 1.0])
    bins = found.calibration()
    assert [bin.images for bin in bins] == [0, 1, 1] + [0] * 11 + [3]
    assert (bins[14].confidence, bins[14].accuracy) == (pytest.approx((0.96875 + 2) / 3), pytest.approx(2 / 3))
    assert (bins[0].confidence, bins[0].accuracy, bins[2].accuracy) == (None, None, 1.0)
    gaps = [0.125 - 0, 1 - 0.1875, (0.96875 + 2) / 3 - 2 / 3]
    assert calibration_error(bins) == pytest.approx((gaps[0] + gaps[1] + 3 * gaps[2]) / 5)


def test_calibration_error_of_a_calibrated_classifier():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.3, 1, 200_000)
    right = rng.random(200_000) < confidence
    assert calibration_error(predictions(np.where(right, 1, 0), np.ones(200_000, int), confidence).calibration()) < 0.01


def test_nan_confidence_is_in_no_bin():
    bins = predictions([0, 0], [0, 0], [float("nan")] * 2).calibration()
    assert sum(bin.images for bin in bins) == 0 and calibration_error(bins) == 0
