"""Re-encode an image of a source for a shard. Imports torch."""

import io
from collections.abc import Iterator

import imagecodecs
import numpy as np
from PIL import Image

from configs.errors import UserError
from data.decode import PIL_FORMATS, decode, is_deep, is_direct, read_npy, read_png, unreadable
from data.exif import orientation, without_exif
from data.reading import (
    BYTES_PER_PIXEL,
    FIRST_FRAME,
    KEPT,
    TOO_LARGE,
    UNSUPPORTED,
    ImageError,
    Notes,
    Page,
    Reading,
    check_size,
    raise_limit,
    sniff,
)
from data.values import PLAIN, encode_page, fill_missing

NOT_TURNED = "{:image was not turned by its|images were not turned by their} EXIF orientation (--no-exif)"
MAX_FIRST = 16  # a first axis up to this length may be of channels
JPEG_QUALITY = 95  # of JPEGs whose pixels change
Encoded = tuple[str, bytes]  # member type and content


def reencode(
    data: bytes,
    name: str,
    resize: int | None = None,
    quality: int | None = None,
    reading: Reading = Reading(),  # noqa: B008  # immutable
    notes: Notes | None = None,
) -> Encoded:
    """Member type and bytes of one image in a shard, as `reencode_all`; of several pages the first.

    Raises `ImageError` if the image cannot be used.
    """
    _, image = next(reencode_all(data, name, resize, quality, reading, Notes() if notes is None else notes))
    if isinstance(image, ImageError):
        raise image
    return image


def reencode_all(
    data: bytes, name: str, resize: int | None, quality: int | None, reading: Reading, notes: Notes
) -> Iterator[tuple[str, Encoded | ImageError]]:
    """Name of each image of a file, and what a shard stores of it or why it cannot be used.

    Every image is decoded, so that no damaged one gets in. The content decides the type, not the suffix. Bytes that
    the loader can decode are kept unless an option changes their pixels; others are converted without loss, see
    `data.values`.

    Args:
        name: of the file; pages of several have `#1`, `#2`, ... appended
        resize: maximum length of the shorter side, pixels; larger images are shrunk; None = keep the size
        quality: JPEG quality; None = re-encode only what is shrunk, JPEG with quality 95; alpha is always PNG
        reading: the user's decisions
        notes: counts what was changed or dropped
    """
    kind = sniff(data)
    try:
        if not data:
            raise ImageError("an empty file")
        if reading.no_exif and kind in KEPT:
            turn, data = orientation(data), without_exif(data)
            notes[NOT_TURNED] += turn != 1
        if kind in KEPT:
            yield name, _picture(data, kind, resize, quality, reading, notes)
            return
        if kind == "npy" and _stays(array := _read_array(data), resize, reading):
            yield name, (kind, data)
            return
        pages = [Page(array)] if kind == "npy" else _pages(data, kind, name, resize, reading, notes)
        for page in pages:
            try:
                image = encode_page(page, resize, quality, reading, notes)
            except ImageError as error:
                image = error
            yield f"{name}#{page.number}" if page.number else name, image
    except ImageError as error:
        yield name, error
    except MemoryError:
        yield name, ImageError("needs more memory than there is: add --resize, or prepare it elsewhere", TOO_LARGE)


def _pages(data: bytes, kind: str, name: str, resize: int | None, reading: Reading, notes: Notes) -> Iterator[Page]:
    """Images of a file that shards do not keep as it is. The readers are imported when a file needs them."""
    if kind == "tif":
        from data.tiff import read_tiff

        yield from read_tiff(data, reading, resize, notes, lambda x, page: fill_missing(x, page, reading, notes))
    elif kind == "dcm" or (not kind and name.lower().endswith(".dcm")):
        from data.dicom import read_dicom

        yield from read_dicom(data, reading, notes)
    else:
        from data.pictures import read_picture

        yield read_picture(data, kind, name, reading, notes)


