"""From the values that a file stores to those of a shard: missing data, range, depth, size, encoding.

8 bits, grey or RGB, perhaps with alpha    PNG, or JPEG by quality
16 bits from a PNG, or with alpha          PNG
everything else                            .npy [H, W, C]: uint8, uint16, or float32 from 0 to 1
"""

import io
from collections.abc import Iterable

import imagecodecs
import numpy as np
from PIL import Image

from data.exif import upright
from data.reading import NODATA, UNSUPPORTED, VALUES, ImageError, Notes, Page, Reading, number

PLAIN = (np.uint8, np.uint16)  # types whose range is the range of values
LARGE = 1 << 24  # pixels; resizing needs a copy in floats, so larger arrays are reduced first
CLIPPED = "{:,} values outside of the range of values were clipped"
REPLACED = "{:,} values without data were replaced by the lowest value"


def encode_page(
    page: Page, resize: int | None, quality: int | None, reading: Reading, notes: Notes
) -> tuple[str, bytes]:
    """Member type and bytes of an image in a shard; counts and errors as `final_pixels`."""
    pixels, alpha = final_pixels(page, resize, reading, notes)
    return encode(pixels, alpha, page.deep_png, quality)


def final_pixels(page: Page, resize: int | None, reading: Reading, notes: Notes) -> tuple[np.ndarray, bool]:
    """Pixels [H, W, C] as a shard stores them, and whether the last channel is opacity.

    What was changed is counted in `notes`. Raises `ImageError` if the range of the values or missing data need a
    decision, or the type has no range.
    """
    pixels = page.pixels.astype(np.uint8) * 255 if page.pixels.dtype == bool else page.pixels
    if pixels.dtype.kind not in "uif" or 0 in pixels.shape:
        kind = f"{pixels.dtype} values of shape {pixels.shape}"
        raise ImageError(f"has {kind}, which cannot be used: convert them to .npy", UNSUPPORTED)
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    colours, opacity = np.split(pixels, [-1], axis=2) if page.alpha else (pixels, None)
    colours = fill_missing(colours, page, reading, notes)
    if limits := _limits(colours.dtype, page, reading):
        colours = _mapped(colours, limits, notes)
    if page.inverted:
        colours = (1 if colours.dtype.kind == "f" else np.iinfo(colours.dtype).max) - colours
    alpha = opacity is not None and opacity.dtype == colours.dtype and colours.dtype in PLAIN
    if opacity is not None and not alpha:
        notes["{:,} images lost their alpha channel: it has neither 8 nor 16 bits"] += 1
    pixels = upright(np.concatenate([colours, opacity], axis=2) if alpha else colours, page.orientation)
    if resize is not None and min(pixels.shape[:2]) > resize:
        pixels = shrink(pixels, resize)
    return np.ascontiguousarray(pixels), alpha


def fill_missing(pixels: np.ndarray, page: Page, reading: Reading, notes: Notes) -> np.ndarray:
    """Pixels whose missing values are replaced by the lowest one.

    Missing are NaN, infinity, the file's nodata value and that of `--nodata`. Raises `ImageError` for missing values
    without `--nodata` and for values without a range, with both remedies.
    """
    missing = _missing(pixels, page.nodata, reading.nodata)
    limits = _limits(pixels.dtype, page, reading)
    found = None if limits or pixels.dtype in PLAIN else _found(pixels, missing)
    low = limits[0] if limits else found[0] if found else 0
    if missing is not None and pixels.dtype in PLAIN and not limits and (pixels[missing] == 0).all():
        missing = None  # they have the lowest value already
    undecided = missing is not None and reading.nodata is None
    if found or undecided:
        without = pixels[missing] if undecided else pixels[:0]
        raise _undecided(pixels.dtype, found, without.size, _kinds(without))
    if missing is None:
        return pixels
    notes[REPLACED] += int(missing.sum())
    return np.where(missing, np.asarray(low).astype(pixels.dtype), pixels)


