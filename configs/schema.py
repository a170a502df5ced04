"""The settings of both stages: every default stands here once, and its meaning in `--help` is the text beside it.

A recipe (`configs/pretrain/*.yaml`, `configs/finetune/*.yaml`) is a YAML file of these keys; the command line
overrides single keys by their dotted names (`--optim.lr 1e-3`). What one key alone can tell about its own validity is
checked here; what needs the model or the data is checked by their owners.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from configs.errors import UserError

CHANNELS, STEM_STRIDE = 3, 4  # of a model where nothing else is said
PATCH_PER_STEM_STRIDE = 8  # three 2x2 downsamplings follow the stem: the last stage has one token for a patch
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def require(ok: bool, key: str, value: object, rule: str) -> None:
    """Raise a `UserError` that names the key and its value unless `ok`."""
    if not ok:
        raise UserError(f"{key} is {value}: it must be {rule}")


def visible_patches(patches: int, mask_ratio: float) -> int:
    """Number of visible patches of each image, at least one. The paper's .6 keeps int(49 x .4) = 19 of 49."""
    return max(1, int(patches * (1 - mask_ratio) + 1e-6))  # 1 - .6 is a little under .4 in floating point


@dataclass(frozen=True)
class Encoder:
    """A ConvNeXt.

    Args:
        name: model, as timm names it: convnextv2_{atto,...,huge} or convnext_{tiny,...,xlarge}
        channels: input channels: 1 grey, 3 RGB, 4 RGBA; any number from .npy images
        stem_stride: 1, 2 or 4; a masked patch has 8 x stem_stride pixels a side; small images need a small one
        depths: blocks of the four stages, where they differ from the named model's
        dims: widths of the four stages, where they differ from the named model's
    """

    name: str | None = None
    channels: int | None = None
    stem_stride: Literal[1, 2, 4] | None = None
    depths: tuple[int, int, int, int] | None = None
    dims: tuple[int, int, int, int] | None = None

    def __post_init__(self):
        require(self.channels is None or self.channels > 0, "model.channels", self.channels, "positive")
        for key in ("depths", "dims"):
            values = getattr(self, key)
            require(values is None or min(values) > 0, f"model.{key}", values, "four positive numbers")


@dataclass(frozen=True)
class PretrainModel(Encoder):
    """The masked autoencoder.

    Args:
        mask_ratio: share of the patches that are hidden
        decoder_dim: width of the decoder
        decoder_depth: ConvNeXt V2 blocks of the decoder
        norm_pix: predict pixels normalised patch by patch (the paper's target)
        backend: packed = visible tokens only (fast); masked = dense convolutions and a mask (plain reference);
            minkowski = MinkowskiEngine's sparse convolutions (the published code's; bash launch/install_minkowski.sh);
            zeroed = ordinary convolutions on images with zeros at hidden patches: worse, the paper's control
        grn_scope: what the encoder's GRN takes its norm over: image = each image, as in the paper; batch = a rank's
            micro batch, as the official sparse code does; only to go on with, or repeat, a run of that code
        recompute: what the backward pass computes again instead of keeping it: mlp = the hidden layer of 4 widths, most
            of the memory; block = the whole block: least memory, about a third more time
    """

    name: str = "convnextv2_atto"
    channels: int = CHANNELS
    stem_stride: Literal[1, 2, 4] = STEM_STRIDE
    mask_ratio: float = 0.6
    decoder_dim: int = 512
    decoder_depth: int = 1
    norm_pix: bool = True
    backend: Literal["packed", "masked", "minkowski", "zeroed"] = "packed"
    grn_scope: Literal["image", "batch"] = "image"
    recompute: Literal["none", "mlp", "block"] = "none"

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.mask_ratio < 1, "model.mask_ratio", self.mask_ratio, "between 0 and 1")
        scopes = ("image",) if self.backend == "zeroed" else ("image", "batch")
        require(self.grn_scope in scopes, "model.grn_scope", self.grn_scope, f"image with backend {self.backend}")
        require(self.decoder_dim > 0, "model.decoder_dim", self.decoder_dim, "positive")
        require(self.decoder_depth > 0, "model.decoder_depth", self.decoder_depth, "positive")


