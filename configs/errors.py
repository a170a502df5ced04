"""Errors that the user can correct, and the exit codes of commands."""

import errno
import logging
import os
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from unicodedata import category

from configs.secrets import WAY_OUT, has_secret, without_secrets

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # raised without a file name
ESCAPED = ("Cc", "Cs", "Zl", "Zp")  # Unicode categories: control, surrogate, line and paragraph separator
BIDIRECTIONAL = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # would reorder the line
LAUNCHER_SECONDS = 4  # launchers poll once a second, so by then they have stopped the other ranks
SAVED, INTERRUPTED, HUNG = 75, 128 + signal.SIGINT, 70  # exit codes; 75 is "try again later" in sysexits.h
MISTAKE = 2  # exit code of a `UserError`
LOST = 71  # exit code of a `LostProcess` in a run that restarts by itself, which must tell it from a mistake


class UserError(Exception):
    """Invalid input. The message is one line that names the file, key or value and the remedy."""


class LostProcess(UserError):  # noqa: N818  # as UserError
    """A process of this run has died, so a restart may help."""


class LostLoader(LostProcess):
    """A loader process has died, which `error` shows."""

    def __init__(self, error: Exception):
        super().__init__(f"a loader process died ({reason(error)}): lower data.workers if memory ran out")


class LostPeer(LostProcess):
    """Another rank has ended and printed the reason, so this rank waits before it prints its own error."""


class Stopped(Exception):  # noqa: N818  # not an error
    """Training was asked to stop and has saved its state. `code` is the exit code, the message one line."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def closest(wrong: str, valid: Iterable[str]) -> str | None:
    """The valid name that a misspelt one is close to, if there is one."""
    return next(iter(get_close_matches(wrong, sorted(valid), n=1, cutoff=0.5)), None)


def nearest(wrong: str, valid: Iterable[str]) -> str:
    """A hint for a misspelt name: `(nearest: x)`, or all valid names if none is close."""
    names = sorted(valid)
    close = closest(wrong, names)
    return f"(nearest: {close})" if close else f"(one of: {', '.join(names)})"


def reason(error: Exception) -> str:
    """The first line of an error message, without secrets, or the error's class if there is none."""
    return without_secrets((str(error).splitlines() or [type(error).__name__])[0])


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun, such as `1 image` or `1,200 images`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def few(names: Iterable[str], count: int = 10) -> str:
    """The first names of several, printable, in one line."""
    names = list(names)
    return ", ".join(map(printable, names[:count])) + (", ..." if len(names) > count else "")


def printable(text: object) -> str:
    """Text for a terminal or one line of a file: control characters and bytes that are not UTF-8 become `\\x1b`.

    Secrets of URLs become `***`.
    """
    text = without_secrets(str(text))
    if text.isprintable():  # quick, and true of most: no such character is printable to Python
        return text
    return "".join(_escape(c) if category(c) in ESCAPED or c in BIDIRECTIONAL else c for c in text)


def _escape(character: str) -> str:
    code = ord(character)
    code -= 0xDC00 if 0xDC80 <= code <= 0xDCFF else 0  # a byte of a file name, see PEP 383
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def output_is_closed() -> bool:
    """Whether the reader of standard output has closed it, as `head` does."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def check_arguments(words: Iterable[str]) -> None:
    """Raise `UserError` if a word of a command line has a URL with user info or a query."""
    for word in words:
        if has_secret(word):
            raise UserError(f"{without_secrets(word)} has user info or a query in its URL: {WAY_OUT}")


def _print_traceback(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """Print an error of this project's or a library's code: messages of libraries quote URLs and names."""
    for line in "".join(traceback.format_exception(kind, error, trace)).splitlines():
        print(printable(line), file=sys.stderr)


def hide_library_warnings() -> None:
    """Keep warnings of libraries from the user, who can do nothing about them; `python -W default` shows them.

    Warnings of this project are ordinary lines. Loader processes are forks and inherit this.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        logging.lastResort.setLevel(logging.ERROR)  # of loggers without a handler


def restartable() -> bool:
    """Whether an agent restarts this process when it fails; see launch/restarts.py."""
    return os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point. Exit codes: 2 for a `UserError`, 130 for Ctrl-C, that of `Stopped` for a stopped run.

    A `LostProcess` exits with 71 if the run restarts by itself.

    An error of all ranks is printed once: the other ranks wait, and the launcher stops them when the first has failed.
    An error of a single rank is printed with its number.
    """
    rank = os.environ.get("RANK", "0")
    sys.excepthook = _print_traceback
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal's encoding lacks; as stderr
    hide_library_warnings()
    try:
        try:
            check_arguments(sys.argv[1:])
            main()
        except MemoryError as error:
            remedy = "take smaller images or batches, fewer processes, or another machine"
            raise UserError(f"memory ran out ({reason(error)}): {remedy}") from None
        except OSError as error:  # no permission, disk full, a file where a folder should be
            if isinstance(error, BrokenPipeError) and output_is_closed():
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # discards further output
                sys.exit(1)
            if error.filename is not None:
                raise UserError(f"{error.filename}: {error.strerror.lower()}") from None
            if error.errno not in DISK_ERRORS:
                raise
            remedy = "free space or repair the disk, then run the same command to resume"
            raise UserError(f"{error.strerror.lower()}: {remedy}") from None
    except UserError as error:
        if rank != "0" or isinstance(error, LostPeer):
            time.sleep(LAUNCHER_SECONDS)
        line = printable(" ".join(str(error).split("\n")))  # file names may contain line breaks
        print("error:", line if rank == "0" else f"[rank {rank}] {line}", file=sys.stderr, flush=True)
        sys.exit(LOST if isinstance(error, LostProcess) and restartable() else MISTAKE)
    except Stopped as stopped:
        if rank == "0":
            print(f"stopped: {printable(stopped)}", file=sys.stderr, flush=True)
        sys.exit(stopped.code)
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C; no file is incomplete: run the same command to continue", file=sys.stderr)
        sys.exit(INTERRUPTED)
