"""Every recipe against the papers' tables, which are written out here once more, in the numbers that a run uses.

V2 is arXiv 2301.00808 (tables 4, 8 to 15), V1 arXiv 2201.03545 (tables 1, 5, 6); images in a split, as published.
"""

import re
import shlex
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from configs.command import parse
from configs.recipes import RECIPES
from configs.schema import Encoder, Finetune, Pretrain, visible_patches
from finetune.layer_decay import layer_decay
from finetune.tasks import TASKS
from launch.training.dry_run import schedule
from launch.training.parameter_groups import parameter_groups
from models.convnext import ConvNeXt
from models.sizes import SIZES, resolve
from pretrain.objectives import OBJECTIVES

IMAGES = {"shards/imagenet": 1_281_167, "shards/imagenet22k": 14_197_122}
CLASSES = {"shards/imagenet": 1_000, "shards/imagenet22k": 21_841}
FILES = {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in RECIPES.rglob("*.yaml")}
PAGE = RECIPES.parent / "docs/recipes.md"
V2_SIZES = ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")
V1_SIZES = ("tiny", "small", "base", "large", "xlarge")
PUBLISHED = sorted(name for name in FILES if "/imagenet/" in name)

# what layer decay is raised to, for the stem, the way into stage 2, blocks in stages 3 and 4, and the head
LAYERS = ("stem.0", "stages.1.downsample.1", "stages.2.blocks.3.mlp.fc1", "stages.3.blocks.1.conv_dw", "head.fc")
GROUP, GROUP_TINY = (13, 11, 9, 1, 0), (13, 11, 7, 1, 0)  # 27 blocks of the third stage in nine groups; 9 blocks
ATTO, NANO, TINY, HUGE = (12, 10, 5, 1, 0), (14, 12, 7, 1, 0), (18, 15, 9, 2, 0), (36, 33, 27, 2, 0)  # single
OF_V2 = {"nano": NANO, "tiny": TINY, "base": GROUP, "large": GROUP, "huge": HUGE}  # smaller than nano: ATTO


@dataclass(frozen=True)
class Row:
    """A published fine-tuning; the learning rate is the one used, not that of 256 images."""

    batch: int
    lr: float
    epochs: int
    warmup: int
    steps: int
    weight_decay: float
    smoothing: float
    mix: tuple[float, float] = (0, 0)  # mixup, cutmix
    drop_path: float = 0
    decay: float = 1
    layers: tuple[int, ...] = (0, 0, 0, 0, 0)  # of LAYERS: their rate is decay ** this
    ema: float = 0
    data: str = "shards/imagenet"
    size: int = 224
    crop: float = 0.875
    init: str = "none"
    top1: float | None = None


