"""The step benchmark, and the work that it counts."""

import json

import pytest
import torch

from bench import step
from bench.roofline import count, floor_seconds
from configs.schema import Encoder

MINKOWSKI = pytest.param("pretrain", "minkowski", marks=pytest.mark.minkowski)


@pytest.mark.parametrize(("stage", "peer"), [("pretrain", "masked"), ("finetune", "timm-nhwc"), MINKOWSKI])
def test_json(stage, peer, command):
    small = ["--model", "convnextv2_atto", "--batch", "1", "--size", "64", "--rounds", "1", "--peers", peer, "--json"]
    result = json.loads(command(step.main, stage, *small))
    assert result["parts"].keys() == {"forward", "forward+backward", "step"}
    assert result["parts"]["step"]["speedup"].keys() == {peer} and result["relative_error"] < 1e-4
    assert all(0 < share < 1 for share in result["roofline_share"].values())


def test_an_unknown_peer(refused):
    assert "masked, compiled, minkowski" in refused(step.main, "pretrain", "--peers", "timm")


def test_counted_work_is_the_published():
    """ConvNeXt V2 tiny has 4.47 G multiply-adds at 224, of which 0.2 are depthwise and not counted here."""
    flop, _ = count(Encoder("convnextv2_tiny"), 49)
    assert flop / 3 / 2 / 1e9 == pytest.approx(4.47, rel=0.06)


def test_the_bound_is_the_slower_of_the_two():
    assert floor_seconds((10.0, 1.0), (1.0, 1.0), torch.float32) == 10
    assert floor_seconds((1.0, 10.0), (1.0, 1.0), torch.float32) == 40
