"""Classify pictures with trained weights: names and probabilities for each.

python finetune/predict.py runs/photos-finetuned/best.pt cat.jpg dog.jpg
python finetune/predict.py runs/photos-finetuned/best.pt inbox/ --csv inbox.csv --annotate inbox-annotated
find photos -name '*.jpg' | python finetune/predict.py runs/photos-finetuned/best.pt -
python finetune/predict.py convnextv2_tiny_1k_224_ema.pt cat.jpg --classes imagenet.txt

Folders are searched recursively; `-` reads paths from standard input, one a line. Size, crop, normalisation and class
names are those of the weights. What cannot be read is named on standard error; the rest is done, the exit code is 2.
"""

import argparse
import csv
import io
import json
import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

import torch
from torch import Tensor

from configs.errors import Parser, UserError, run_main
from configs.files import whole_file, write_whole
from configs.schema import Optim, Run
from data.decode import decode
from data.folder import list_images, read_image
from data.loader import collate
from data.sources import READABLE
from finetune.evaluation import output_of
from finetune.tasks.classification.pictures import annotate
from finetune.trained import Trained, add_options, open_trained
from launch.training.precision import precision
from launch.training.world import start, stop

STDIN = "-"
AHEAD = 2  # batches that are decoded while one is classified
UNKNOWN = f"not of a known type ({', '.join(READABLE)})"


