"""The encoder benchmark: its numbers, and that it refuses to time a wrong result."""

import json

import pytest
import torch

from bench import encoder, timing
from configs.errors import UserError
from configs.schema import Encoder
from models.convnext import ConvNeXt

SMALL = ["--model", "convnextv2_atto", "--batch", "1", "--size", "64", "--rounds", "1"]


def test_json(command):
    result = json.loads(command(encoder.main, *SMALL, "--json"))
    assert result["speedup"].keys() == {"masked"} and result["speedup"]["masked"] > 0
    assert result["relative_error"] <= timing.TOLERANCE and result["visible"] == "1/4"
    ratio = result["milliseconds"]["masked"] / result["milliseconds"]["packed"]
    assert result["speedup"]["masked"] == pytest.approx(ratio, rel=0.01)


@pytest.mark.minkowski
def test_table_with_minkowski(command):
    lines = command(encoder.main, *SMALL, "--peers", "masked", "minkowski").splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["packed", "masked", "minkowski"]


def test_sweep(command, monkeypatch, tmp_path):
    """A sweep times every setting once, in the order of the picture's axes."""
    monkeypatch.setattr(encoder, "SWEEP", {"mask_ratio": (0.0, 0.6), "size": (32, 64), "batch": (2,)})
    result = json.loads(command(encoder.main, *SMALL, "--json", "--sweep", "--picture", tmp_path / "sweep.svg"))
    settings = [(timed["batch"], timed["size"], timed["mask_ratio"]) for timed in result["sweep"]]
    assert settings == [(1, 64, 0), (1, 64, 0.6), (4, 32, 0.6), (1, 64, 0.6), (2, 64, 0.6)]
    assert "mask ratio" in (tmp_path / "sweep.svg").read_text()


def test_a_wrong_result_is_not_timed():
    model = ConvNeXt(Encoder("convnextv2_atto", stem_stride=1, dims=(8, 8, 8, 8)))
    image, visible = torch.randn(1, 3, 16, 16), torch.tensor([[[True, False], [True, False]]])
    runs = encoder.peers(model, image, visible, 2, ["masked"])
    reference = timing.outputs(model, runs["masked"])
    allowed = dict.fromkeys(reference, timing.TOLERANCE)
    assert timing.check("packed", timing.outputs(model, runs["packed"]), reference, allowed) <= 1e-4
    wrong = timing.outputs(model, lambda: runs["masked"]() * 1.001)
    with pytest.raises(UserError, match="not timed"):
        timing.check("packed", wrong, reference, allowed)


@pytest.mark.parametrize("wrong", [["--size", "100"], ["--batch", "0"], ["--mask-ratio", "1"], ["--picture", "x.svg"]])
def test_bad_input(refused, wrong):
    assert wrong[0] in refused(encoder.main, *wrong)
