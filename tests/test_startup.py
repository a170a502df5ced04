"""`--help` and mistakes are answered before torch is imported, so in less than a second."""

import os
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

SECONDS, QUICK_SECONDS = 5, 3  # on a busy machine, QUICK_SECONDS for `COMMANDS`; torch alone takes 2 on a quiet one
# runs a command as `python COMMAND WORDS` does, then names the heavy modules that were imported
WATCH = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    code = end.code or 0
heavy = {"torch", "torchvision", "timm", "deepspeed", "webdataset", "sklearn", "scipy", "matplotlib", "pyarrow"}
print("imported:", *sorted(heavy & sys.modules.keys()))
sys.exit(code)
"""
STAGES = ["pretrain/main.py", "finetune/main.py"]
EVALUATE, PREDICT, EXPORT, PROBE = (f"finetune/{name}.py" for name in ("evaluate", "predict", "export", "probe"))
EMBED, CURATE = "finetune/embed.py", "finetune/curate.py"
RECONSTRUCT, CONVERT = "pretrain/reconstruct.py", "models/convert.py"
COMMANDS = [EVALUATE, PREDICT, EXPORT, PROBE, EMBED, CURATE, RECONSTRUCT, CONVERT]
FILE = "README.md"  # exists; its content is not read
MISTAKES = [
    (["--optm.lr", "1"], "optim.lr"),
    (["--optim.lr", "fast"], "optim.lr is fast"),
    (["--config", "nowhere.yaml"], "nowhere.yaml"),
    (["--model.name", "convnextv2_tny"], "convnextv2_tiny"),
    (["--data.path", "nowhere"], "nowhere"),
    (["--init", "nowhere.pt"], "nowhere.pt"),
    (["--init", "hf://nowhere"], "hf://USER/REPO"),
]


def answered(command: str, *words: str) -> subprocess.CompletedProcess:
    """What a command answers; it must come at once."""
    started = time.perf_counter()
    program = [sys.executable, "-c", WATCH, str(ROOT / command), *words]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"})
    seconds = time.perf_counter() - started
    assert done.stdout.endswith("imported:\n"), done.stdout[-1000:] + done.stderr[-1000:]
    assert seconds < (QUICK_SECONDS if command in COMMANDS else SECONDS)
    return done


@pytest.mark.parametrize("command", [*STAGES, *COMMANDS, "data/prepare.py", "launch/report.py", "launch/plan.py"])
def test_help(command):
    done = answered(command, "--help")
    assert done.returncode == 0 and command.split("/")[1] in done.stdout and done.stderr == ""
    assert "usage" in done.stdout


@pytest.mark.parametrize("command", STAGES)
@pytest.mark.parametrize(("words", "names"), MISTAKES)
def test_mistakes(command, words, names):
    done = answered(command, *words)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert names in done.stderr


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
        ([EMBED, "nowhere.pt", "docs", "x.parquet"], "nowhere.pt"),
        ([EMBED, FILE, "nowhere", "x.parquet"], "nowhere"),
        ([EMBED, FILE, "docs", "nowhere/x.parquet"], "nowhere"),
        ([CURATE, "nowhere.parquet", "x.csv", "--outliers", "1"], "nowhere.parquet"),
        ([CURATE, FILE, "x.csv"], "--duplicates"),
        ([CURATE, FILE, FILE, "--outliers", "1"], FILE),
        ([RECONSTRUCT, "docs", "--weights", "nowhere.pt", "--out", "x.png"], "nowhere.pt"),
        ([RECONSTRUCT, "nowhere", "--weights", FILE, "--out", "x.png"], "nowhere"),
        ([RECONSTRUCT, "docs", "--weights", FILE, "--out", "nowhere/x.png"], "nowhere"),
        ([RECONSTRUCT, "docs", "--weights", FILE, "--out", "x.png", "--size", "big"], "--size"),
        (["launch/plan.py", "nowhere"], "nowhere"),
        (["launch/plan.py", "docs/guide", "--out", "nowhere/x.yaml"], "nowhere"),
        ([CONVERT, "nowhere.pt", "x.pt", "--to", "ours"], "nowhere.pt"),
        ([CONVERT, FILE, "nowhere/x.pt", "--to", "ours"], "nowhere"),
        ([CONVERT, FILE, "x.pt", "--to", "nothing"], "nothing"),
        ([CONVERT, FILE, "x.pt", "--to", "ours", "--push", "me/x"], "--push"),
        ([PREDICT, "hf://nowhere", FILE], "hf://USER/REPO"),
    ],
)
def test_mistakes_of_commands(words, names):
    done = answered(*words)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and names in done.stderr


@pytest.mark.parametrize("words", [["pretrain/main.py", "--help"], ["data/prepare.py", "--help"]])
def test_a_reader_that_ends_early_is_no_error(words):
    """`--help | head` prints no traceback."""
    end, pipe = os.pipe()
    os.close(end)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=pipe, stderr=subprocess.PIPE, check=False)
    os.close(pipe)
    assert done.stderr == b""


def test_a_heavy_import_is_seen(tmp_path):
    (tmp_path / "slow.py").write_text("import torch")
    with pytest.raises(AssertionError):
        answered(str(tmp_path / "slow.py"))
