"""Evaluate a classifier on labelled images: accuracies, confusions, calibration, and every prediction.

python finetune/evaluate.py runs/photos-finetuned/best.pt shards/photos                  split val of shards
python finetune/evaluate.py runs/photos-finetuned/best.pt photos/ --split test           a folder, a sub-folder a class
python finetune/evaluate.py convnextv2_tiny_1k_224_ema.pt shards/imagenet --size 288     weights of any format
deepspeed finetune/evaluate.py runs/photos-finetuned/best.pt s3://bucket/shards/photos   on every GPU

Writes evaluation.json, predictions.csv, confusion.png and calibration.png. Each image counts once, on any number of
GPUs; damaged ones are named and left out. Classes are matched by their names where both weights and data have such.
"""

import argparse
import csv
import io
import json
import sys
from collections import ChainMap, Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.metrics import f1_score, recall_score
from torch import Tensor

from configs.errors import Parser, UserError, run_main
from configs.files import write_whole
from configs.log import say
from configs.schema import Data, Optim, Run
from data.folder import Folder, open_images, sample_names
from data.loader import Loader, eval_loader
from data.shards import Split
from finetune.evaluation import predict
from finetune.tasks.classification import scores as classification
from finetune.tasks.classification.pictures import calibration_picture, confusion_picture
from finetune.tasks.classification.scores import Predictions, calibration_error
from finetune.trained import Trained, add_options, open_trained
from launch.training.precision import precision
from launch.training.world import World, gather, peers, start, stop