def _read_array(data: bytes) -> np.ndarray:
    """A .npy array [H, W, C]. Raises `ImageError` if its channels seem to be first."""
    array = read_npy(data)
    height, width, channels = array.shape
    if height <= MAX_FIRST < channels and height < width:
        shape = f"has shape {array.shape}, so its channels seem to be first"
        raise ImageError(f"{shape}: save it as [H, W, C] with numpy.moveaxis(array, 0, 2)", UNSUPPORTED)
    return array


def _stays(array: np.ndarray, resize: int | None, reading: Reading) -> bool:
    """Whether a .npy file is kept byte for byte."""
    mapped = reading.value_range is not None and array.dtype != np.uint8
    small = resize is None or min(array.shape[:2]) <= resize
    return array.dtype in PLAIN and small and not mapped and reading.nodata in (None, "nan")


def _picture(
    data: bytes, kind: str, resize: int | None, quality: int | None, reading: Reading, notes: Notes
) -> Encoded:
    """A JPEG, PNG, WebP or GIF: its own bytes if no option changes its pixels."""
    try:
        picture = Image.open(io.BytesIO(data), formats=PIL_FORMATS)
        deep, small = is_deep(picture), resize is None or min(picture.size) <= resize
        _check_picture(picture, None if small else resize, resize, reading.max_pixels)
        notes[FIRST_FRAME] += getattr(picture, "is_animated", False)
        if deep and small and reading.value_range is None and reading.nodata in (None, "nan"):
            picture.verify()
            read_png(data)  # in 2 bytes per value; the loader needs 4
            return kind, data
        if not deep and small and quality is None:
            decode(data, 3, max_pixels=reading.max_pixels)  # as the loader will
            return kind, data
        page = picture_page(picture, data)
    except UserError:
        raise
    except Exception:  # damaged files raise almost any exception in PIL
        raise unreadable(data) from None
    return encode_page(page, resize, quality or (JPEG_QUALITY if kind == "jpg" else None), reading, notes)


def picture_page(picture: Image.Image, data: bytes) -> Page:
    """The pixels of an opened JPEG, PNG, WebP or GIF, whose bytes are `data`."""
    if is_direct(picture):
        picture.verify()  # checksums
        pixels = read_png(data)
        alpha = pixels.shape[2] in (2, 4)
        return Page(pixels, alpha=alpha, orientation=orientation(data), deep_png=is_deep(picture))
    if picture.format == "WEBP" and not picture.is_animated:  # PIL takes twice the memory
        pixels = imagecodecs.webp_decode(data)
        return Page(pixels, alpha=pixels.shape[2] == 4, orientation=orientation(data))
    from data.pictures import from_pil

    picture.load()
    return from_pil(picture, orientation(data))


def _check_picture(picture: Image.Image, shrunk_to: int | None, resize: int | None, max_pixels: int) -> None:
    """Raise `ImageError` for a picture that is too large.

    One that is shrunk is limited by its decoded bytes alone, and a JPEG is then decoded at 1/2, 1/4 or 1/8.
    """
    (width, height), bands = picture.size, len(picture.getbands())
    if is_deep(picture):
        bands = 4 if picture.tile[0].args.startswith("RGBA") else {"L": 2, "R": 3}.get(picture.tile[0].args[0], 1)
        pixel_bytes = bands * (2 if shrunk_to else 4)
    else:
        pixel_bytes = bands
    fits = width * height * pixel_bytes <= max_pixels * BYTES_PER_PIXEL
    drafts = picture.format == "JPEG" and not picture.info.get("progressive")  # else all coefficients are in memory
    if shrunk_to and fits:
        return
    if shrunk_to and drafts:
        gap = 2 * shrunk_to / min(picture.size)
        picture.draft(picture.mode, (round(width * gap), round(height * gap)))
    advice = f": add --max-pixels {raise_limit(height, width, pixel_bytes)}"
    advice += " or --resize" if resize is None and (fits or drafts) else ""
    check_size(picture.height, picture.width, pixel_bytes, max_pixels, advice)