@dataclass(frozen=True)
class FinetuneModel(Encoder):
    """The dense classifier. Keys left null are read from the file of --init.

    Args:
        like: pretraining recipe whose model is built with --init none, for the keys left null
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first
        head_init: scale of a new classifier's initial weights; null = .001 with --init, 1 from scratch
        freeze_encoder: train the classifier alone (its norm and linear layer) on the encoder as it is
        recompute: what the backward pass computes again instead of keeping it: mlp = the hidden layer of 4 widths, most
            of the memory; block = the whole block: least memory, about a third more time
    """

    like: str | None = None
    drop_path: float = 0.0
    head_init: float | None = None
    freeze_encoder: bool = False
    recompute: Literal["none", "mlp", "block"] = "none"

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.drop_path < 1, "model.drop_path", self.drop_path, "at least 0 and below 1")


@dataclass(frozen=True)
class Data:
    """Shards made or indexed by `python data/prepare.py`.

    Args:
        path: folder with the shards and their index.json, or its URL: http(s)://, s3://, gs://, az:// or hf://
        split: which split to train on
        size: height and width in pixels of the images the model sees; one number for a square
        crop_scale: least and greatest share of the image's area in a random crop
        crop_ratio: least and greatest ratio of width to height of a random crop
        interpolation: how crops are resized; random = bilinear or bicubic in training, bicubic in evaluation
        hflip: probability of a horizontal flip
        vflip: probability of a vertical flip: for images without an up and down, as from above or a microscope
        repeats: random crops of each image in a global batch, which then holds fewer images (repeated augmentation)
        mean: mean of each channel (pixels are 0 to 1); null = that of --init; else ImageNet's for 3 channels, or .5
        std: standard deviation of each channel, likewise
        workers: loader processes of each rank; 0 = none, load in the training process; null = a rank's share of the
            machine's cores, at most 8
        cache: folder for shards fetched from a URL, shared by all ranks and runs of a machine
        cache_gb: the most that folder may hold, in 10^9 bytes; the least recently used shards go
        max_damaged: share of a split's images that may be damaged; each is named and replaced by another
    """

    path: str = "shards/digits"
    split: str = "train"
    size: int | tuple[int, int] = 224
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Literal["bicubic", "bilinear", "nearest", "random"] = "bicubic"
    hflip: float = 0.5
    vflip: float = 0.0
    repeats: int = 1
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    workers: int | None = None
    cache: str = "~/.cache/convnext-fcmae"
    cache_gb: float = 100.0
    max_damaged: float = 0.01

    def __post_init__(self):
        low, high = self.crop_scale
        require(0 < low <= high <= 1, "data.crop_scale", self.crop_scale, "two shares with 0 < least <= greatest <= 1")
        low, high = self.crop_ratio
        require(0 < low <= high, "data.crop_ratio", self.crop_ratio, "two ratios with 0 < least <= greatest")
        for key in ("hflip", "vflip"):
            require(0 <= getattr(self, key) <= 1, f"data.{key}", getattr(self, key), "a probability")
        require(self.repeats > 0, "data.repeats", self.repeats, "positive")
        require(self.workers is None or self.workers >= 0, "data.workers", self.workers, "0 or more")
        require(self.cache_gb > 0, "data.cache_gb", self.cache_gb, "positive")
        require(0 <= self.max_damaged <= 1, "data.max_damaged", self.max_damaged, "a share, 0 to 1")
        require(min(self.height_width) > 0, "data.size", self.size, "positive")
        require(self.std is None or min(self.std) > 0, "data.std", self.std, "positive")

    @property
    def height_width(self) -> tuple[int, int]:
        """Image height and width, pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)

    @property
    def eval_interpolation(self) -> str:
        """How images are resized where nothing is random."""
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
class Optim:
    """AdamW, linear warm-up, cosine decay; the learning rate changes every step.

    Args:
        lr: base learning rate for a batch of 256; the one used is lr x batch_size / 256
        batch_size: images in one optimizer step, over all ranks
        micro_batch: images that a rank takes at once; the rest is accumulated; null = batch_size / ranks
        epochs: passes over the data
        warmup_epochs: epochs in which the learning rate rises from 0
        warmup_lr: learning rate at the beginning of the warm-up, for a batch of 256
        min_lr: learning rate at the end, for a batch of 256
        weight_decay: decay of weights; biases, norms, GRN, layer scale and mask token have none
        decay_rules: other weight decays by parameter name, like {"stem.*": 0, "*.grn.*": 0.01}; of several patterns
            that match, the last counts; --dry-run prints every parameter's
        betas: AdamW's
        clip_grad: greatest norm of the gradient; 0 = off
        precision: fp32; bf16 or fp16 (autocast; weights stay fp32; fp16 with dynamic loss scaling, for GPUs without
            bf16); auto = bf16 on a GPU that has it, else fp32
        zero_stage: what DeepSpeed's ZeRO divides among the ranks: 0 nothing, 1 optimizer state, 2 gradients too,
            3 weights too; 3 resumes on the same number of ranks only
        max_skipped: steps in a row that may be skipped because the loss or a gradient is not finite; one more stops
            the run
    """

    lr: float = 1.5e-4
    batch_size: int = 4096
    micro_batch: int | None = None
    epochs: int = 800
    warmup_epochs: float = 40
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    weight_decay: float = 0.05
    decay_rules: dict[str, float] | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad: float = 0.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 1
    max_skipped: int = 10

    def __post_init__(self):
        require(self.lr > 0, "optim.lr", self.lr, "positive")
        require(self.batch_size > 0, "optim.batch_size", self.batch_size, "positive")
        require(self.epochs > 0, "optim.epochs", self.epochs, "positive")
        require(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, "0 or more")
        require(self.clip_grad >= 0, "optim.clip_grad", self.clip_grad, "0 or more")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        for key in ("warmup_lr", "min_lr"):
            require(getattr(self, key) >= 0, f"optim.{key}", getattr(self, key), "0 or more")
        for pattern, decay in (self.decay_rules or {}).items():
            require(decay >= 0, f"optim.decay_rules {pattern}", decay, "0 or more")
        require(self.max_skipped >= 0, "optim.max_skipped", self.max_skipped, "0 or more")
        require(self.micro_batch is None or self.micro_batch > 0, "optim.micro_batch", self.micro_batch, "positive")
        require(all(0 <= beta < 1 for beta in self.betas), "optim.betas", self.betas, "two numbers from 0 to below 1")

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of a step (counted from 0), before layer decay: linear warm-up, then half a cosine."""
        scale = self.batch_size / 256
        warmup, total = self.warmup_epochs * steps_per_epoch, self.epochs * steps_per_epoch
        if step < warmup:
            return scale * (self.warmup_lr + (self.lr - self.warmup_lr) * step / warmup)
        progress = (step - warmup) / max(1, total - warmup)
        return scale * (self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))

    def accumulation(self, ranks: int) -> tuple[int, int]:
        """Micro batch of a rank and number of accumulated micro batches. Raises `UserError` if they do not divide."""
        micro = self.micro_batch or self.batch_size // ranks
        if micro == 0 or self.batch_size % (micro * ranks):
            raise UserError(
                f"optim.batch_size {self.batch_size} is not a whole number of micro batches: optim.micro_batch "
                f"{micro} x {ranks} ranks = {micro * ranks}; choose a multiple of it"
            )
        return micro, self.batch_size // (micro * ranks)


