"""One image of a source to the bytes that go into a shard."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from configs.errors import UserError
from data.shards import IMAGE_TYPES
from data.sources import open_picture
from data.transforms import decode

EIGHT_BIT = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")  # PIL modes that PNG or JPEG can hold


@dataclass(frozen=True)
class Options:
    """What to do to each image. With neither option set, bytes are kept as they are where the loader can read them.

    Args:
        resize: longest allowed shorter side, pixels; larger images are shrunk, smaller ones kept; None = keep all
        quality: JPEG quality to re-encode with; None = 95 where a JPEG has to be re-encoded; with alpha, PNG it stays
    """

    resize: int | None = None
    quality: int | None = None


def convert(data: bytes, name: str, options: Options) -> tuple[str, bytes]:
    """Member type and bytes for a shard. Every image is decoded, so that no damaged one gets in.

    Pictures of types the loader does not read become PNG, those of more than 8 bits .npy; nothing loses precision
    unless --resize or --quality asks for it.

    Raises:
        UserError: the image cannot be read
    """
    kind = name.rsplit(".", 1)[-1].lower()
    kind = "jpg" if kind == "jpeg" else kind
    if kind == "npy":
        image = decode(data)
        if options.resize is None or min(image.shape[1:]) <= options.resize:
            return kind, data
        raise UserError(
            f"--resize does not apply to .npy images, this one is {tuple(image.shape)}: resize it beforehand"
        )
    picture = open_picture(data)
    small = options.resize is None or min(picture.size) <= options.resize
    if picture.mode not in EIGHT_BIT:
        return "npy", _to_npy(np.asarray(picture) if small else _shrink_deep(picture, options.resize))
    if small and kind in IMAGE_TYPES and options.quality is None:
        decode(data, 3)  # as the loader will
        return kind, data
    if picture.mode in ("P", "1", "LA", "CMYK", "YCbCr"):
        picture = picture.convert({"1": "L", "LA": "RGBA"}.get(picture.mode, "RGB"))
    if not small:
        picture = _shrink(picture, options.resize)
    lossy = kind == "jpg" or options.quality is not None
    out = io.BytesIO()
    if lossy and picture.mode != "RGBA":
        picture.save(out, "jpeg", quality=options.quality or 95)
        return "jpg", out.getvalue()
    picture.save(out, "png")
    return "png", out.getvalue()


def _shrink(picture: Image.Image, shorter: int) -> Image.Image:
    scale = shorter / min(picture.size)
    return picture.resize([max(shorter, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC)


def _shrink_deep(picture: Image.Image, shorter: int) -> np.ndarray:
    """A grey picture of 16 or 32 bits; its type stays, and no value leaves the range of those it had."""
    pixels = np.asarray(picture)
    shrunk = np.asarray(_shrink(picture.convert("F"), shorter), np.float64)
    whole = shrunk.round() if pixels.dtype.kind in "iu" else shrunk
    return whole.clip(pixels.min(), pixels.max()).astype(pixels.dtype)


def _to_npy(pixels: np.ndarray) -> bytes:
    """A picture of 16 or 32 bits, as an array the loader reads."""
    out = io.BytesIO()
    np.save(out, pixels, allow_pickle=False)
    return out.getvalue()
