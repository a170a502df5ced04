"""Decoding images to [C, H, W]: uint8, or float32 from 0 to 1 for more than 8 bits per channel."""

import io
import math
import warnings
from collections.abc import Callable

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as F

from configs.errors import UserError, reason

MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB, 4: ImageReadMode.RGB_ALPHA, None: ImageReadMode.UNCHANGED}
JPEG_MODES = {1: "GRAY", 3: "RGB", 4: "RGB"}  # JPEG has no alpha
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
NPY_MAGIC, JPEG_MAGIC = b"\x93NUMPY", b"\xff\xd8\xff"
PIL_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")  # decoded besides .npy
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # PIL refuses larger pictures as decompression bombs, also in prepare.py
Shrink = Callable[[int, int], int]  # from a picture's height and width, the factor 1, 2, 4 or 8 to decode it at


def decode(data: bytes, channels: int | None = None, shrink: Shrink | None = None) -> Tensor:
    """Decode an image to [C, H, W]: uint8, or float32 for more than 8 bits per channel (integers scaled to 0..1).

    Args:
        data: JPEG, PNG, WebP, GIF (first frame), or .npy of shape [H, W] or [H, W, C]
        channels: convert pictures to 1 (grey), 3 (RGB) or 4 (RGBA); None = as stored; .npy arrays are not converted
        shrink: the factor by which a JPEG may be smaller; its decoder computes only the frequencies that are needed
    Raises:
        UserError: damaged, of an unknown type, or a .npy with another number of channels. Pictures of more than
            `MAX_PIXELS`, and .npy headers that promise more bytes than follow, are refused before memory is allocated
    """
    if data.startswith(NPY_MAGIC):
        image = _decode_npy(data)
        if channels not in (None, len(image)):
            raise UserError(f"a .npy image has {len(image)} channels, model.channels is {channels}")
        return image
    if channels not in MODES:
        raise UserError(f"pictures cannot be read with {channels} channels: use .npy, or model.channels 1, 3 or 4")
    image = _decode_picture(data, channels, shrink)
    return image if channels is None else _to_channels(image, channels)


def _decode_picture(data: bytes, channels: int | None, shrink: Shrink | None) -> Tensor:
    """Decode a picture. The header is checked first: decoders would allocate whatever size it claims."""
    try:
        if data.startswith(JPEG_MAGIC) and (image := _decode_jpeg(data, channels, shrink)) is not None:
            return image
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's read-only buffer, which is not written to; PIL's large images
            picture = Image.open(io.BytesIO(data), formats=PIL_FORMATS)
            if picture.format == "GIF":  # torchvision would decode every frame
                return _from_pil(picture, channels)
            if picture.format == "PNG":  # torchvision's libpng crashes the process on damaged files (0.29)
                return _decode_png(picture, data, channels)
            mode = MODES[3 if channels == 4 and picture.format != "WEBP" else channels]  # JPEG has no alpha
            return decode_image(torch.frombuffer(data, dtype=torch.uint8), mode)
    except Image.DecompressionBombError:
        raise UserError(f"not a readable image (its header claims more than {MAX_PIXELS:,} pixels)") from None
    except UnidentifiedImageError:
        raise UserError("not a readable image (not a JPEG, PNG, WebP or GIF, or its header is damaged)") from None
    except Exception as error:  # damaged files raise almost any exception in PIL
        raise UserError(f"not a readable image ({reason(error)})") from None


def _decode_jpeg(data: bytes, channels: int | None, shrink: Shrink | None) -> Tensor | None:
    """A JPEG in grey or colour; None for one in CMYK."""
    height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    if space not in ("Gray", "YCbCr", "RGB"):
        return None
    if height * width > MAX_PIXELS:
        raise Image.DecompressionBombError
    factor = shrink(height, width) if shrink else 1
    mode = JPEG_MODES[channels or (1 if space == "Gray" else 3)]
    pixels = simplejpeg.decode_jpeg(data, mode, min_height=height // factor, min_width=width // factor)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _from_pil(picture: Image.Image, channels: int | None) -> Tensor:
    """A picture opened by PIL, of at most 8 bits per channel, as uint8 [C, H, W]."""
    picture.load()
    stored = {"1": "L", "P": "RGBA" if "transparency" in picture.info else "RGB"}
    mode = PIL_MODES[channels] if channels else stored.get(picture.mode, picture.mode)
    return F.pil_to_tensor(picture.convert(mode))


def _decode_png(picture: Image.Image, data: bytes, channels: int | None) -> Tensor:
    """A PNG as [C, H, W]: uint8, or float32 from 0 to 1 for 16 bits per channel.

    PIL keeps 8 bits of colours, so the high and low bytes of 16-bit channels are decoded separately.
    """

    def decode_as(raw_mode: str) -> np.ndarray:
        reopened = Image.open(io.BytesIO(data), formats=PIL_FORMATS)
        reopened.tile = [reopened.tile[0]._replace(args=raw_mode)]
        return np.asarray(reopened).astype(np.uint16)

    stored = picture.tile[0].args
    picture.verify()  # checksums, which decoding ignores
    if "16" not in stored:
        return _from_pil(Image.open(io.BytesIO(data), formats=PIL_FORMATS), channels)
    if stored == "LA;16B":
        bytes_ = decode_as("RGBA")
        pixels = bytes_[..., ::2] * 256 + bytes_[..., 1::2]
    elif stored == "I;16B":
        pixels = decode_as(stored)[..., None]
    else:
        pixels = decode_as(stored) * 256 + decode_as(stored.replace("16B", "16L"))  # the other byte order
    return torch.from_numpy(pixels / np.float32(65535)).permute(2, 0, 1)


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


def _decode_npy(data: bytes) -> Tensor:
    """Decode an array. Unlike np.load, which allocates what the header claims, this checks that the bytes exist."""
    file, npy = io.BytesIO(data), np.lib.format
    try:
        version_1 = npy.read_magic(file) == (1, 0)
        shape, fortran_order, dtype = (npy.read_array_header_1_0 if version_1 else npy.read_array_header_2_0)(file)
        array = np.frombuffer(data, dtype, math.prod(shape), file.tell())
        array = array.reshape(shape, order="F" if fortran_order else "C")
    except Exception as error:  # damaged headers raise almost any exception in numpy
        raise UserError(f"not a readable .npy image ({reason(error)})") from None
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.dtype.kind not in "uif" or 0 in array.shape:
        kind = f"{array.dtype} {array.shape}"
        raise UserError(f"a .npy image must be a numeric array of shape [H, W] or [H, W, C], not {kind}")
    if array.dtype.kind in "ui" and array.dtype != np.uint8:
        array = array / np.iinfo(array.dtype).max
    if array.dtype != np.uint8:
        array = array.astype(np.float32)
    return torch.from_numpy(np.array(array, order="C")).permute(2, 0, 1)
