"""A page of examples of an evaluation: images with their truth and prediction, in groups such as the worst."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from configs.errors import UserError
from data.decode import decode
from data.sheets import COLUMNS as ROW
from data.sheets import Cell, Group, Sheet, write_sheet
from finetune.contact_sheet import thumbnail

Example = tuple[int, str, str]  # number of the sample in its split, and two lines of text


def write_examples(path: Path, images: Any, groups: dict[str, list[Example]]) -> None:
    """Write a PNG of groups of samples of a split; each has a title and at most one row."""
    sheet = [
        Group(title, [Cell(_picture(images, sample), tuple(lines)) for sample, *lines in examples[:ROW]])
        for title, examples in groups.items()
    ]
    write_sheet(path, Sheet(sheet))


def spread(samples: Sequence, count: int = ROW) -> list:
    """At most so many of some samples, evenly spaced over them."""
    return [samples[i * len(samples) // count] for i in range(count)] if len(samples) > count else list(samples)


def _picture(images: Any, sample: int) -> Image.Image:
    try:
        return thumbnail(decode(images.read(sample)[0]))
    except UserError:  # damaged since it was evaluated
        return Image.new("RGB", (1, 1), "white")
