"""Segment a picture that is larger than the memory: in tiles, as data/prepare.py --tile cuts them, assembled again."""

from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from configs.errors import UserError
from data.decode import decode
from data.grid import count_tiles
from data.planning import PrepareOptions
from data.reading import Notes, Reading, reading_of
from data.sources import Item
from data.tiles import cut, measure
from data.transforms import to_rgb

MAX_OVERVIEW = 4096  # pixels of the longer side of a scene's small copy


class Mosaic:
    """The mask [height, width] of a scene from those of its tiles, and a small copy of the scene.

    Where tiles overlap, the one whose border is further away counts. Pixels without a tile have the highest value of
    the mask's type, which is no class.
    """

    def __init__(self, height: int, width: int, classes: int):
        kind = np.uint8 if classes < 256 else np.uint16
        self.mask = np.full((height, width), np.iinfo(kind).max, kind)
        self.distance = np.zeros((height, width), np.uint8)  # from the border of the tile that counts, at most 255
        self.scale = min(1, MAX_OVERVIEW / max(height, width))
        self.overview = torch.zeros(3, *self._scaled(height, width), dtype=torch.uint8)

    def _scaled(self, *sides: int) -> list[int]:
        return [max(1, round(side * self.scale)) for side in sides]

    def add(self, top: int, left: int, mask: np.ndarray, image: Tensor) -> None:
        """Add a tile [h, w] and its image [C, h, w], of which the upper left corner is at (top, left)."""
        rows, columns = (np.minimum(np.arange(n), n - 1 - np.arange(n)) + 1 for n in mask.shape)
        inside = np.minimum(np.minimum(rows[:, None], columns[None]), 255)
        place = np.s_[top : top + mask.shape[0], left : left + mask.shape[1]]
        closer = inside > self.distance[place]
        self.mask[place] = np.where(closer, mask, self.mask[place])
        self.distance[place] = np.where(closer, inside, self.distance[place])
        y0, x0 = (round(side * self.scale) for side in (top, left))
        y1, x1 = self._scaled(top + mask.shape[0], left + mask.shape[1])
        if y0 < y1 and x0 < x1:
            self.overview[:, y0:y1, x0:x1] = F.resize(to_rgb(image), [y1 - y0, x1 - x0], antialias=True)

    def small_mask(self) -> np.ndarray:
        """The mask at the size of `overview`."""
        rows, columns = (
            np.minimum((np.arange(n) / self.scale).astype(int), side - 1)
            for n, side in zip(self.overview.shape[1:], self.mask.shape, strict=True)
        )
        return self.mask[rows[:, None], columns[None]]


def segment_scene(
    path: Path, tile: int, overlap: int, batch: int, reading: Reading, channels: int, classes: int,
    run: Callable[[list[Tensor]], list[Tensor]],
) -> tuple[Mosaic | None, list[str]]:  # fmt: skip
    """The mask of a file's image, None if no tile is readable; and what could not be read.

    Args:
        tile, overlap: as of data/prepare.py, pixels
        batch: tiles at a time
        run: predicted class [h, w] of each pixel of tiles [C, h, w]
    """
    options = PrepareOptions(
        **asdict(reading_of(reading)), source=str(path), tile=tile, overlap=overlap, keep_empty=True
    )  # fmt: skip
    item, mosaic, problems = Item(path.name, str(path)), None, []
    count = count_tiles(measure([item], options)[item], tile, overlap)
    console = Console(stderr=True)
    tiles = track(cut(item, range(count), options, Notes()), path.name, count, console=console, transient=True)
    for some in iter(lambda: list(islice(tiles, batch)), []):
        places, images = [], []
        for one in some:
            try:
                if isinstance(one.image, UserError):
                    raise one.image
                images.append(decode(one.image[1], channels, max_pixels=reading.max_pixels))
                places.append(one.place)
            except UserError as error:
                problems.append(str(error))
        if images:
            mosaic = mosaic or Mosaic(places[0]["height"], places[0]["width"], classes)
            for place, image, mask in zip(places, images, run(images), strict=True):
                mosaic.add(place["y"], place["x"], mask.cpu().numpy(), image)
    return mosaic, problems
