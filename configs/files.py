"""Writing files so that they are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to be written under a temporary name; on success it is synced and renamed to `path`."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file's content at once, or not at all."""
    with whole_file(path) as file:
        file.write(data)
