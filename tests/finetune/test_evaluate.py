"""Evaluation counts every sample once."""

import pytest
import torch

from finetune.evaluate import evaluate
from launch.world import World


def test_scores_by_hand(monkeypatch):
    monkeypatch.setattr("finetune.evaluate.sum_over_ranks", lambda x: x)
    logits = torch.tensor(
        [[9.0, 5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7]]
    )
    labels = torch.tensor([0, 6, 1, -1])  # right, right, sixth best, filling
    batch = {"image": torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1), "label": labels}

    class Table(torch.nn.Module):
        def forward(self, image):
            return logits[image.flatten().mul(255).round().long()]

    world = World(0, 1, torch.device("cpu"))
    score = evaluate({"raw": Table()}, [batch], world, torch.zeros(1), torch.ones(1), autocast=False)["raw"]
    assert (score.top1, score.top5, score.images) == (pytest.approx(2 / 3), pytest.approx(2 / 3), 3)
    expected = -torch.log_softmax(logits[:3], 1)[torch.arange(3), labels[:3]].mean()
    assert score.loss == pytest.approx(float(expected), rel=1e-6)
