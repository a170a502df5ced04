"""Transforms of one decoded image: crop, flip, augmentation, mask. Images are [C, H, W], uint8 until on the device.

All randomness comes from the generator passed in, one for each (seed, epoch, sample).
"""

import math
import random
import re
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from configs.errors import UserError
from configs.preprocessing import Preprocessing
from configs.schema import Augment, Data
from data.colors import recolor
from data.sampler import SAMPLES

RESIZING = {  # torchvision's NEAREST is half a pixel off PIL's
    "nearest": InterpolationMode.NEAREST_EXACT,
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
}
ALMOST_WHOLE = 1 - 1e-6  # a crop that keeps the aspect ratio, other than 1
SPARE = 1.5  # crops of smaller decoded photographs then differ by half a grey level on average, without it by 1.3
NUMBER = r"\d+(\.\d+)?"
POLICY = re.compile(  # names of timm's augmentation policies
    rf"rand(-((m|n|p|mstd|mmax|inc){NUMBER}|t\w*))*|augmix(-(m|w|d|a|b|mstd){NUMBER})*"
    rf"|(original|originalr|v0|v0r|3a)(-mstd{NUMBER})?"
)


def sample_rng(seed: int, epoch: int, sample: int, view: int = 0) -> np.random.Generator:
    """The random generator of one sample in one epoch; `view` numbers its crops with `data.repeats`."""
    return np.random.default_rng([seed, SAMPLES, epoch, sample] + ([view] if view else []))


