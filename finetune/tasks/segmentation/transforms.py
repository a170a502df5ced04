"""Transforms of an image and its mask. All randomness comes from the sample's generator."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from configs.errors import UserError
from configs.schema import Augment, Data
from data.masks import decode_mask
from data.transforms import RESIZING, jitter
from finetune.tasks.segmentation import Settings

Mask = Tensor  # [H, W] uint8, or int32 for more than 255 classes


@dataclass(frozen=True)
class ReadMask:
    """Reads the mask of a sample. Raises `UserError` if it has none, or values that are no class."""

    classes: int
    ignore: int

    def __call__(self, data: bytes) -> Mask:
        if not data:
            raise UserError("has no mask")
        mask = decode_mask(data)
        known = mask[mask != self.ignore]
        if known.size and int(known.max()) >= self.classes:
            raise UserError(f"its mask has value {known.max()}, but there are {self.classes} classes")
        return torch.from_numpy(mask if mask.dtype == np.uint8 else mask.astype(np.int32))


def base_scale(image: Tensor, short_side: int | None) -> float:
    """Factor to the size at scale 1."""
    return short_side / min(image.shape[1:]) if short_side else 1.0


class TrainTransform:
    """A random crop of `data.size` at a random scale, mirrored; colours change in the image alone.

    Beyond the borders of a small image, pixels have the mean and do not count. Raises `UserError` for augmentations
    that would move pixels without their mask, or change colours of images without them.
    """

    def __init__(self, data: Data, augment: Augment, settings: Settings, ignore: int, mean: tuple[float, ...]):
        if augment.auto_augment:
            raise UserError("augment.auto_augment moves pixels, but not those of masks: set it to null")
        if augment.color_jitter and len(mean) != 3:
            raise UserError(f"augment.color_jitter needs images of 3 channels, these have {len(mean)}: set it to 0")
        self.data, self.color_jitter, self.settings, self.ignore = data, augment.color_jitter, settings, ignore
        self.mean = torch.tensor(mean)[:, None, None]

    def __call__(self, image: Tensor, mask: Mask, rng: np.random.Generator) -> dict[str, Tensor]:
        self.check(image, mask)
        factor = base_scale(image, self.settings.short_side) * rng.uniform(*self.settings.scale)
        size = self.data.height_width
        inside = [min(old, max(1, round(new / factor))) for old, new in zip(mask.shape, size, strict=True)]
        top, left = (int(rng.integers(old - part + 1)) for old, part in zip(mask.shape, inside, strict=True))
        shown = [min(new, max(1, round(part * factor))) for part, new in zip(inside, size, strict=True)]
        mode = self.data.interpolation
        if mode == "random":
            mode = ("bilinear", "bicubic")[rng.integers(2)]
        image = F.resized_crop(image, top, left, *inside, shown, RESIZING[mode], antialias=True)
        mask = F.resized_crop(mask[None], top, left, *inside, shown, RESIZING["nearest"])[0]
        for axis, probability in ((1, self.data.hflip), (0, self.data.vflip)):
            if probability and rng.random() < probability:
                image, mask = image.flip(axis + 1), mask.flip(axis)
        if self.color_jitter:
            image = jitter(image, rng, self.color_jitter)
        return {"image": self.padded(image, size), "mask": padded_mask(mask, size, self.ignore)}

    def check(self, image: Tensor, mask: Mask) -> None:
        """Raise `UserError` if image and mask differ in size."""
        if image.shape[1:] != mask.shape:
            (height, width), (h, w) = image.shape[1:], mask.shape
            raise UserError(f"an image of {width}x{height} pixels has a mask of {w}x{h}: prepare the shards again")

    def padded(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """The image in the top left corner of one of `size`."""
        if image.shape[1:] == size:
            return image
        fill = (self.mean * (255 if image.dtype == torch.uint8 else 1)).to(image.dtype)
        out = fill.expand(-1, *size).clone()
        out[:, : image.shape[1], : image.shape[2]] = image
        return out


def padded_mask(mask: Mask, size: tuple[int, int], ignore: int) -> Mask:
    """The mask in the top left corner of one of `size`."""
    out = torch.full(size, ignore, dtype=mask.dtype)
    out[: mask.shape[0], : mask.shape[1]] = mask
    return out


@dataclass(frozen=True)
class EvalTransform:
    """The whole image at scale 1.

    Entries: `size` [2] of the image, which its batch pads; `full` [2], its size before; `object_mask` [H * W], the
    pixels of its mask at full size, none without a mask.
    """

    short_side: int | None
    interpolation: str = "bicubic"

    def __call__(self, image: Tensor, mask: Mask | None = None, rng: object = None) -> dict[str, Tensor]:
        full = image.shape[1:]
        if mask is not None and mask.shape != full:
            raise UserError(f"an image of {full[1]}x{full[0]} pixels has a mask of {mask.shape[1]}x{mask.shape[0]}")
        factor = base_scale(image, self.short_side)
        if factor != 1:
            size = [max(1, round(side * factor)) for side in full]
            image = F.resize(image, size, RESIZING[self.interpolation], antialias=True)
        pixels = torch.zeros(0, dtype=torch.uint8) if mask is None else mask.flatten()
        return {
            "image": image, "size": torch.tensor(image.shape[1:]), "full": torch.tensor(full), "object_mask": pixels,
        }  # fmt: skip
