"""Masks of semantic segmentation: names of their classes, reading, sizes, writing. Free of torch.

A mask in a shard is a PNG [H, W] of 8 bits, or 16 bits for more than 255 classes. Its values are classes; the highest
value (255 or 65535) marks pixels without a class.
"""

import colorsys
import csv
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from configs.errors import UserError, printable
from configs.style import AREAS
from data.cache import RemoteUserError
from data.exif import orientation, swaps, upright
from data.reading import (
    KEPT,
    MASK_CLASS,
    MASK_SIZE,
    MAX_PIXELS,
    NO_MASK,
    UNSUPPORTED,
    ImageError,
    Notes,
    check_size,
    sniff,
)
from data.sources import Item

if TYPE_CHECKING:
    from data.planning import PrepareOptions
    from data.tiles import Tile

FORMATS = ("PNG", "GIF", "BMP", "TIFF", "WEBP")  # read by PIL; TIFF by tifffile
IGNORE = "ignore"  # name of rows whose colour or value is no class
MAX_CLASSES = 65535
SHOWN = 12  # values in a message
GOLDEN = 0.618034  # step of the hue: neighbouring classes get distant colours


@dataclass(frozen=True, eq=False)
class MaskClasses:
    """Names of the classes, and how a mask stores them.

    `values` [N] are sorted values, or colours as 0xRRGGBB, of the classes `numbers` [N] (-1 = none); None = a value is
    its class. `ignore` are further values without a class.
    """

    names: list[str]
    ignore: tuple[int, ...]
    values: np.ndarray | None = None
    numbers: np.ndarray | None = None
    coloured: bool = False

    @property
    def dtype(self) -> type:
        """Type of stored masks."""
        return np.uint8 if len(self.names) <= 255 else np.uint16

    @property
    def void(self) -> int:
        """Stored value of pixels without a class."""
        return int(np.iinfo(self.dtype).max)


def read_classes(path: Path, ignore: tuple[int, ...]) -> MaskClasses:
    """Read `--mask-classes`: a name a line, or csv with `name,value` or `name,r,g,b`; see docs/data.md.

    Raises `UserError` for a file that cannot be read, or with contradicting lines.
    """
    try:
        return _parse_classes(path.read_text("utf-8-sig"), path, ignore)
    except (OSError, UnicodeDecodeError):
        way_out = "give a text file in UTF-8 with the name of a class in each line"
        raise UserError(f"{path} cannot be read: {way_out}") from None


@lru_cache(1)
def _parse_classes(text: str, path: Path, ignore: tuple[int, ...]) -> MaskClasses:
    lines = text.splitlines()
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines) if any(cell.strip() for cell in row)]
    header = rows[0][1:] if rows else []
    if [cell.lower() for cell in header] in (["value"], ["r", "g", "b"]):
        rows = rows[1:]
    else:
        header = header if header and all(cell.isdecimal() for cell in header) else []
    if not rows:
        raise UserError(f"{path} is empty: write the name of a class in each line")
    if len(header) not in (1, 3):
        names = [line.strip() for line in lines if line.strip()]
        if wrong := next((name for name in names if re.search(r"[;\t]\s*\d+$", name)), None):
            raise UserError(f"{path}: {printable(wrong)}: separate name and value by a comma, as `name,value`")
        if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
            raise UserError(f"{path} names {printable(twice)} twice: rename one, or give values as `name,value`")
        return MaskClasses(_checked(names, path), ignore)
    width, names, found = len(header), [], {}
    for row in rows:
        cells, limit = row[-width:], 255 if width == 3 else MAX_CLASSES
        if len(row) != 1 + width or not all(cell.isdecimal() and int(cell) <= limit for cell in cells):
            form = "name,r,g,b" if width == 3 else "name,value"
            raise UserError(f"{path}: {printable(','.join(row))} is not `{form}` with numbers up to {limit}")
        value = int(cells[0]) if width == 1 else int.from_bytes(bytes(map(int, cells)), "big")
        if value in found:
            raise UserError(f"{path} gives {','.join(cells)} to two classes: remove one line")
        if row[0].lower() == IGNORE:
            found[value] = -1
            continue
        names += [row[0]] if row[0] not in names else []
        found[value] = names.index(row[0])
    values = np.array(sorted(found), np.int64)
    numbers = np.array([found[value] for value in values.tolist()], np.int64)
    return MaskClasses(_checked(names, path), ignore, values, numbers, width == 3)


def _checked(names: list[str], path: Path) -> list[str]:
    if not 0 < len(names) < MAX_CLASSES:
        raise UserError(f"{path} has {len(names):,} classes: give 1 to {MAX_CLASSES - 1:,}")
    return names