def random_box(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], ratios: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop, in pixels, distributed like torchvision's RandomResizedCrop.

    `scale` limits its share of the area, `ratios` its ratio of width to height.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(ratios[0]), math.log(ratios[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w = min(width, max(1, round(height * ratios[1])))  # fallback: the largest centred crop of an allowed shape
    h = min(height, max(1, round(width / ratios[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def is_small(data: Data, height: int, width: int) -> bool:
    """Whether an image of this size is too small for `crop_shrink` to be more than 1, whatever the crop."""
    return min(height / data.height_width[0], width / data.height_width[1]) < 2 * SPARE


def crop_shrink(data: Data, rng: np.random.Generator, height: int, width: int) -> int:
    """Factor 1, 2, 4 or 8 by which an image may be smaller while its crop is at least `SPARE` times `data.size`.

    `rng` is in the state in which `random_crop` gets it, and draws the same crop.
    """
    *_, h, w = random_box(rng, height, width, data.crop_scale, data.crop_ratio)
    spare = min(h / data.height_width[0], w / data.height_width[1]) / SPARE
    return max(factor for factor in (1, 2, 4, 8) if factor <= max(1, spare))


def random_crop(image: Tensor, rng: np.random.Generator, data: Data) -> Tensor:
    """A random crop of the image at `data.size` (antialiased), mirrored with probability `hflip`, `vflip`."""
    box = random_box(rng, image.shape[1], image.shape[2], data.crop_scale, data.crop_ratio)
    mode = data.interpolation
    if mode == "random":
        mode = ("bilinear", "bicubic")[rng.integers(2)]
    image = F.resized_crop(image, *box, list(data.height_width), RESIZING[mode], antialias=True)
    image = image.flip(2) if rng.random() < data.hflip else image
    return image.flip(1) if data.vflip and rng.random() < data.vflip else image


def center_crop(image: Tensor, size: tuple[int, int], share: float, interpolation: str = "bicubic") -> Tensor:
    """The image at `size` (height, width) for evaluation: a centre crop.

    `share` is the crop's side, relative to the image's; 1 = resize the whole image, ignoring its aspect ratio.
    """
    mode = RESIZING[interpolation]
    if share == 1:
        return F.resize(image, list(size), mode, antialias=True)
    scale = max(size[0] / share / image.shape[1], size[1] / share / image.shape[2])
    resized = [max(target, round(side * scale)) for target, side in zip(size, image.shape[1:], strict=True)]
    return F.center_crop(F.resize(image, resized, mode, antialias=True), list(size))


def seen_region(height: int, width: int, size: tuple[int, int], share: float) -> tuple[float, float, float, float]:
    """(left, top, right, bottom), in pixels of an image, of what `center_crop` keeps of it."""
    if share == 1:
        return 0.0, 0.0, float(width), float(height)
    scale = max(size[0] / share / height, size[1] / share / width)
    h, w = (
        side * target / max(target, round(side * scale)) for side, target in zip((height, width), size, strict=True)
    )
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def draw_visible(rng: np.random.Generator, grid: tuple[int, int], n: int) -> Tensor:
    """A bool mask [gy, gx] with exactly n True: the patches visible to the encoder."""
    return draw_masks(rng, grid, n, 1)[0]


def draw_masks(rng: np.random.Generator, grid: tuple[int, int], n: int, masks: int) -> Tensor:
    """Bool masks [masks, gy, gx] of one image, each with exactly n True.

    They are consecutive parts of one permutation, which starts again at its end: disjoint while patches last, and
    together they show the whole image if masks x n is at least gy x gx.
    """
    order = rng.permutation(grid[0] * grid[1])
    visible = np.zeros((masks, len(order)), bool)
    for mask in range(masks):
        visible[mask, order[np.arange(mask * n, (mask + 1) * n) % len(order)]] = True
    return torch.from_numpy(visible).view(masks, *grid)


@dataclass(frozen=True)
class PretrainTransform:
    """Pretraining transform: a random crop, and a mask [gy, gx] of `grid` patches of which n are visible.

    With several `masks`, they are [masks, gy, gx].
    """

    data: Data
    grid: tuple[int, int]
    n: int
    masks: int = 1

    def __call__(self, image: Tensor, target: int, rng: np.random.Generator) -> dict[str, Tensor]:
        image, visible = random_crop(image, rng, self.data), draw_masks(rng, self.grid, self.n, self.masks)
        return {"image": image, "visible": visible if self.masks > 1 else visible[0]}


@dataclass(frozen=True)
class ViewTransform:
    """One of the views of an image that are compared: a random crop in other colours, and its mask [gy, gx].

    `color_jitter`, `hue` and `grayscale` are those of `recolor`; all 0 leave the colours as they are.
    """

    pretrain: PretrainTransform
    color_jitter: float
    hue: float
    grayscale: float

    def __call__(self, image: Tensor, target: int, rng: np.random.Generator) -> dict[str, Tensor]:
        entries = self.pretrain(image, target, rng)
        if self.color_jitter or self.hue or self.grayscale:
            entries["image"] = recolor(entries["image"], rng, self.color_jitter, self.hue, self.grayscale)
        return entries


class TrainTransform:
    """Fine-tuning transform: a random crop, an augmentation policy, colour jitter.

    `mean` (0 to 1) fills the borders of shifted or rotated images. Raises `UserError` if timm does not know the policy,
    or colours would change and the images do not have 3 channels.
    """

    def __init__(self, data: Data, augment: Augment, mean: tuple[float, ...]):
        for key, off in (("auto_augment", "null"), ("color_jitter", "0")):
            if getattr(augment, key) and len(mean) != 3:
                raise UserError(f"augment.{key} needs images of 3 channels, these have {len(mean)}: set it to {off}")
        self.data, self.color_jitter = data, augment.color_jitter
        self.policy = AutoAugment(augment.auto_augment, mean, data) if augment.auto_augment else None

    def __call__(self, image: Tensor, label: int, rng: np.random.Generator) -> dict[str, Tensor | int]:
        image = random_crop(image, rng, self.data)
        if self.policy:
            image = self.policy(image, rng)
        if self.color_jitter:
            image = jitter(image, rng, self.color_jitter)
        return {"image": image, "label": label}


@dataclass(frozen=True)
class EvalTransform:
    """Evaluation transform: `center_crop`."""

    size: tuple[int, int]
    crop: float
    interpolation: str = "bicubic"

    @classmethod
    def of(cls, preprocessing: Preprocessing) -> "EvalTransform":
        """The transform that a weight file records."""
        return cls(preprocessing.size, preprocessing.crop, preprocessing.interpolation)

    def __call__(
        self, image: Tensor, label: int = -1, rng: np.random.Generator | None = None
    ) -> dict[str, Tensor | int]:
        return {"image": center_crop(image, self.size, self.crop, self.interpolation), "label": label}

    def enlarged(self, factor: float) -> "EvalTransform":
        """Images larger by a factor, with what lies around the crop; if that is nothing, the crop is resized."""
        size, crop = tuple(round(side * factor) for side in self.size), self.crop
        return replace(self, size=size, crop=crop if crop == 1 else min(crop * factor, ALMOST_WHOLE))


@dataclass(frozen=True)
class RowTransform:
    """A transform of an image whose target is a row of `length` numbers: the entry `label`, float32.

    The row is NaN for a sample that does not count. With `by_class`, the target is a class, and its value the row.
    """

    transform: TrainTransform | EvalTransform
    length: int
    by_class: tuple[float, ...] | None = None

    def __call__(self, image: Tensor, target: np.ndarray | int | None, rng: np.random.Generator) -> dict[str, Tensor]:
        if self.by_class is not None:
            target = np.array([math.nan if target is None or target < 0 else self.by_class[target]])
        elif target is None:
            target = np.full(self.length, math.nan)
        return self.transform(image, torch.from_numpy(target).float(), rng)

    def of_classes(self, values: tuple[float, ...]) -> "RowTransform":
        """The same for targets that are classes."""
        return replace(self, by_class=values)

    def enlarged(self, factor: float) -> "RowTransform":
        """As `EvalTransform.enlarged`."""
        return replace(self, transform=self.transform.enlarged(factor))


class AutoAugment:
    """One of timm's policies (RandAugment, AutoAugment, three-augment, AugMix) on uint8 tensors [3, H, W]."""

    def __init__(self, policy: str, mean: tuple[float, ...], data: Data):
        if not POLICY.fullmatch(policy):  # timm ignores what it cannot parse
            raise UserError(
                f"augment.auto_augment {policy!r} is not a policy: use, for example, rand-m9-mstd0.5-inc1, "
                "original, v0, 3a or augmix-m3-w3"
            )
        kind = policy.partition("-")[0]
        build = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}.get(kind, auto_augment_transform)
        settings = {"img_mean": tuple(round(255 * m) for m in mean)}
        max_shift = int(0.45 * min(data.height_width))  # pixels
        settings |= {"translate_pct": 0.3} if kind == "augmix" else {"translate_const": max_shift}
        if data.interpolation != "random":
            settings["interpolation"] = getattr(Image.Resampling, data.interpolation.upper())
        self.transform = build(policy, settings)

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        random.seed(int(rng.integers(2**32)))  # timm draws from the global generators
        np.random.seed(int(rng.integers(2**32)))
        if image.dtype != torch.uint8:
            raise UserError("augment.auto_augment needs images of 8 bits: set it to null")
        return F.pil_to_tensor(self.transform(F.to_pil_image(image)))


def jitter(image: Tensor, rng: np.random.Generator, strength: float) -> Tensor:
    """Scale brightness, contrast and saturation of an image [3, H, W], in random order, by 1 - to 1 + `strength`."""
    for adjust in rng.permutation([F.adjust_brightness, F.adjust_contrast, F.adjust_saturation]):
        image = adjust(image, rng.uniform(1 - strength, 1 + strength))
    return image


def to_float(images: Tensor) -> Tensor:
    """Loaded images, uint8 or float32 from 0 to 1, as float32 from 0 to 1."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def to_rgb(images: Tensor) -> Tensor:
    """Images [..., C, H, W] as uint8 [..., 3, H, W]: the first three channels; the first as grey if there are fewer."""
    images = images[..., :3, :, :] if images.shape[-3] >= 3 else torch.cat([images[..., :1, :, :]] * 3, -3)
    return (to_float(images).clamp(0, 1) * 255).round().to(torch.uint8)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise loaded images [B, C, H, W], uint8 or float32 from 0 to 1, to fp32; `mean` and `std` are [C]."""
    largest = 255 if images.dtype == torch.uint8 else 1
    scaled = images.to(torch.float32, copy=True).mul_((1 / (largest * std))[:, None, None])  # in place: one copy
    return scaled.sub_((mean / std)[:, None, None])
