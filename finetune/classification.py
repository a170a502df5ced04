"""Classification in evaluate.py and predict.py: class names, scores, tables, pictures and the files written."""

import csv
import io
import json
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from configs.command import say
from configs.errors import UserError
from configs.files import whole_file, write_whole
from data.folder import Folder, read_image
from data.shards import Split
from data.transforms import decode
from finetune.scores import Predictions, calibration_error
from models.opening import Trained

MAX_CLASSES_SHOWN = 20  # the table lists all classes up to this number
WORST = 10  # otherwise the worst; also the number of confusions and damaged images shown
MAX_NAMES = 5  # in an error message


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of a picture, (name, probability), in descending order of probability."""

    path: Path
    classes: list[tuple[str, float]]

    @property
    def lines(self) -> list[str]:
        """The classes as they are printed."""
        return [f"{name} {100 * share:.1f} %" for name, share in self.classes]


def match_classes(trained: Trained, images: Split | Folder) -> tuple[list[str], np.ndarray]:
    """(names of the model's classes, the model's class for each label of the data).

    Raises:
        UserError: an image has no label, or one that the model does not have
    """
    where, labels, outputs = f"{images.folder}, split {images.name}", images.labels(), trained.weights.outputs
    if not len(labels):
        raise UserError(f"{where} has no images")
    if (labels < 0).any():
        raise UserError(f"{where} has images without labels: use finetune/predict.py for them")
    names, given = trained.weights.classes, images.classes
    if given and labels.max() >= len(given):
        raise UserError(f"{where} has label {labels.max()}, but {len(given)} class names: prepare it again")
    if names and given and names != given:
        copies = Counter(names)
        unknown = [name for name in given if copies[name] != 1]
        if unknown:
            more = f" and {len(unknown) - MAX_NAMES} more" if unknown[MAX_NAMES:] else ""
            known = ", ".join(names[:MAX_NAMES]) + (", ..." if names[MAX_NAMES:] else "")
            raise UserError(
                f"{images.folder} has classes that {trained.path} does not have: {', '.join(unknown[:MAX_NAMES])}{more}"
                f" (it has {outputs}: {known})"
            )
        say(f"classes matched by name: the data has {len(given)} of the model's {outputs}")
        number = {name: i for i, name in enumerate(names)}
        return names, np.array([number[name] for name in given])
    if not (names and given):
        say(f"{images.folder if names else trained.path} has no class names: labels are matched by number")
    count = len(given) if given else labels.max() + 1
    if labels.max() >= outputs or (given and count != outputs):
        raise UserError(f"{where} has {count} classes, {trained.path} {outputs}: without names they cannot be matched")
    return names or given or [str(i) for i in range(outputs)], np.arange(outputs)


def evaluation(predictions: Predictions, names: list[str]) -> dict:
    """Scores, accuracy of each class that has images, confusions (most frequent first) and calibration."""
    from sklearn.metrics import f1_score, recall_score  # takes over a second

    label, first = predictions.label, predictions.best[:, 0]
    present, counts = np.unique(label, return_counts=True)
    recall = recall_score(label, first, labels=present, average=None)
    images = dict(zip(present.tolist(), counts.tolist(), strict=True))
    bins = predictions.calibration()
    scores = asdict(predictions.score()) | {
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
            for (i, j), count in zip(*(x.tolist() for x in predictions.confusions()), strict=True)
        ],
        "calibration": [asdict(bin) for bin in bins],
    }


def write_evaluation(out: Path, result: dict, predictions: Predictions, names: list[str], where: list[str]) -> None:
    """Write predictions.csv, two pictures, and evaluation.json last."""
    from finetune.pictures import calibration_picture, confusion_picture  # matplotlib, sklearn

    text = io.StringIO(newline="")
    rows = csv.writer(text)
    top = (f"top{i + 1}" for i in range(predictions.best.shape[1]))
    rows.writerow(["sample", "name", "label", *top, "confidence", "loss"])
    columns = (predictions.sample.tolist(), predictions.label, predictions.best)
    for sample, label, best, confidence, loss in zip(*columns, predictions.confidence, predictions.loss, strict=True):
        rows.writerow([sample, where[sample], names[label], *(names[i] for i in best), confidence, loss])
    write_whole(out / "predictions.csv", text.getvalue().encode("utf-8", "surrogateescape"))
    confusion_picture(out / "confusion.png", predictions, names)
    calibration_picture(out / "calibration.png", predictions.calibration())
    write_whole(out / "evaluation.json", json.dumps(result, indent=1).encode())


def show_evaluation(result: dict) -> None:
    """Print the scores, all classes or the worst, and the most frequent confusions."""
    console = Console(markup=False, emoji=False, highlight=False)
    scores, classes, confusions, damaged = (result[key] for key in ("scores", "classes", "confusions", "damaged"))
    for line in damaged[:WORST]:
        console.print(f"damaged, left out: {line['name']} ({line['error']})", soft_wrap=True)
    if damaged[WORST:]:
        console.print(f"and {len(damaged) - WORST} more, listed in evaluation.json")
    table = Table(title=f"{result['weights']} on {result['data']}, split {result['split']}")
    titles = {
        "top1": "top-1",
        "top5": "top-5",
        "mean_class_accuracy": "mean over classes",
        "macro_f1": "macro F1",
        "calibration_error": "calibration error",
    }
    for title in ("images", "loss", *titles.values()):
        table.add_column(title, justify="right")
    table.add_row(f"{scores['images']:,}", f"{scores['loss']:.4f}", *(percent(scores[key]) for key in titles))
    console.print(table)

    shown = MAX_CLASSES_SHOWN if len(classes) <= MAX_CLASSES_SHOWN else WORST
    worst = sorted(classes, key=lambda row: row["accuracy"])[:shown]
    table = Table("class", title="classes" if len(worst) == len(classes) else f"worst of {len(classes)} classes")
    for title in ("images", "accuracy"):
        table.add_column(title, justify="right")
    for row in worst:
        table.add_row(row["name"], f"{row['images']:,}", percent(row["accuracy"]))
    console.print(table)

    if confusions:
        table = Table("class", "predicted as", title="most frequent confusions")
        for title in ("images", "of the class"):
            table.add_column(title, justify="right")
        for row in confusions[:WORST]:
            table.add_row(row["label"], row["predicted"], f"{row['images']:,}", percent(row["share"]))
        console.print(table)


def percent(share: float) -> str:
    """A share of 0 to 1 as a percentage."""
    return f"{100 * share:.2f} %"


def class_names(trained: Trained, file: str | None) -> list[str]:
    """Names from `--classes`, or else from the weights. Raises `UserError` unless there is one for each class."""
    if file is None and trained.weights.classes is None:
        raise UserError(f"{trained.path} has no class names: give them with --classes names.txt, one a line")
    try:
        names = trained.weights.classes if file is None else Path(file).read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{file} is not text in UTF-8") from None
    if len(names) != trained.weights.outputs:
        raise UserError(
            f"{file or trained.path} has {len(names)} names, {trained.path} {trained.weights.outputs} classes"
        )
    return names


def top_classes(logits: Tensor, paths: list[Path], names: list[str], top: int) -> list[Prediction]:
    """The `top` most likely classes of pictures, from logits [B, classes]. Raises `UserError` unless all are finite."""
    if not bool(torch.isfinite(logits).all()):
        raise UserError("the weights give numbers that are not finite: try --precision fp32")
    numbers = logits.topk(min(top, logits.shape[1])).indices
    shares = logits.softmax(1).gather(1, numbers).tolist()
    rows = [
        [(names[i], share) for i, share in zip(*row, strict=True)] for row in zip(numbers.tolist(), shares, strict=True)
    ]
    return [Prediction(path, row) for path, row in zip(paths, rows, strict=True)]


def write_annotated(folder: Path, number: int, prediction: Prediction, channels: int) -> None:
    """Write a copy of a picture with its classes below it, as JPEG or PNG; `number` keeps file names unique."""
    from finetune.pictures import annotate  # matplotlib, sklearn

    path = prediction.path
    kind = "jpeg" if path.suffix.lower() in (".jpg", ".jpeg") else "png"
    copy = annotate(decode(read_image(path), channels), prediction.lines)
    with whole_file(folder / f"{number:05}-{path.stem}.{kind}") as file:
        copy.save(file, kind, quality=95)


def write_table(path: Path, predictions: list[Prediction], top: int) -> None:
    """Write a CSV file with a row for each picture."""
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(["path", *(f"{column}{i + 1}" for i in range(top) for column in ("class", "probability"))])
    rows.writerows([prediction.path, *chain.from_iterable(prediction.classes)] for prediction in predictions)
    write_whole(path, text.getvalue().encode("utf-8", "surrogateescape"))


def write_objects(path: Path, predictions: list[Prediction]) -> None:
    """Write a JSON file: a list of objects, one a line."""
    objects = (
        {
            "path": str(prediction.path),
            "classes": [{"name": name, "probability": share} for name, share in prediction.classes],
        }
        for prediction in predictions
    )
    write_whole(path, f"[{','.join(chr(10) + json.dumps(item) for item in objects)}\n]\n".encode())
