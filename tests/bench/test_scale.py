"""The scale benchmark runs at a small size, and refuses to time a wrong result."""

import json

import pytest

from bench import scale
from configs.errors import UserError
from tests.conftest import run


@pytest.mark.slow
def test_json(tmp_path):
    small = ["--shards", "20", "--images", "2", "--rounds", "1", "--models", "convnextv2_atto", "--json"]
    result = json.loads(run("python", "bench/scale.py", "--folder", tmp_path, *small).stdout)
    assert result["index"]["json_bytes"] > 20 * 200
    assert result["sampler"]["a billion"]["samples"] == 10**9 and result["sampler"]["a billion"]["first_s"] < 5
    assert result["reading"]["images"] == 32 and result["reading"]["mb_per_s"] > 0
    assert result["checkpoints"]["convnextv2_atto"]["bytes"] == pytest.approx(16 * 7_257_992, rel=0.01)
    assert not any(tmp_path.iterdir())


def test_an_order_that_repeats_an_image_is_not_timed(monkeypatch):
    ids = scale.EpochOrder.ids
    monkeypatch.setattr(scale.EpochOrder, "ids", lambda *args: ids(*args) // 2 * 2)
    with pytest.raises(UserError, match="not a permutation"):
        scale.sampling(16, 1)
