"""Evaluate an encoder's features before fine-tuning: nearest neighbours and a linear classifier.

python finetune/probe.py runs/digits/fcmae.pt shards/digits                      all images of train and val
python finetune/probe.py runs/digits/fcmae.pt shards/digits --crop 1 --random    uncropped images; random weights too
python finetune/probe.py convnextv2_tiny.pth shards/photos --images 20000        weights of any format
python finetune/probe.py runs/digits/fcmae.pt photos/                            a folder of class folders, in splits
deepspeed finetune/probe.py runs/photos/fcmae.pt s3://bucket/shards/photos --out probe.json

The feature of an image is the mean of the last stage's tokens; images are preprocessed as in evaluation. kNN: a vote of
the k training images with the most similar features. Linear: softmax regression on the features, without augmentation,
for several learning rates; the best one on a held-out tenth of the training images counts.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from configs.checks import check_parent, check_weights
from configs.command import parse_options
from configs.errors import UserError, run_main
from configs.feature_eval import KS, LRS, TEMPERATURE
from configs.files import write_atomic
from configs.keys import Share, argument, option, require
from configs.log import say
from configs.schema import Augment, Data, Optim, Run
from data.folder import check_images
from finetune.options import ImageOptions

if TYPE_CHECKING:
    from data.loader import Loader
    from launch.training.world import World
    from models.opening import Trained

MIN_IMAGES = 10  # training images, so that a tenth can be held out
VAL, FOLDS = "val", 10


@dataclass(frozen=True)
class Options(ImageOptions):
    """The command line."""

    data: str = argument("labelled images: shards or their URL, a folder, a zip, a tar, a table of files")
    train_split: str = option("train", "neighbours, and training set of the linear classifier")
    eval_split: str | None = option(None, "split that is classified (default: val, else a tenth of --train-split)")
    images: PositiveInt | None = option(None, "maximum images of either split, evenly spread (default: all)")
    k: tuple[PositiveInt, ...] = option(KS, "numbers of neighbours")
    temperature: PositiveFloat = option(TEMPERATURE, "temperature of the neighbours' votes")
    no_linear: bool = option(False, "nearest neighbours only")
    epochs: PositiveInt = option(100, "epochs of the linear classifier")
    lrs: tuple[PositiveFloat, ...] = option(LRS, "learning rates of the linear classifier")
    random: bool = option(False, "evaluate the same model with random weights too")
    seed: int = option(0, "of the linear classifier and random weights")
    crop: Share | None = option(
        None, f"relative side of the centre crop; 1 = squash, no crop (default: the file's, else {Augment.eval_crop})"
    )
    batch: PositiveInt = option(64, "images per batch and rank")
    workers: NonNegativeInt | None = option(None, "loader processes per rank (default: its cores, at most 8)")
    out: Path | None = option(None, "write scores and settings to this file, as JSON")

    def __post_init__(self):
        super().__post_init__()
        require(self.eval_split != self.train_split, "--eval-split", self.eval_split, "another than --train-split")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    options = parse_options(Options, __doc__, argv)
    check_weights(options.weights)
    check_images(options.data)
    if options.out:
        check_parent(options.out)
    data = Data(path=options.data, workers=options.workers, max_pixels=options.max_pixels)

    from timm.utils import random_seed  # slow imports, after parsing

    from data.transforms import EvalTransform
    from launch.training.feature_eval import check_labels, probe_loader
    from launch.training.precision import precision
    from launch.training.world import destroy_world, init_world, process_errors
    from models.convnext import ConvNeXt
    from models.opening import open_encoder

    trained = open_encoder(options.weights, options.ema, options.size)
    arch, preprocessing = trained.weights.arch, trained.preprocessing
    preprocessing = replace(preprocessing, crop=options.crop or preprocessing.crop)
    splits = open_parts(data, options)
    for split in splits:
        check_labels(split)
    images = min(options.images or len(splits[0]), len(splits[0]))
    if images < MIN_IMAGES and not options.no_linear:
        problem = f"{images} training images are too few for the linear classifier"
        raise UserError(f"{problem}: give {MIN_IMAGES}, or --no-linear")

    world = init_world(Run(device=options.device))
    say(f"{options.weights}: {arch.name}, images of {'x'.join(map(str, preprocessing.size))}")
    transform = EvalTransform.of(preprocessing)
    settings = options.images, transform, arch.channels, data, options.batch, world
    loaders = [probe_loader(split, *settings) for split in splits]
    kind = precision(Optim(precision=options.precision), world.device)

    with process_errors():
        scores = feature_scores(trained, loaders, kind, options, world)
        if options.random:
            say("the same with random weights")
            random_seed(options.seed)
            random = replace(trained, model=ConvNeXt(arch))
            scores["random"] = feature_scores(random, loaders, kind, options, world)
    if world.first:
        for split, used in zip(splits, (scores["train_images"], scores["eval_images"]), strict=True):
            if damaged := min(options.images or len(split), len(split)) - used:
                say(f"{damaged:,} damaged images of split {split.name} left out: data/prepare.py --verify lists them")
        show(scores, options)
        if options.out:
            settings = {key: value for key, value in vars(options).items() if key not in ("out", "random")}
            settings |= preprocessing.to_dict() | {"crop": preprocessing.crop, "ranks": world.ranks}
            about = {"model": asdict(arch), "settings": settings}
            write_atomic(options.out, json.dumps(about | scores, indent=1).encode())
            say(f"wrote {options.out}")
    destroy_world()


def open_parts(data: Data, options: Options) -> list:
    """The images to learn from and those to classify: two splits, or nine tenths and a tenth of one.

    Images are divided by a hash of their names, alike in their classes. Raises `UserError` if there is no such split.
    """
    from data.folder import is_collection, list_collection, open_folder, open_splits
    from data.folds import fold_parts
    from data.shard_index import read_index

    collection = is_collection(data.path)
    catalog = list_collection(data.path) if collection else None
    names = catalog.splits if collection else read_index(open_folder(data)).splits
    if options.eval_split or VAL in names:
        chosen = [options.train_split, options.eval_split or VAL]
        return open_splits(data, chosen, options, catalog=catalog)
    (whole,) = open_splits(data, [options.train_split], options, catalog=catalog)
    train, held_out = fold_parts(whole, 0, FOLDS)
    train.name, held_out.name = f"nine tenths of {whole.name}", f"a tenth of {whole.name}"
    say(f"{data.path} has no split {VAL}: {len(held_out):,} of {len(whole):,} images are held out to be classified")
    return [train, held_out]


def feature_scores(trained: "Trained", loaders: "list[Loader]", kind: str, options: Options, world: "World") -> dict:
    """Scores of an encoder as plain values; `loaders` are of training and evaluation split, `kind` is the precision."""
    from launch.training.feature_eval import best_of, count, features, knn, linear

    def progress(steps: Iterable, number: int, what: str) -> Iterable:
        return track(steps, what, number, console=Console(stderr=True), disable=not world.first, show_speed=False)

    encoder, mean, std = (x.to(world.device) for x in (trained.model, trained.mean, trained.std))
    train, evaluation = (features(encoder, loader, world, mean, std, kind, progress) for loader in loaders)
    classes = len(loaders[0].samples.split.classes)
    names = dict(zip(("train_split", "eval_split"), (loader.samples.split.name for loader in loaders), strict=True))
    scores = {"train_images": count(train), "eval_images": count(evaluation), "classes": classes, "precision": kind}
    scores |= names
    scores["knn"] = knn(train, evaluation, classes, options.k, options.temperature, world, progress)
    if not options.no_linear:
        grid = linear(train, evaluation, classes, options.lrs, options.epochs, options.seed, progress)
        scores["linear"] = asdict(best_of(grid)) | {"grid": [asdict(point) for point in grid]}
    return scores


def show(scores: dict, options: Options) -> None:
    """Print a table of the probes, one of the learning rates in ascending order, and the k that were left out."""
    train, evaluation = scores["train_images"], scores["eval_images"]
    for k in sorted(set(options.k) - scores["knn"].keys()):
        say(f"k {k} left out: {scores['train_split']} has {train:,} images")
    columns = {"": scores} | ({"random ": scores["random"]} if "random" in scores else {})
    numbers = (Column(f"{name}{top}", justify="right") for name in columns for top in ("top-1", "top-5"))
    title = f"{evaluation:,} images of {scores['eval_split']} by {train:,} of {scores['train_split']}"
    table, console = Table("probe", *numbers, title=title), Console(markup=False, highlight=False)
    rows = {f"kNN, k {k}": [column["knn"][k] for column in columns.values()] for k in scores["knn"]}
    if "linear" in scores:
        rows["linear"] = [column["linear"] for column in columns.values()]
    for name, row in rows.items():
        table.add_row(name, *(f"{score[key]:.2%}" for score in row for key in ("top1", "top5")))
    console.print(table)
    if "linear" not in scores:
        return
    grid, best = scores["linear"]["grid"], scores["linear"]["lr"]
    headings = ("learning rate", "held-out", "top-1", "top-5")
    table = Table(*(Column(name, justify="right") for name in headings), title="linear")
    for row in grid:
        cells = (f"{row[key]:.2%}" for key in ("held_out", "top1", "top5"))
        table.add_row(f"{row['lr']:g}", *cells, style="bold" if row["lr"] == best else None)
    console.print(table)
    if largest := next((row["used"] for row in grid if row["used"] < row["lr"]), None):
        say(f"learning rates above {largest:.2g} oscillate on these features: {largest:.2g} was used instead")
    if len(grid) > 1 and best in (grid[0]["lr"], grid[-1]["lr"]):
        say(f"the best learning rate, {best:g}, is at an end of the grid: widen --lrs")


if __name__ == "__main__":
    run_main(main)
