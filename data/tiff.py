"""Pages of a TIFF, BigTIFF or GeoTIFF, as stored."""

import io
import logging
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import BinaryIO

import numpy as np
import tifffile
from tifffile import PHOTOMETRIC, TiffFile, TiffPage

from data.reading import (
    BYTES_PER_PIXEL,
    FIRST_PAGE,
    PAGES,
    UNSUPPORTED,
    ImageError,
    Notes,
    Page,
    Reading,
    check_size,
    damage_as_error,
    raise_limit,
)
from data.regions import BLOCK_ROWS, JPEG, View, check_band, tiff_regions, whole
from data.values import reduced

NODATA_TAG, ORIENTATION_TAG = 42113, 274
ALPHA = (1, 2)  # values of the tag ExtraSamples; 0 = a band
GREY = (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.MINISWHITE)
KNOWN = (*GREY, PHOTOMETRIC.RGB, PHOTOMETRIC.PALETTE, PHOTOMETRIC.YCBCR, PHOTOMETRIC.SEPARATED)
REDUCED_ROWS = 256  # rows of a page that is reduced in parts
logging.getLogger("tifffile").disabled = True  # complaints about tags go to stderr; damage is raised

Fill = Callable[[np.ndarray, Page], np.ndarray]  # replaces missing values, or refuses them


def read_tiff(data: bytes, reading: Reading, resize: int | None, notes: Notes, fill: Fill) -> Iterator[Page]:
    """Pages of a TIFF, of which `reading.pages` decides. Overviews, thumbnails and masks are no pages.

    With `resize`, a page over the limit of `reading.max_pixels` is reduced strip by strip or tile by tile to at least
    twice the shorter side; `fill` is applied before.

    Raises `ImageError`: damaged, of an unsupported kind, too large, or of several pages without `reading.pages`.
    """
    with damage_as_error("a damaged TIFF"), TiffFile(io.BytesIO(data)) as tif:
        pages, depth, several = _chosen_pages(tif, reading, notes)
        found = (_read_page(tif, page, reading, resize, fill) for page in pages)
        for number, page in enumerate(found if depth == 1 else _slices(tif, pages[0], depth, reading), 1):
            yield replace(page, number=number) if several else page
            if not several:
                return


def tiff_views(file: BinaryIO, reading: Reading, tile: int, notes: Notes) -> Iterator[View]:
    """Pages as `read_tiff`, whose regions are read from the file; slices of a volume are in memory together.

    Rows of `tile` pixels' height have to fit the limit of decoded bytes. Raises `ImageError` as `read_tiff`.
    """
    with damage_as_error("a damaged TIFF"), TiffFile(file) as tif:
        pages, depth, several = _chosen_pages(tif, reading, notes)
        volume = lru_cache(1)(lambda: list(_slices(tif, pages[0], depth, reading)))
        for number in range(len(pages) * depth if several else 1):
            page = pages[0] if depth > 1 else pages[number]
            _check_kind(page)
            size = page.imagelength, page.imagewidth
            if depth > 1:
                yield View(size, lambda number=number: whole(volume()[number]), number + 1 if several else 0)
                continue
            check_band(size, tile + BLOCK_ROWS, _pixel_bytes(page), reading.max_pixels)
            yield View(size, partial(_open_page, tif, page, reading), number + 1 if several else 0)


def _open_page(tif: TiffFile, page: TiffPage, reading: Reading) -> tuple[int, Callable[[int, int, int, int], Page]]:
    read = tiff_regions(tif, page, reading.max_pixels)
    about = _as_page(page, np.empty((0, 0, page.samplesperpixel), page.dtype), reading)
    return about.orientation, lambda *region: _as_page(page, read(*region), reading)


def _chosen_pages(tif: TiffFile, reading: Reading, notes: Notes) -> tuple[list[TiffPage], int, bool]:
    """Pages that are neither overviews, thumbnails nor masks; slices in a single one; whether all are taken."""
    _check_chain(tif)
    pages = [page.aspage() for page in tif.pages]
    pages = [page for page in pages if not page.is_reduced and not page.subfiletype & 4] or pages[:1]
    if not pages:
        raise ImageError("not a readable image (a damaged TIFF)")
    depth = _stacked(tif, pages[0]) if len(pages) == 1 else 1
    if len(pages) * depth > 1 and reading.pages is None:
        raise ImageError(f"has {len(pages) * depth:,} pages: add --pages first or --pages all", PAGES)
    several = len(pages) * depth > 1 and reading.pages == "all"
    notes[FIRST_PAGE] += len(pages) * depth > 1 and not several
    return pages, depth, several


