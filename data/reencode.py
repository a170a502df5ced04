"""Re-encode an image of a source for a shard. Imports torch."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from configs.errors import UserError, reason
from data.decode import decode
from data.tars import IMAGE_TYPES

EIGHT_BIT = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")  # PIL modes that PNG or JPEG can store


def reencode(data: bytes, name: str, resize: int | None = None, quality: int | None = None) -> tuple[str, bytes]:
    """Member type and bytes of an image in a shard. Every image is decoded, so that no damaged one gets in.

    Without options, bytes that the loader can decode are kept. Other pictures become PNG or, with more than 8 bits per
    channel, .npy; both are lossless.

    Args:
        name: of the file; its suffix is the type
        resize: maximum length of the shorter side, pixels; larger images are shrunk; None = keep the size
        quality: JPEG quality; None = re-encode only what is shrunk, JPEG with quality 95; alpha is always PNG
    Raises:
        UserError: the image cannot be read, or `resize` would shrink a .npy array
    """
    kind = name.rsplit(".", 1)[-1].lower()
    kind = "jpg" if kind == "jpeg" else kind
    if kind == "npy":
        image = decode(data)
        if resize is None or min(image.shape[1:]) <= resize:
            return kind, data
        shape = tuple(image.shape)
        raise UserError(f"--resize does not support .npy images, this one has shape {shape}: resize it beforehand")
    picture, out = _open_picture(data), io.BytesIO()
    small = resize is None or min(picture.size) <= resize
    if picture.mode not in EIGHT_BIT:
        np.save(out, np.asarray(picture) if small else _shrink_deep(picture, resize), allow_pickle=False)
        return "npy", out.getvalue()
    if small and kind in IMAGE_TYPES and quality is None:
        decode(data, 3)  # as the loader will
        return kind, data
    if picture.mode in ("P", "1", "LA", "CMYK", "YCbCr"):
        picture = picture.convert({"1": "L", "LA": "RGBA"}.get(picture.mode, "RGB"))
    if not small:
        picture = _shrink(picture, resize)
    if picture.mode != "RGBA" and (kind == "jpg" or quality is not None):
        picture.save(out, "jpeg", quality=quality or 95)
        return "jpg", out.getvalue()
    picture.save(out, "png")
    return "png", out.getvalue()


def _shrink(picture: Image.Image, shorter: int) -> Image.Image:
    scale = shorter / min(picture.size)
    return picture.resize([max(shorter, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC)


def _shrink_deep(picture: Image.Image, shorter: int) -> np.ndarray:
    """Shrink a grey picture of 16 or 32 bits; keeps its type and its range of values."""
    pixels = np.asarray(picture)
    shrunk = np.asarray(_shrink(picture.convert("F"), shorter), np.float64)
    whole = shrunk.round() if pixels.dtype.kind in "iu" else shrunk
    return whole.clip(pixels.min(), pixels.max()).astype(pixels.dtype)


def _open_picture(data: bytes) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(data))
        picture.load()
        return picture
    except UnidentifiedImageError:
        raise UserError("not an image of a known type") from None
    except Exception as error:  # damaged files raise almost any exception in PIL
        raise UserError(f"not a readable image ({reason(error)})") from None
