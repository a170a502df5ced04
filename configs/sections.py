"""The sections about the model and its images. Checks that need the model or the data are with these."""

from dataclasses import dataclass
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from configs.errors import UserError
from configs.keys import BelowOne, Choice, Probability, Share, fixed, free, require

CHANNELS, STEM_STRIDE = 3, 4  # defaults of a model
PATCH_PER_STEM_STRIDE = 8  # three 2x2 downsamplings follow the stem: one token of the last stage covers one patch
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INPUT_CHANNELS = "input channels: 1 grey, 3 RGB, 4 RGBA; any number with .npy images"
PATCH = "a masked patch is 8 x stem_stride pixels wide; use 1 or 2 for small images"
RECOMPUTE = (
    "activation checkpointing: mlp = only the MLPs' hidden layers, most of the memory; block = whole blocks: least "
    "memory, about a third more time"
)


def visible_patches(patches: int, mask_ratio: float) -> int:
    """Number of visible patches of an image, at least one. The paper's ratio of .6 keeps int(49 x .4) = 19 of 49."""
    return max(1, int(patches * (1 - mask_ratio) + 1e-6))  # 1 - .6 is a little under .4 in floating point


@dataclass(frozen=True)
class Encoder:
    """A ConvNeXt."""

    name: str | None = fixed(None, "model, by its timm name: convnextv2_{atto,...,huge} or convnext_{tiny,...,xlarge}")
    channels: int | None = fixed(None, INPUT_CHANNELS)
    stem_stride: Literal[1, 2, 4] | None = fixed(None, PATCH)
    depths: tuple[int, int, int, int] | None = fixed(None, "blocks of each stage; null = as the model's name implies")
    dims: tuple[int, int, int, int] | None = fixed(None, "width of each stage; null = as the model's name implies")

    def __post_init__(self):
        require(self.channels is None or self.channels > 0, "model.channels", self.channels, "positive")
        for key in ("depths", "dims"):
            values = getattr(self, key)
            require(values is None or min(values) > 0, f"model.{key}", values, "four positive numbers")


@dataclass(frozen=True)
class PretrainModel(Encoder):
    """The encoder in pretraining, and how it is computed."""

    name: str = fixed("convnextv2_atto", "model, by its timm name: convnextv2_{atto,...,huge} or convnext_{...}")
    channels: int = fixed(CHANNELS, INPUT_CHANNELS)
    stem_stride: Literal[1, 2, 4] = fixed(STEM_STRIDE, PATCH)
    backend: Literal["packed", "masked", "minkowski", "zeroed"] = fixed(
        "packed",
        "packed = visible tokens only (fast); masked = dense convolutions with a mask (reference); minkowski = sparse "
        "convolutions of MinkowskiEngine, as in the published code (bash launch/install_minkowski.sh); zeroed = "
        "ordinary convolutions on images with zeroed patches: worse, the paper's control",
    )
    grn_scope: Literal["image", "batch"] = fixed(
        "image",
        "GRN's norm is over: image = each image, as in the paper; batch = a rank's micro batch, as in the official "
        "sparse code; only to continue or reproduce a run of that code",
    )
    recompute: Literal["none", "mlp", "block"] = fixed("none", RECOMPUTE)

    def __post_init__(self):
        super().__post_init__()
        scopes = ("image",) if self.backend == "zeroed" else ("image", "batch")
        require(self.grn_scope in scopes, "model.grn_scope", self.grn_scope, f"image with backend {self.backend}")


@dataclass(frozen=True)
class MaskedSettings:
    """Masks, and the decoder that predicts for hidden patches."""

    mask_ratio: float = fixed(0.6, "share of the patches that is hidden")
    masks: PositiveInt = fixed(
        1, "masks of each image in a step, which show different patches; an image is read, decoded and cropped once"
    )
    decoder_dim: int = fixed(512, "width of the decoder")
    decoder_depth: int = fixed(1, "ConvNeXt V2 blocks of the decoder")

    def __post_init__(self):
        require(0 < self.mask_ratio < 1, "objective.mask_ratio", self.mask_ratio, "above 0 and below 1")
        require(self.decoder_dim > 0, "objective.decoder_dim", self.decoder_dim, "positive")
        require(self.decoder_depth > 0, "objective.decoder_depth", self.decoder_depth, "positive")


@dataclass(frozen=True)
class FCMAESettings(MaskedSettings):
    """The masked autoencoder's masks, decoder and target."""

    norm_pix: bool = fixed(True, "predict pixels normalised within each patch, as in the paper")


@dataclass(frozen=True)
class FCMAEChoice(FCMAESettings, Choice):
    """The section `objective` of FCMAE. Weight files hold its settings alone."""


@dataclass(frozen=True)
class FinetuneModel(Encoder):
    """The encoder in fine-tuning. Keys left null are read from the file of --init."""

    like: str | None = fixed(
        None, "with --init none: pretraining recipe that supplies the keys left null, and data.mean and data.std"
    )
    drop_path: BelowOne = fixed(0.0, "stochastic depth of the last block; it grows linearly from 0 at the first")
    freeze_encoder: bool = fixed(False, "train the head only")
    recompute: Literal["none", "mlp", "block"] = fixed("none", RECOMPUTE)


