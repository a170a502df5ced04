"""The grid of square tiles that cover an image. Free of torch.

Tiles begin every `tile - overlap` pixels. The last row and column are shifted inwards, so that all tiles have full
size. In a direction in which an image is smaller than a tile, there is one tile of the image's size.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from data.exif import FLIPS, swaps
from data.sources import Item

Sizes = dict[Item, list[tuple[int, int]]]  # height and width of the images of each file


class Box(NamedTuple):
    """A tile: rows and columns as stored, and the place of its upper left corner in the upright image."""

    row: int
    column: int
    height: int
    width: int
    y: int
    x: int


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """First pixels of the tiles along a side of `length` pixels."""
    last = max(0, length - tile)
    return [*range(0, last, tile - overlap), last]


def count_tiles(sizes: Sequence[tuple[int, int]], tile: int, overlap: int) -> int:
    """Number of tiles of images of (height, width)."""
    steps = tile - overlap
    return sum((1 + -(-max(0, h - tile) // steps)) * (1 + -(-max(0, w - tile) // steps)) for h, w in sizes)


def boxes(size: tuple[int, int], orientation: int, tile: int, overlap: int, positions: Sequence[int]) -> Iterator[Box]:
    """Some of an image's tiles, row by row as stored, by their positions in that order.

    Args:
        size: height and width as stored
        orientation: EXIF orientation; the grid is that of the upright image
    """
    height, width = reversed(size) if swaps(orientation) else size
    vertical, horizontal = (
        sorted((length - first - min(tile, length) if flip in FLIPS[orientation] else first, first)
               for first in starts(length, tile, overlap))
        for length, flip in ((height, "v"), (width, "h"))
    )  # fmt: skip
    rows, columns = (horizontal, vertical) if swaps(orientation) else (vertical, horizontal)
    for position in positions:
        (row, y), (column, x) = rows[position // len(columns)], columns[position % len(columns)]
        y, x = (x, y) if swaps(orientation) else (y, x)
        yield Box(row, column, min(tile, size[0]), min(tile, size[1]), y, x)
