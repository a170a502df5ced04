"""Types of command-line options, for argparse."""

import re

from configs.errors import UserError


def parse_size(text: str) -> int | tuple[int, int]:
    """The value of `--size`: 224, or [224,384] for height and width. Raises `UserError` for anything else."""
    sides = [int(side) for side in re.findall(r"\d+", text)]
    if not re.fullmatch(r"\d+|\[?\d+, ?\d+\]?", text):
        raise UserError(f"--size {text}: give a number of pixels, or height and width like [224,384]")
    return sides[0] if len(sides) == 1 else tuple(sides)
