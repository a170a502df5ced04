"""Errors that the user can mend, and how an entry point ends."""

import errno
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable
from difflib import get_close_matches

DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # a full disk does not say whose file it was
LAUNCHER_SECONDS = 4  # a launcher that polls each second has ended the other ranks by then


SAVED, INTERRUPTED, HUNG = 75, 128 + signal.SIGINT, 70  # exit codes; 2 = the user can mend it, 0 = done


class UserError(Exception):
    """Wrong input. The message is one line: it names the file, key or value, and the way out."""


class LostPeer(UserError):  # noqa: N818  # as UserError
    """Another rank ended. It has printed why, so this one waits a while before it adds to that."""


class Stopped(Exception):  # noqa: N818  # not an error
    """Training ended early because it was asked to, its state saved. `code` is the exit code, the message one line."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def nearest(wrong: str, valid: Iterable[str]) -> str:
    """A hint `(nearest: x)` for a misspelt name, or all the valid names if none is close."""
    names = sorted(valid)
    close = get_close_matches(wrong, names, n=1, cutoff=0.5)
    return f"(nearest: {close[0]})" if close else f"(one of: {', '.join(names)})"


def reason(error: Exception) -> str:
    """The first line of a library's error message, or the error's name if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def output_is_closed() -> bool:
    """Whether the reader of standard output has ended, as `head` does."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point. A `UserError` becomes one line on stderr and exit code 2, Ctrl-C exit code 130.

    A run that was asked to stop and has saved its state gets exit code 75 (sysexits' "try again later").

    An error common to all ranks appears once: the others wait, and the launcher ends them when the first has failed. An
    error of one rank alone appears with its number.
    """
    rank = os.environ.get("RANK", "0")
    try:
        try:
            main()
        except OSError as error:  # no permission, disk full, a file where a folder should be
            if isinstance(error, BrokenPipeError) and output_is_closed():
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is left to print
                sys.exit(1)
            if error.filename is not None:
                raise UserError(f"{error.filename}: {error.strerror.lower()}") from None
            if error.errno not in DISK_TROUBLE:
                raise
            raise UserError(f"{error.strerror.lower()}: mend that, then the same command goes on") from None
    except UserError as error:
        if rank != "0" or isinstance(error, LostPeer):
            time.sleep(LAUNCHER_SECONDS)
        line = " ".join(str(error).split("\n"))  # names from files may hold anything
        print(f"error: {line}" if rank == "0" else f"error: [rank {rank}] {line}", file=sys.stderr, flush=True)
        sys.exit(2)
    except Stopped as stopped:
        if rank == "0":
            print(f"stopped: {stopped}", file=sys.stderr, flush=True)
        sys.exit(stopped.code)
    except KeyboardInterrupt:
        print(
            "\nstopped by Ctrl-C; nothing is half-written: the same command goes on, or starts again", file=sys.stderr
        )
        sys.exit(INTERRUPTED)
