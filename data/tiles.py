"""Cut images into square tiles. Imports torch.

A tile is named NAME@Y,X after the place of its upper left corner in the upright image, tiles of a page NAME#PAGE@Y,X.
`data/grid.py` has the rule for edges, `is_background` the one for empty tiles.
"""

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import BinaryIO, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from configs.errors import UserError
from data.cache import RemoteUserError
from data.decode import PIL_FORMATS, is_deep, is_direct, npy_header, read_npy
from data.dicom import dicom_views
from data.exif import orientation, swaps
from data.grid import Sizes, boxes, count_tiles
from data.pictures import picture_size, read_picture
from data.planning import PrepareOptions
from data.reading import (
    FIRST_FRAME,
    HEAD_BYTES,
    KEPT,
    TOO_LARGE,
    ImageError,
    Notes,
    Page,
    check_size,
    damage_as_error,
    raise_limit,
    sniff,
)
from data.reencode import JPEG_QUALITY, Encoded, picture_page, reencode_all
from data.regions import BLOCK_ROWS, View, check_band, check_png, png_regions, stored_rows, whole
from data.sources import Item
from data.tiff import tiff_views
from data.values import encode, final_pixels, share_without_data, undecided_range

MAX_PIXELS = 1 << 37  # of an image: a header that promises more is damaged
WITHOUT_DATA = 0.9  # a tile with a larger share of pixels without data is background
UNIFORM, WHITE, BLACK = 4, 200, 8  # of 255: standard deviation, and means, of the bands of a background tile of 8 bits
DROPPED = "{:tile was|tiles were} dropped as background (--keep-empty keeps them)"
WRITTEN = "{:tile was|tiles were} kept"
SMALL = "{:tile is smaller than --tile, as its image is|tiles are smaller than --tile, as their images are}"


class Tile(NamedTuple):
    """A tile, or why it or its whole image cannot be used, then without `place`, what the sample's json has of it."""

    name: str
    image: Encoded | ImageError
    place: dict


def measure(items: Sequence[Item], options: PrepareOptions) -> Sizes:
    """Height and width of each image of each file, from headers; an empty list for a file that cannot be used."""

    def sizes(item: Item) -> list[tuple[int, int]]:
        with suppress(ImageError), item.open() as file:
            return [view.size for view in _views(item, file, options, Notes())]
        return []

    with ThreadPoolExecutor(options.workers) as pool:
        return dict(zip(items, pool.map(sizes, items), strict=True))


def cut(item: Item, positions: Sequence[int], options: PrepareOptions, notes: Notes) -> Iterator[Tile]:
    """Some of a file's tiles without background, by their ascending positions in the grids of its images in turn.

    What cannot be used comes as one `ImageError` for each image and kind of refusal. Changes are counted in `notes`.
    """
    try:
        with item.open() as file:
            first = 0
            for view in _views(item, file, options, notes):
                count = count_tiles([view.size], options.tile, options.overlap)
                inside = [position - first for position in positions if first <= position < first + count]
                first += count
                if inside:
                    yield from _cut_view(item, view, inside, options, notes)
    except RemoteUserError:  # the image is not damaged, but cannot be fetched
        raise
    except UserError as error:
        yield Tile(item.name, error if isinstance(error, ImageError) else ImageError(str(error)), {})


def find_range(item: Item, options: PrepareOptions) -> ImageError | None:
    """What the values of a file's first image need, `--value-range` or `--nodata`; reads all of it."""
    with item.open() as file:
        view = next(_views(item, file, options, Notes()))
        _, crop = view.open()
        height, width = view.size
        rows = range(0, height, BLOCK_ROWS)
        return undecided_range((crop(row, 0, min(BLOCK_ROWS, height - row), width) for row in rows), options)


def _cut_view(item: Item, view: View, positions: list[int], options: PrepareOptions, notes: Notes) -> Iterator[Tile]:
    name = f"{item.name}#{view.number}" if view.number else item.name
    refused: dict[str, tuple[ImageError, str, int]] = {}  # by kind: the first error, its tile, their number
    try:
        turn, crop = view.open()
    except ImageError as error:
        yield Tile(name, error, {})
        return
    height, width = view.size[::-1] if swaps(turn) else view.size
    for box in boxes(view.size, turn, options.tile, options.overlap, positions):
        try:
            image = _encoded(item, view, crop(*box[:4]), options, notes)
        except ImageError as error:
            at, _, count = refused.get(error.kind, (error, "", 0))
            refused[error.kind] = at, refused[error.kind][1] if count else f"{box.y},{box.x}", count + 1
            continue
        if image:
            notes[WRITTEN] += 1
            notes[SMALL] += min(box.height, box.width) < options.tile
            place = {"source": name, "y": box.y, "x": box.x, "height": height, "width": width}
            yield Tile(f"{name}@{box.y},{box.x}", image, place)
    for error, at, count in refused.values():
        yield Tile(name, ImageError(f"{count:,} of its tiles, the first at {at}: {error}", error.kind, error.found), {})


def _encoded(item: Item, view: View, page: Page, options: PrepareOptions, notes: Notes) -> Encoded | None:
    """What a shard stores of a tile; None for background. Raises `ImageError`."""
    changes = Notes()
    pixels, alpha = final_pixels(page, None, options, changes)
    if not options.keep_empty and is_background(
        pixels[..., : pixels.shape[2] - alpha], share_without_data(page, options)
    ):
        notes[DROPPED] += 1
        return None
    if view.kind in KEPT and page.pixels.shape[:2] == view.size:  # the whole image: its own bytes
        data = item.image_bytes(options.max_file_bytes)
        _, image = next(reencode_all(data, item.name, None, options.quality, options, notes))
        if isinstance(image, ImageError):
            raise image
        return image
    notes.update(changes)
    return encode(pixels, alpha, page.deep_png, options.quality or (JPEG_QUALITY if view.kind == "jpg" else None))


