"""Small copies of images for sheets (`data/sheets.py`)."""

from collections.abc import Sequence

from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from configs.errors import UserError
from configs.schema import Data
from data.decode import decode
from data.folder import names_of, open_splits
from data.name_lists import escape_name
from data.reading import Reading
from data.transforms import to_rgb

CELL, MAX_CELLS = 160, 48  # side of a copy in pixels; copies of a sheet


def thumbnail(image: Tensor) -> Image.Image:
    """A copy of an image [C, H, W] that fits into a cell; pixels of a smaller one stay sharp."""
    picture = F.to_pil_image(to_rgb(image))
    method = Image.Resampling.NEAREST if max(picture.size) < CELL else Image.Resampling.BICUBIC
    return ImageOps.contain(picture, (CELL, CELL), method)


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
