"""What the features of an encoder are worth before fine-tuning: nearest neighbours, and a linear classifier.

python finetune/probe.py runs/digits/fcmae.pt shards/digits                      all images of train and val
python finetune/probe.py runs/digits/fcmae.pt shards/digits --crop 1 --random    whole images; fresh weights as well
python finetune/probe.py convnextv2_tiny.pth shards/photos --images 20000        weights of any format
deepspeed finetune/probe.py runs/photos/fcmae.pt s3://bucket/shards/photos --out probe.json

An image's feature is the mean of the last stage's tokens; images are shown as in an evaluation. kNN: a vote of the k
training images with the most similar features. Linear: softmax regression on the features, without augmentation, once
for each learning rate; the one that is best on a held-out tenth of the training images counts.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from rich.console import Console
from rich.progress import track
from rich.table import Table

from configs.errors import Parser, UserError, run_main
from configs.files import write_whole
from configs.log import say
from configs.schema import Augment, Data, Optim, Run
from data.loader import Loader
from data.shards import Split, open_split
from finetune.trained import Trained, add_options, open_trained
from launch.training.engine import seed_everything
from launch.training.feature_eval import (
    KS,
    LRS,
    TEMPERATURE,
    best_of,
    check_labels,
    count,
    features,
    knn,
    linear,
    probe_loader,
)
from launch.training.precision import precision
from launch.training.world import World, peers, start, stop
from models.convnext import ConvNeXt

LEAST = 10  # training images, so that there is a tenth to hold out


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    add_options(parser)
    add = parser.add_argument
    add("data", metavar="DATA", help="folder of labelled shards, or its URL")
    add("--train-split", default="train", metavar="SPLIT", help="the neighbours; trains the linear classifier")
    add("--eval-split", default="val", metavar="SPLIT", help="what is classified")
    add("--images", type=int, metavar="N", help="the most images of either split, evenly spread (default: all)")
    add("--k", type=int, nargs="+", default=KS, metavar="K", help=f"numbers of neighbours (default: {_words(KS)})")
    add("--temperature", type=float, default=TEMPERATURE, metavar="T", help="of the votes (default: %(default)s)")
    add("--no-linear", action="store_true", help="neighbours alone")
    add("--epochs", type=int, default=100, metavar="N", help="of the linear classifier (default: %(default)s)")
    add("--lrs", type=float, nargs="+", default=LRS, metavar="LR", help=f"learning rates (default: {_words(LRS)})")
    add("--random", action="store_true", help="score the same model with fresh weights as well")
    add("--seed", type=int, default=0, metavar="N", help="of the linear classifier and the fresh weights (default: 0)")
    crop = f"share of the side in the centre crop; 1 = squash, no crop (default: the file's, else {Augment.eval_crop})"
    add("--crop", type=float, metavar="SHARE", help=crop)
    add("--batch", type=int, default=64, metavar="N", help="images that a rank takes at once (default: %(default)s)")
    add("--workers", type=int, metavar="N", help="loader processes of each rank (default: its cores, at most 8)")
    add("--out", type=Path, metavar="FILE", help="write scores and settings to this file, as JSON")
    args = parser.parse_args(argv)
    for name in ("images", "k", "temperature", "epochs", "lrs", "batch"):
        value = getattr(args, name)
        if value is not None and min(value if isinstance(value, list | tuple) else [value]) <= 0:
            parser.error(f"--{name} {_words(value) if isinstance(value, list) else value}: must be positive")
    if args.eval_split == args.train_split:
        parser.error(f"--eval-split {args.eval_split}: must be another than --train-split")
    if args.crop is not None and not 0 < args.crop <= 1:
        parser.error(f"--crop {args.crop}: must be above 0 and at most 1")
    return args


def _words(numbers: Iterable[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def main(argv: list[str] | None = None) -> None:
    """Entry point: read, score, tell."""
    args = parse(argv)
    if args.out and not args.out.parent.is_dir():
        raise UserError(f"{args.out.parent} is not a folder: make it first")
    trained = open_trained(args.weights, args.ema, args.size, backbone=True)
    arch, transform = trained.weights.arch, trained.transform
    transform = replace(transform, crop=args.crop or transform.crop)
    data = Data(path=args.data, workers=args.workers)
    splits = open_split(data, args.train_split), open_split(data, args.eval_split)
    for split in splits:
        check_labels(split)
    images = min(args.images or len(splits[0]), len(splits[0]))
    if images < LEAST and not args.no_linear:
        raise UserError(f"{images} training images are too few for the linear classifier: give {LEAST}, or --no-linear")

    world = start(Run(device=args.device))
    say(f"{args.weights}: {arch.name}, images of {'x'.join(map(str, transform.size))}")
    loaders = [probe_loader(split, args.images, transform, arch.channels, data, args.batch, world) for split in splits]
    with peers():
        found = probe(trained.model, loaders, trained, args, world)
        if args.random:
            say("the same with fresh weights")
            seed_everything(args.seed)
            found["random"] = probe(ConvNeXt(arch), loaders, trained, args, world)
    if world.first:
        show(found, args, splits)
        if args.out:
            settings = {key: value for key, value in vars(args).items() if key not in ("out", "local_rank", "random")}
            settings |= trained.weights.image | {"crop": transform.crop, "ranks": world.ranks}
            about = {"model": asdict(arch), "settings": settings}
            write_whole(args.out, json.dumps(about | found, indent=1).encode())
            print(f"wrote {args.out}")
    stop()


def probe(encoder: ConvNeXt, loaders: list[Loader], trained: Trained, args: argparse.Namespace, world: World) -> dict:
    """Scores of an encoder as plain values: of each k, and of the linear classifier at its best learning rate and all.

    Args:
        loaders: of the training and the evaluation split
        trained: of which the statistics of the channels are taken
    """

    def watch(steps: Iterable, number: int, what: str) -> Iterable:
        return track(steps, what, number, console=Console(stderr=True), disable=not world.first, show_speed=False)

    kind = precision(Optim(precision=args.precision), world.device)
    encoder, mean, std = (x.to(world.device) for x in (encoder, trained.mean, trained.std))
    train, evaluation = (features(encoder, loader, world, mean, std, kind, watch) for loader in loaders)
    classes = len(loaders[0].samples.split.classes)
    found = {"train_images": count(train), "eval_images": count(evaluation), "classes": classes, "precision": kind}
    found["knn"] = knn(train, evaluation, classes, args.k, args.temperature, world, watch)
    if not args.no_linear:
        grid = linear(train, evaluation, classes, args.lrs, args.epochs, args.seed, watch)
        found["linear"] = asdict(best_of(grid)) | {"grid": [asdict(one) for one in grid]}
    return found


def show(found: dict, args: argparse.Namespace, splits: tuple[Split, Split]) -> None:
    """Print the scores, a row a probe and a row a learning rate, and what was left out."""
    train, evaluation = found["train_images"], found["eval_images"]
    for split, images in zip(splits, (train, evaluation), strict=True):
        if damaged := min(args.images or len(split), len(split)) - images:
            print(f"{damaged:,} damaged images of split {split.name} left out: data/prepare.py --verify names them")
    for k in sorted(set(args.k) - found["knn"].keys()):
        print(f"k {k} left out: split {args.train_split} has {train:,} images")
    columns = {"": found} | ({"fresh ": found["random"]} if "random" in found else {})
    table = Table(title=f"{evaluation:,} images of {args.eval_split} by {train:,} of {args.train_split}")
    table.add_column("probe")
    for name in columns:
        table.add_column(f"{name}top-1", justify="right")
        table.add_column(f"{name}top-5", justify="right")
    rows = {f"kNN, k {k}": [held["knn"][k] for held in columns.values()] for k in found["knn"]}
    if "linear" in found:
        rows["linear"] = [held["linear"] for held in columns.values()]
    for name, scores in rows.items():
        table.add_row(name, *(f"{score[key]:.2%}" for score in scores for key in ("top1", "top5")))
    Console(markup=False, highlight=False).print(table)
    if "linear" in found:
        show_grid(found["linear"]["grid"], found["linear"]["lr"])


def show_grid(grid: list[dict], best: float) -> None:
    """Print the linear classifier's accuracies at each learning rate, in ascending order."""
    table = Table(title="linear")
    for name in ("learning rate", "held out", "top-1", "top-5"):
        table.add_column(name, justify="right")
    for row in grid:
        cells = (f"{row[key]:.2%}" for key in ("held_out", "top1", "top5"))
        table.add_row(f"{row['lr']:g}", *cells, style="bold" if row["lr"] == best else None)
    Console(markup=False, highlight=False).print(table)
    if len(grid) > 1 and best in (grid[0]["lr"], grid[-1]["lr"]):
        print(f"the best learning rate, {best:g}, is at an end of the grid: widen --lrs")


if __name__ == "__main__":
    run_main(main)