@dataclass(frozen=True)
class Picture:
    """A file: its image [C, H, W] as the model takes it, or what is wrong with it."""

    path: Path
    image: Tensor | None = None
    error: str = ""


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of a picture, (name, probability from 0 to 1), the first one first."""

    path: Path
    classes: list[tuple[str, float]]

    @property
    def shown(self) -> list[str]:
        """The classes as they are printed."""
        return [f"{name} {100 * share:.1f} %" for name, share in self.classes]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    add_options(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder, or - for paths from standard input")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes for each (default %(default)s)")
    parser.add_argument(
        "--annotate", metavar="FOLDER", help="write copies with names and probabilities below the picture"
    )
    parser.add_argument("--csv", metavar="FILE", help="write a table")
    parser.add_argument("--json", metavar="FILE", help="write the same as a list of objects")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images taken at once (default %(default)s)")
    parser.add_argument("--classes", metavar="FILE", help="class names, one a line, for weights that have none")
    args = parser.parse_args(argv)
    for name in ("top", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be 1 or more")
    return args


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse(argv)
    sys.stdout.reconfigure(errors="surrogateescape")  # names of files may be any bytes
    trained = open_trained(args.weights, args.ema, args.size)
    names = class_names(trained, args.classes)
    paths = find(args.images)
    for file in filter(None, (args.csv, args.json)):
        if not Path(file).parent.is_dir():
            raise UserError(f"{Path(file).parent} is not a folder: make it first")
    if args.annotate:
        Path(args.annotate).mkdir(parents=True, exist_ok=True)
    try:
        failed, images = run(trained, names, paths, args)
    except BrokenPipeError:  # who reads the lines has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    if failed and images > 1:
        raise UserError(f"{failed} of {images} images could not be read")
    if failed:
        sys.exit(2)


def run(trained: Trained, names: list[str], paths: Iterator[Path], args: argparse.Namespace) -> tuple[int, int]:
    """Classify and print, batch by batch, then write the files. Returns how many could not be read, and of how many."""
    world = start(Run(device=args.device))
    if world.ranks > 1:
        raise UserError("finetune/predict.py runs in one process: start it with python, not with a launcher")
    kind = precision(Optim(precision=args.precision), world.device)
    model, mean, std = (x.to(world.device) for x in (trained.model, trained.mean, trained.std))
    found: list[Prediction] = []
    done = failed = 0
    for pictures in load(paths, trained, args):
        whole = [picture for picture in pictures if not picture.error]
        if whole:
            image = collate([{"image": picture.image} for picture in whole])["image"].to(world.device)
            predictions = best(output_of(model, image, mean, std, kind).float(), whole, names, args.top)
            for number, prediction in enumerate(predictions, done + 1):
                print(f"{prediction.path}: {', '.join(prediction.shown)}")
                if args.annotate:
                    write_copy(Path(args.annotate), number, prediction, trained.weights.arch.channels)
            found += predictions if args.csv or args.json else []
        sys.stdout.flush()
        for picture in pictures:
            if picture.error:
                print(f"error: {picture.path}: {picture.error}", file=sys.stderr)
        done, failed = done + len(whole), failed + len(pictures) - len(whole)
    if args.csv:
        write_table(Path(args.csv), found, min(args.top, len(names)))
    if args.json:
        write_objects(Path(args.json), found)
    stop()
    return failed, done + failed


def class_names(trained: Trained, file: str | None) -> list[str]:
    """The names in `--classes`, or else those of the weights. Raises `UserError` unless each class has one."""
    if file is None and trained.classes is None:
        raise UserError(f"{trained.path} has no class names: give them with --classes names.txt, one a line")
    try:
        names = trained.classes if file is None else Path(file).read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{file} is not text in UTF-8") from None
    if len(names) != trained.weights.outputs:
        raise UserError(
            f"{file or trained.path} has {len(names)} names, {trained.path} {trained.weights.outputs} classes"
        )
    return names


def find(arguments: list[str]) -> Iterator[Path]:
    """The images that the command line names.

    Raises:
        UserError: a path is missing or no image, or a folder has none; of standard input nothing is checked
    """
    if STDIN in arguments:
        if arguments != [STDIN]:
            raise UserError(f"{STDIN} takes the paths from standard input: give no others beside it")
        sys.stdin.reconfigure(errors="surrogateescape")
        return (Path(line.rstrip("\n")) for line in sys.stdin if line.strip())
    paths = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            paths += [path / item.name for item in list_images(path)]
        elif not path.exists():
            raise UserError(f"{path} does not exist: give pictures, or folders of them")
        else:
            if not is_known(path):
                raise UserError(f"{path}: {UNKNOWN}")
            paths.append(path)
    return iter(paths)


def is_known(path: Path) -> bool:
    """Whether a file is a picture, by its name."""
    return path.suffix.lower().removeprefix(".") in READABLE


def load(paths: Iterator[Path], trained: Trained, args: argparse.Namespace) -> Iterator[list[Picture]]:
    """Batches of pictures, decoded by threads, some ahead; those from standard input as soon as a batch is there."""

    def read_picture(path: Path) -> Picture:
        if not is_known(path):
            return Picture(path, error=UNKNOWN)
        try:
            return Picture(path, trained.transform(decode(read_image(path), trained.weights.arch.channels))["image"])
        except UserError as error:
            return Picture(path, error=str(error))

    ahead, pending = 0 if args.images == [STDIN] else AHEAD, deque()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        while batch := list(islice(paths, args.batch)):
            pending.append([pool.submit(read_picture, path) for path in batch])
            if len(pending) > ahead:
                yield [future.result() for future in pending.popleft()]
        for batch in pending:
            yield [future.result() for future in batch]


def best(logits: Tensor, pictures: list[Picture], names: list[str], top: int) -> list[Prediction]:
    """The `top` likeliest classes of pictures, from logits [B, classes]. Raises `UserError` if some are not finite."""
    if not bool(torch.isfinite(logits).all()):
        raise UserError("the weights give numbers that are not finite: try --precision fp32")
    numbers = logits.topk(min(top, logits.shape[1])).indices
    shares = logits.softmax(1).gather(1, numbers).tolist()
    rows = [
        [(names[i], share) for i, share in zip(*row, strict=True)] for row in zip(numbers.tolist(), shares, strict=True)
    ]
    return [Prediction(picture.path, row) for picture, row in zip(pictures, rows, strict=True)]


def write_copy(folder: Path, number: int, prediction: Prediction, channels: int) -> None:
    """Write a picture with its classes below it; JPEG if it was one, else PNG. Numbers keep equal names apart."""
    path = prediction.path
    kind = "jpeg" if path.suffix.lower() in (".jpg", ".jpeg") else "png"
    copy = annotate(decode(read_image(path), channels), prediction.shown)
    with whole_file(folder / f"{number:05}-{path.stem}.{kind}") as file:
        copy.save(file, kind, quality=95)


def write_table(path: Path, found: list[Prediction], top: int) -> None:
    """Write a CSV file: a row a picture."""
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(["path", *(f"{what}{i + 1}" for i in range(top) for what in ("class", "probability"))])
    rows.writerows([prediction.path, *chain.from_iterable(prediction.classes)] for prediction in found)
    write_whole(path, text.getvalue().encode("utf-8", "surrogateescape"))


def write_objects(path: Path, found: list[Prediction]) -> None:
    """Write a JSON file: a list of objects, one a line."""
    objects = (
        {
            "path": str(prediction.path),
            "classes": [{"name": name, "probability": share} for name, share in prediction.classes],
        }
        for prediction in found
    )
    write_whole(path, f"[{','.join(chr(10) + json.dumps(item) for item in objects)}\n]\n".encode())


if __name__ == "__main__":
    run_main(main)
