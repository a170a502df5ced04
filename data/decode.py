"""Decoding images to [C, H, W]: uint8, or float32 from 0 to 1 for more than 8 bits per channel."""

import io
import math
import warnings
from collections.abc import Callable
from typing import BinaryIO

import imagecodecs
import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as F

from data.exif import orientation, rare_jpeg, swaps, upright
from data.reading import CHANNELS, MAX_PIXELS, NO_IMAGE, ImageError, check_size, sniff

MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB, 4: ImageReadMode.RGB_ALPHA, None: ImageReadMode.UNCHANGED}
JPEG_MODES = {1: "GRAY", 3: "RGB", 4: "RGB"}  # JPEG has no alpha
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
PIL_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")  # decoded besides .npy
PNG_BANDS = {"I": 1, "L": 2, "R": 3}  # of 16 bits, by the first letter of PIL's raw mode; RGBA has 4
LARGE = 1 << 24  # pixels
DAMAGED_NPY = "not a readable .npy image (damaged, cut short, or of Python objects)"
Shrink = Callable[[int, int], int]  # from a picture's height and width, the factor 1, 2, 4 or 8 to decode it at
Image.MAX_IMAGE_PIXELS = None  # `check_size` limits pictures instead: its limit can be raised


def decode(
    data: bytes, channels: int | None = None, shrink: Shrink | None = None, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """Decode an image to [C, H, W]: uint8, or float32 for more than 8 bits per channel (integers scaled to 0..1).

    JPEG, PNG and WebP are turned upright by their EXIF orientation.

    Args:
        data: JPEG, PNG, WebP, GIF (first frame), or .npy of shape [H, W] or [H, W, C]
        channels: convert pictures to 1 (grey), 3 (RGB) or 4 (RGBA); None = as stored; .npy arrays are not converted
        shrink: from the upright height and width, the factor by which a JPEG may be smaller; its decoder computes only
            the frequencies that are needed
        max_pixels: refuse larger pictures, and pictures of more than 4 times as many decoded bytes
    Raises:
        ImageError: damaged, of an unknown type, too large, or a .npy with another number of channels. Headers that
            promise too much, also those of .npy, are refused before memory is allocated
    """
    kind = sniff(data)
    if kind == "npy":
        image = torch.from_numpy(np.array(scaled(read_npy(data)), order="C")).permute(2, 0, 1)
        if channels not in (None, len(image)):
            raise ImageError(f"has {len(image)} channels as an array, model.channels is {channels}", CHANNELS)
        return image
    if channels not in MODES:
        message = f"pictures cannot be read with {channels} channels: use .npy, or model.channels 1, 3 or 4"
        raise ImageError(message, CHANNELS)
    image = _decode_picture(data, kind, channels, shrink, max_pixels)
    return image if channels is None else _to_channels(image, channels)


def _decode_picture(data: bytes, kind: str, channels: int | None, shrink: Shrink | None, max_pixels: int) -> Tensor:
    """Decode a picture. The header is checked first: decoders would allocate whatever size it claims."""
    try:
        turn = orientation(data)
        if kind == "jpg" and (image := _decode_jpeg(data, channels, shrink, turn, max_pixels)) is not None:
            return upright(image, turn, rows=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's read-only buffer, which is not written to
            picture = Image.open(io.BytesIO(data), formats=PIL_FORMATS)
            check_size(picture.height, picture.width, _pixel_bytes(picture), max_pixels)
            if picture.format == "GIF" or (kind == "webp" and picture.is_animated):
                return upright(_from_pil(picture, channels), turn, rows=1)  # torchvision would decode every frame
            if picture.format == "PNG":  # torchvision's libpng crashes the process on damaged files (0.29)
                return upright(_decode_png(picture, data, channels), turn, rows=1)
            mode = MODES[3 if channels == 4 and picture.format != "WEBP" else channels]  # JPEG has no alpha
            image = decode_image(torch.frombuffer(data, dtype=torch.uint8), mode)
            return upright(image, turn, rows=1)
    except ImageError:
        raise
    except UnidentifiedImageError:
        message = "not a readable image (not a JPEG, PNG, WebP or GIF, or its header is damaged)"
        raise ImageError(message, "damaged" if kind else NO_IMAGE) from None
    except Exception:  # damaged files raise almost any exception in PIL
        raise unreadable(data) from None


def unreadable(data: bytes) -> ImageError:
    """The error for a picture that a decoder refuses: rare kinds of JPEG are not damaged."""
    if rare := rare_jpeg(data):
        return ImageError(f"a {rare} JPEG is not supported: convert it to PNG", "unsupported")
    return ImageError("not a readable image (damaged or cut short)")


def _decode_jpeg(data: bytes, channels: int | None, shrink: Shrink | None, turn: int, max_pixels: int) -> Tensor | None:
    """A JPEG in grey or colour, not turned; None for one in CMYK."""
    height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    if space not in ("Gray", "YCbCr", "RGB"):
        return None
    check_size(height, width, 3, max_pixels)
    factor = shrink(*((width, height) if swaps(turn) else (height, width))) if shrink else 1
    mode = JPEG_MODES[channels or (1 if space == "Gray" else 3)]
    pixels = simplejpeg.decode_jpeg(data, mode, min_height=height // factor, min_width=width // factor)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def is_deep(picture: Image.Image) -> bool:
    """Whether an opened PNG has 16 bits per channel."""
    return picture.format == "PNG" and bool(picture.tile) and "16" in picture.tile[0].args


def is_direct(picture: Image.Image) -> bool:
    """Whether an opened PNG is for `read_png`: of 16 bits, or so large that PIL's 4 bytes per pixel matter."""
    plain = picture.mode in ("L", "RGB", "RGBA") and "transparency" not in picture.info
    return is_deep(picture) or (picture.format == "PNG" and plain and picture.width * picture.height > LARGE)


def _pixel_bytes(picture: Image.Image) -> int:
    """Bytes of a decoded pixel: 16-bit channels become float32."""
    if is_deep(picture):
        stored = picture.tile[0].args
        return 4 * (4 if stored.startswith("RGBA") else PNG_BANDS[stored[0]])
    return len(picture.getbands())


def _from_pil(picture: Image.Image, channels: int | None) -> Tensor:
    """A picture opened by PIL, of at most 8 bits per channel, as uint8 [C, H, W]."""
    picture.load()
    stored = {"1": "L", "P": "RGBA" if "transparency" in picture.info else "RGB"}
    mode = PIL_MODES[channels] if channels else stored.get(picture.mode, picture.mode)
    picture = picture if picture.mode == mode else picture.convert(mode)  # a copy would double the memory
    shape = picture.height, picture.width, len(picture.getbands())
    return torch.from_numpy(np.frombuffer(picture.tobytes(), np.uint8).reshape(shape)).permute(2, 0, 1)


def _decode_png(picture: Image.Image, data: bytes, channels: int | None) -> Tensor:
    """A PNG as [C, H, W]: uint8, or float32 from 0 to 1 for 16 bits per channel."""
    direct = is_direct(picture)
    picture.verify()  # checksums, which decoding ignores
    if not direct:
        return _from_pil(Image.open(io.BytesIO(data), formats=PIL_FORMATS), channels)
    return torch.from_numpy(scaled(read_png(data))).permute(2, 0, 1)


def read_png(data: bytes) -> np.ndarray:
    """A PNG as uint8 or uint16 [H, W, C], in one pass; PIL would keep 8 bits of colours."""
    pixels = imagecodecs.png_decode(data)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def scaled(pixels: np.ndarray) -> np.ndarray:
    """Pixels as the model gets them: uint8 as it is; other integers as float32, divided by their type's maximum."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.uint16:  # in place: a large picture fits once
        image = pixels.astype(np.float32)
        image /= np.float32(65535)
        return image
    if pixels.dtype.kind in "ui":
        pixels = pixels / np.iinfo(pixels.dtype).max
    return pixels.astype(np.float32, copy=False)


def _to_channels(image: Tensor, channels: int) -> Tensor:
    """Convert a picture to grey, RGB or RGBA if its decoder did not (WebP, 16-bit PNG)."""
    stored = image.shape[0]
    if stored == channels:
        return image
    if stored in (2, 4) and channels in (1, 3):  # drop alpha
        return _to_channels(image[: stored - 1], channels)
    if channels == 1:
        return F.rgb_to_grayscale(image)
    if channels == 3:
        return image.expand(3, -1, -1)
    alpha = image[1:] if stored == 2 else torch.full_like(image[:1], 255 if image.dtype == torch.uint8 else 1)
    return torch.cat([_to_channels(image, 3), alpha])


def read_npy(data: bytes) -> np.ndarray:
    """A .npy array as [H, W, C]; unlike np.load, it checks that the bytes exist before it allocates what they claim."""
    file = io.BytesIO(data)
    shape, fortran_order, dtype = npy_header(file)
    try:
        array = np.frombuffer(data, dtype, math.prod(shape), file.tell())
        return array.reshape(shape, order="F" if fortran_order else "C")
    except Exception:
        raise ImageError(DAMAGED_NPY) from None


def npy_header(file: BinaryIO) -> tuple[tuple[int, int, int], bool, np.dtype]:
    """Shape [H, W, C], whether in Fortran's order, and type of a .npy, of which only the header is read."""
    npy = np.lib.format
    try:
        version_1 = npy.read_magic(file) == (1, 0)
        shape, fortran_order, dtype = (npy.read_array_header_1_0 if version_1 else npy.read_array_header_2_0)(file)
        if dtype.hasobject:
            raise ImageError("a .npy of Python objects is never read: save an array of numbers", "unsupported")
    except ImageError:
        raise
    except Exception:  # damaged headers raise almost any exception in numpy
        raise ImageError(DAMAGED_NPY) from None
    if len(shape) not in (2, 3) or dtype.kind not in "uif" or min(shape) < 1:
        kind = f"{dtype} {shape}"
        message = f"a .npy image must be a numeric array of shape [H, W] or [H, W, C], not {kind}"
        raise ImageError(message, "unsupported")
    return (*shape, 1)[:3], fortran_order, dtype