def share_without_data(page: Page, reading: Reading) -> float:
    """Share of the pixels that are transparent or missing in all bands, see `fill_missing`."""
    colours, opacity = np.split(page.pixels, [-1], axis=2) if page.alpha else (page.pixels, None)
    missing = _missing(colours, page.nodata, reading.nodata)
    absent = np.zeros(colours.shape[:2], bool) if missing is None else missing.all(2)
    return float((absent if opacity is None else absent | (opacity[..., 0] == 0)).mean())


def undecided_range(pages: Iterable[Page], reading: Reading) -> ImageError | None:
    """The error of `fill_missing` for an image that comes in parts, with the range of all of them; None without one."""
    found, count, kinds, dtype = [], 0, set(), None
    for page in pages:
        colours = page.pixels[..., :-1] if page.alpha else page.pixels
        try:
            fill_missing(colours, page, reading, Notes())
        except ImageError as error:
            dtype = colours.dtype
            missing = _missing(colours, page.nodata, reading.nodata)
            if error.found and (missing is None or not missing.all()):
                found.append(error.found)
            if missing is not None and reading.nodata is None:
                count += int(missing.sum())
                kinds |= _kinds(colours[missing])
    if dtype is None:
        return None
    return _undecided(dtype, (min(a for a, _ in found), max(b for _, b in found)) if found else None, count, kinds)


def _limits(dtype: np.dtype, page: Page, reading: Reading) -> tuple[float, float] | None:
    """The values that become 0 and 1; None = those of the type, or not known."""
    given = None if dtype == np.uint8 else reading.value_range
    return given or page.value_range


def _missing(pixels: np.ndarray, declared: float | None, given: float | str | None) -> np.ndarray | None:
    """Bools like `pixels`: where data are missing; None = nowhere."""
    floats = pixels.dtype.kind == "f"
    missing = ~np.isfinite(pixels) if floats else None
    for value in {declared, given} - {None, "nan"}:
        if np.isfinite(value) and (floats or value == int(value)):
            equal = pixels == (pixels.dtype.type(value) if floats else int(value))
            missing = equal if missing is None else missing | equal
    return missing if missing is not None and missing.any() else None


def _found(pixels: np.ndarray, missing: np.ndarray | None) -> tuple[float, float]:
    """Range of the values that are not missing; floats from 0 to 1 count as already scaled."""
    values = pixels if missing is None else pixels[~missing]
    if not values.size:
        return 0, 1
    low, high = values.min(), values.max()
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        return 0, 1
    low, high = (float(str(value)) if values.dtype.kind == "f" else int(value) for value in (low, high))
    return low, high if high > low else low + 1


def _kinds(missing: np.ndarray) -> set[str]:
    """A few of the values that mean missing data."""
    return {"NaN" if np.isnan(v) else number(float(v)) for v in np.unique(missing)[:3]}


def _undecided(dtype: np.dtype, found: tuple[float, float] | None, count: int, kinds: set[str]) -> ImageError:
    problems, options = [], []
    if found:
        low, high = map(number, found)
        problems.append(f"{dtype} values from {low} to {high}")
        options.append(f"--value-range {low} {high}")
    if count:
        problems.append(f"{count:,} {'value' if count == 1 else 'values'} without data ({', '.join(sorted(kinds))})")
        options.append("--nodata nan")
    return ImageError(f"has {' and '.join(problems)}: add {' '.join(options)}", VALUES if found else NODATA, found)


