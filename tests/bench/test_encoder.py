"""The encoder benchmark: its numbers, and that it refuses to time a wrong result."""

import json

import pytest
import torch

from bench import common, encoder
from configs.errors import UserError
from configs.schema import Encoder
from models.convnext import ConvNeXt
from tests.conftest import run

SMALL = ["--model", "convnextv2_atto", "--batch", "2", "--size", "96", "--rounds", "2"]


def test_json():
    result = json.loads(run("python", "bench/encoder.py", *SMALL, "--json").stdout)
    assert result["speedup"].keys() == {"masked"} and result["speedup"]["masked"] > 0
    assert result["relative_error"] <= common.TOLERANCE["fp32"] and result["visible"] == "3/9"
    ratio = result["milliseconds"]["masked"] / result["milliseconds"]["packed"]
    assert result["speedup"]["masked"] == pytest.approx(ratio, rel=0.01)


@pytest.mark.minkowski
def test_table_with_minkowski():
    lines = run("python", "bench/encoder.py", *SMALL, "--peers", "masked", "minkowski").stdout.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["packed", "masked", "minkowski"]


def test_a_wrong_result_is_not_timed():
    model = ConvNeXt(Encoder("convnextv2_atto", stem_stride=1, dims=(8, 8, 8, 8)))
    image, visible = torch.randn(1, 3, 16, 16), torch.tensor([[[True, False], [True, False]]])
    runs = encoder.peers(model, image, visible, 2, ["masked"])
    reference = common.outputs(model, runs["masked"])
    assert common.check("packed", common.outputs(model, runs["packed"]), reference, 1e-4) <= 1e-4
    wrong = common.outputs(model, lambda: runs["masked"]() * 1.001)
    with pytest.raises(UserError, match="packed differs from the fp32 reference"):
        common.check("packed", wrong, reference, 1e-4)


def test_bad_input():
    assert "--size 100 is not a multiple" in run("python", "bench/encoder.py", "--size", "100", code=2).stderr
