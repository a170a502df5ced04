"""The loader benchmark."""

import json

from bench import loader


def test_json(digits, command):
    small = ["--split", "val", "--size", "32", "--images", "20", "--rounds", "1", "--json"]
    result = json.loads(command(loader.main, digits, *small))
    assert result["milliseconds"].keys() == {"ours", "ours, uint8", "ImageFolder + PIL"}
    assert result["grey_levels"] < 1


def test_bad_input(refused, tmp_path):
    assert "index.json" in refused(loader.main, tmp_path)