def _mapped(pixels: np.ndarray, limits: tuple[float, float], notes: Notes) -> np.ndarray:
    """Values with `limits` mapped to 0 and 1: uint16 if that keeps all integers apart, else float32."""
    whole = pixels.dtype.kind in "ui" and limits[1] - limits[0] <= 65535
    work = np.float64 if pixels.dtype.itemsize > 2 and pixels.dtype != np.float32 else np.float32
    low, high = work(limits[0]), work(limits[1])
    values = pixels.astype(work)
    if clipped := int(np.count_nonzero((values < low) | (values > high))):
        notes[CLIPPED] += clipped
    values -= low
    values /= high - low
    np.clip(values, 0, 1, out=values)
    notes[f"{{:,}} images of {pixels.dtype} values: {number(limits[0])} to {number(limits[1])} became 0 to 1"] += 1
    if whole:
        values *= 65535
        return np.rint(values, out=values).astype(np.uint16)
    return values.astype(np.float32, copy=False)


def shrink(pixels: np.ndarray, shorter: int) -> np.ndarray:
    """Bicubic resize of [H, W, C] to a shorter side, at the same depth and within the range of the values."""
    factor = min(pixels.shape[:2]) // (2 * shorter)
    if pixels.dtype != np.uint8 and pixels[..., 0].size > LARGE and factor > 1:
        rows = range(0, len(pixels), 256)
        parts = ((pixels[row : row + 256], row, 0, 0) for row in rows)
        pixels = reduced(parts, pixels.shape[:2], pixels.shape[2], pixels.dtype, factor)
    scale = shorter / min(pixels.shape[:2])
    size = [max(shorter, round(side * scale)) for side in pixels.shape[1::-1]]
    bands = []
    for band in np.moveaxis(pixels, 2, 0):
        band = np.ascontiguousarray(band if pixels.dtype == np.uint8 else band.astype(np.float32))
        small = np.asarray(Image.fromarray(band).resize(size, Image.Resampling.BICUBIC))
        if pixels.dtype != np.uint8:
            small = (np.rint(small) if pixels.dtype.kind in "ui" else small).clip(band.min(), band.max())
        bands.append(small.astype(pixels.dtype))
    return np.stack(bands, 2)


def reduced(
    parts: Iterable[tuple[np.ndarray, int, int, int]],
    size: tuple[int, int],
    channels: int,
    dtype: np.dtype,
    factor: int,
) -> np.ndarray:
    """Means of blocks of `factor` x `factor` pixels, [H / factor, W / factor, C] rounded up, in the pixels' type.

    The picture of `size` comes in parts: (pixels [h, w, C], row, column, first channel).
    """
    shape = -(-size[0] // factor), -(-size[1] // factor)
    sums, counts = np.zeros((*shape, channels)), np.zeros((*shape, channels), np.int64)
    for pixels, row, column, channel in parts:
        blocks = []
        for axis, first in enumerate((row, column)):
            block = (first + np.arange(pixels.shape[axis])) // factor
            starts = np.flatnonzero(np.diff(block, prepend=-1))
            pixels = np.add.reduceat(pixels, starts, axis, np.float64)
            blocks.append((block[starts], np.diff(starts, append=len(block))))
        (ys, heights), (xs, widths) = blocks
        place = np.s_[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1, channel : channel + pixels.shape[2]]
        sums[place] += pixels
        counts[place] += np.outer(heights, widths)[..., None]
    means = sums / counts
    return (np.rint(means) if dtype.kind in "ui" else means).astype(dtype)


def encode(pixels: np.ndarray, alpha: bool, deep_png: bool, quality: int | None) -> tuple[str, bytes]:
    """Member type and bytes of final pixels."""
    channels, out = pixels.shape[2], io.BytesIO()
    if pixels.dtype == np.uint16 and (deep_png or alpha) and channels <= 4:
        return "png", imagecodecs.png_encode(pixels)
    if pixels.dtype == np.uint8 and channels - alpha in (1, 3):
        picture = Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels)
        if quality is not None and not alpha:
            picture.save(out, "jpeg", quality=quality)
            return "jpg", out.getvalue()
        picture.save(out, "png")
        return "png", out.getvalue()
    np.save(out, pixels, allow_pickle=False)
    return "npy", out.getvalue()
