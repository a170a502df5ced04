"""Run a command on a hostile input, in a fork with a limit of memory, and judge what it has done."""

import contextlib
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from configs.errors import run_main

SECRET = "S3CR3T"  # part of every secret
LIMIT = 3 << 30  # bytes of address space that a command may add
SECONDS = 120  # of a command
CONTROL = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]")  # in text that is printed or written, but tab and line break
TEXTS = (".txt", ".json", ".csv", ".jsonl", ".yaml", ".html", ".record")


@dataclass(frozen=True)
class Case:
    """A hostile input: `make(base)` writes it below `base` and returns the words of the command."""

    kind: str
    name: str
    main: Callable[[], None]
    make: Callable[[Path], list]
    code: int | None = None  # of the exit; None: 0 or 2

    @property
    def title(self) -> str:
        return f"{self.kind}: {self.name}"


@dataclass
class Outcome:
    """What a command did: its exit code, output, additional memory in bytes, and everything that is wrong."""

    code: int
    text: str
    memory: int
    seconds: float
    wrong: dict[str, str] = field(default_factory=dict)  # by what is counted


COUNTED = ("executed", "written outside", "secret printed", "traceback", "raw control character", "exit code")


def attempt(case: Case, base: Path) -> Outcome:
    """Run a case in the new folder `base`: the command may write to base/out, base/cwd, base/home and base/tmp."""
    for name in ("in", "cwd", "home", "tmp", "ran"):
        (base / name).mkdir(parents=True)
    words = [str(word) for word in case.make(base)]
    before = _files(base.parent)
    began, own = time.monotonic(), _rss()
    child = os.fork()
    if child == 0:
        _command(case, words, base)
    code, peak = _wait(child)
    text = (base / "printed").read_bytes()
    found = Outcome(code, text.decode("utf-8", "replace"), max(0, peak - own), time.monotonic() - began)
    _judge(found, case, base, text, _files(base.parent) - before)
    return found


def _command(case: Case, words: list[str], base: Path) -> None:
    """In the fork: run the command, and never return."""
    code = 1
    try:
        out = os.open(base / "printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115
        os.chdir(base / "cwd")
        os.environ |= {"HOME": str(base / "home"), "TMPDIR": str(base / "tmp")}
        limit = _size() + LIMIT
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        sys.argv = ["command", *words]
        with contextlib.suppress(ImportError):
            import data.remote

            data.remote.BACKOFF_SECONDS = 0.01
        run_main(case.main)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int) -> tuple[int, int]:
    """Exit code, and peak memory in bytes of the largest of the command's processes; killed after a time."""
    end = time.monotonic() + SECONDS
    while True:
        process, status, used = os.wait4(child, os.WNOHANG)
        if process:
            return os.waitstatus_to_exitcode(status), used.ru_maxrss * 1024
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            end = float("inf")
        time.sleep(0.005)


def _judge(found: Outcome, case: Case, base: Path, text: bytes, new: set[Path]) -> None:
    if any((base / "ran").iterdir()):
        found.wrong["executed"] = "a payload ran"
    own = ("out", "cwd", "home", "tmp", "printed")
    if outside := [path for path in new if not _inside(path, base, own)]:
        found.wrong["written outside"] = str(outside[0])
    written = [path for path in new if _inside(path, base, own) and path.suffix in TEXTS and path.is_file()]
    if SECRET.encode() in text or any(SECRET.encode() in path.read_bytes() for path in new if path.is_file()):
        found.wrong["secret printed"] = found.text[-300:]
    if b"Traceback" in text:
        found.wrong["traceback"] = found.text[-1500:]
    for data in (re.sub(rb"\r", b"", text), *(path.read_bytes() for path in written)):
        if match := CONTROL.search(data):
            found.wrong["raw control character"] = repr(data[max(0, match.start() - 60) : match.end() + 20])
    if found.code not in ((0, 2) if case.code is None else (case.code,)):
        found.wrong["exit code"] = f"{found.code}: {found.text[-600:]}"
    if found.code == 2 and text.count(b"error: ") != 1:
        found.wrong["exit code"] = f"2 without one line that begins with error: {found.text[-600:]}"


def _inside(path: Path, base: Path, own: tuple[str, ...]) -> bool:
    parts = path.relative_to(base.parent).parts
    return parts[0] == base.name and len(parts) > 1 and (parts[1] in own or parts[1].startswith("out"))


def _files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.is_dir()}


def _rss() -> int:
    return _status("VmRSS")


def _size() -> int:
    return _status("VmSize")


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def attempts(cases: list[Case], folder: Path) -> Iterator[tuple[Case, Outcome]]:
    """Every case in a folder of its own, which is removed."""
    import shutil

    for i, case in enumerate(cases):
        base = folder / f"{i:03}"
        try:
            yield case, attempt(case, base)
        finally:
            shutil.rmtree(base, ignore_errors=True)
