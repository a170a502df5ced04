"""The grid of tiles: every pixel is covered, tiles have full size, the upright grid is found in the stored image."""

from itertools import pairwise

import numpy as np
import pytest

from data.exif import FLIPS, upright
from data.grid import boxes, count_tiles, starts


@pytest.mark.parametrize(
    ("length", "tile", "overlap", "expected"),
    [
        (64, 32, 0, [0, 32]),
        (65, 32, 0, [0, 32, 33]),
        (32, 32, 0, [0]),
        (20, 32, 0, [0]),
        (64, 32, 8, [0, 24, 32]),
        (56, 32, 8, [0, 24]),
        (33, 32, 31, [0, 1]),
    ],
)
def test_the_last_tile_is_shifted_inwards(length, tile, overlap, expected):
    assert starts(length, tile, overlap) == expected
    assert count_tiles([(length, length)], tile, overlap) == len(expected) ** 2


@pytest.mark.parametrize("overlap", [0, 1, 5, 15])
@pytest.mark.parametrize("length", range(1, 70, 3))
def test_every_pixel_is_in_a_tile_and_neighbours_overlap(length, overlap):
    firsts = starts(length, 16, overlap)
    covered = {pixel for first in firsts for pixel in range(first, min(first + 16, length))}
    assert covered == set(range(length)) and len(set(firsts)) == len(firsts)
    assert all(before + 16 - after >= overlap for before, after in pairwise(firsts))
    assert count_tiles([(length, length)], 16, overlap) == len(firsts) ** 2


@pytest.mark.parametrize("turn", FLIPS)
def test_boxes_of_a_turned_image(turn):
    stored = np.random.default_rng(0).integers(0, 256, (50, 37), np.uint8)
    image = upright(stored, turn)
    every = count_tiles([stored.shape], 16, 3)
    found = list(boxes(stored.shape, turn, 16, 3, range(every)))
    assert [box.row for box in found] == sorted(box.row for box in found)  # as regions are read
    for box in found:
        tile = upright(stored[box.row : box.row + box.height, box.column : box.column + box.width], turn)
        assert np.array_equal(tile, image[box.y : box.y + 16, box.x : box.x + 16])
    grid = {(y, x) for y in starts(image.shape[0], 16, 3) for x in starts(image.shape[1], 16, 3)}
    assert {(box.y, box.x) for box in found} == grid and every == len(grid)