def v2_rows() -> dict[str, Row]:
    """Tables 9 to 15; TRAINING.md for the rate of base and large."""
    small = Row(1024, 8e-4, 600, 0, 750_600, 0.3, 0.2, decay=0.9, ema=0.9999)
    tiny = Row(1024, 3.2e-3, 300, 40, 375_300, 0.05, 0.1, (0.8, 1), 0.2, 0.9, ema=0.9999)
    base = Row(1024, 2.5e-3, 100, 20, 125_100, 0.05, 0.1, (0.8, 1), 0.1, 0.6, ema=0.9999)
    huge = Row(1024, 5e-3, 50, 10, 62_550, 0.05, 0.1, (0.8, 1), 0.3, 0.75, ema=0.9999)
    first = {
        "atto": replace(small, drop_path=0.1, top1=76.7),
        "femto": replace(small, weight_decay=0.05, mix=(0.3, 0.3), top1=78.5),
        "pico": replace(small, mix=(0.3, 0.3), top1=80.3),
        "nano": replace(small, drop_path=0.1, mix=(0.5, 0.5), top1=81.9),
        "tiny": replace(tiny, top1=83.0),
        "base": replace(base, top1=84.9),
        "large": replace(base, drop_path=0.2, top1=85.8),
        "huge": replace(huge, top1=86.3),
    }
    many = Row(4096, 4e-3, 90, 5, 311_940, 0.05, 0.1, (0.8, 1), data="shards/imagenet22k")
    after = Row(512, 5e-5, 30, 0, 75_060, 1e-8, 0.1, ema=0.9999)
    longer = replace(after, epochs=90, steps=225_180, decay=0.9, drop_path=0.1)
    through_22k = {
        "nano": (replace(many, decay=0.9), longer, {224: 82.1, 384: 83.4}),
        "tiny": (replace(many, decay=0.9), longer, {224: 83.9, 384: 85.1}),
        "base": (
            replace(many, decay=0.8, drop_path=0.1),
            replace(after, decay=0.8, drop_path=0.2),
            {224: 86.8, 384: 87.7},
        ),
        "large": (
            replace(many, decay=0.8, drop_path=0.1),
            replace(after, decay=0.8, drop_path=0.3),
            {224: 87.3, 384: 88.2},
        ),
        "huge": (
            replace(many, decay=0.8, drop_path=0.3),
            replace(after, decay=0.85, drop_path=0.5, ema=0),
            {384: 88.7, 512: 88.9},
        ),
    }
    rows = {}
    for size, row in first.items():
        rows[f"{size}-1k"] = replace(row, layers=OF_V2.get(size, ATTO), init=f"runs/{size}-1600/fcmae.pt")
    for size, (before, row, results) in through_22k.items():
        rows[f"{size}-22k"] = replace(before, layers=OF_V2[size], init=f"runs/{size}-1600/fcmae.pt")
        common = replace(row, layers=OF_V2[size], init=f"runs/{size}-22k/last.pt")
        rows |= {f"{size}-22k-1k-{side}": at(common, side, top1) for side, top1 in results.items()}
    return rows


def v1_rows() -> dict[str, Row]:
    """Tables 1, 5 and 6."""
    scratch = Row(4096, 4e-3, 300, 20, 93_600, 0.05, 0.1, (0.8, 1), ema=0.9999)
    many = Row(4096, 4e-3, 90, 5, 311_940, 0.05, 0.1, (0.8, 1), data="shards/imagenet22k")
    after = Row(512, 5e-5, 30, 0, 75_060, 1e-8, 0.1, layers=GROUP)
    rows = {
        "v1-tiny-1k": replace(scratch, drop_path=0.1, top1=82.1),
        "v1-small-1k": replace(scratch, drop_path=0.4, top1=83.1),
        "v1-base-1k": replace(scratch, drop_path=0.5, top1=83.8),
        "v1-large-1k": replace(scratch, drop_path=0.5, top1=84.3),
        "v1-base-1k-384": at(replace(after, decay=0.7, drop_path=0.8, init="runs/v1-base-1k/last.pt"), 384, 85.1),
        "v1-large-1k-384": at(replace(after, decay=0.7, drop_path=0.95, init="runs/v1-large-1k/best.pt"), 384, 85.5),
    }
    through_22k = {  # drop path on 22K and on 1K, results at 224 and at 384
        "tiny": (0, 0, 82.9, 84.1), "small": (0, 0.1, 84.6, 85.8), "base": (0.1, 0.2, 85.8, 86.8),
        "large": (0.1, 0.3, 86.6, 87.5), "xlarge": (0.2, 0.4, 87.0, 87.8),
    }  # fmt: skip
    for size, (before, drop_path, at_224, at_384) in through_22k.items():
        rows[f"v1-{size}-22k"] = replace(many, drop_path=before)
        common = replace(after, decay=0.8, drop_path=drop_path, init=f"runs/v1-{size}-22k/last.pt")
        if size in ("tiny", "xlarge"):
            common = replace(common, **({"layers": GROUP_TINY} if size == "tiny" else {"ema": 0.9999}))
        rows |= {f"v1-{size}-22k-1k-{side}": at(common, side, top1) for side, top1 in ((224, at_224), (384, at_384))}
    return rows


def at(row: Row, side: int, top1: float) -> Row:
    """At an image size: from 384 up, evaluation squashes the whole image."""
    return replace(row, size=side, crop=0.875 if side == 224 else 1, top1=top1)


