"""Printing to the console."""

import os

from configs.errors import printable


def say(message: str) -> None:
    """Print lines on the first rank, without control characters and secrets."""
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(map(printable, message.split("\n"))), flush=True)
