"""A run that is killed and resumed, compared with an uninterrupted one."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

from models.opening import open_weights
from models.weights import Weights
from tests.conftest import losses, run, started


def killed_and_resumed(words: Callable[[str], list], folder: Path) -> tuple[Weights, Weights, dict, dict]:
    """Weights of last.pt and summaries: of a whole run, and of one that was killed after its first checkpoint.

    Asserts that it was killed before its end, and that losses and averaged weights are equal bit for bit. `words` are
    the arguments of finetune/main.py by the run's name; runs are in `folder`.
    """
    run("python", "finetune/main.py", *words("whole"))
    command = ["finetune/main.py", *words("killed")]
    first, deadline = started(folder / "output", *command), time.monotonic() + 300
    while not list((folder / "killed/checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert _summary(folder / "killed")["epoch"] < _summary(folder / "whole")["epoch"]
    run("python", *command, "--resume")
    assert losses(folder / "killed") == losses(folder / "whole")
    whole, killed = (open_weights(str(folder / name / "last.pt")).weights for name in ("whole", "killed"))
    assert all(torch.equal(tensor, killed.ema[name]) for name, tensor in whole.ema.items())
    return whole, killed, _summary(folder / "whole"), _summary(folder / "killed")


def _summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())
