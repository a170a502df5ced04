"""Errors that the user can mend, and how an entry point ends."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from difflib import get_close_matches

LAUNCHER_SECONDS = 4  # a launcher that polls each second has ended the other ranks by then


class UserError(Exception):
    """Wrong input. The message is one line: it names the file, key or value, and the way out."""


def nearest(wrong: str, valid: Iterable[str]) -> str:
    """A hint `(nearest: x)` for a misspelt name, or all the valid names if none is close."""
    names = sorted(valid)
    close = get_close_matches(wrong, names, n=1, cutoff=0.5)
    return f"(nearest: {close[0]})" if close else f"(one of: {', '.join(names)})"


def reason(error: Exception) -> str:
    """The first line of a library's error message, or the error's name if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class Parser(argparse.ArgumentParser):
    """Like its base, but keeps the lines of the description, and a mistake is a `UserError`: one line."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see --help)")


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point. A `UserError` becomes one line on stderr and exit code 2, Ctrl-C exit code 130.

    An error common to all ranks appears once: the others wait, and the launcher ends them when the first has failed. An
    error of one rank alone appears with its number.
    """
    rank = os.environ.get("RANK", "0")
    try:
        try:
            main()
        except OSError as error:  # no permission, disk full, a file where a folder should be
            if error.filename is None:
                raise
            raise UserError(f"{error.filename}: {error.strerror.lower()}") from None
    except UserError as error:
        if rank != "0":
            time.sleep(LAUNCHER_SECONDS)
        line = " ".join(str(error).split("\n"))  # names from files may hold anything
        print(f"error: {line}" if rank == "0" else f"error: [rank {rank}] {line}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "\nstopped by Ctrl-C; nothing is half-written: the same command goes on, or starts again", file=sys.stderr
        )
        sys.exit(128 + signal.SIGINT)
