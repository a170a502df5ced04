"""Evaluate an encoder's features before fine-tuning: nearest neighbours and a linear classifier.

python finetune/probe.py runs/digits/fcmae.pt shards/digits                      all images of train and val
python finetune/probe.py runs/digits/fcmae.pt shards/digits --crop 1 --random    uncropped images; random weights too
python finetune/probe.py convnextv2_tiny.pth shards/photos --images 20000        weights of any format
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

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from rich.console import Console
from rich.table import Table

from configs.arguments import check_parent, check_weights
from configs.errors import Parser, UserError, run_main
from configs.feature_eval import KS, LRS, TEMPERATURE
from configs.files import write_whole
from configs.schema import Augment, Data, Optim, Run
from finetune.arguments import DeviceOptions, add_model_and_device, check_dataset, check_positive, parse_options

MIN_IMAGES = 10  # training images, so that a tenth can be held out


@dataclass(frozen=True)
class Options(DeviceOptions):
    """The command line.

    Args:
        data: folder of labelled shards, or its URL
        train_split: the neighbours, and the training set of the linear classifier
        eval_split: split that is classified
        images: maximum number of images of either split; None = all
        k: numbers of neighbours
        temperature: of the neighbours' votes
        no_linear: leave the linear classifier out
        epochs: of the linear classifier
        lrs: learning rates of the linear classifier
        random: evaluate random weights too
        seed: of the linear classifier and the random weights
        crop: side of the centre crop relative to the resized image; None = from the file
        batch: images per batch and rank
        workers: loader processes of a rank; None = its cores, at most 8
        out: JSON file to write
    """

    data: str
    train_split: str
    eval_split: str
    images: int | None
    k: list[int]
    temperature: float
    no_linear: bool
    epochs: int
    lrs: list[float]
    random: bool
    seed: int
    crop: float | None
    batch: int
    workers: int | None
    out: Path | None


def parse(argv: list[str] | None = None) -> Options:
    """Parse the command line."""
    parser = Parser(description=__doc__)
    add_model_and_device(parser)
    add = parser.add_argument
    add("data", metavar="DATA", help="folder of labelled shards, or its URL")
    add("--train-split", default="train", metavar="SPLIT", help="neighbours, and training set of the linear classifier")
    add("--eval-split", default="val", metavar="SPLIT", help="split that is classified")
    add("--images", type=int, metavar="N", help="maximum images of either split, evenly spread (default: all)")
    add("--k", type=int, nargs="+", default=KS, metavar="K", help=f"numbers of neighbours (default: {_join(KS)})")
    add("--temperature", type=float, default=TEMPERATURE, metavar="T", help="of the votes (default: %(default)s)")
    add("--no-linear", action="store_true", help="nearest neighbours only")
    add("--epochs", type=int, default=100, metavar="N", help="of the linear classifier (default: %(default)s)")
    add("--lrs", type=float, nargs="+", default=LRS, metavar="LR", help=f"learning rates (default: {_join(LRS)})")
    add("--random", action="store_true", help="evaluate the same model with random weights too")
    add("--seed", type=int, default=0, metavar="N", help="of the linear classifier and random weights (default: 0)")
    crop = f"relative side of the centre crop; 1 = squash, no crop (default: the file's, else {Augment.eval_crop})"
    add("--crop", type=float, metavar="SHARE", help=crop)
    add("--batch", type=int, default=64, metavar="N", help="images per batch and rank (default: %(default)s)")
    add("--workers", type=int, metavar="N", help="loader processes per rank (default: its cores, at most 8)")
    add("--out", type=Path, metavar="FILE", help="write scores and settings to this file, as JSON")
    options = parse_options(parser, Options, argv)
    positive = ("images", "k", "temperature", "epochs", "lrs", "batch")
    check_positive(parser, **{name: getattr(options, name) for name in positive})
    if options.eval_split == options.train_split:
        parser.error(f"--eval-split {options.eval_split}: must differ from --train-split")
    if options.crop is not None and not 0 < options.crop <= 1:
        parser.error(f"--crop {options.crop}: must be above 0 and at most 1")
    return options


def _join(numbers: Iterable[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    options = parse(argv)
    check_weights(options.weights)
    check_dataset(options.data)
    if options.out:
        check_parent(options.out)
    data = Data(path=options.data, workers=options.workers)

    from configs.log import say  # torch and all that needs it: seconds, which --help and mistakes need not wait for
    from data.shards import open_split
    from data.transforms import EvalTransform
    from finetune.feature_scores import Settings, feature_scores
    from launch.training.engine import seed_everything
    from launch.training.feature_eval import check_labels, probe_loader
    from launch.training.precision import precision
    from launch.training.world import destroy_world, init_world, process_errors
    from models.convnext import ConvNeXt
    from models.opening import open_encoder

    trained = open_encoder(options.weights, options.ema, options.size)
    arch, preprocessing = trained.weights.arch, trained.preprocessing
    preprocessing = replace(preprocessing, crop=options.crop or preprocessing.crop)
    splits = open_split(data, options.train_split), open_split(data, options.eval_split)
    for split in splits:
        check_labels(split)
    images = min(options.images or len(splits[0]), len(splits[0]))
    if images < MIN_IMAGES and not options.no_linear:
        raise UserError(
            f"{images} training images are too few for the linear classifier: give {MIN_IMAGES}, or --no-linear"
        )

    world = init_world(Run(device=options.device))
    say(f"{options.weights}: {arch.name}, images of {'x'.join(map(str, preprocessing.size))}")
    transform = EvalTransform.of(preprocessing)
    loaders = [
        probe_loader(split, options.images, transform, arch.channels, data, options.batch, world) for split in splits
    ]
    kind = precision(Optim(precision=options.precision), world.device)

    lrs = None if options.no_linear else options.lrs
    settings = Settings(options.k, options.temperature, lrs, options.epochs, options.seed)
    with process_errors():
        scores = feature_scores(trained, loaders, kind, settings, world)
        if options.random:
            say("the same with random weights")
            seed_everything(options.seed)
            random = replace(trained, model=ConvNeXt(arch))
            scores["random"] = feature_scores(random, loaders, kind, settings, world)
    if world.first:
        for split, used in zip(splits, (scores["train_images"], scores["eval_images"]), strict=True):
            if damaged := min(options.images or len(split), len(split)) - used:
                print(f"{damaged:,} damaged images of split {split.name} left out: data/prepare.py --verify lists them")
        show(scores, options)
        if options.out:
            settings = {key: value for key, value in vars(options).items() if key not in ("out", "random")}
            settings |= preprocessing.to_dict() | {"crop": preprocessing.crop, "ranks": world.ranks}
            about = {"model": asdict(arch), "settings": settings}
            write_whole(options.out, json.dumps(about | scores, indent=1).encode())
            print(f"wrote {options.out}")
    destroy_world()


def show(scores: dict, options: Options) -> None:
    """Print the scores in one row per probe, the learning rates, and the k that were left out."""
    train, evaluation = scores["train_images"], scores["eval_images"]
    for k in sorted(set(options.k) - scores["knn"].keys()):
        print(f"k {k} left out: split {options.train_split} has {train:,} images")
    columns = {"": scores} | ({"random ": scores["random"]} if "random" in scores else {})
    table = Table(title=f"{evaluation:,} images of {options.eval_split} by {train:,} of {options.train_split}")
    table.add_column("probe")
    for name in columns:
        table.add_column(f"{name}top-1", justify="right")
        table.add_column(f"{name}top-5", justify="right")
    rows = {f"kNN, k {k}": [column["knn"][k] for column in columns.values()] for k in scores["knn"]}
    if "linear" in scores:
        rows["linear"] = [column["linear"] for column in columns.values()]
    for name, row in rows.items():
        table.add_row(name, *(f"{score[key]:.2%}" for score in row for key in ("top1", "top5")))
    Console(markup=False, highlight=False).print(table)
    if "linear" in scores:
        show_grid(scores["linear"]["grid"], scores["linear"]["lr"])


def show_grid(grid: list[dict], best: float) -> None:
    """Print the linear classifier's accuracy at each learning rate, in ascending order."""
    table = Table(title="linear")
    for name in ("learning rate", "held-out", "top-1", "top-5"):
        table.add_column(name, justify="right")
    for row in grid:
        cells = (f"{row[key]:.2%}" for key in ("held_out", "top1", "top5"))
        table.add_row(f"{row['lr']:g}", *cells, style="bold" if row["lr"] == best else None)
    Console(markup=False, highlight=False).print(table)
    if len(grid) > 1 and best in (grid[0]["lr"], grid[-1]["lr"]):
        print(f"the best learning rate, {best:g}, is at an end of the grid: widen --lrs")


if __name__ == "__main__":
    run_main(main)