FEW_CLASSES = 20  # the table has all classes of so many
WORST = 10  # else the worst; and the most frequent confusions
NAMED = 5  # names in a message


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    add_options(parser)
    parser.add_argument("data", metavar="DATA", help="folder of shards or its URL, or a folder of images")
    parser.add_argument("--split", default="val", help="which one (default %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=64, metavar="N", help="images a rank takes at once (default %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="loader processes of a rank (default: its cores, at most 8)"
    )
    parser.add_argument("--out", metavar="FOLDER", help="default: evaluation-SPLIT-NAME beside the weights")
    args = parser.parse_args(argv)
    if args.batch < 1:
        parser.error(f"--batch {args.batch}: must be 1 or more")
    return args


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse(argv)
    trained = open_trained(args.weights, args.ema, args.size)
    images = open_images(args.data, args.split)
    names, classes = match_classes(trained, images)
    out = Path(args.out) if args.out else default_folder(args)
    world = start(Run(device=args.device))
    if world.first:
        out.mkdir(parents=True, exist_ok=True)  # now, not after the work
    kind = precision(Optim(precision=args.precision), world.device)
    found, damaged = evaluate(trained, images, classes, world, kind, args)
    if world.first:
        held = {"weights": args.weights, "ema": args.ema, "data": args.data, "split": args.split, "precision": kind}
        held["size"] = list(trained.transform.size)
        where = sample_names(images)
        held |= evaluation(found, names)
        held["damaged"] = [{"sample": i, "name": where[i], "error": damaged[i]} for i in sorted(damaged)]
        write(out, held, found, names, where)
        show(held)
        print(f"wrote {out}: evaluation.json, predictions.csv, confusion.png, calibration.png")
    stop()


def default_folder(args: argparse.Namespace) -> Path:
    """Beside the weights, named after split and weights: best.pt, last.pt and its average do not share one."""
    weights = Path(args.weights).absolute()
    name = weights.name if weights.is_dir() else weights.stem
    return Path(args.weights).parent / f"evaluation-{args.split}-{name}{'-ema' if args.ema else ''}"


def match_classes(trained: Trained, images: Split | Folder) -> tuple[list[str], np.ndarray]:
    """(names of the model's classes, the model's class for each label of the data).

    Raises:
        UserError: an image has no label, or one that the model does not know
    """
    where, labels, outputs = f"{images.folder}, split {images.name}", images.labels(), trained.weights.outputs
    if not len(labels):
        raise UserError(f"{where} has no images")
    if (labels < 0).any():
        raise UserError(f"{where} has images without labels: finetune/predict.py predicts such")
    names, given = trained.classes, images.classes
    if given and labels.max() >= len(given):
        raise UserError(f"{where} has label {labels.max()}, but {len(given)} class names: prepare it again")
    if names and given and names != given:
        copies = Counter(names)
        strange = [name for name in given if copies[name] != 1]
        if strange:
            more = f" and {len(strange) - NAMED} more" if strange[NAMED:] else ""
            held = ", ".join(names[:NAMED]) + (", ..." if names[NAMED:] else "")
            raise UserError(
                f"{images.folder} has classes that {trained.path} does not know: {', '.join(strange[:NAMED])}{more} "
                f"(it has {outputs}: {held})"
            )
        say(f"classes matched by name: the data has {len(given)} of the model's {outputs}")
        number = {name: i for i, name in enumerate(names)}
        return names, np.array([number[name] for name in given])
    if not (names and given):
        say(f"{images.folder if names else trained.path} has no class names: labels are taken by their number")
    count = len(given) if given else labels.max() + 1
    if labels.max() >= outputs or (given and count != outputs):
        raise UserError(f"{where} has {count} classes, {trained.path} {outputs}: without names they cannot be matched")
    return names or given or [str(i) for i in range(outputs)], np.arange(outputs)


def evaluate(
    trained: Trained, images: Split | Folder, classes: np.ndarray, world: World, kind: str, args: argparse.Namespace
) -> tuple[Predictions, dict[int, str]]:
    """(predictions, what is wrong with each damaged sample); every rank calls this and gets the same."""
    device, batch = world.device, min(args.batch, len(images))
    place = world.rank, world.ranks, device.type == "cuda"
    channels, data = trained.weights.arch.channels, Data(workers=args.workers)
    loader = eval_loader(images, trained.transform, channels, data, batch, *place)
    damaged: dict[int, str] = {}
    batches = watched(loader, torch.from_numpy(classes), batch, damaged, world.first)
    model, mean, std = (x.to(device) for x in (trained.model, trained.mean, trained.std))
    with peers():
        found = predict(classification, {"": model}, batches, world, mean, std, kind)[""]
        damaged = dict(ChainMap(*gather(damaged)))
    if not np.isfinite(found.loss).all():
        raise UserError(f"{trained.path} gives numbers that are not finite with precision {kind}: try --precision fp32")
    return found, damaged


def watched(
    loader: Loader, classes: Tensor, size: int, damaged: dict[int, str], first: bool
) -> Iterator[dict[str, Tensor]]:
    """The loader's batches under a progress bar, with the model's classes for labels; damaged samples are noted.

    All are filled up to one size, because the last digits of the numbers depend on it: so they do not depend on the
    number of ranks. (They may on a CPU's number of threads.)
    """
    bar = Console(stderr=True)
    for batch in track(loader, "evaluating", len(loader.batches), console=bar, disable=not first, show_speed=False):
        for sample in batch["sample"][batch["damaged"]].tolist():
            damaged[sample] = loader.samples.describe_damage(sample)
        label, missing = batch["label"], size - len(batch["label"])
        label = torch.where(label < 0, label, classes[label])
        filling = batch["image"][:1].expand(missing, -1, -1, -1)
        yield {
            "image": torch.cat([batch["image"], filling]),
            "label": F.pad(label, (0, missing), value=-1),
            "sample": F.pad(batch["sample"], (0, missing), value=-1),
        }


def evaluation(found: Predictions, names: list[str]) -> dict:
    """Scores, accuracy of each class that has images, confusions (the most frequent first) and calibration."""
    label, first = found.label, found.best[:, 0]
    present, counts = np.unique(label, return_counts=True)
    recall = recall_score(label, first, labels=present, average=None)
    images = dict(zip(present.tolist(), counts.tolist(), strict=True))
    bins = found.calibration()
    scores = asdict(found.score()) | {
        "mean_class_accuracy": float(recall.mean()),
        "macro_f1": float(f1_score(label, first, labels=present, average="macro")),
        "calibration_error": calibration_error(bins),
    }
    return {
        "scores": scores,
        "classes": [
            {"class": i, "name": names[i], "images": count, "accuracy": accuracy}
            for (i, count), accuracy in zip(images.items(), recall.tolist(), strict=True)
        ],
        "confusions": [
            {"label": names[i], "predicted": names[j], "images": count, "share": count / images[i]}
            for (i, j), count in zip(*(x.tolist() for x in found.confusions()), strict=True)
        ],
        "calibration": [asdict(bin) for bin in bins],
    }


def write(out: Path, held: dict, found: Predictions, names: list[str], where: list[str]) -> None:
    """Write the four files; evaluation.json comes last."""
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(
        ["sample", "name", "label", *(f"top{i + 1}" for i in range(found.best.shape[1])), "confidence", "loss"]
    )
    columns = (found.sample.tolist(), found.label, found.best, found.confidence, found.loss)
    for sample, label, best, confidence, loss in zip(*columns, strict=True):
        rows.writerow([sample, where[sample], names[label], *(names[i] for i in best), confidence, loss])
    write_whole(out / "predictions.csv", text.getvalue().encode("utf-8", "surrogateescape"))
    confusion_picture(out / "confusion.png", found, names)
    calibration_picture(out / "calibration.png", found.calibration())
    write_whole(out / "evaluation.json", json.dumps(held, indent=1).encode())


def show(held: dict) -> None:
    """Print the scores, the classes, all or the worst, and the most frequent confusions."""
    console = Console(markup=False, emoji=False, highlight=False)
    scores, classes, confusions = held["scores"], held["classes"], held["confusions"]
    for line in held["damaged"][:WORST]:
        console.print(f"damaged, left out: {line['name']} ({line['error']})", soft_wrap=True)
    if held["damaged"][WORST:]:
        console.print(f"and {len(held['damaged']) - WORST} more, listed in evaluation.json")
    table = Table(title=f"{held['weights']} on {held['data']}, split {held['split']}")
    kinds = {
        "top1": "top-1",
        "top5": "top-5",
        "mean_class_accuracy": "mean over classes",
        "macro_f1": "macro F1",
        "calibration_error": "calibration error",
    }
    for title in ("images", "loss", *kinds.values()):
        table.add_column(title, justify="right")
    table.add_row(f"{scores['images']:,}", f"{scores['loss']:.4f}", *(percent(scores[kind]) for kind in kinds))
    console.print(table)

    worst = sorted(classes, key=lambda row: row["accuracy"])[: FEW_CLASSES if len(classes) <= FEW_CLASSES else WORST]
    table = Table("class", title="classes" if len(worst) == len(classes) else f"worst of {len(classes)} classes")
    for title in ("images", "accuracy"):
        table.add_column(title, justify="right")
    for row in worst:
        table.add_row(row["name"], f"{row['images']:,}", percent(row["accuracy"]))
    console.print(table)

    if confusions:
        table = Table("class", "taken for", title="most frequent confusions")
        for title in ("images", "of the class"):
            table.add_column(title, justify="right")
        for row in confusions[:WORST]:
            table.add_row(row["label"], row["predicted"], f"{row['images']:,}", percent(row["share"]))
        console.print(table)


def percent(share: float) -> str:
    """A share of 0 to 1, as it is printed."""
    return f"{100 * share:.2f} %"


if __name__ == "__main__":
    run_main(main)