def read_pixels(data: bytes, max_pixels: int, coloured: bool = False) -> np.ndarray:
    """Values of a mask [H, W], or with `coloured` its colours as 0xRRGGBB. Of a palette PNG the values are its indices.

    Raises `ImageError` if it is not an image of whole numbers.
    """
    kind = sniff(data)
    try:
        if kind == "npy":
            from data.decode import read_npy  # imports torch

            pixels = read_npy(data)
        elif kind == "tif":
            import tifffile

            with tifffile.TiffFile(io.BytesIO(data)) as file:
                page = file.pages[0]
                check_size(page.imagelength, page.imagewidth, page.dtype.itemsize * page.samplesperpixel, max_pixels)
                pixels = page.asarray()
        elif kind == "jpg":
            raise ImageError("its mask is a JPEG, which changes values: save it as PNG", NO_MASK)
        else:
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                check_size(picture.height, picture.width, len(picture.getbands()), max_pixels)
                if coloured or picture.mode in ("RGBA", "LA", "PA"):
                    picture = picture.convert("RGB")
                pixels = np.asarray(picture)
    except ImageError:
        raise
    except Exception:  # damaged files raise almost any exception in PIL
        raise ImageError("its mask is not a readable image (damaged or cut short)", NO_MASK) from None
    pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    if pixels.dtype.kind not in "uib" or (pixels.dtype.kind == "i" and pixels.size and pixels.min() < 0):
        raise ImageError(f"its mask has values of type {pixels.dtype}, not whole numbers from 0", NO_MASK)
    if coloured:
        pixels = pixels[..., None].repeat(3, 2) if pixels.ndim == 2 else pixels
        if pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8:
            return pixels.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
        raise ImageError(f"its mask is not a colour image but {pixels.dtype} {pixels.shape}", NO_MASK)
    if pixels.ndim != 2:
        if pixels.ndim == 3 and pixels.shape[2] == 3 and (pixels == pixels[..., :1]).all():
            return pixels[..., 0]  # grey, stored as colour
        raise ImageError("its mask is a colour image: give its colours as `name,r,g,b` in --mask-classes", NO_MASK)
    return pixels


def read_mask(data: bytes, classes: MaskClasses, max_pixels: int) -> np.ndarray:
    """A mask [H, W] as it is stored. Raises `ImageError` if it is none, or for a value that is no class."""
    pixels = read_pixels(data, max_pixels, classes.coloured)
    void = np.isin(pixels, classes.ignore) if not classes.coloured else np.zeros(pixels.shape, bool)
    if classes.values is None:
        numbers, known = pixels, pixels < len(classes.names)
    else:
        place = np.searchsorted(classes.values, pixels).clip(max=len(classes.values) - 1)
        known, numbers = classes.values[place] == pixels, classes.numbers[place]
        void |= known & (numbers < 0)
    if not (known | void).all():
        unknown = np.unique(pixels[~(known | void)]).tolist()
        shown = ", ".join(f"#{value:06x}" if classes.coloured else str(value) for value in unknown[:SHOWN])
        what = "colours" if classes.coloured else "values"
        count = f"{len(classes.names)} classes of --mask-classes"
        way_out = "" if classes.coloured else " (--ignore leaves values out)"
        raise ImageError(f"its mask has {what} {shown}, which are not of the {count}{way_out}", MASK_CLASS)
    return np.where(void, classes.void, numbers).astype(classes.dtype)


def encode_mask(mask: np.ndarray) -> bytes:
    """A mask [H, W] as PNG."""
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(mask)).save(out, "png")
    return out.getvalue()


def decode_mask(data: bytes) -> np.ndarray:
    """The mask [H, W] of a shard. Raises `UserError` if it is damaged."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            check_size(picture.height, picture.width, 1, 4 * MAX_PIXELS)  # no decompression bomb
            mask = np.array(picture)
    except ImageError:
        raise
    except Exception:
        raise UserError("its mask is not a readable PNG") from None
    if mask.ndim != 2 or mask.dtype not in (np.uint8, np.uint16, np.int32):  # int32: 16 bits in some versions of PIL
        raise UserError(f"its mask has values of type {mask.dtype} and shape {mask.shape}, not 8 or 16 bits [H, W]")
    return mask


def shrink_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A mask at another size: the value nearest to each pixel's centre."""
    rows, columns = ((np.arange(n) + 0.5) * old / n for n, old in ((height, mask.shape[0]), (width, mask.shape[1])))
    return mask[rows.astype(int)[:, None], columns.astype(int)]