@dataclass(frozen=True)
class Run:
    """Where a run writes, and how often.

    Args:
        name: the run's name; it writes into FOLDER/NAME
        folder: parent folder of runs
        seed: of everything random
        log_every: steps between two log lines
        picture_every: epochs between two reconstruction pictures (pretraining)
        eval_every: epochs between two evaluations, and after the last epoch (fine-tuning)
        patience: epochs without a better top-1 after which fine-tuning ends; 0 = never
        max_steps: end after this step of the schedule, as if the last epoch ended there: to try a recipe out
        save_every: epochs between two checkpoints
        save_minutes: also a checkpoint when the last one is this old, in the middle of an epoch; 0 = off
        keep: how many checkpoints to keep, besides the best one (fine-tuning)
        hang_minutes: a run without progress for so long ends, and names the rank it waited for
        device: auto = GPU where there is one
        kernels: on a GPU: triton = this project's kernels; plain = PyTorch's operations, slower, the same result
    """

    name: str = "digits"
    folder: str = "runs"
    seed: int = 0
    log_every: int = 10
    picture_every: int = 10
    eval_every: int = 1
    patience: int = 0
    max_steps: int | None = None
    save_every: int = 1
    save_minutes: float = 30.0
    keep: int = 2
    hang_minutes: float = 10.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    kernels: Literal["triton", "plain"] = "triton"

    def __post_init__(self):
        for key in ("log_every", "picture_every", "eval_every", "save_every", "keep"):
            require(getattr(self, key) > 0, f"run.{key}", getattr(self, key), "positive")
        require(self.patience >= 0, "run.patience", self.patience, "0 or more")
        require(self.max_steps is None or self.max_steps > 0, "run.max_steps", self.max_steps, "positive")
        require(self.save_minutes >= 0, "run.save_minutes", self.save_minutes, "0 or more")
        require(self.hang_minutes > 0, "run.hang_minutes", self.hang_minutes, "positive")
        require(0 <= self.seed < 2**32, "run.seed", self.seed, "from 0 to below 2**32")
        require(self.name not in ("", ".", ".."), "run.name", repr(self.name), "the name of a folder")


