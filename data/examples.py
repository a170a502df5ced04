"""A few decoded images of a file, a collection or shards, to look at or to compare outputs on."""

from pathlib import Path

import numpy as np
from torch import Tensor

from configs.errors import UserError
from data.decode import decode
from data.folder import is_collection, open_images, read_image
from data.reading import Reading


def example_images(
    path: str, split: str, count: int, channels: int, reading: Reading
) -> tuple[list[Tensor], list[str]]:
    """Up to `count` images [C, H, W] of a picture file, or evenly spread over a split of a collection or of shards.

    Also returns a line on each unreadable image. Raises `UserError` if the split has no images.
    """
    one_file = Path(path).is_file() and not is_collection(path)
    images = None if one_file else open_images(path, split, reading)
    available = 1 if images is None else len(images)
    if not available:
        raise UserError(f"{path}, split {split} has no images: choose another --split")
    found, problems = [], []
    for sample in np.linspace(0, available - 1, min(count, available)).round().astype(int).tolist():
        try:
            data = read_image(Path(path), reading) if images is None else images.read(sample)[0]
            found.append(decode(data, channels, max_pixels=reading.max_pixels))
        except UserError as error:
            problems.append(f"{path if images is None else images.place(sample)}: {error}")
    return found, problems
