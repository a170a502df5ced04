"""The rules of a plan: keys of a recipe for both stages, each with its reason.

The values come from the recipes in `configs/`; only what depends on the images or the machine is decided here.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.recipes import RECIPES, load_recipe
from launch.plans.facts import TASKS, Facts, evaluated_split, why_no_finetuning

SIDES = {40: (32, 1), 56: (48, 1), 80: (64, 2), 112: (96, 2), 176: (128, 4)}  # shorter side up to: size, stem stride
LARGE = 224, 4  # docs/guide/small-images.md has the reasons for the smaller ones
MODELS = {100_000: "atto", 1_000_000: "femto", math.inf: "pico"}  # on a GPU, by the images below
MANY = 1_000_000  # images of configs/pretrain/one-gpu.yaml and more
FEW = 4_096  # images below which a batch of 512 would give less than 8 steps an epoch
MIN_STEPS = 8  # of an epoch
MIN_BATCH = 16
PASSES = {"cpu": 45_000 * 45, "cuda": 45_000 * 200}  # images x epochs of cifar10-small-muon.yaml and of cifar10.yaml
MUON = "cifar10-small-muon"  # the recipe of FCMAE without a GPU
CROPS = "cifar10-small-lejepa"  # the recipe whose objective compares crops of an image
CROPS_PASSES = 45_000 * 28  # its crops x epochs
CROPS_BATCH, CROPS_IMAGES = 120, 256  # fewest crops in a step, and images: fewer give no distribution to compare
EPOCHS = {"cpu": (10, 2000), "cuda": (100, 2000)}  # of one-gpu.yaml, and of docs/guide/own-images.md
WARMUP = 0.05  # of the epochs
OF_CROPS = ("data.crop_scale", "data.repeats", "objective.name", "objective.mask_ratio")
KEPT = (*OF_CROPS, "data.vflip", "objective.decoder_dim", "model.depths", "model.dims", "optim.name")
WHY = {
    "data.repeats": "crops of an image in a step; batch and epochs count crops",
    "optim.name": "learns more in the same time than AdamW, measured without a GPU (docs/results.md)",
    "objective.name": "fcmae too, and crops of an image get alike features: better ones (docs/results.md)",
}
NOT_KEPT = (
    "data.path",
    "data.size",
    "data.mean",
    "data.std",
    "data.workers",
    "model.like",
    "optim.precision",
    "run.name",
)


@dataclass
class Entries:
    """Keys of a part of a plan: (value, reason) by dotted key."""

    keys: dict[str, tuple[Any, str]] = field(default_factory=dict)

    def set(self, key: str, value: Any, why: str = "") -> None:
        """Set a key, in the place of an earlier value."""
        self.keys[key] = value, why

    def values(self) -> dict[str, Any]:
        """Values by dotted key."""
        return {key: value for key, (value, _) in self.keys.items()}


@dataclass
class Choices:
    """A plan: keys of both stages, of pretraining and of fine-tuning, or why there is none of the latter."""

    common: Entries
    pretrain: Entries
    finetune: Entries | None
    problem: str | None


def choose(facts: Facts, device: str, ranks: int, name: str, plan: Path) -> Choices:
    """The plan for a collection.

    Args:
        device: `cpu` or `cuda`
        ranks: processes that train
        name: of the runs
        plan: file that the plan will be written to
    """
    common = Entries()
    size, stride, why = _size(facts, device)
    common.set("data.path", facts.path)
    common.set("data.size", size, why)
    base = ("cifar10-small" if device == "cpu" else "cifar10") if stride < 4 else "photos"
    problem = why_no_finetuning(facts.splits, evaluated_split(facts.splits))
    if facts.kind:
        task, recipe = TASKS[facts.kind]
        subject = "masks" if facts.kind == "mask" else facts.kind
        problem = f"for the {subject}, fine-tune with --config configs/finetune/{recipe}.yaml --task.name {task}"
    pretrain = _pretrain(facts, device, ranks, base, stride)
    if problem is None:
        _probe(facts, base, pretrain)
    pretrain.set("run.name", name)
    every = max(1, pretrain.values()["optim.epochs"] // 20)
    pretrain.set("run.picture_every", every, "epochs between pictures, and between checkpoints")
    pretrain.set("run.save_every", every)
    finetune = None if problem else _finetune(facts, ranks, base, name, plan)
    return Choices(common, pretrain, finetune, problem)


def _size(facts: Facts, device: str) -> tuple[int, int, str]:
    """Image size, stem stride, and why."""
    low, middle, high = facts.side
    sides = (
        f"shorter sides are {low} to {high} pixels, the median is {middle}"
        if low < high
        else f"shorter sides are {low} pixels"
    )
    size, stride = next((value for limit, value in SIDES.items() if middle <= limit), LARGE)
    smaller = load_recipe(RECIPES / "pretrain/one-gpu.yaml", "pretrain")["data.size"]
    if size > smaller and (device == "cpu" or facts.images >= MANY):
        return smaller, stride, f"{sides}; {smaller} has half as many tokens as {size}, to save time"
    return size, stride, f"{sides}; a multiple of the patch of {8 * stride}"


def _pretrain(facts: Facts, device: str, ranks: int, base: str, stride: int) -> Entries:
    recipe = load_recipe(RECIPES / f"pretrain/{base}.yaml", "pretrain")
    crops = _compares_crops(facts, device)
    if crops:
        recipe |= {key: value for key, value in crops.items() if key in OF_CROPS}
    if device == "cpu":
        recipe["optim.name"] = load_recipe(RECIPES / f"pretrain/{MUON}.yaml", "pretrain")["optim.name"]
    found, images = Entries(), facts.images
    if facts.split != "train":
        found.set("data.split", facts.split, "the largest split; pretraining ignores labels")
    found.set("data.mean", list(facts.mean), f"of each channel, from {facts.looked:,} evenly spread images")
    found.set("data.std", list(facts.std))
    size = "atto" if base != "photos" or device == "cpu" else next(v for n, v in MODELS.items() if images < n)
    why = f"{images:,} images" + (" and no GPU" if device == "cpu" else "")
    found.set("model.name", f"convnextv2_{size}", f"{why}: a small model; compare larger ones by the probe")
    kind = "grey" if facts.channels == 1 else "colour" if facts.channels == 3 else f"{facts.channels} channels"
    found.set("model.channels", facts.channels, f"{kind}, {'more than 8' if facts.deep else '8'} bits per channel")
    found.set("model.stem_stride", stride, f"a masked patch is {8 * stride} pixels wide")
    for key in KEPT:
        if key in recipe:
            same = f"as configs/pretrain/{CROPS if crops and key in OF_CROPS else base}.yaml"
            found.set(key, recipe[key], WHY.get(key, same))
    batch, by_batch = _batch(images, device, ranks, base, crops)
    found.set("optim.batch_size", batch, by_batch)
    found.set("optim.lr", *_rate(images, batch, device, base, crops))
    lowest, highest = EPOCHS[device]
    passes = CROPS_PASSES if crops else PASSES[device]
    epochs = _two_digits(min(highest, max(lowest, passes / images)))
    found.set("optim.epochs", epochs, f"{epochs * (images // batch):,} steps; few images need many epochs")
    found.set("optim.warmup_epochs", max(1, round(WARMUP * epochs)))
    every = max(10, epochs // 10)
    found.set("probe.unlabelled_every", every, "epochs between evaluations without labels: is it still improving?")
    return found


def _compares_crops(facts: Facts, device: str) -> dict[str, Any]:
    """The recipe that compares crops of an image, if it suits; measured without a GPU, on colour images of 8 bits."""
    suits = device == "cpu" and facts.channels == 3 and not facts.deep and facts.images >= CROPS_IMAGES
    return load_recipe(RECIPES / f"pretrain/{CROPS}.yaml", "pretrain") if suits else {}


def _batch(images: int, device: str, ranks: int, base: str, crops: dict[str, Any]) -> tuple[int, str]:
    """Images or crops per step, and why."""
    if crops:
        cap, multiple = crops["optim.batch_size"], crops["data.repeats"] * ranks
        return fitting_batch(images, cap, multiple, CROPS_BATCH), f"crops: at most {cap}, and at least {CROPS_BATCH}"
    if device == "cpu" or images < FEW:
        cap = load_recipe(RECIPES / "pretrain/cifar10-small.yaml", "pretrain")["optim.batch_size"]
    else:
        cap = load_recipe(RECIPES / f"pretrain/{'one-gpu' if images >= MANY else base}.yaml", "pretrain")[
            "optim.batch_size"
        ]
    return fitting_batch(
        images, cap, ranks
    ), f"at most {cap}, and at least {MIN_STEPS} steps an epoch where images allow it"


def _rate(images: int, batch: int, device: str, base: str, crops: dict[str, Any]) -> tuple[float, str]:
    """Base learning rate, and why."""
    if crops:
        recipe, what = CROPS, "crops"
        lr = float(f"{crops['optim.lr'] * crops['optim.batch_size'] / batch:.2g}")  # the same step for any batch
    else:
        small = MUON if device == "cpu" else "cifar10-small"
        recipe, what = small if batch <= 128 else "one-gpu" if images >= MANY else base, "images"
        lr = load_recipe(RECIPES / f"pretrain/{recipe}.yaml", "pretrain")["optim.lr"]
    return lr, f"for 256 {what}, the actual one is {lr * batch / 256:.2g}; as configs/pretrain/{recipe}.yaml"


def fitting_batch(images: int, cap: int, multiple: int, least: int = MIN_BATCH) -> int:
    """The largest power of two up to `cap` with `MIN_STEPS` steps an epoch, at least `least`, at most all images;
    rounded down to a multiple."""
    batch = min(images, max(least, min(cap, 1 << max(0, (images // MIN_STEPS).bit_length() - 1))))
    return max(multiple, batch - batch % multiple)


def _probe(facts: Facts, base: str, found: Entries) -> None:
    """Evaluate the features by the labels."""
    split = evaluated_split(facts.splits)
    if facts.splits["train"].total() < 10:
        return
    epochs = found.values()["optim.epochs"]
    found.set("probe.every", max(10, epochs // 10), "epochs between kNN evaluations of the features; 0 = none")
    found.set("probe.eval_split", split)
    if base != "photos":
        found.set("probe.crop", 1, "the whole image")


def _finetune(facts: Facts, ranks: int, base: str, name: str, plan: Path) -> Entries:
    recipe = load_recipe(RECIPES / f"finetune/{base}.yaml", "finetune")
    found = Entries()
    split, images = evaluated_split(facts.splits), facts.splits["train"].total()
    note = "" if split == "val" else "there is no val: the best epoch is chosen on this split, so its score is too good"
    found.set("eval_split", split, note)
    same = f"as configs/finetune/{base}.yaml, unless another reason is given"
    for key, value in recipe.items():
        if key not in NOT_KEPT:
            found.set(key, value, same)
            same = ""
    batch = fitting_batch(images, recipe["optim.batch_size"], 2 * ranks)  # mixup pairs images
    found.set("optim.batch_size", batch, f"{images:,} labelled images, {len(facts.splits['train'])} classes")
    if recipe.get("augment.auto_augment") and (facts.channels != 3 or facts.deep):
        found.set("augment.auto_augment", None, "policies need 3 channels of 8 bits")
    found.set("model.like", str(plan), "the model of --init none")
    found.set("run.name", f"{name}-finetuned")
    return found


def _two_digits(number: float) -> int:
    """A number rounded to two digits."""
    digits = max(0, len(str(round(number))) - 2)
    return round(number / 10**digits) * 10**digits
