"""`--help` and user errors of the commands for trained models: quick, because torch is not imported for them."""

import os
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

SECONDS = 3.0  # generous: about 0.3 on a quiet machine; torch alone takes 2
HEAVY = ("torch", "torchvision", "timm", "sklearn", "webdataset", "deepspeed", "matplotlib")
RUN = """
import atexit, runpy, sys
atexit.register(lambda: print("imported:", *(name for name in {heavy} if name in sys.modules), file=sys.stderr))
sys.argv = {words}
runpy.run_path({words}[0], run_name="__main__")
"""
EVALUATE, PREDICT, EXPORT, PROBE = (f"finetune/{name}.py" for name in ("evaluate", "predict", "export", "probe"))
RECONSTRUCT, CONVERT = "pretrain/reconstruct.py", "models/convert.py"
FILE = "README.md"  # exists; its content is not read


def start(words: list[str]) -> tuple[int, str, float]:
    """(exit code, output, seconds) of a command; the last line of its output lists the heavy modules it imported."""
    program = [sys.executable, "-c", RUN.format(heavy=HEAVY, words=words)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    begin = time.monotonic()
    done = subprocess.run(program, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr, time.monotonic() - begin


@pytest.mark.parametrize("command", [EVALUATE, PREDICT, EXPORT, PROBE, RECONSTRUCT, CONVERT])
def test_help(command):
    code, output, seconds = start([command, "--help"])
    assert code == 0 and "usage" in output
    assert output.endswith("imported:\n") and seconds < SECONDS


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([EVALUATE, "nowhere.pt", "docs"], "nowhere.pt"),
        ([EVALUATE, FILE, "nowhere"], "nowhere"),
        ([EVALUATE, FILE, "docs", "--batch", "0"], "--batch"),
        ([EVALUATE, FILE, "docs", "--workers", "-1"], "workers"),
        ([PREDICT, "nowhere.pt", FILE], "nowhere.pt"),
        ([PREDICT, FILE, "nowhere.png"], "nowhere.png"),
        ([PREDICT, FILE, FILE, "--csv", "nowhere/x.csv"], "nowhere"),
        ([PREDICT, FILE, FILE, "--top", "0"], "--top"),
        ([EXPORT, "nowhere.pt", "x.onnx", "--to", "onnx", "--images", "docs"], "nowhere.pt"),
        ([EXPORT, FILE, "x.onnx", "--to", "onnx", "--images", "nowhere"], "nowhere"),
        ([EXPORT, FILE, "nowhere/x.onnx", "--to", "onnx", "--images", "docs"], "nowhere"),
        ([EXPORT, FILE, "x.png", "--to", "onnx", "--images", "docs"], "x.png"),
        ([PROBE, "nowhere.pt", "docs"], "nowhere.pt"),
        ([PROBE, FILE, "nowhere"], "nowhere"),
        ([PROBE, FILE, "docs", "--crop", "2"], "--crop"),
        ([PROBE, FILE, "docs", "--out", "nowhere/x.json"], "nowhere"),
        ([RECONSTRUCT, "docs", "--weights", "nowhere.pt", "--out", "x.png"], "nowhere.pt"),
        ([RECONSTRUCT, "nowhere", "--weights", FILE, "--out", "x.png"], "nowhere"),
        ([RECONSTRUCT, "docs", "--weights", FILE, "--out", "nowhere/x.png"], "nowhere"),
        ([RECONSTRUCT, "docs", "--weights", FILE, "--out", "x.png", "--size", "big"], "--size"),
        ([CONVERT, "nowhere.pt", "x.pt", "--to", "ours"], "nowhere.pt"),
        ([CONVERT, FILE, "nowhere/x.pt", "--to", "ours"], "nowhere"),
        ([CONVERT, FILE, "x.pt", "--to", "nothing"], "nothing"),
    ],
)
def test_a_mistake(words, names):
    code, output, seconds = start(words)
    assert code == 2 and output.startswith("error: ") and names in output
    assert output.endswith("imported:\n") and seconds < SECONDS
