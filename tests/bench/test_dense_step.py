"""The benchmark of segmentation and detection steps."""

import json

import pytest

from bench import dense_step


@pytest.mark.parametrize("task", [["segmentation", "--head", "upernet"], ["segmentation"], ["detection"]])
def test_json(task, command):
    small = ["--model", "convnextv2_atto", "--batch", "1", "--size", "64", "--rounds", "1", "--width", "16"]
    result = json.loads(command(dense_step.main, *task, *small, "--classes", "4", "--json"))
    assert result["bench"] == task[0] and result["forward+backward"]["speedup"].keys() == {"timm"}
    assert result["relative_error"] < dense_step.TOLERANCE
