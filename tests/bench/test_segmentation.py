"""The segmentation benchmark."""

import json

import pytest

from bench import segmentation


@pytest.mark.parametrize("head", ["fpn", "upernet"])
def test_json(head, command):
    small = ["--model", "convnextv2_atto", "--batch", "1", "--size", "64", "--rounds", "1", "--width", "16"]
    result = json.loads(command(segmentation.main, *small, "--classes", "4", "--head", head, "--json"))
    assert result["relative_error"] < 1e-4 and result["forward+backward"]["speedup"].keys() == {"timm"}