def check_repeats(data: Data, optim: Optim) -> None:
    """Raise `UserError` for a global batch that is not so many crops of each of its images."""
    require(
        optim.batch_size % data.repeats == 0,
        "data.repeats",
        data.repeats,
        f"a divisor of optim.batch_size {optim.batch_size}",
    )


@dataclass(frozen=True)
class Probe:
    """What the encoder's features tell of labelled images while it is pretrained.

    Args:
        every: epochs between two probes, and one after the last epoch; 0 = none; needs labels
        path: labelled shards; null = those of data.path
        train_split: split whose images are the neighbours
        eval_split: split that is classified
        images: the most images that are taken of either split, evenly spread over it
        linear_epochs: passes of a linear classifier over the features, which is scored too; 0 = none
        crop: share of the image's side in the centre crop; 1 = squash without crop
    """

    every: int = 0
    path: str | None = None
    train_split: str = "train"
    eval_split: str = "val"
    images: int = 50_000
    linear_epochs: int = 0
    crop: float = 0.875

    def __post_init__(self):
        require(self.every >= 0, "probe.every", self.every, "0 or more")
        require(self.images > 0, "probe.images", self.images, "positive")
        require(self.linear_epochs >= 0, "probe.linear_epochs", self.linear_epochs, "0 or more")
        require(0 < self.crop <= 1, "probe.crop", self.crop, "above 0 and at most 1")
        require(
            self.eval_split != self.train_split, "probe.eval_split", self.eval_split, "another than probe.train_split"
        )


@dataclass(frozen=True)
class Pretrain:
    """FCMAE pretraining.

    Args:
        init: weights to start from: an fcmae.pt, or a file of any other format (official, official-sparse, timm,
            transformers, mmpretrain), with the decoder if the file has one; none = from scratch
        resume: auto = go on from the newest checkpoint, if any; must = fail without one; never = fail with one
        data: Images
        model: Masked autoencoder
        optim: Optimisation
        probe: Nearest neighbours along the way
        run: The run
    """

    init: str = "none"
    resume: Literal["auto", "must", "never"] = "auto"
    data: Data = field(default_factory=Data)
    model: PretrainModel = field(default_factory=PretrainModel)
    optim: Optim = field(default_factory=Optim)
    probe: Probe = field(default_factory=Probe)
    run: Run = field(default_factory=Run)

    def __post_init__(self):
        check_repeats(self.data, self.optim)


