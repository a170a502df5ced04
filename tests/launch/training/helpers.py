"""Training runs as processes: start, wait for a step, inject a fault, check the exit."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.conftest import BIN, QUICK, ROOT, TINY, deepspeed, run_ranks

SMALL = [*TINY, *QUICK]  # some ten steps a second


class Job:
    """Context manager: `deepspeed pretrain/main.py` on some ranks (0 = `python`, one process), in its own session.

    Real processes, for tests of signals and kills; they are killed at the end. `train` is quicker for runs that finish.
    """

    def __init__(
        self, shards: Path, folder: Path, ranks: int, *more: str, epochs: int = 1000, program: list[str] | None = None
    ):
        self.folder = folder
        launcher = deepspeed("--num_gpus", str(ranks)) if ranks else [sys.executable]
        words = ["--data.path", shards, "--run.folder", folder.parent, "--run.name", folder.name, *SMALL]
        words += ["--optim.epochs", epochs, *more]
        self.command = [*(program or launcher), "pretrain/main.py", *map(str, words)]

    def __enter__(self) -> "Job":
        self.output = self.folder.parent / f"{self.folder.name}.out"
        env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.family = [psutil.Process(self.process.pid)]
        return self

    def __exit__(self, *_) -> None:
        self.find()
        for process in self.family:
            if process.is_running():
                process.kill()
        self.process.wait()

    def find(self) -> None:
        """Add all processes of this run to `family`, so that those whose parents end are known."""
        known = {process.pid for process in self.family}
        for process in list(self.family):
            if process.is_running():
                self.family += [child for child in process.children(recursive=True) if child.pid not in known]
                known |= {child.pid for child in self.family}

    def wait_for_step(self, step: int, seconds: float = 180) -> None:
        """Wait until the line of a step is printed."""
        deadline = time.monotonic() + seconds
        while not any(int(done) >= step for done in re.findall(r"  step (\d+)/", self.text())):
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.05)
        self.find()

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        return next(
            p for p in self.family if p.is_running() and _environment(p).get("RANK") == str(number) and _is_rank(p)
        )

    def launcher(self) -> psutil.Process:
        """DeepSpeed's launcher, the parent of all ranks."""
        return next(p for p in self.family if "deepspeed.launcher.launch" in p.cmdline())

    def end(self, seconds: float = 120) -> int:
        """Exit code of the command; fails if a process of it is left after `seconds`."""
        code = self.process.wait(seconds)
        _, alive = psutil.wait_procs(self.family, timeout=seconds)
        assert not alive, f"left alive: {[process.cmdline()[:4] for process in alive]}"
        return code

    def tracebacks(self) -> bool:
        """Whether this project's code printed a traceback; DeepSpeed's launcher prints its own at Ctrl-C."""
        return "Traceback" in self.text() and f'File "{ROOT}/launch' in self.text()

    def text(self) -> str:
        """The output so far."""
        return self.output.read_text()


def train(shards: Path, folder: Path, ranks: int, *more: object, epochs: int, code: int = 0) -> str:
    """Output of `pretrain/main.py` on some ranks without a launcher; fails on another exit code."""
    words = ["--data.path", shards, "--run.folder", folder.parent, "--run.name", folder.name, *SMALL]
    return run_ranks(ranks, "pretrain/main.py", *words, "--optim.epochs", epochs, *more, code=code).stdout


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def _is_rank(process: psutil.Process) -> bool:
    return "pretrain/main.py" in process.cmdline() and _environment(process.parent()).get("RANK") is None


def logged(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of a run's log so far; its last line may be truncated."""
    path = folder / "log.jsonl"
    entries = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]


def saved(folder: Path) -> list[int]:
    """Steps of a run's complete checkpoints."""
    return sorted(
        int(path.parent.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*/manifest.json")
    )
