"""Printing to the console."""

import os


def say(message: str) -> None:
    """Print on the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)