@dataclass(frozen=True)
class Data:
    """Shards written or indexed by `python data/prepare.py`."""

    path: str = free(
        "shards/digits",
        "folder of shards, or its URL (http(s)://, s3://, gs://, az://, hf://); folder, zip, tar or table of images",
    )
    split: str = fixed("train", "split to train on")
    size: PositiveInt | tuple[PositiveInt, PositiveInt] = fixed(224, "image side in pixels, or [height,width]")
    crop_scale: tuple[float, float] = fixed((0.2, 1.0), "range of a random crop's area, as a share of the image")
    crop_ratio: tuple[float, float] = fixed((3 / 4, 4 / 3), "range of a random crop's width / height")
    interpolation: Literal["bicubic", "bilinear", "nearest", "random"] = fixed(
        "bicubic", "how crops are resized; random = bilinear or bicubic in training, bicubic in evaluation"
    )
    shrink_jpeg: bool = fixed(
        True, "decode JPEGs at 1/2, 1/4 or 1/8 of their size where their crop needs no more (training)"
    )
    hflip: Probability = fixed(0.5, "probability of a horizontal flip")
    vflip: Probability = fixed(0.0, "probability of a vertical flip, for aerial or microscopic images")
    repeats: PositiveInt = fixed(
        1, "crops of an image in a batch; batch_size counts crops, so a batch has batch_size / repeats images"
    )
    mean: tuple[float, ...] | None = fixed(
        None, "mean per channel, of pixels from 0 to 1; null = that of --init, else ImageNet's for 3 channels, or .5"
    )
    std: tuple[PositiveFloat, ...] | None = fixed(None, "standard deviation per channel, likewise")
    workers: NonNegativeInt | None = free(
        None, "loader processes per rank; 0 = load in the training process; null = its share of the cores, max. 8"
    )
    cache: str = free("~/.cache/convnext-fcmae", "folder for downloaded shards, shared by ranks and runs of a machine")
    cache_gb: PositiveFloat = free(100.0, "maximum size of the cache, 10^9 bytes; least recently used shards go first")
    max_pixels: PositiveInt = free(178_956_970, "refuse larger images, as --max-pixels of data/prepare.py")
    max_damaged: Probability = free(0.01, "share of images that may be unreadable; they are replaced and reported")

    folds: NonNegativeInt = fixed(
        0, "cross-validation: number of parts of data.split, stratified by label; 0 = off (fine-tuning)"
    )
    fold: NonNegativeInt = fixed(0, "the part that is evaluated, from 0; the others are trained on (fine-tuning)")

    def __post_init__(self):
        require(self.folds != 1, "data.folds", self.folds, "0, or at least 2")
        require(self.fold < max(1, self.folds), "data.fold", self.fold, f"below data.folds {self.folds}")
        low, high = self.crop_scale
        require(0 < low <= high <= 1, "data.crop_scale", self.crop_scale, "two shares with 0 < min <= max <= 1")
        low, high = self.crop_ratio
        require(0 < low <= high, "data.crop_ratio", self.crop_ratio, "two ratios with 0 < min <= max")

    @property
    def unit(self) -> str:
        """What batch sizes and rates count: image, or crop of one."""
        return "crop" if self.repeats > 1 else "image"

    @property
    def height_width(self) -> tuple[int, int]:
        """Image height and width, pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)

    @property
    def eval_interpolation(self) -> str:
        """How images are resized in evaluation."""
        return "bicubic" if self.interpolation == "random" else self.interpolation

    def grid(self, stem_stride: int) -> tuple[int, int]:
        """Rows and columns of patches. Raises `UserError` if the patch does not divide the image."""
        patch = PATCH_PER_STEM_STRIDE * stem_stride
        height, width = self.height_width
        if height % patch or width % patch:
            near = [max(patch, round(side / patch) * patch) for side in (height, width)]
            raise UserError(
                f"data.size {height}x{width} is not a multiple of the patch, {patch} pixels (8 x model.stem_stride "
                f"{stem_stride}): use {near[0]}x{near[1]} or another model.stem_stride"
            )
        return height // patch, width // patch

    def statistics(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel. Raises `UserError` where their number is not `channels`."""
        default = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
        mean, std = self.mean or default[0], self.std or default[1]
        for key, values in (("data.mean", mean), ("data.std", std)):
            require(len(values) == channels, key, list(values), f"null, or {channels} numbers (model.channels)")
        return tuple(mean), tuple(std)


@dataclass(frozen=True)
class Augment:
    """Augmentation of images and averaging of weights, as in timm."""

    auto_augment: str | None = fixed(
        None,
        "timm policy: RandAugment (rand-m9-mstd0.5-inc1), AutoAugment (original, originalr, v0, v0r), three-augment "
        "(3a) or AugMix (augmix-m3-w3); null = off; 8-bit images with 3 channels only",
    )
    color_jitter: Probability = fixed(
        0.0, "max. relative change of brightness, contrast, saturation; 0 = off; 3 channels"
    )
    erase: Probability = fixed(0.0, "probability of random erasing")
    erase_mode: Literal["const", "rand", "pixel"] = fixed(
        "pixel", "fill of erased areas: const = the mean, rand = one random colour, pixel = noise"
    )
    erase_count: PositiveInt = fixed(1, "maximum number of erased areas per image")
    ema: BelowOne = fixed(0.0, "decay of the exponential moving average of the weights; 0 = off")
    eval_crop: Share = fixed(0.875, "centre crop in evaluation, as a share of the side; 1 = squash without a crop")
