"""Scores of several labels, against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score

from finetune.inference import join
from finetune.tasks.labels.scores import Predictions, best_threshold, collect

rng = np.random.default_rng(0)
LABEL = rng.random((200, 5)) < (0.5, 0.3, 0.1, 0.02, 0.0)
LOGITS = torch.from_numpy((LABEL * 1.5 + rng.normal(size=LABEL.shape)).round(1)).float()  # with equal ones


def found(threshold=None, rows=slice(None)) -> Predictions:
    sample = torch.arange(200)[rows]
    return collect(LOGITS[rows], {"sample": sample, "label": torch.from_numpy(LABEL[rows]).float()}, threshold)


def test_scores_are_those_of_sklearn():
    predictions = found((0.5,) * 5)
    probability, scores = LOGITS.sigmoid().numpy(), predictions.scores()
    precision = average_precision_score(LABEL[:, :4], probability[:, :4], average=None)
    assert predictions.average_precision()[:4] == pytest.approx(precision, abs=1e-6)
    assert np.isnan(predictions.average_precision()[4])
    assert scores["map"] == pytest.approx(precision.mean(), abs=1e-6)
    predicted = probability >= 0.5
    assert scores["f1_micro"] == pytest.approx(f1_score(LABEL, predicted, average="micro"), abs=1e-6)
    macro = f1_score(LABEL, predicted, labels=range(4), average="macro")  # of labels that an image has
    assert scores["f1_macro"] == pytest.approx(macro, abs=1e-6)
    assert predictions.f1() == pytest.approx(f1_score(LABEL, predicted, average=None, zero_division=0), abs=1e-6)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(LOGITS, torch.from_numpy(LABEL).float())
    assert scores["loss"] == pytest.approx(float(loss), abs=1e-6) and scores["images"] == 200


def test_the_best_threshold_has_the_best_f1():
    probability = LOGITS.sigmoid().numpy()
    for i in range(4):
        chosen = best_threshold(LABEL[:, i], probability[:, i])
        values = [f1_score(LABEL[:, i], probability[:, i] >= t, zero_division=0) for t in np.unique(probability[:, i])]
        assert f1_score(LABEL[:, i], probability[:, i] >= chosen) == pytest.approx(max(values), abs=1e-9)
    assert best_threshold(LABEL[:, 4], probability[:, 4]) == 0.5
    assert found().scores()["f1_macro"] >= found((0.5,) * 5).scores()["f1_macro"]


def test_parts_are_joined_and_padding_is_left_out():
    parts = [found((0.5,) * 5, slice(i, None, 3)) for i in range(3)]
    assert join(parts).scores() == found((0.5,) * 5).scores()
    batch = {"sample": torch.tensor([3, 4, -1]), "label": torch.tensor([[0.0] * 5, [np.nan] * 5, [-1.0] * 5])}
    assert collect(LOGITS[:3], batch, None).sample.tolist() == [3]


def test_outputs_that_are_not_finite():
    batch = {"sample": torch.arange(2), "label": torch.zeros(2, 3)}
    scores = collect(torch.full((2, 3), torch.nan), batch, None).scores()
    assert all(np.isnan(scores[key]) for key in ("map", "f1_micro", "f1_macro", "loss"))
