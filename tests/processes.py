"""Processes of the project's commands that start within a second.

Importing torch and DeepSpeed takes 6 to 8 s of CPU time. A fork server imports them once per session; a command is then
a fork of it, with arguments, environment, folder and standard streams of its own. The project's own modules are not
imported beforehand. With a GPU nothing is forked, because CUDA does not survive that: commands are ordinary processes.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
CAN_FORK = sys.platform == "linux" and not Path("/dev/nvidiactl").exists()
IMPORTED = [
    "torch", "torch.distributed.elastic.multiprocessing", "torch.utils.tensorboard", "torchvision.transforms.v2",
    "deepspeed", "timm.data", "timm.loss", "timm.models.convnext",
    "webdataset", "sklearn.datasets", "matplotlib.pyplot", "networkx", "tensorboard", "safetensors.torch",
    "rich.console", "rich.progress", "pydantic", "yaml", "jinja2", "psutil", "fsspec",
]  # fmt: skip


class Process:
    """A running command: `python` with arguments, like `["pretrain/main.py", "--help"]` or `["-c", CODE]`.

    Args:
        words: the arguments of the interpreter
        out, err: files that standard output and standard error are appended to
        env: the whole environment
    """

    def __init__(self, words: Sequence[object], out: Path, err: Path, env: dict[str, str], cwd: Path = ROOT):
        words = [str(word) for word in words]
        if CAN_FORK:
            self.forked: BaseProcess | None = _context().Process(target=_become, args=(words, out, err, env, cwd))
            self.forked.start()
            self.pid = self.forked.pid
        else:
            self.forked = None
            with out.open("a") as stdout, err.open("a") as stderr:
                self.process = subprocess.Popen(
                    [sys.executable, *words], cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
                    start_new_session=True,
                )  # fmt: skip
            self.pid = self.process.pid

    def poll(self) -> int | None:
        """The exit code (-N after signal N), or None while it runs."""
        return self.forked.exitcode if self.forked else self.process.poll()

    def wait(self, seconds: float | None = None) -> int:
        """The exit code; `subprocess.TimeoutExpired` if it still runs then."""
        if self.forked is None:
            return self.process.wait(seconds)
        self.forked.join(seconds)
        if self.forked.exitcode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", seconds)
        return self.forked.exitcode

    def send_signal(self, number: int) -> None:
        """Nothing happens if it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


@contextlib.contextmanager
def ranks(
    number: int, words: Sequence[object], out: Path, err: Path, env: dict[str, str], port: int, cwd: Path = ROOT
) -> Iterator[list[Process]]:
    """The ranks of a training, as torchrun starts them, but without a launcher; none is left at the end."""
    common = env | {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = []
    try:
        for rank in range(number):
            found.append(Process(words, out, err, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd))
        yield found
    finally:
        for process in found:
            process.kill()
            process.wait()


def _context() -> multiprocessing.context.ForkServerContext:
    """The fork server, started on the first call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    # DeepSpeed reads DS_ACCELERATOR when it is imported
    with mock.patch.dict(os.environ, {"DS_ACCELERATOR": "cpu"}):
        forkserver.ensure_running()
    return context


def _become(words: list[str], out: Path, err: Path, env: dict[str, str], cwd: Path) -> None:
    """In the fork: run the command as the interpreter would."""
    multiprocessing.set_start_method(None, force=True)  # the platform's own, not that of this fork
    os.setsid()
    for path, stream in ((os.devnull, 0), (out, 1), (err, 2)):
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        os.dup2(file, stream)
        os.close(file)
    sys.stdout = open(1, "w", closefd=False, buffering=1 if "PYTHONUNBUFFERED" in env else -1)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    first, *more = words
    path = [place for place in sys.path if place and Path(place).resolve() != ROOT]
    path[:0] = env["PYTHONPATH"].split(os.pathsep) if "PYTHONPATH" in env else []
    sys.path[:] = ["" if first == "-c" else str((Path(cwd) / first).parent), *path]
    if first == "-c":
        sys.argv = ["-c", *more[1:]]
        exec(compile(more[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(first, run_name="__main__")


def on_ranks(number: int, function: Callable[..., object], folder: Path, *args: object) -> list:
    """What a function of a test module returns on each of several ranks, joined by gloo; its arguments are pickled.

    Args:
        function: called with (rank, *args)
        folder: an existing one, where the ranks meet
    """
    context = _context() if CAN_FORK else multiprocessing.get_context("spawn")
    answers = context.Queue()
    where = f"file://{folder}/{function.__name__}-{number}"
    common = (number, where, function, args, answers)
    found = [context.Process(target=_rank, args=(rank, *common)) for rank in range(number)]
    try:
        for process in found:
            process.start()
        returned = dict(answers.get(timeout=120) for _ in found)
        for process in found:
            process.join(120)
    finally:
        for process in found:
            process.kill()
    return [returned[rank] for rank in range(number)]


def _rank(rank: int, number: int, where: str, function: Callable, args: tuple, answers: multiprocessing.Queue) -> None:
    """In the new process: join the others, call, answer."""
    import torch

    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=number)
    answers.put((rank, function(rank, *args)))
    torch.distributed.destroy_process_group()
