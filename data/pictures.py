"""Pictures of types that shards do not keep: AVIF, HEIC, JPEG 2000, PNM, BMP, TGA, ..."""

import io
import re
import warnings
from typing import BinaryIO

import imagecodecs
import numpy as np
import pillow_heif
from PIL import Image, UnidentifiedImageError

from data.reading import NO_IMAGE, ImageError, Notes, Page, Reading, check_size, damage_as_error, raise_limit

# no formats that start programs (EPS) or describe drawings (WMF)
FORMATS = ("AVIF", "BMP", "DIB", "ICO", "JPEG2000", "PCX", "PPM", "QOI", "SGI", "SUN", "XBM")
STORED = {"1": "L", "CMYK": "RGB", "YCbCr": "RGB", "LAB": "RGB", "RGBX": "RGB", "RGBa": "RGBA", "La": "LA"}
CODESTREAM_SIZE = b"\xff\x4f\xff\x51"  # of JPEG 2000: start of code stream, size marker
PNM_HEADER = re.compile(rb"P([56])(?:\s|#[^\n]*\n)+(\d+)(?:\s|#[^\n]*\n)+(\d+)(?:\s|#[^\n]*\n)+(\d+)\s")


def read_picture(data: bytes, kind: str, name: str, reading: Reading, notes: Notes) -> Page:
    """A picture at its full depth; of animations the first frame.

    Args:
        kind: by `data.reading.sniff`
        name: of the file, for the one type without a signature, TGA
    Raises:
        ImageError: damaged, no image at all, or too large
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PIL, about damage that it tolerates
            if kind == "heif":
                return _read_heif(data, reading)
            if kind == "pnm" and (match := PNM_HEADER.match(data)) and int(match[4]) > 255:
                return _read_deep_pnm(data, match, reading)
            picture = _open(io.BytesIO(data), name)
            _check(picture.size, len(picture.getbands()), reading)
            if getattr(picture, "is_animated", False):
                notes["{:,} pictures are animated: only their first frame was taken"] += 1
            if kind == "avif":
                pixels, turn = imagecodecs.avif_decode(data, index=0), picture.getexif().get(274, 1)
                return _page(pixels, _avif_bits(data), 1 if reading.no_exif else turn)
            if kind == "jp2":
                return _page(imagecodecs.jpeg2k_decode(data), _jpeg2000_bits(data))
            picture.load()
            return from_pil(picture)
    except UnidentifiedImageError:
        raise _unknown(kind, data[:2]) from None
    except ImageError:
        raise
    except Exception:  # damaged files raise almost any exception in PIL
        raise ImageError("not a readable image (damaged or cut short)") from None


def picture_size(file: BinaryIO, kind: str, name: str) -> tuple[int, int]:
    """Height and width of a picture of `read_picture`, from its header. Raises `ImageError`."""
    with damage_as_error(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return (pillow_heif.open_heif(file) if kind == "heif" else _open(file, name)).size[::-1]
        except UnidentifiedImageError:
            file.seek(0)
            raise _unknown(kind, file.read(2)) from None


def _open(file: BinaryIO, name: str) -> Image.Image:
    return Image.open(file, formats=(*FORMATS, "TGA") if name.lower().endswith(".tga") else FORMATS)


def _unknown(kind: str, start: bytes) -> ImageError:
    if kind:
        return ImageError("not a readable image (its header is damaged)")
    archive = ": an archive; unpack it, and save arrays of .npz as .npy" if start == b"PK" else ""
    return ImageError(f"not an image of a known type{archive}", NO_IMAGE)


def from_pil(picture: Image.Image, orientation: int = 1) -> Page:
    """A loaded picture of at most 8 bits per channel, or of one deeper channel, with its EXIF orientation."""
    if picture.mode in ("P", "PA"):
        picture = picture.convert("RGBA" if "transparency" in picture.info or picture.mode == "PA" else "RGB")
    picture = picture.convert(STORED[picture.mode]) if picture.mode in STORED else picture
    pixels = np.asarray(picture)
    return Page(pixels.reshape(*pixels.shape[:2], -1), alpha=picture.mode in ("LA", "RGBA"), orientation=orientation)


def _check(size: tuple[int, int], pixel_bytes: int, reading: Reading) -> None:
    advice = f": add --max-pixels {raise_limit(*size, pixel_bytes)}"
    check_size(*size, pixel_bytes, reading.max_pixels, advice)


def _page(pixels: np.ndarray, bits: int, turn: int = 1) -> Page:
    """Pixels [H, W] or [H, W, C] of `bits` bits; 2 and 4 channels have alpha."""
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    full = (1 << bits) - 1
    limits = None if pixels.dtype.kind != "u" or full == np.iinfo(pixels.dtype).max else (0, full)
    return Page(pixels, limits, alpha=pixels.shape[2] in (2, 4), orientation=turn if turn in range(1, 9) else 1)


def _read_heif(data: bytes, reading: Reading) -> Page:
    """HEIC; its decoder turns it upright. Deeper values come shifted to 16 bits."""
    picture = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=False)
    deep = ";16" in picture.mode
    _check(picture.size, (2 if deep else 1) * len(picture.mode.partition(";")[0]), reading)
    pixels = np.asarray(picture)
    bits = picture.info.get("bit_depth", 8)
    return _page(pixels >> (16 - bits), bits) if deep else _page(pixels, 8)


def _read_deep_pnm(data: bytes, match: re.Match, reading: Reading) -> Page:
    """PGM or PPM of 16 bits, of which PIL keeps 8 in colours."""
    bands = 1 if match[1] == b"5" else 3
    width, height, full = (int(match[i]) for i in (2, 3, 4))
    _check((height, width), 2 * bands, reading)
    pixels = np.frombuffer(data, ">u2", height * width * bands, match.end()).reshape(height, width, bands)
    return Page(pixels, None if full == 65535 else (0, full))


def _avif_bits(data: bytes) -> int:
    """Bits per channel, from the configuration of AV1."""
    flags = data[data.index(b"av1C") + 6]
    return (12 if flags & 0x20 else 10) if flags & 0x40 else 8


def _jpeg2000_bits(data: bytes) -> int:
    """Bits per channel, from the size marker of the code stream."""
    return (data[data.index(CODESTREAM_SIZE) + 42] & 0x7F) + 1
