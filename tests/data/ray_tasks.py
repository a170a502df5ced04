"""Tasks for workers of Ray; without torch, so that they start quickly."""

import os
import signal
import time
from pathlib import Path

from configs.errors import UserError
from data.pool import add_progress


def double(number: int) -> tuple[int, int]:
    add_progress(1)
    time.sleep(0.05 * (number % 3))  # tasks end in another order
    return 2 * number, os.getpid()


def kill_once(number: int, folder: Path) -> int:
    """The first worker of task 3 is killed in the middle of its work."""
    if number == 3 and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def kill_always(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(number: int, folder: Path) -> None:
    if number == 1:
        raise UserError("x.tar is damaged: fetch it again")
    if number == 2:
        (folder / "absent" / "file").write_bytes(b"")
    time.sleep(600)