def _check_chain(tif: TiffFile) -> None:
    """Raise `ImageError` if the pages are a circle, in which tifffile would turn for ever."""
    file, kind, seen = tif.filehandle, tif.tiff, set()
    offset = tif.pages.first.offset
    while 0 < offset < file.size:
        if offset in seen:
            raise ImageError("not a readable image (a damaged TIFF: its pages are a circle)")
        seen.add(offset)
        file.seek(offset)
        head = file.read(kind.tagnosize)
        if len(head) < kind.tagnosize:
            return
        file.seek(struct.unpack(kind.tagnoformat, head)[0] * kind.tagsize, os.SEEK_CUR)
        following = file.read(kind.offsetsize)
        offset = struct.unpack(kind.offsetformat, following)[0] if len(following) == kind.offsetsize else 0


def _stacked(tif: TiffFile, page: TiffPage) -> int:
    """Number of slices that share the tags of one page."""
    if page.imagedepth > 1:
        return page.imagedepth
    if not (tif.is_imagej or tif.is_shaped or tif.is_stk) or not tif.series:
        return 1
    return max(1, int(np.prod(tif.series[0].shape)) // int(np.prod(page.shape)))


def _slices(tif: TiffFile, page: TiffPage, depth: int, reading: Reading) -> Iterator[Page]:
    """Slices of a volume."""
    _check_kind(page)
    check_size(page.imagelength * depth, page.imagewidth, _pixel_bytes(page), reading.max_pixels, ": split it")
    volume = page.asarray() if page.imagedepth > 1 else tif.series[0].asarray()
    channels = page.samplesperpixel
    volume = volume.reshape(channels, depth, page.imagelength, page.imagewidth) if page.planarconfig == 2 else volume
    volume = np.moveaxis(volume, 0, -1) if page.planarconfig == 2 else volume
    volume = volume.reshape(depth, page.imagelength, page.imagewidth, channels)
    for pixels in volume:
        yield _as_page(page, pixels, reading)


def _read_page(tif: TiffFile, page: TiffPage, reading: Reading, resize: int | None, fill: Fill) -> Page:
    _check_kind(page)
    size, pixel_bytes, limit = (page.imagelength, page.imagewidth), _pixel_bytes(page), reading.max_pixels
    too_large = max(size[0] * size[1], size[0] * size[1] * pixel_bytes // BYTES_PER_PIXEL) > limit
    factor = min(size) // (2 * resize) if resize else 1
    tile = int(np.prod(page.chunks)) * page.dtype.itemsize
    in_parts = page.colormap is None and (page.is_contiguous or tile <= limit * BYTES_PER_PIXEL)
    if not (too_large and in_parts and factor > 1):
        advice = f": add --max-pixels {raise_limit(*size, pixel_bytes)}"
        check_size(*size, pixel_bytes, limit, advice + (" or --resize" if in_parts and resize is None else ""))
        check_size(*page.chunks[:2], pixel_bytes, limit, advice)
        pixels = page.asarray()
        if page.planarconfig == 2 and page.samplesperpixel > 1:
            pixels = np.moveaxis(pixels, 0, -1)
        return _as_page(page, pixels.reshape(*size, -1), reading)
    read, rows = tiff_regions(tif, page, limit), range(0, size[0], REDUCED_ROWS)
    parts = ((read(row, 0, min(REDUCED_ROWS, size[0] - row), size[1]), row, 0, 0) for row in rows)
    about = _as_page(page, np.empty((0, 0, page.samplesperpixel), page.dtype), reading)
    if page.dtype == bool:
        parts = ((pixels.astype(np.uint8) * 255, *place) for pixels, *place in parts)
    filled = ((fill(pixels, about), *place) for pixels, *place in parts)
    dtype = np.dtype(np.uint8) if page.dtype == bool else page.dtype
    pixels = reduced(filled, size, page.samplesperpixel, dtype, factor)
    return replace(_as_page(page, pixels, reading), nodata=None)  # a mean may equal it


def _check_kind(page: TiffPage) -> None:
    """Raise `ImageError` for what tifffile cannot decode, or not as what it is."""
    if page.dtype is None:
        raise ImageError(f"a TIFF with {page.bitspersample} bits per sample is not supported: convert it", UNSUPPORTED)
    if page.compression not in tifffile.TIFF.DECOMPRESSORS:
        name = getattr(page.compression, "name", page.compression)
        raise ImageError(f"a TIFF with compression {name} is not supported: convert it", UNSUPPORTED)
    subsampled = page.photometric == PHOTOMETRIC.YCBCR and page.compression not in JPEG  # its decoder makes it RGB
    if page.photometric not in KNOWN or subsampled:
        name = getattr(page.photometric, "name", page.photometric)
        raise ImageError(f"a TIFF with {name} colours is not supported: convert it", UNSUPPORTED)


def _pixel_bytes(page: TiffPage) -> int:
    return page.samplesperpixel * page.dtype.itemsize


def _as_page(page: TiffPage, pixels: np.ndarray, reading: Reading) -> Page:
    """A page with what its tags say about the values."""
    inverted, value_range, bits = page.photometric == PHOTOMETRIC.MINISWHITE, None, page.bitspersample
    alpha = bool(page.extrasamples) and page.extrasamples[-1] in ALPHA
    if page.photometric == PHOTOMETRIC.PALETTE and page.colormap is not None:
        pixels = _coloured(pixels[..., 0], page.colormap)
    elif page.photometric == PHOTOMETRIC.SEPARATED:
        pixels, inverted = _from_inks(page, pixels), False
    elif pixels.dtype == np.uint8 and bits in (2, 4):
        pixels = pixels * (255 // ((1 << bits) - 1))
    elif pixels.dtype == np.uint16 and 8 < bits < 16:
        value_range = 0, (1 << bits) - 1
    if alpha and page.extrasamples[-1] == 1:
        pixels = _unassociated(pixels)
    bands = pixels.shape[2] - alpha
    alpha = alpha and bands == (3 if page.photometric == PHOTOMETRIC.RGB else 1)  # otherwise it is kept as a band
    turn = page.tags.valueof(ORIENTATION_TAG, 1)
    turn = int(turn) if turn in range(1, 9) and not reading.no_exif else 1
    return Page(pixels, value_range, _nodata(page), alpha, inverted, turn)


def _nodata(page: TiffPage) -> float | None:
    """The value of GDAL's tag for missing data."""
    try:
        return float(str(page.tags.valueof(NODATA_TAG, "")).strip("\0 "))
    except ValueError:
        return None


def _coloured(indices: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Colours [H, W, 3] of a palette [3, N] of 16 bits: uint8 if they have 8 bits."""
    pixels = np.moveaxis(colours[:, indices.astype(np.intp)], 0, -1)
    eight_bit = any((colours % unit == 0).all() for unit in (256, 257))
    return (pixels >> 8).astype(np.uint8) if eight_bit else pixels


def _from_inks(page: TiffPage, pixels: np.ndarray) -> np.ndarray:
    """CMYK as RGB."""
    if page.samplesperpixel != 4 or pixels.dtype not in (np.uint8, np.uint16):
        raise ImageError("a TIFF with inks other than 8-bit or 16-bit CMYK is not supported: convert it", UNSUPPORTED)
    full = np.iinfo(pixels.dtype).max
    light = (full - pixels).astype(np.float32)
    return np.rint(light[..., :3] * (light[..., 3:] / full)).astype(pixels.dtype)


def _unassociated(pixels: np.ndarray) -> np.ndarray:
    """Colours divided by their alpha, with which an associated one has multiplied them."""
    if pixels.dtype.kind != "u":
        return pixels
    full = np.iinfo(pixels.dtype).max
    alpha = np.maximum(pixels[..., -1:], 1).astype(np.float64)
    colours = np.rint(pixels[..., :-1] * float(full) / alpha).clip(0, full).astype(pixels.dtype)
    return np.concatenate([colours, pixels[..., -1:]], 2)
