"""Commands to paste into a shell."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from configs.errors import printable

ROOT = Path(__file__).resolve().parents[1]


def command(script: str, *words: object, launcher: str = "python") -> str:
    """A command of this project that works as pasted, in this folder and with this interpreter.

    Args:
        script: path in the project, like `finetune/main.py`
        words: its arguments, not quoted
        launcher: `python` or another program of the same environment
    """
    own = Path(sys.executable).with_name(launcher)
    found = shutil.which(launcher)
    program = launcher if found and Path(found).parent.samefile(own.parent) else str(own)
    here = Path(script).exists() and Path(script).samefile(ROOT / script)
    return " ".join(map(quote, (program, script if here else str(ROOT / script), *map(str, words))))


def quote(word: str) -> str:
    """A word for a shell. Control characters and bytes that are not UTF-8 become $'\\\\x1b', for bash and zsh."""
    if printable(word) == word:
        return shlex.quote(word)
    plain = (
        chr(byte) if 32 <= byte < 127 and chr(byte) not in "'\\" else f"\\x{byte:02x}" for byte in os.fsencode(word)
    )
    return f"$'{''.join(plain)}'"
