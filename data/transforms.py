"""From bytes to tensors: decoding, crop, flip, mask. Images are [C, H, W], uint8 until they are on the device.

What is random is drawn from the generator handed in, one for each (seed, epoch, sample).
"""

import io
import math
import random
import re
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from configs.errors import UserError, reason
from configs.preprocessing import Preprocessing
from configs.schema import Augment, Data
from data.sampler import SAMPLES

MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB, 4: ImageReadMode.RGB_ALPHA, None: ImageReadMode.UNCHANGED}
RESIZING = {  # torch's own "nearest" is half a pixel off PIL's
    "nearest": InterpolationMode.NEAREST_EXACT,
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
}
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
NPY_MAGIC = b"\x93NUMPY"
NUMBER = r"\d+(\.\d+)?"
POLICY = re.compile(  # of timm
    rf"rand(-((m|n|p|mstd|mmax|inc){NUMBER}|t\w*))*|augmix(-(m|w|d|a|b|mstd){NUMBER})*"
    rf"|(original|originalr|v0|v0r|3a)(-mstd{NUMBER})?"
)
PICTURES = ("JPEG", "PNG", "WEBP", "GIF")  # PIL's names of what is read besides .npy
MOST_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # where PIL itself refuses a picture as a bomb, so that prepare.py agrees


def sample_rng(seed: int, epoch: int, sample: int, view: int = 0) -> np.random.Generator:
    """The generator of one sample in one epoch; of its several crops there (`data.repeats`), that of one `view`."""
    return np.random.default_rng([seed, SAMPLES, epoch, sample] + ([view] if view else []))


def decode(data: bytes, channels: int | None = None) -> Tensor:
    """Decode an image to [C, H, W]: uint8, or float32 for .npy arrays of more than 8 bits (integers scaled to 0..1).

    Args:
        data: JPEG, PNG, WebP, GIF (its first frame), or .npy of shape [H, W] or [H, W, C]
        channels: convert pictures to 1 (grey), 3 (RGB) or 4 (RGBA); None = as stored; .npy is never converted
    Raises:
        UserError: damaged, of an unknown type, or a .npy with another number of channels; also, before memory is
            taken for it, a picture of more than `MOST_PIXELS` or a .npy of more bytes than there are
    """
    if data.startswith(NPY_MAGIC):
        image = _decode_npy(data)
    elif channels not in MODES:
        raise UserError(
            f"a picture cannot be read with {channels} channels: use .npy images or model.channels 1, 3 or 4"
        )
    else:
        image = _decode_picture(data, channels)
        if channels is not None:
            image = _to_channels(image, channels)
    if channels is not None and image.shape[0] != channels:
        raise UserError(f"a .npy image has {image.shape[0]} channels, model.channels is {channels}")
    return image