def cut_mask(mask: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    """The part of a mask under a tile of its image; beyond the border, pixels have no class."""
    part = mask[max(0, top) : max(0, top + height), max(0, left) : max(0, left + width)]
    void = np.full((height, width), np.iinfo(mask.dtype).max, mask.dtype)
    y, x = max(0, -top), max(0, -left)
    void[y : y + part.shape[0], x : x + part.shape[1]] = part
    return void


def with_masks(
    images: Iterator[tuple], data: bytes, item: Item, options: "PrepareOptions"
) -> Iterator[tuple[str, tuple[str, bytes] | ImageError, bytes | None]]:
    """What `reencode_all` yields for a file with content `data`, with the PNG of the image's mask, None without one.

    An image whose mask cannot be used is an `ImageError`.
    """
    for name, image in images:
        mask = None
        if item.mask and not isinstance(image, ImageError):
            try:
                mask = encode_mask(_mask_of(image, name, data, item, options))
            except RemoteUserError:
                raise
            except ImageError as error:
                image = error
            except UserError as error:
                image = ImageError(f"its mask {error}", NO_MASK)
        yield name, image, mask


def with_tile_masks(
    tiles: Iterable["Tile"], item: Item, options: "PrepareOptions"
) -> Iterator[tuple[str, tuple[str, bytes] | ImageError, dict, bytes | None]]:
    """(name, image, place, mask) of the tiles of a file; the mask is cut as its image."""
    whole = None
    for name, image, place in tiles:
        mask = None
        if item.mask and not isinstance(image, ImageError):
            try:
                whole = _whole_mask(item, (place["height"], place["width"]), options) if whole is None else whole
                mask = encode_mask(cut_mask(whole, place["y"], place["x"], *image_size(*image)))
            except RemoteUserError:
                raise
            except ImageError as error:
                image = error
            except UserError as error:
                image = ImageError(f"its mask {error}", NO_MASK)
        yield name, image, place, mask


def _read(mask: Item, options: "PrepareOptions") -> np.ndarray:
    data, classes = mask.image_bytes(options.max_file_bytes), read_classes(options.mask_classes, options.ignore)
    return read_mask(data, classes, options.max_pixels)


def _whole_mask(item: Item, size: tuple[int, int], options: "PrepareOptions") -> np.ndarray:
    """The mask of an image of upright `size` that is cut into tiles."""
    if not options.no_exif and orientation(item.head(1 << 16)) != 1:
        raise ImageError("is turned by EXIF: save image and mask upright to cut them into tiles", UNSUPPORTED)
    mask = _read(item.mask, options)
    if mask.shape != size:
        sizes = "{1}x{0} pixels, the image {3}x{2}".format(*mask.shape, *size)
        raise ImageError(f"its mask {printable(item.mask.name)} has {sizes}", MASK_SIZE)
    return mask


def _mask_of(image: tuple[str, bytes], name: str, data: bytes, item: Item, options: "PrepareOptions") -> np.ndarray:
    """The mask of an encoded image, upright and of its size."""
    if name != item.name:
        raise ImageError("is one of several pages, but has one mask: use --pages first", UNSUPPORTED)
    mask = _read(item.mask, options)
    stored = full = image_size(*image)
    if options.resize:
        from data.reencode import reencode  # imports torch

        kept = sniff(data) in KEPT and not options.no_exif
        full = image_size(*((sniff(data), data) if kept else reencode(data, name, reading=options, notes=Notes())))
    turn = 1 if options.no_exif or sniff(data) not in KEPT else orientation(data)
    if turn != 1:
        if not swaps(turn) or full[0] == full[1]:
            problem = "has an EXIF rotation, and its size cannot show whether its mask is rotated too"
            raise ImageError(
                f"{problem}: save both upright, or use --no-exif if masks fit the stored pixels", UNSUPPORTED
            )
        mask = upright(mask, turn) if mask.shape == full[::-1] else mask
    if mask.shape != full:
        sizes = "{1}x{0} pixels, the image {3}x{2}".format(*mask.shape, *full)
        raise ImageError(f"its mask {printable(item.mask.name)} has {sizes}", MASK_SIZE)
    return mask if stored == full else shrink_mask(mask, *stored)


def image_size(kind: str, data: bytes) -> tuple[int, int]:
    """Height and width of an encoded image, upright."""
    if kind == "npy":
        from data.decode import read_npy  # imports torch

        return read_npy(data).shape[:2]
    with Image.open(io.BytesIO(data)) as picture:
        return picture.size if swaps(orientation(data)) else picture.size[::-1]


def class_colours(count: int) -> np.ndarray:
    """Distinct colours of classes, uint8 [count, 3]: the first few are so for colour-blind readers too."""
    tones = ((i * GOLDEN % 1, 0.85 if i % 2 else 0.6, (1.0, 0.75, 0.55)[i // 7 % 3]) for i in range(count))
    colours = (255 * np.array([colorsys.hsv_to_rgb(*tone) for tone in tones])).round().astype(np.uint8)
    known = [list(bytes.fromhex(colour[1:])) for colour in AREAS[:count]]
    colours[: len(known)] = known
    return colours


def overlay(pixels: np.ndarray, mask: np.ndarray, classes: int, strength: float = 0.55) -> np.ndarray:
    """An image [H, W, 3] in the colours of its mask [H, W]; pixels without a class (`classes` and above) stay grey."""
    grey = np.repeat(pixels.mean(2, keepdims=True), 3, 2)
    colours = class_colours(classes)[np.minimum(mask, classes - 1)]
    shown = np.where((mask < classes)[..., None], (1 - strength) * pixels + strength * colours, 0.5 * grey)
    return shown.round().astype(np.uint8)
