"""Shared by all tests: shards of the built-in digits, tiny models, and entry points as subprocesses."""

import fcntl
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # threads of so small models only wait for each other, longer on a busy machine
os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidiactl").exists() else "1")  # before Triton's import

import pytest
import torch

from configs.errors import run_main
from data.sources import open_zip
from launch.training.world import free_port
from tests.processes import Process, ranks
from tests.sampling import sampled

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--model.depths", "[1,1,1,1]", "--model.dims", "[8,16,16,16]", "--objective.decoder_dim", "16"]  # pretraining
QUICK = [
    "--optim.batch_size",
    "240",
    "--data.workers",
    "0",
    "--run.log_every",
    "1",
    "--run.device",
    "cpu",
    "--optim.precision",
    "fp32",
]  # 6 steps an epoch
BIN = Path(sys.executable).parent
SECONDS = 600  # that a command may take


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sample", metavar="K/N", help="of the slow tests about every N-th: those of sample K")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in its own
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if not item.get_closest_marker("xdist_group") and _has_module_fixtures(item):
            item.add_marker(pytest.mark.xdist_group(item.path.stem + item.path.parent.stem))
    if not (sample := config.getoption("--sample")):
        return
    number, every = map(int, sample.split("/"))
    left_out = {item for item in items if item.get_closest_marker("slow") and not sampled(item.nodeid, number, every)}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def _has_module_fixtures(item: pytest.Item) -> bool:
    """Whether a test shares fixtures with others of its file, which only one worker should make."""
    found = item._fixtureinfo.name2fixturedefs.values()
    return any(fixture[-1].scope == "module" for fixture in found)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """List the slow tests that a sample has taken."""
    if sample := config.getoption("--sample"):
        reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
        slow = sorted({report.nodeid for report in reports if report.when == "call" and "slow" in report.keywords})
        terminalreporter.section(f"sample {sample}: {len(slow)} slow tests")
        for node in slow:
            terminalreporter.line(node)


def deepspeed(*words: str) -> list[str]:
    """The `deepspeed` command; on a port of its own, because others may test on the same machine."""
    return [str(BIN / "deepspeed"), "--master_port", str(free_port()), *words]


def environment() -> dict[str, str]:
    """The variables that commands start with: the environment's programs come first in PATH."""
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}


def run(*command: object, cwd: Path = ROOT, code: int = 0) -> subprocess.CompletedProcess:
    """Run a command of the README in the project's folder, and demand an exit code.

    `python` is a fork that need not import torch (see processes.py), other programs are new processes.
    """
    program, *words = map(str, command)
    if program == "python":
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            process = Process(words, out, err, environment(), cwd)
            try:
                process.wait(SECONDS)
            finally:
                process.kill()
            done = subprocess.CompletedProcess(command, process.wait(), out.read_text(), err.read_text())
    else:
        words = deepspeed(*words) if program == "deepspeed" else [str(BIN / program), *words]
        done = subprocess.run(
            words, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL
        )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def run_ranks(number: int, *words: object, code: int = 0) -> subprocess.CompletedProcess:
    """Run a script on several ranks without a launcher, which saves its imports, and demand the first one's exit code.

    Both streams of all ranks are in `stdout`.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        with ranks(number, words, out, out, environment(), free_port()) as found:
            codes = [process.wait(SECONDS) for process in found]
        done = subprocess.CompletedProcess(words, codes[0], out.read_text())
    assert done.returncode == code, f"exit codes {codes}\n{done.stdout[-3000:]}"
    return done


def started(out: Path, *words: object) -> Process:
    """A script with its arguments that has begun; both of its streams are appended to a file."""
    return Process(words, out, out, environment())


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of a run's log."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]


def has(text: object, words: str) -> bool:
    """Whether a message has all of some words, which blanks separate: what it is about, not how it says that."""
    return all(word in str(text) for word in words.split())


def names(folder: Path) -> set[str]:
    """What a folder holds."""
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def refused(monkeypatch, capsys):
    """Calls an entry point that must end with one line and exit code 2, and returns the line.

    It runs in this process, which saves the seconds that a new one takes.
    """

    def call(main: Callable[[], None], *words: object) -> str:
        monkeypatch.setattr("sys.argv", ["main.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            run_main(main)
        _leave_process_group()
        line = capsys.readouterr().err
        assert end.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
        return line

    return call


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder that several workers want: the first one makes it, the others wait; again if that one failed."""
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (done := folder.with_suffix(".done")).exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that is the same for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def digits(shared) -> Path:
    """Shards of the built-in digits."""
    command = ["python", "data/prepare.py", "--no-plan", "digits"]
    return make_once(shared / "digits", lambda folder: run(*command, folder, "--shard-size", "500"))


@pytest.fixture(scope="session")
def pretrained(digits, shared) -> Path:
    """Folder of a tiny pretraining run, started as the README says, on one rank."""

    def make(folder: Path) -> None:
        words = ["--data.path", digits, "--run.folder", folder, "--run.name", "one", "--optim.epochs", "2"]
        run("deepspeed", "--num_gpus", "1", "pretrain/main.py", *words, *TINY, *QUICK)

    return make_once(shared / "runs", make) / "one"


@pytest.fixture(scope="module")
def cluster():
    """Address of a cluster of two nodes with one CPU each."""
    pytest.importorskip("ray", reason="tests on Ray need it: pip install ray")
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    found.add_node(num_cpus=1)
    yield found.address
    found.shutdown()


@pytest.fixture(autouse=True)
def _alone():
    """Each test has the same random numbers, and leaves no variable (RANK, ...), process group or open zip to the next.

    The next one's `tmp_path` may have the same name.
    """
    torch.manual_seed(0)
    with mock.patch.dict(os.environ):
        yield
    _leave_process_group()
    open_zip.cache_clear()


def _leave_process_group() -> None:
    """After an error of a command that has joined one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
