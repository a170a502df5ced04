"""Arguments and cheap checks that several commands share; free of torch, so that mistakes are reported at once."""

import re
from pathlib import Path

from configs.errors import UserError


def parse_size(text: str) -> int | tuple[int, int]:
    """Value of `--size`: 224, or [224,384] for height and width. Raises `UserError` for anything else."""
    sides = [int(side) for side in re.findall(r"\d+", text)]
    if not re.fullmatch(r"\d+|\[?\d+, ?\d+\]?", text):
        raise UserError(f"--size {text}: give a number of pixels, or height and width like [224,384]")
    return sides[0] if len(sides) == 1 else tuple(sides)


def check_weights(path: str) -> None:
    """Raise `UserError` if a weight file or model folder does not exist."""
    if not Path(path).exists():
        raise UserError(f"{path} does not exist: give a weight file")


def check_parent(path: str | Path) -> None:
    """Raise `UserError` if the folder that a file is to be written to does not exist."""
    folder = Path(path).parent
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: create it first")
