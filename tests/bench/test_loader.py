"""The loader benchmark, and the page that shows results."""

import json

from bench import report
from bench.common import load
from tests.conftest import ROOT, run


def test_json(digits):
    command = ["--split", "val", "--size", "32", "--images", "20", "--rounds", "1", "--json"]
    result = json.loads(run("python", "bench/loader.py", digits, *command).stdout)
    assert result["milliseconds"].keys() == {"ours", "ours, uint8", "ImageFolder + PIL"}
    assert result["grey_levels"] < 1


def test_kernels_need_a_gpu():
    done = run("python", "bench/kernels.py", "--device", "cpu", code=2)
    assert "the kernels are for GPUs" in done.stderr


def test_the_page_shows_the_results():
    """docs/performance.md is what bench/report.py makes of bench/results."""
    assert report.PAGE.read_text() == report.page(load())
    assert "scaling.svg" in report.PAGE.read_text() and report.PICTURE.exists()


def test_every_result_names_its_machine():
    for file in (ROOT / "bench/results").glob("*.json"):
        assert {"bench", "device", "torch", "commit"} <= json.loads(file.read_text()).keys(), file
