"""A page of examples of an evaluation: images with their truth and prediction, in groups such as the worst."""

from pathlib import Path
from typing import Any

from PIL import Image

from configs.errors import UserError
from data.decode import decode
from finetune.contact_sheet import COLUMNS as ROW
from finetune.contact_sheet import thumbnail, write_sheet

Example = tuple[int, str, str]  # number of the sample in its split, and two lines of text


def write_examples(path: Path, images: Any, groups: dict[str, list[Example]]) -> None:
    """Write a PNG of groups of samples of a split; each has a title and at most one row."""
    cells = {}
    for title, examples in groups.items():
        cells[title] = [(_picture(images, sample), *lines) for sample, *lines in examples[:ROW]]
    write_sheet(path, {title: row for title, row in cells.items() if row})


def _picture(images: Any, sample: int) -> Image.Image:
    try:
        return thumbnail(decode(images.read(sample)[0]))
    except UserError:  # damaged since it was evaluated
        return Image.new("RGB", (1, 1), "white")
