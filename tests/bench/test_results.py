"""Saved results, the pages that quote them, and how the benchmarks start."""

import json
import subprocess
import sys

import pytest

from bench import kernels
from bench.options import RESULTS
from tests.conftest import ROOT

HELP = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""
SAVED = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


@pytest.mark.parametrize(
    "name", ["encoder", "step", "dense_step", "kernels", "loader", "scale", "evidence", "evidence_page"]
)
def test_help_is_quick(name):
    """`--help` does not wait for torch."""
    done = subprocess.run([sys.executable, "-c", HELP, f"bench/{name}.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


def test_kernels_need_a_gpu(refused):
    assert "GPU" in refused(kernels.main, "--device", "cpu")


def test_every_result_names_its_machine():
    for name, result in SAVED.items():
        assert {"bench", "device", "torch", "commit"} <= result.keys(), name


def test_the_performance_page_quotes_the_results():
    """docs/performance.md has the milliseconds (the loader: images/s) of every saved result except the sweep's."""
    page = (ROOT / "docs/performance.md").read_text()
    for name, result in SAVED.items():
        if result["bench"] == "loader":
            figures = [f"{1e3 * result['images'] / ms:.0f}" for ms in result["milliseconds"].values()]
        else:
            timed = result.get("parts", {"": result}).values()
            figures = [f"{ms:.1f}" for part in timed for ms in part.get("milliseconds", {}).values()]
        missing = [figure for figure in figures if f"| {figure} |" not in page]
        assert not missing, f"{name}: {missing}"