FINETUNED = {f"finetune/imagenet/{name}": row for name, row in (v2_rows() | v1_rows()).items()}
PRETRAINED = {  # top-1 after 800 and after 1600 epochs; table 4 for base, large and huge, table 14 for the others
    f"pretrain/imagenet/{size}": results
    for size, results in {
        "atto": (None, 76.7), "femto": (None, 78.5), "pico": (None, 80.3), "nano": (None, 81.9), "tiny": (None, 83.0),
        "base": (84.6, 84.9), "large": (85.6, 85.8), "huge": (85.8, 86.3),
    }.items()
}  # fmt: skip
EPOCHS = (800, 1600)  # of pretraining; the recipe has the first


@cache
def recipe(name: str, *options: str) -> Pretrain | Finetune:
    argv = ["--config", str(FILES[name]), *options]
    if name.startswith("pretrain/"):
        return parse(Pretrain, "", "", {"objective": OBJECTIVES}, argv)
    return parse(Finetune, "", "", {"task": TASKS}, argv)


def longer(name: str) -> tuple[str, ...]:
    """Options of the second command in the head of a pretraining recipe."""
    return tuple(shlex.split(head(name)["Command"].split(f"{name}.yaml \\")[1]))


def head(name: str) -> dict[str, str]:
    """The lines `# Word: text` of a recipe's head; a line without a word continues the one before."""
    entries, word = {}, "About"
    for line in FILES[name].read_text().splitlines():
        if not line.startswith("#"):
            return entries
        found = re.match(r"# ([A-Z][a-z]+): +(.*)", line)
        word, text = found.groups() if found else (word, line.strip("# "))
        entries[word] = f"{entries[word]} {text}" if word in entries else text
    return entries


@cache
def classifier(model: str, classes: int) -> ConvNeXt:
    with torch.device("meta"):
        return ConvNeXt(Encoder(model), classes)


def cost(model: str, side: int) -> tuple[float, float]:
    """(parameters, multiply-adds of one forward pass) of a classifier with 1,000 classes."""
    model = classifier(model, 1000)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, side, side, device="meta"))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2


def model_of(name: str) -> str:
    """convnextv2_base of finetune/imagenet/base-22k-1k-224."""
    version, size = re.fullmatch(r"\w+/imagenet/(v1-)?([a-z]+)(?:-.*)?", name).groups()
    return f"convnext{'' if version else 'v2'}_{size}"


def test_there_is_a_recipe_for_every_published_result_and_no_other():
    assert set(PUBLISHED) == PRETRAINED.keys() | FINETUNED.keys()
    assert len(PRETRAINED) == 8 and len(FINETUNED) == 8 + 5 + 10 + 4 + 2 + 5 + 10


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_recipe_names_a_model_and_says_how_to_run_it(name):
    config, said = recipe(name), head(name)
    model = config.model
    if isinstance(config, Finetune) and model.like:
        model = recipe(model.like.removeprefix("configs/").removesuffix(".yaml")).model
    assert resolve(model).name in SIZES
    stage = name.split("/")[0]
    assert said["Hardware"] and f"{stage}/main.py" in said["Command"]
    named = re.findall(r"--config configs/(\S+)\.yaml", said["Command"])
    assert set(named) == {name} or (not named and name == f"{stage}/digits")  # the one without --config


def test_every_result_starts_from_one_that_has_a_recipe():
    runs = {recipe(name).run.name for name in FINETUNED}
    assert runs == {name.split("/")[-1] for name in FINETUNED}
    runs |= {recipe(name, *options).run.name for name in PRETRAINED for options in ((), longer(name))}
    for row in FINETUNED.values():
        assert row.init == "none" or row.init.split("/")[1] in runs


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_head_of_a_published_recipe(name):
    """Its GPUs make the batch, the result is the published one, the source is the right paper."""
    said, optim = head(name), recipe(name).optim
    gpus, micro = map(int, re.match(r"(\d+) GPUs x (\d+) images make up the batch", said["Hardware"]).groups())
    assert (gpus * micro, micro) == (optim.batch_size, optim.micro_batch) and "not run here" in said["Hardware"]
    if name in PRETRAINED:
        found = dict(re.findall(r"([\d.]+) %(?: top-1)? \((\d+) epochs\)", said["Result"]))
        assert found == {str(top1): str(n) for n, top1 in zip(EPOCHS, PRETRAINED[name], strict=True) if top1}
    else:
        top1 = FINETUNED[name].top1
        assert said["Result"].startswith(f"published {top1} % top-1" if top1 else "none published")
    assert said["Source"].startswith("arXiv 2201.03545, table" if "/v1-" in name else "arXiv 2301.00808, table")
    if name in FINETUNED:
        init = re.search(r"--init (\S+)", said["Command"])
        assert (init[1] if init else recipe(name).init) == FINETUNED[name].init
        assert float(re.search(r"peaks at (\S+) and decays to 1e-6", said["Rates"])[1]) == FINETUNED[name].lr


