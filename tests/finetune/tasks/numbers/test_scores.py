"""Scores of predicted numbers, against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score, mean_absolute_error, r2_score, root_mean_squared_error

from finetune.inference import join
from finetune.tasks.numbers.head import NumberHead
from finetune.tasks.numbers.scores import collector

rng = np.random.default_rng(0)
GRADE = rng.integers(5, size=(150, 2)).astype(np.float32)
NUMBER = torch.from_numpy(GRADE + rng.normal(size=GRADE.shape)).float()
LABEL = np.where(rng.random(GRADE.shape) < 0.2, np.nan, GRADE)
collect = collector(["a", "b"], [2.0, 3.0], ((0.0, 4.0), (0.0, 4.0)))


def found(rows=slice(None)):
    return collect(NUMBER[rows], {"sample": torch.arange(150)[rows], "label": torch.from_numpy(LABEL[rows])})


def test_scores_are_those_of_sklearn():
    scores, kinds = found().scores(), {"mae": mean_absolute_error, "rmse": root_mean_squared_error, "r2": r2_score}
    for key, function in kinds.items():
        each = []
        for i, name in enumerate("ab"):
            known = np.isfinite(LABEL[:, i])
            each.append(function(LABEL[known, i], NUMBER.numpy()[known, i].astype(float)))
            assert scores[f"{key}_{name}"] == pytest.approx(each[-1], abs=1e-6)
        assert scores[key] == pytest.approx(np.mean(each), abs=1e-6)
    known = np.isfinite(LABEL[:, 1])
    grades = np.clip(NUMBER.numpy()[known, 1].round(), 0, 4).astype(int)
    expected = cohen_kappa_score(LABEL[known, 1].astype(int), grades, weights="quadratic")
    assert scores["kappa_b"] == pytest.approx(expected, abs=1e-6)


def test_parts_are_joined_and_images_without_numbers_left_out():
    parts = [found(slice(i, None, 3)) for i in range(3)]
    assert join(parts).scores() == found().scores()
    assert len(found().sample) == np.isfinite(LABEL).any(1).sum() < 150


def test_the_head_scales_back_and_stays_fp32_under_autocast():
    head = NumberHead(8, [1000.0, -5.0], [10.0, 0.1])
    x = torch.randn(4, 2, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        low = head(x.bfloat16().float())
    expected = head.fc(head.norm(x.bfloat16().float().mean((1, 2)))) * head.std + head.mean
    assert low.dtype == torch.float32 and torch.allclose(low, expected, atol=1e-4)
    assert {"mean", "std"} <= head.state_dict().keys()


def test_scores_that_are_undefined_are_0():
    one = collect(torch.zeros(1, 2), {"sample": torch.tensor([0]), "label": torch.tensor([[1.0, float("nan")]])})
    scores = one.scores()
    assert scores["r2"] == scores["kappa_b"] == 0 and scores["mae_a"] == 1
