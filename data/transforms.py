"""From bytes to tensors: decoding, crop, flip, mask. Images are [C, H, W], uint8 until they are on the device.

What is random is drawn from the generator handed in, one for each (seed, epoch, sample).
"""

import io
import math
import random
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from configs.errors import UserError, reason
from data.sampler import SAMPLES

CROP_RATIO = (3 / 4, 4 / 3)  # least and greatest aspect ratio of a random crop
MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB, 4: ImageReadMode.RGB_ALPHA, None: ImageReadMode.UNCHANGED}
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
NPY_MAGIC = b"\x93NUMPY"
PICTURES = ("JPEG", "PNG", "WEBP", "GIF")  # PIL's names of what is read besides .npy
MOST_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # where PIL itself refuses a picture as a bomb, so that prepare.py agrees


def sample_rng(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The generator of one sample in one epoch."""
    return np.random.default_rng([seed, SAMPLES, epoch, sample])


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

    def read(bytes_as: str) -> np.ndarray:
        again = Image.open(io.BytesIO(data), formats=PICTURES)
        again.tile = [again.tile[0]._replace(args=bytes_as)]
        return np.asarray(again).astype(np.uint16)

    stored = picture.tile[0].args
    picture.verify()  # its checksums, at which decoding does not look
    if "16" not in stored:
        return _from_pil(Image.open(io.BytesIO(data), formats=PICTURES), channels)
    if stored == "LA;16B":
        halves = read("RGBA")
        pixels = halves[..., ::2] * 256 + halves[..., 1::2]
    elif stored == "I;16B":
        pixels = read(stored)[..., None]
    else:
        pixels = read(stored) * 256 + read(stored.replace("16B", "16L"))
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
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop, distributed like torchvision's RandomResizedCrop."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w = min(width, round(height * CROP_RATIO[1]))  # the largest centred crop of an allowed shape
    h = min(height, round(width / CROP_RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def random_crop_flip(
    image: Tensor, rng: np.random.Generator, size: tuple[int, int], scale: tuple[float, float], hflip: float
) -> Tensor:
    """A random crop of the image at `size` (bicubic, antialiased), mirrored with probability `hflip`."""
    box = random_box(rng, image.shape[1], image.shape[2], scale)
    image = F.resized_crop(image, *box, list(size), InterpolationMode.BICUBIC, antialias=True)
    return image.flip(2) if rng.random() < hflip else image


def center_crop(image: Tensor, size: tuple[int, int], share: float) -> Tensor:
    """The image at `size` for evaluation: its centre, `share` of the side long; 1 = the whole image, squashed."""
    if share == 1:
        return F.resize(image, list(size), InterpolationMode.BICUBIC, antialias=True)
    scale = max(size[0] / share / image.shape[1], size[1] / share / image.shape[2])
    resized = [max(target, round(side * scale)) for target, side in zip(size, image.shape[1:], strict=True)]
    return F.center_crop(F.resize(image, resized, InterpolationMode.BICUBIC, antialias=True), list(size))


def draw_visible(rng: np.random.Generator, grid: tuple[int, int], n: int) -> Tensor:
    """A mask [gy, gx] of bool with exactly n True: the patches that the encoder sees."""
    visible = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    visible[torch.from_numpy(rng.permutation(len(visible))[:n])] = True
    return visible.view(grid)


@dataclass(frozen=True)
class PretrainTransform:
    """A sample for the masked autoencoder: a random crop, and a mask with n visible patches."""

    size: tuple[int, int]
    crop_scale: tuple[float, float]
    hflip: float
    grid: tuple[int, int]
    n: int

    def __call__(self, image: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
        image = random_crop_flip(image, rng, self.size, self.crop_scale, self.hflip)
        return {"image": image, "visible": draw_visible(rng, self.grid, self.n)}


@dataclass(frozen=True)
class TrainTransform:
    """A sample for the classifier in training: a random crop, and RandAugment if asked for."""

    size: tuple[int, int]
    crop_scale: tuple[float, float]
    hflip: float
    rand_augment: "RandAugment | None"

    def __call__(self, image: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
        image = random_crop_flip(image, rng, self.size, self.crop_scale, self.hflip)
        return {"image": self.rand_augment(image, rng) if self.rand_augment else image}


@dataclass(frozen=True)
class EvalTransform:
    """A sample for evaluation: the image's centre."""

    size: tuple[int, int]
    crop: float

    def __call__(self, image: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
        return {"image": center_crop(image, self.size, self.crop)}


class RandAugment:
    """timm's RandAugment on a uint8 tensor of 3 channels. Raises `UserError` for a policy timm does not know."""

    def __init__(self, policy: str, mean: tuple[float, ...]):
        if len(mean) != 3:
            raise UserError(f"augment.rand_augment needs images of 3 channels, these have {len(mean)}: leave it null")
        fill = tuple(round(255 * m) for m in mean)
        try:
            self.transform = rand_augment_transform(policy, {"img_mean": fill, "translate_const": 100})
        except (AssertionError, ValueError, KeyError):
            raise UserError(
                f"augment.rand_augment {policy!r} is not a policy: write it like rand-m9-mstd0.5-inc1"
            ) from None

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        random.seed(int(rng.integers(2**32)))  # timm draws from the global generators
        np.random.seed(int(rng.integers(2**32)))
        if image.dtype != torch.uint8:
            raise UserError("augment.rand_augment needs images of 8 bits: leave it null")
        return F.pil_to_tensor(self.transform(F.to_pil_image(image)))


def to_float(images: Tensor) -> Tensor:
    """Images as loaded, uint8 or float32 from 0 to 1, as float32 from 0 to 1."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Images [B, C, H, W] as loaded to fp32 with the given statistics [C]."""
    largest = 255 if images.dtype == torch.uint8 else 1
    scaled = images.to(torch.float32, copy=True).mul_((1 / (largest * std))[:, None, None])  # one pass, one copy
    return scaled.sub_((mean / std)[:, None, None])