@pytest.mark.parametrize("epochs", EPOCHS)
@pytest.mark.parametrize("name", sorted(PRETRAINED))
def test_pretraining_is_the_published(name, epochs):
    config = recipe(name, *(() if epochs == EPOCHS[0] else longer(name)))
    assert config.run.name == f"{name.split('/')[-1]}-{epochs}"
    optim, data, model, own = config.optim, config.data, config.model, config.objective
    assert (model.name, model.channels, model.stem_stride) == (model_of(name), 3, 4)
    assert model.depths is None and model.dims is None
    assert visible_patches(49, own.mask_ratio) == 19 and (own.decoder_dim, own.decoder_depth) == (512, 1)
    assert own.norm_pix and model.grn_scope == "image"
    assert (data.path, data.height_width, data.crop_scale) == ("shards/imagenet", (224, 224), (0.2, 1.0))
    assert_plain(config)
    assert (optim.epochs, optim.warmup_epochs, optim.batch_size, optim.betas) == (epochs, 40, 4096, (0.9, 0.95))
    assert_schedule(config, 2.4e-3, 0, 40, 312 * epochs)
    with torch.device("meta"):
        groups = parameter_groups(ConvNeXt(Encoder(model.name)), optim)
    assert {group["weight_decay"] for group in groups} == {0, 0.05} and {group["lr_scale"] for group in groups} == {1}


@pytest.mark.parametrize("name", sorted(FINETUNED))
def test_finetuning_is_the_published(name):
    config, row = recipe(name), FINETUNED[name]
    optim, data, augment, task = config.optim, config.data, config.augment, config.task
    assert config.model.name == model_of(name)
    assert config.model.drop_path == row.drop_path and not config.model.freeze_encoder
    assert (data.path, data.height_width, data.crop_scale) == (row.data, (row.size, row.size), (0.08, 1.0))
    assert_plain(config)
    assert (augment.auto_augment, augment.color_jitter) == ("rand-m9-mstd0.5-inc1", 0)
    assert (augment.erase, augment.erase_mode, augment.erase_count) == (0.25, "pixel", 1)
    assert (task.mixup, task.cutmix) == row.mix and task.smoothing == row.smoothing
    assert (task.mix_prob, task.mix_switch, task.mix_mode) == (1, 0.5, "batch")
    assert (augment.ema, augment.eval_crop, task.balance) == (row.ema, row.crop, 0)
    assert task.head_init is None and config.init == "none"  # .001 with --init, 1 without
    assert (optim.batch_size, optim.epochs, optim.warmup_epochs) == (row.batch, row.epochs, row.warmup)
    assert optim.betas == (0.9, 0.999)
    assert_schedule(config, row.lr, 1e-6, row.warmup, row.steps)


@pytest.mark.parametrize("name", sorted(FINETUNED))
def test_weight_decay_and_rate_of_parameters(name):
    config, row = recipe(name), FINETUNED[name]
    model = classifier(config.model.name, CLASSES[row.data])
    scale = layer_decay(config.layer_decay, model.arch.depths, config.layer_decay_kind)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: (group["weight_decay"], group["lr_scale"])
        for group in parameter_groups(model, config.optim, scale)
        for parameter in group["params"]
    }
    assert found.keys() == set(names.values())
    for layer, above in zip(LAYERS, row.layers, strict=True):
        assert found[f"{layer}.weight"] == (row.weight_decay, pytest.approx(row.decay**above)), layer
        assert found[f"{layer}.bias"] == (0, pytest.approx(row.decay**above)), layer
    own = ["gamma"] if "/v1-" in name else ["mlp.grn.weight", "mlp.grn.bias"]
    for part in [*own, "norm.weight"]:
        assert found[f"stages.2.blocks.3.{part}"] == (0, pytest.approx(row.decay ** row.layers[2])), part
    assert found["stem.1.weight"][0] == found["head.norm.weight"][0] == 0


