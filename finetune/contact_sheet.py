"""Contact sheets: small copies of images with a line of text below each."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from configs.errors import UserError
from configs.files import atomic_file
from configs.schema import Data
from data.decode import decode
from data.folder import names_of, open_splits
from data.name_lists import escape_name
from data.reading import Reading
from data.transforms import to_rgb

CELL, GAP, LETTERS = 160, 8, 11  # pixels: side of a cell, between cells, height of letters
COLUMNS, MAX_CELLS = 6, 48
FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"  # PIL's default has Latin letters only


def thumbnail(image: Tensor) -> Image.Image:
    """A copy of an image [C, H, W] that fits into a cell."""
    return ImageOps.contain(F.to_pil_image(to_rgb(image)), (CELL, CELL))


def thumbnails(source: str, rows: Sequence[tuple[str, int, str]], reading: Reading) -> list[Image.Image]:
    """Small copies of the images (split, sample, escaped name), read as when they were embedded.

    Raises `UserError` if one is unreadable, or has another name: the source is not the one that was embedded.
    """
    names = [*dict.fromkeys(split for split, *_ in rows)]
    opened = dict(zip(names, open_splits(Data(source), names, reading), strict=True))
    found = {}
    for name, images in opened.items():
        samples = sorted({sample for split, sample, _ in rows if split == name and 0 <= sample < len(images)})
        found |= {(name, i): escape_name(where) for i, where in zip(samples, names_of(images, samples), strict=True)}
    copies = []
    for split, sample, name in rows:
        if (now := found.get((split, sample), "missing")) != name:
            problem = f"{source}, split {split}: sample {sample} is {now}, but was {name} when it was embedded"
            raise UserError(f"{problem}: give the images with --source, or run finetune/embed.py again")
        try:
            copies.append(thumbnail(decode(opened[split].read(sample)[0], max_pixels=reading.max_pixels)))
        except UserError as error:
            raise UserError(f"{source}, {name}: {error}") from None
    return copies


def write_sheet(path: Path, groups: dict[str, Sequence[tuple[Image.Image, str, str]]]) -> None:
    """Write a PNG of groups of cells by title: a thumbnail, and two lines of text below it."""
    font, columns = ImageFont.truetype(str(FONT), LETTERS), min(COLUMNS, max(map(len, groups.values())))
    line = LETTERS + 4
    title_height, cell_height = 2 * line, CELL + 2 * line + GAP
    rows = {title: -(-len(cells) // columns) for title, cells in groups.items()}
    height = sum(title_height * bool(title) + cell_height * count for title, count in rows.items()) + GAP
    sheet = Image.new("RGB", (columns * (CELL + GAP) + GAP, height), "white")
    draw, start = ImageDraw.Draw(sheet), GAP
    for title, cells in groups.items():
        if title:
            draw.text((GAP, start + LETTERS // 2), title, fill="black", font=font)
            start += title_height
        for i, (image, *lines) in enumerate(cells):
            left, top = GAP + i % columns * (CELL + GAP), start + i // columns * cell_height
            sheet.paste(image, (left + (CELL - image.width) // 2, top + (CELL - image.height) // 2))
            for number, text in enumerate(lines):
                draw.text((left, top + CELL + 2 + number * line), fit_text(text, font), fill="black", font=font)
        start += rows[title] * cell_height
    with atomic_file(path) as file:
        sheet.save(file, "png")


def fit_text(line: str, font: ImageFont.FreeTypeFont, width: int = CELL) -> str:
    """The end of a line that is wider than `width` pixels: names differ there."""
    if font.getlength(line) <= width:
        return line
    return next(part for start in range(1, len(line) + 1) if font.getlength(part := f"…{line[start:]}") <= width)