@dataclass(frozen=True)
class Augment:
    """Augmentations and regularisers, timm's.

    Args:
        auto_augment: policy in timm's notation: RandAugment (rand-m9-mstd0.5-inc1), AutoAugment (original, originalr,
            v0, v0r), three-augment (3a) or AugMix (augmix-m3-w3); null = off; needs 3 channels of 8 bits
        color_jitter: greatest relative change of brightness, contrast and saturation; 0 = off; needs 3 channels
        erase: probability of random erasing
        erase_mode: what the erased area is filled with: const = the mean, rand = one random colour, pixel = noise
        erase_count: the most areas that are erased in an image
        mixup: mixup's alpha; 0 = off
        cutmix: cutmix's alpha; 0 = off
        mix_prob: probability that mixup or cutmix is applied
        mix_switch: probability of cutmix where both are on
        mix_mode: what shares one draw: batch = the micro batch, pair = two images, elem = none
        smoothing: label smoothing
        ema: decay of the exponential moving average of the weights; 0 = off
        eval_crop: share of the image's side in the centre crop of an evaluation; 1 = squash without crop
    """

    auto_augment: str | None = None
    color_jitter: float = 0.0
    erase: float = 0.0
    erase_mode: Literal["const", "rand", "pixel"] = "pixel"
    erase_count: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    mix_switch: float = 0.5
    mix_mode: Literal["batch", "pair", "elem"] = "batch"
    smoothing: float = 0.1
    ema: float = 0.0
    eval_crop: float = 0.875

    def __post_init__(self):
        for key in ("erase", "mix_prob", "mix_switch"):
            require(0 <= getattr(self, key) <= 1, f"augment.{key}", getattr(self, key), "a probability")
        require(0 <= self.color_jitter <= 1, "augment.color_jitter", self.color_jitter, "from 0 to 1")
        require(self.erase_count > 0, "augment.erase_count", self.erase_count, "positive")
        require(0 <= self.smoothing < 1, "augment.smoothing", self.smoothing, "at least 0 and below 1")
        require(0 <= self.ema < 1, "augment.ema", self.ema, "at least 0 and below 1")
        for key in ("mixup", "cutmix"):
            require(getattr(self, key) >= 0, f"augment.{key}", getattr(self, key), "0 or more")
        require(0 < self.eval_crop <= 1, "augment.eval_crop", self.eval_crop, "above 0 and at most 1")


@dataclass(frozen=True)
class Finetune:
    """Supervised fine-tuning.

    Args:
        init: weights to start from: an fcmae.pt, or a file of any other format (official, official-sparse, timm,
            transformers, mmpretrain); none = from scratch
        resume: auto = go on from the newest checkpoint, if any; must = fail without one; never = fail with one
        eval_split: split that is evaluated after each epoch
        layer_decay: factor of the learning rate from one layer to the one below it; 1 = off
        layer_decay_kind: what a layer is: single = each block; group = a twelfth of the network
        balance: how far rare classes are drawn more often: 0 = as they come, 1 = all classes alike; an image of a class
            with n images is drawn in proportion to n ** -balance
        label_share: share of the images of each class that are trained on, drawn from run.seed: what few labels suffice
        data: Images
        model: Classifier
        optim: Optimisation
        augment: Augmentation
        run: The run
    """

    init: str = "none"
    resume: Literal["auto", "must", "never"] = "auto"
    eval_split: str = "val"
    layer_decay: float = 1.0
    layer_decay_kind: Literal["single", "group"] = "single"
    balance: float = 0.0
    label_share: float = 1.0
    data: Data = field(default_factory=Data)
    model: FinetuneModel = field(default_factory=FinetuneModel)
    optim: Optim = field(default_factory=Optim)
    augment: Augment = field(default_factory=Augment)
    run: Run = field(default_factory=Run)

    def __post_init__(self):
        require(0 < self.layer_decay <= 1, "layer_decay", self.layer_decay, "above 0 and at most 1")
        check_repeats(self.data, self.optim)
        require(0 <= self.balance <= 1, "balance", self.balance, "from 0 to 1")
        require(0 < self.label_share <= 1, "label_share", self.label_share, "above 0 and at most 1")
        if self.augment.ema and self.optim.zero_stage == 3:
            raise UserError(
                f"augment.ema is {self.augment.ema} with optim.zero_stage 3, where no rank has all weights to average: "
                "use optim.zero_stage 0, 1 or 2, or augment.ema 0"
            )