@pytest.mark.parametrize(
    ("model", "side", "parameters", "macs"),
    [
        ("convnextv2_atto", 224, 3.7, 0.55),  # 2301.00808, tables 14 and 15
        ("convnextv2_nano", 384, 15.6, 7.21),
        ("convnextv2_tiny", 224, 28.6, 4.47),
        ("convnextv2_base", 384, 89, 45.2),
        ("convnextv2_huge", 512, 660, 600.8),
        ("convnext_small", 384, 50, 25.5),  # 2201.03545, table 1
        ("convnext_xlarge", 384, 350, 179.0),
    ],
)
def test_counts_are_the_published(model, side, parameters, macs):
    counted = cost(model, side)
    assert counted[0] / 1e6 == pytest.approx(parameters, rel=0.006)
    assert counted[1] / 1e9 == pytest.approx(macs, rel=0.006)


def test_the_page_of_recipes():
    """docs/recipes.md links every published recipe once, with its accuracy where there is one."""
    links = re.findall(r"\[([^]]+)\]\(\.\./configs/(\S+)\.yaml\)", PAGE.read_text())
    names = sorted(name for _, name in links)
    assert len(set(names)) == len(names) and {name for name in FILES if "imagenet/" in name} <= set(names) <= set(FILES)
    shown = {name: float(text) for text, name in links if text[0].isdigit()}
    assert shown == {name: row.top1 for name, row in FINETUNED.items() if row.top1}


@pytest.mark.parametrize("model", [f"convnextv2_{s}" for s in V2_SIZES] + [f"convnext_{s}" for s in V1_SIZES])
def test_the_page_of_recipes_counts(model):
    """Parameters and multiply-adds at 224 pixels, and the accuracy after 800 epochs."""
    family, size = model.split("_")
    section = PAGE.read_text().split("## ConvNeXt V")[1 if family == "convnextv2" else 2]
    row = re.search(rf"^\| {size} \| ([\d.]+) \| ([\d.]+) \|(.*)$", section, re.M)
    parameters, macs = cost(model, 224)
    assert float(row[1]) == pytest.approx(parameters / 1e6, abs=0.05)
    assert float(row[2]) == pytest.approx(macs / 1e9, rel=0.005)
    if family == "convnextv2":
        top1 = PRETRAINED[f"pretrain/imagenet/{size}"][0]
        assert row[3].split("|")[1].strip() == str(top1 or "-")


def assert_plain(config: Pretrain | Finetune) -> None:
    """What no paper has anything special for."""
    data, optim = config.data, config.optim
    assert (data.crop_ratio, data.interpolation) == ((3 / 4, 4 / 3), "bicubic")
    assert (data.hflip, data.vflip, data.repeats, data.mean, data.std) == (0.5, 0, 1, None, None)
    assert (optim.clip_grad, optim.warmup_lr, optim.decay_rules) == (0, 0, None)


def assert_schedule(config: Pretrain | Finetune, peak: float, end: float, warmup: int, total: int) -> None:
    """Rates at the beginning, the peak, halfway down and the end; steps of the published number of images."""
    optim = config.optim
    steps, left_over = divmod(total, optim.epochs)
    assert left_over == 0
    rates = [optim.lr_at(step, steps) for step in (0, warmup * steps, (warmup * steps + total) / 2, total)]
    assert rates == pytest.approx([0 if warmup else peak, peak, (peak + end) / 2, end], rel=1e-9, abs=1e-12)
    planned = schedule(optim, IMAGES[config.data.path], ranks=1)[-1]
    assert f"= {total:,}; the first {warmup * steps:,} are warm-up" in planned
