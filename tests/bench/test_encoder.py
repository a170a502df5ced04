"""The encoder benchmark: its numbers, and that it refuses to time a wrong result."""

import json

import pytest
import torch

from bench import encoder as bench
from configs.errors import UserError
from configs.schema import Encoder
from models.convnext import ConvNeXt
from tests.conftest import run


def test_json():
    command = [
        "--model",
        "convnextv2_atto",
        "--batch",
        "2",
        "--size",
        "96",
        "--rounds",
        "2",
        "--device",
        "cpu",
        "--json",
    ]
    result = json.loads(run("python", "bench/encoder.py", *command).stdout)
    assert result["speedup"].keys() == {"masked"} and result["speedup"]["masked"] > 0
    assert result["max_relative_error"] <= bench.TOLERANCE
    ratio = result["milliseconds"]["masked"] / result["milliseconds"]["packed"]
    assert result["speedup"]["masked"] == pytest.approx(ratio, rel=0.01)


def test_a_wrong_result_is_not_timed():
    encoder = ConvNeXt(Encoder("convnextv2_atto", stem_stride=1, dims=(8, 8, 8, 8)))
    image, visible = torch.randn(1, 3, 16, 16), torch.tensor([[[True, False], [True, False]]])
    runs = bench.peers(encoder, image, visible, 2)
    bench.check(encoder, runs)
    wrong = runs | {"packed": lambda: runs["masked"]() * 1.001}
    with pytest.raises(UserError, match="packed differs from the masked reference"):
        bench.check(encoder, wrong)


def test_bad_input():
    assert "--size 100 is not a multiple" in run("python", "bench/encoder.py", "--size", "100", code=2).stderr
