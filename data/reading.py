"""How images of a source are read: options, refusals by kind, one image as it is stored. Free of torch."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from configs.errors import UserError
from configs.keys import option, require
from data.cache import RemoteUserError

HEAD_BYTES = 132  # of a file, from which `sniff` knows its type
MAX_PIXELS = 178_956_970  # the size at which PIL refuses pictures as decompression bombs
BYTES_PER_PIXEL = 4  # allowed for each pixel of the limit: RGBA, or one float32
MAX_FILE_BYTES = 1 << 30  # of a file that is read whole: a small zip or sparse file may hold more than the memory
DAMAGED, TOO_LARGE, UNSUPPORTED, NO_IMAGE = "damaged", "too large", "unsupported", "not an image"  # kinds of refusals
UNREADABLE = "cannot be read"  # the disk or the permissions, not the image
CHANNELS, PAGES, VALUES, NODATA = "wrong channels", "needs --pages", "needs --value-range", "needs --nodata"
NO_MASK, MASK_SIZE, MASK_CLASS = (
    "with an unreadable mask",
    "with a mask of another size",
    "with a mask of unknown classes",
)
BOXES = "with boxes of another size"
KINDS = (
    DAMAGED, TOO_LARGE, UNSUPPORTED, NO_IMAGE, CHANNELS, PAGES, VALUES, NODATA, NO_MASK, MASK_SIZE, MASK_CLASS, BOXES,
)  # fmt: skip
NEED_OPTION = (PAGES, VALUES, NODATA)  # of the user, before a collection can be written

FIRST_PAGE = "{:file has|files have} several pages or frames: only the first was taken (--pages first)"
FIRST_FRAME = "{:picture has|pictures have} several frames or images: only the first one is used"
AVIF, HEIF = {b"avif", b"avis"}, {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}  # brands
KEPT = ("jpg", "png", "webp", "gif")  # pictures that the loader decodes
Notes = Counter  # line with a place for its number, formatted as `Plural` -> number
PixelLimit = Annotated[int, Field(ge=1, le=1 << 34)]


class ImageError(UserError):
    """An image that cannot be used. `kind` is the reason in a few words, by which refusals are counted.

    `found` is the range of its values if `kind` is `VALUES`.
    """

    def __init__(self, message: str, kind: str = DAMAGED, found: tuple[float, float] | None = None):
        super().__init__(message)
        self.kind, self.found = kind, found


class Plural(int):
    """A number that is formatted with its words: `{:image is|images are}` -> 1 image is, 1,200 images are."""

    def __format__(self, spec: str) -> str:
        one, _, more = spec.partition("|")
        return f"{int(self):,} {one if self == 1 else more}"


@dataclass(frozen=True)
class Reading:
    """What the user has decided about files that can be read in several ways."""

    pages: Literal["first", "all"] | None = option(
        None, "of files with several pages, slices or frames (TIFF, DICOM): the first one, or all as images NAME#1, ..."
    )
    value_range: tuple[float, float] | None = option(
        None, "LOW HIGH: values that become 0 and 1, for images of more than 8 bits; others are clipped"
    )
    nodata: float | Literal["nan"] | None = option(
        None, "replace NaN, infinity, the nodata value that a file declares, and this value (or nan) by LOW, or 0"
    )
    max_pixels: PixelLimit = option(MAX_PIXELS, "refuse larger images; decoded bytes are limited to 4 per pixel")
    no_exif: bool = option(False, "do not turn images by their EXIF orientation; their EXIF data are removed")

    def __post_init__(self):
        if self.value_range is not None:
            low, high = self.value_range
            given = " ".join(map(number, self.value_range))
            require(-math.inf < low < high < math.inf, "--value-range", given, "two numbers, LOW below HIGH")

    @property
    def max_file_bytes(self) -> int:
        """Encoded bytes of a file that is read whole."""
        return max(MAX_FILE_BYTES, self.max_pixels * BYTES_PER_PIXEL)

    @property
    def as_stored(self) -> bool:
        """Whether files that the loader decodes are taken as they are."""
        return not self.no_exif and self.value_range is None and self.nodata in (None, "nan")


@dataclass(frozen=True)
class FileOptions(Reading):
    """How files of images are read by a command that has one result for a file."""

    def __post_init__(self):
        super().__post_init__()
        require(self.pages != "all", "--pages", self.pages, "first: a file has one result, shards may have all pages")


def reading_of(options: Reading) -> Reading:
    """The reading options of a command."""
    return Reading(**{field.name: getattr(options, field.name) for field in fields(Reading)})


@dataclass(frozen=True, eq=False)
class Page:
    """One image of a file, as stored: `pixels` [H, W, C] of any numeric type.

    `value_range` are the values that mean 0 and 1 if the file says so, `nodata` its value for missing data. The last
    channel of `alpha` images is opacity. `inverted`: low values are bright. `deep_png`: 16 bits that stay a PNG.
    `number` counts the pages of a file with several from 1, 0 = a single one.
    """

    pixels: np.ndarray
    value_range: tuple[float, float] | None = None
    nodata: float | None = None
    alpha: bool = False
    inverted: bool = False
    orientation: int = 1
    deep_png: bool = False
    number: int = 0


@contextmanager
def damage_as_error(what: str = "damaged or cut short") -> Iterator[None]:
    """Turn what decoders raise into `ImageError`."""
    try:
        yield
    except (ImageError, RemoteUserError):
        raise
    except MemoryError:
        raise ImageError("needs more memory than there is", TOO_LARGE) from None
    except Exception:  # damaged files raise almost any exception
        raise ImageError(f"not a readable image ({what})") from None


def number(value: float) -> str:
    """A number as short as possible, for messages and command lines."""
    return str(int(value)) if math.isfinite(value) and value == int(value) else str(value)


def check_size(height: int, width: int, pixel_bytes: int, max_pixels: int, advice: str = "") -> None:
    """Raise `ImageError` for more than `max_pixels`, or for more decoded bytes than `BYTES_PER_PIXEL` times as many."""
    pixels, limit = height * width, max_pixels * BYTES_PER_PIXEL
    if pixels > max_pixels:
        problem = f"has {pixels:,} pixels, more than the limit of {max_pixels:,} pixels"
    elif pixels * pixel_bytes > limit:
        problem = f"has {pixels:,} pixels of {pixel_bytes} bytes, more than the limit of {limit:,} bytes"
    else:
        return
    raise ImageError(problem + advice, TOO_LARGE)


def check_file_size(size: int, max_bytes: int) -> None:
    """Raise `ImageError` for a file of more than `max_bytes`, see `Reading.max_file_bytes`."""
    if size > max_bytes:
        problem = f"has {size:,} bytes, more than the limit of {max_bytes:,} bytes"
        raise ImageError(f"{problem}: add --max-pixels {-(-size // BYTES_PER_PIXEL)} if it is an image", TOO_LARGE)


def raise_limit(height: int, width: int, pixel_bytes: int) -> str:
    """The value of `--max-pixels` that allows an image, rounded up to two digits."""
    needed = max(height * width, -(-height * width * pixel_bytes // BYTES_PER_PIXEL))
    unit = 10 ** max(0, len(str(needed)) - 2)
    return str(-(-needed // unit) * unit)


def sniff(data: bytes) -> str:
    """Type of a file by its first bytes: jpg, png, webp, gif, npy, tif, dcm, heif, avif, jp2 or pnm; `` = another."""
    for kind, start in (("jpg", b"\xff\xd8\xff"), ("png", b"\x89PNG\r\n\x1a\n"), ("npy", b"\x93NUMPY")):
        if data.startswith(start):
            return kind
    if data[:4] == b"GIF8":
        return "gif"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tif"
    if data[128:132] == b"DICM":
        return "dcm"
    if data[4:8] == b"ftyp":
        brands = {data[at : at + 4] for at in range(8, min(int.from_bytes(data[:4], "big"), len(data)), 4)}
        return "avif" if brands & AVIF else "heif" if brands & HEIF else ""  # "": a video
    if data[4:12] == b"jP  \r\n\x87\n" or data[:4] == b"\xff\x4f\xff\x51":
        return "jp2"
    if data[:1] == b"P" and data[1:2] in b"123456" and data[2:3].isspace():
        return "pnm"
    return ""