def is_background(pixels: np.ndarray, without_data: float) -> bool:
    """Whether a tile [H, W, C] shows nothing, given its share of pixels without data.

    Over 90 % have none; or each band has one value; or bands of 8 bits are nearly uniform (standard deviation below 4)
    and all white (means above 200) or all black (means below 8). So sky, water and dark land with any structure stay.
    """
    if without_data > WITHOUT_DATA:
        return True
    values = pixels.reshape(-1, pixels.shape[2])
    if (values[0] == values[-1]).all() and (values == values[0]).all():
        return True
    if pixels.dtype != np.uint8:
        return False
    means = values.mean(0)
    if not ((means > WHITE).all() or (means < BLACK).all()):
        return False
    return bool((values.std(0) < UNIFORM).all())


def _views(item: Item, file: BinaryIO, reading: PrepareOptions, notes: Notes) -> Iterator[View]:
    """The images of a file. Raises `ImageError` for one that cannot be used or exceeds the limit of its kind."""
    kind = sniff(file.read(HEAD_BYTES))
    file.seek(0)
    for view in _views_of_kind(item, file, kind, reading, notes):
        if view.size[0] * view.size[1] > MAX_PIXELS or min(view.size) < 1:
            problem = f"has {view.size[0]:,} x {view.size[1]:,} pixels: its header is damaged"
            raise ImageError(problem, TOO_LARGE)
        yield replace(view, kind=kind)


def _views_of_kind(item: Item, file: BinaryIO, kind: str, reading: PrepareOptions, notes: Notes) -> Iterator[View]:
    if kind == "tif":
        yield from tiff_views(file, reading, reading.tile, notes)
    elif kind == "dcm" or (not kind and item.name.lower().endswith(".dcm")):
        yield from dicom_views(file, reading, notes)
    elif kind == "npy":
        yield _npy_view(item, file, reading)
    elif kind in KEPT:
        yield _picture_view(item, file, kind, reading, notes)
    else:
        size = picture_size(file, kind, item.name)
        read = partial(item.image_bytes, reading.max_file_bytes)
        yield View(size, lambda: _checked(read_picture(read(), kind, item.name, reading, notes), size))


def _checked(page: Page, size: tuple[int, int]) -> tuple:
    """A page in memory. Raises `ImageError` if it has another size than its header says."""
    if page.pixels.shape[:2] != size:
        raise ImageError("not a readable image (its header and its pixels differ in size)")
    return whole(page)


def _npy_view(item: Item, file: BinaryIO, reading: PrepareOptions) -> View:
    (height, width, channels), fortran_order, dtype = npy_header(file)
    if fortran_order:
        return View((height, width), lambda: whole(Page(read_npy(item.image_bytes(reading.max_file_bytes)))))
    check_band((height, width), reading.tile + BLOCK_ROWS, channels * dtype.itemsize, reading.max_pixels)
    read = stored_rows(file, file.tell(), dtype, (1, height, width, channels))
    return View((height, width), lambda: (1, lambda *region: Page(read(*region))))


def _picture_view(item: Item, file: BinaryIO, kind: str, reading: PrepareOptions, notes: Notes) -> View:
    """A JPEG, PNG, WebP or GIF. A large or 16-bit PNG is read by rows, others are decoded as a whole."""
    with damage_as_error():
        picture = Image.open(file, formats=PIL_FORMATS)
        size, bands, deep = picture.size[::-1], len(picture.getbands()), is_deep(picture)
        animated, direct = getattr(picture, "is_animated", False), is_direct(picture)
    notes[FIRST_FRAME] += animated
    turned = not reading.no_exif
    if direct and "transparency" not in picture.info and (read := png_regions(file)) is not None:
        pixel_bytes = 8 if deep else 4
        check_band(size, reading.tile + BLOCK_ROWS, pixel_bytes, reading.max_pixels)

        def opened() -> tuple:
            turn = check_png(file)
            turn = turn if turned else 1

            def crop(*region: int) -> Page:
                pixels = read(*region)
                return Page(pixels, alpha=pixels.shape[2] in (2, 4), orientation=turn, deep_png=deep)

            return turn, crop

        return View(size, opened)
    pixel_bytes = bands * (2 if deep else 1)
    advice = f": a {picture.format} is decoded as a whole: add --max-pixels {raise_limit(*size, pixel_bytes)}"
    check_size(*size, pixel_bytes, reading.max_pixels, advice)

    def decoded() -> tuple:
        data = item.image_bytes(reading.max_file_bytes)
        with damage_as_error():
            page = _decoded(data, kind)
        return _checked(page if turned else replace(page, orientation=1), size)

    return View(size, decoded)


def _decoded(data: bytes, kind: str) -> Page:
    """All of a picture. JPEGs as the loader decodes them, in 3 bytes per pixel; PIL needs 4."""
    if kind == "jpg":
        space = simplejpeg.decode_jpeg_header(data)[2]
        if space in ("Gray", "YCbCr", "RGB"):
            pixels = simplejpeg.decode_jpeg(data, "GRAY" if space == "Gray" else "RGB")
            return Page(pixels, orientation=orientation(data))
    return picture_page(Image.open(io.BytesIO(data), formats=PIL_FORMATS), data)
