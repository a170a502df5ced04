"""The scale benchmark, its arithmetic by hand, and the page that it makes."""

import json

import pytest

from bench import scale, scale_page
from bench.common import load
from configs.errors import UserError
from tests.conftest import run

SMALL = ["--shards", "20", "--images", "32", "--rounds", "1", "--models", "convnextv2_atto", "--json"]
QUICK = ["index", "sampler", "window", "reading", "checkpoints"]


def test_parts_at_a_small_size(tmp_path):
    result = json.loads(run("python", "bench/scale.py", "--folder", tmp_path, *SMALL, "--parts", *QUICK).stdout)
    assert result.keys() >= {"bench", "device", "commit", "load", *QUICK} and "exchange" not in result
    assert result["index"]["samples"] == 200_000 and result["index"]["json_bytes"] > 20 * 200
    assert result["sampler"]["a billion"]["samples"] == 10**9 and result["sampler"]["a billion"]["first_s"] < 5
    assert result["window"]["of_a_shard_in_a_batch"]["mean"] == 256
    assert result["reading"]["images"] == 32 and result["reading"]["mb_per_s"] > 0
    assert result["checkpoints"]["convnextv2_atto"]["bytes"] == pytest.approx(16 * 7_257_992, rel=0.01)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_what_deepspeed_hands_to_collectives():
    """`payload` is what this DeepSpeed does: the benchmark ends with an error otherwise."""
    result = json.loads(run("python", "bench/scale.py", *SMALL, "--parts", "exchange").stdout)
    assert [case["all_reduce"] for case in result["exchange"]["counted"]] == [1, 1, 1, 1, 1, 2, 0, 0]


def test_bad_input():
    assert "--images at least 16" in run("python", "bench/scale.py", "--images", "15", code=2).stderr


@pytest.mark.parametrize(("stage", "one", "two"), [(0, 600, 600), (1, 900, 900), (2, 900, 1500), (3, 600, 1200)])
def test_bytes_that_a_rank_sends(stage, one, two):
    """100 parameters on 4 ranks: a scatter or gather passes 3/4 of 400 bytes, 300; an all-reduce 600."""
    assert scale.sent(100, 4, stage) == one
    assert scale.sent(100, 4, stage, micro_batches=2) == two
    assert scale.sent(100, 1, stage) == 0


def test_an_order_that_repeats_a_sample_is_not_timed(monkeypatch):
    ids = scale.EpochOrder.ids
    monkeypatch.setattr(scale.EpochOrder, "ids", lambda *args: ids(*args) // 2 * 2)
    with pytest.raises(UserError, match="not a permutation"):
        scale.order_of(16, 1)


def test_what_a_run_needs_by_hand():
    """Two GPUs at 50 images/s, batches of 100, so a second a step; 3 x 4 x 10^9 / 2 bytes in .06 s of network."""
    measured = {
        "index": {"shards": 1000, "json_bytes": 250_000, "open_s": 0.02},
        "reading": {"mb_per_s": 1000.0},
        "checkpoints": {"m": {"bytes": 16_000, "stall_s": [0.1, 0.5], "counts_s": [0.1, 0.25]}},
        "exchange": {"parameters": {"m": 10**9}},
    }
    found = scale_page.needs(scale_page.Plan("x", 25_050, 100_000, 4, "m", 2, 100, 50.0), measured, core=25.0)
    assert (found["shards"], found["json"], found["open"], found["looks"]) == (3, 750, pytest.approx(6e-5), 12)
    assert (found["rows"], found["window"], found["window bytes"]) == (501_000, 160_000, 16_000_000_000)
    assert (found["steps"], found["all steps"], found["window batches"]) == (250, 1000, 1600)
    assert (found["compute"], found["sent"], found["exchange"]) == (1, 6e9, pytest.approx(0.06))
    assert (found["exchange 0"], found["share"]) == (pytest.approx(0.04), pytest.approx(0.06 / 1.06))
    assert found["tenth"] == pytest.approx(54)  # .54 s to compute, .06 s to exchange
    assert (found["time"], found["interval"]) == (pytest.approx(1060), pytest.approx(265))
    assert (found["read"], found["read node"], found["readers"]) == (1e7, 4e7, pytest.approx(0.04))
    assert (found["cores"], found["cores node"]) == (2, 16)
    assert found["opens"] == pytest.approx(2 * 3 * 2 * 8 / 265)
    assert (found["checkpoint"], found["first rank"]) == (16e9, 10e9)
    assert found["stall"] == pytest.approx(10e9 * 0.5 / 16_000) and found["counts"] == pytest.approx(250_000)


def test_chance_is_that_of_the_hypergeometric_distribution():
    assert scale_page.chance() == pytest.approx((4096 / 16 * 15 / 16 * 155_904 / 159_999) ** 0.5)


def test_folding_leaves_tables_and_headings():
    made = scale_page.fold("# A\n\na\nb\n\n| x |\n| - |\n\n- " + "word " * 30 + "\n- c\n")
    assert made.startswith("# A\n\na b\n\n| x |\n| - |\n\n- word") and made.endswith(
        "\n  " + "word " * 6 + "word\n- c\n"
    )
    assert max(map(len, made.splitlines())) <= 120


def test_the_page_shows_the_results():
    """docs/scale.md is what bench/report.py makes of bench/results."""
    assert scale_page.PAGE.read_text() == scale_page.page(load())
    assert "| shards (s) | I / 10,000 | 1,420 | 100,000 |" in scale_page.PAGE.read_text()


def test_the_page_needs_its_results():
    with pytest.raises(UserError, match=r"bench/scale\.py and bench/loader\.py"):
        scale_page.page([result for result in load() if result["bench"] != "scale"])