def _decode_picture(data: bytes, channels: int | None) -> Tensor:
    """A picture as [C, H, W]. PIL reads its header first, in 40 us: torchvision would believe any size it claims."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "the given buffer is not writable": it is only read; PIL's, of large ones
            picture = Image.open(io.BytesIO(data), formats=PICTURES)
            if picture.format == "GIF":  # torchvision would decode every frame
                return _from_pil(picture, channels)
            if picture.format == "PNG":  # a damaged one ends the process in torchvision's libpng (0.29)
                return _decode_png(picture, data, channels)
            mode = MODES[3 if channels == 4 and picture.format != "WEBP" else channels]  # a JPEG has no alpha
            return decode_image(torch.frombuffer(data, dtype=torch.uint8), mode)
    except Image.DecompressionBombError:
        raise UserError(f"not a readable image (it claims more than {MOST_PIXELS:,} pixels)") from None
    except UnidentifiedImageError:
        raise UserError("not a readable image (no JPEG, PNG, WebP or GIF, or its header is damaged)") from None
    except Exception as error:  # damaged files make PIL's decoders raise nearly anything
        raise UserError(f"not a readable image ({reason(error)})") from None


def _from_pil(picture: Image.Image, channels: int | None) -> Tensor:
    """What PIL has opened, of 8 bits or fewer, as uint8 [C, H, W]."""
    picture.load()
    stored = {"1": "L", "P": "RGBA" if "transparency" in picture.info else "RGB"}
    mode = PIL_MODES[channels] if channels else stored.get(picture.mode, picture.mode)
    return F.pil_to_tensor(picture.convert(mode))


def _decode_png(picture: Image.Image, data: bytes, channels: int | None) -> Tensor:
    """A PNG as [C, H, W]: uint8, or float32 from 0 to 1 for 16 bits a channel.

    PIL's colours have 8 bits. So of 16 it is asked for the upper ones, and told another order of bytes, for the lower.
    """

    def plane(bytes_as: str) -> np.ndarray:
        again = Image.open(io.BytesIO(data), formats=PICTURES)
        again.tile = [again.tile[0]._replace(args=bytes_as)]
        return np.asarray(again).astype(np.uint16)

    stored = picture.tile[0].args
    picture.verify()  # its checksums, at which decoding does not look
    if "16" not in stored:
        return _from_pil(Image.open(io.BytesIO(data), formats=PICTURES), channels)
    if stored == "LA;16B":
        halves = plane("RGBA")
        pixels = halves[..., ::2] * 256 + halves[..., 1::2]
    elif stored == "I;16B":
        pixels = plane(stored)[..., None]
    else:
        pixels = plane(stored) * 256 + plane(stored.replace("16B", "16L"))
    return torch.from_numpy(pixels / np.float32(65535)).permute(2, 0, 1)


def _to_channels(image: Tensor, channels: int) -> Tensor:
    """A picture as grey, RGB or RGBA, where its decoder did not convert it (WebP, PNG of 16 bits)."""
    have = image.shape[0]
    if have == channels:
        return image
    if have in (2, 4) and channels in (1, 3):  # without alpha
        return _to_channels(image[: have - 1], channels)
    if channels == 1:
        return F.rgb_to_grayscale(image)
    if channels == 3:
        return image.expand(3, -1, -1)
    alpha = image[1:] if have == 2 else torch.full_like(image[:1], 255 if image.dtype == torch.uint8 else 1)
    return torch.cat([_to_channels(image, 3), alpha])


def _decode_npy(data: bytes) -> Tensor:
    """An array as [C, H, W]. np.load would take as much memory as the header claims; here the bytes must be there."""
    file = io.BytesIO(data)
    try:
        old = np.lib.format.read_magic(file) == (1, 0)
        read_header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read_header(file)
        array = np.frombuffer(data, dtype, math.prod(shape), file.tell())
        array = array.reshape(shape, order="F" if by_columns else "C")
    except Exception as error:  # damaged headers make numpy's parser raise nearly anything
        raise UserError(f"not a readable .npy image ({reason(error)})") from None
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.dtype.kind not in "uif" or 0 in array.shape:
        raise UserError(
            f"a .npy image must be numbers of shape [H, W] or [H, W, C], this one is {array.dtype} {array.shape}"
        )
    if array.dtype.kind in "ui" and array.dtype != np.uint8:
        array = array / np.iinfo(array.dtype).max
    if array.dtype != np.uint8:
        array = array.astype(np.float32)
    return torch.from_numpy(np.array(array, order="C")).permute(2, 0, 1)


def random_box(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], ratios: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop, distributed like torchvision's RandomResizedCrop.

    Args:
        scale: least and greatest share of the area
        ratios: least and greatest ratio of width to height
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(ratios[0]), math.log(ratios[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w = min(width, max(1, round(height * ratios[1])))  # the largest centred crop of an allowed shape
    h = min(height, max(1, round(width / ratios[0])))
    return (height - h) // 2, (width - w) // 2, h, w


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
    """The image at `size` for evaluation: its centre, `share` of the side long; 1 = the whole image, squashed."""
    mode = RESIZING[interpolation]
    if share == 1:
        return F.resize(image, list(size), mode, antialias=True)
    scale = max(size[0] / share / image.shape[1], size[1] / share / image.shape[2])
    resized = [max(target, round(side * scale)) for target, side in zip(size, image.shape[1:], strict=True)]
    return F.center_crop(F.resize(image, resized, mode, antialias=True), list(size))


def draw_visible(rng: np.random.Generator, grid: tuple[int, int], n: int) -> Tensor:
    """A mask [gy, gx] of bool with exactly n True: the patches that the encoder sees."""
    visible = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    visible[torch.from_numpy(rng.permutation(len(visible))[:n])] = True
    return visible.view(grid)


@dataclass(frozen=True)
class PretrainTransform:
    """A sample for the masked autoencoder: a random crop, and a mask with n visible patches."""

    data: Data
    grid: tuple[int, int]
    n: int

    def __call__(self, image: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
        return {"image": random_crop(image, rng, self.data), "visible": draw_visible(rng, self.grid, self.n)}


@dataclass(frozen=True)
class TrainTransform:
    """A sample for the classifier in training: a random crop, a policy's changes, colour jitter."""

    data: Data
    policy: "AutoAugment | None" = None
    color_jitter: float = 0.0

    def __call__(self, image: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
        image = random_crop(image, rng, self.data)
        if self.policy:
            image = self.policy(image, rng)
        return {"image": jitter(image, rng, self.color_jitter) if self.color_jitter else image}


def train_transform(data: Data, augment: Augment, mean: tuple[float, ...]) -> TrainTransform:
    """The transform that a configuration asks for; `mean` is the channels'.

    Raises:
        UserError: a policy timm does not know, or changes of colour for images that have no three channels
    """
    for key, off in (("auto_augment", "null"), ("color_jitter", "0")):
        if getattr(augment, key) and len(mean) != 3:
            raise UserError(f"augment.{key} needs images of 3 channels, these have {len(mean)}: set it to {off}")
    policy = AutoAugment(augment.auto_augment, mean, data) if augment.auto_augment else None
    return TrainTransform(data, policy, augment.color_jitter)


@dataclass(frozen=True)
class EvalTransform:
    """A sample for evaluation: the image's centre, as `center_crop` takes it."""

    size: tuple[int, int]
    crop: float
    interpolation: str = "bicubic"

    @classmethod
    def of(cls, preprocessing: Preprocessing) -> "EvalTransform":
        """The transform that a weight file records."""
        return cls(preprocessing.size, preprocessing.crop, preprocessing.interpolation)

    def __call__(self, image: Tensor, rng: np.random.Generator | None = None) -> dict[str, Tensor]:
        return {"image": center_crop(image, self.size, self.crop, self.interpolation)}


class AutoAugment:
    """A policy of timm's on a uint8 tensor of 3 channels: RandAugment, AutoAugment, three-augment or AugMix.

    Raises:
        UserError: a policy timm does not know
    """

    def __init__(self, policy: str, mean: tuple[float, ...], data: Data):
        if not POLICY.fullmatch(policy):  # timm passes over what it does not know
            raise UserError(
                f"augment.auto_augment {policy!r} is not a policy: write it like rand-m9-mstd0.5-inc1, original, v0, "
                "3a or augmix-m3-w3"
            )
        kind = policy.partition("-")[0]
        make = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}.get(kind, auto_augment_transform)
        settings = {"img_mean": tuple(round(255 * m) for m in mean)}
        if kind == "augmix":
            settings["translate_pct"] = 0.3
        else:
            settings["translate_const"] = int(0.45 * min(data.height_width))
        if data.interpolation != "random":
            settings["interpolation"] = getattr(Image.Resampling, data.interpolation.upper())
        self.transform = make(policy, settings)

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        random.seed(int(rng.integers(2**32)))  # timm draws from the global generators
        np.random.seed(int(rng.integers(2**32)))
        if image.dtype != torch.uint8:
            raise UserError("augment.auto_augment needs images of 8 bits: set it to null")
        return F.pil_to_tensor(self.transform(F.to_pil_image(image)))


def jitter(image: Tensor, rng: np.random.Generator, most: float) -> Tensor:
    """An image [3, H, W] with brightness, contrast and saturation, in random order, changed by up to `most`."""
    for adjust in rng.permutation([F.adjust_brightness, F.adjust_contrast, F.adjust_saturation]):
        image = adjust(image, rng.uniform(1 - most, 1 + most))
    return image


def to_float(images: Tensor) -> Tensor:
    """Images as loaded, uint8 or float32 from 0 to 1, as float32 from 0 to 1."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Images [B, C, H, W] as loaded to fp32 with the given statistics [C]."""
    largest = 255 if images.dtype == torch.uint8 else 1
    scaled = images.to(torch.float32, copy=True).mul_((1 / (largest * std))[:, None, None])  # one pass, one copy
    return scaled.sub_((mean / std)[:, None, None])
