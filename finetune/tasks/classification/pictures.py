"""Confusion matrix and reliability diagram."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix

from finetune.tasks.classification.scores import Bin, Predictions, calibration_error
from finetune.tasks.examples import ROW, Example, write_examples
from finetune.tasks.pictures import write_figure

MAX_CLASSES, CONFUSED_CLASSES = 100, 30  # in a confusion matrix; with more classes the most confused are shown
MAX_CLASSES_WITH_NUMBERS = 30  # in the cells
MAX_NAME = 30  # characters of a class name


FILES = "confusion.png, calibration.png, examples.png"


def write_pictures(folder: Path, predictions: Predictions, names: list[str], images: Any) -> None:
    """Write the pictures `FILES`; `images` is the split of the predictions."""
    confusion_picture(folder / "confusion.png", predictions, names)
    calibration_picture(folder / "calibration.png", predictions.calibration())
    order, wrong = np.argsort(predictions.loss, kind="stable"), predictions.best[:, 0] != predictions.label
    sure = np.argsort(-predictions.confidence, kind="stable")
    groups = {
        "Worst: the highest loss": order[::-1],
        "Best: the lowest loss": order,
        "Mistakes with the highest confidence": sure[wrong[sure]],
    }
    lines = {title: [_example(predictions, i, names) for i in chosen[:ROW]] for title, chosen in groups.items()}
    write_examples(folder / "examples.png", images, lines)


def _example(predictions: Predictions, i: int, names: list[str]) -> Example:
    found = f"{names[predictions.best[i, 0]]} {100 * predictions.confidence[i]:.0f} %"
    return int(predictions.sample[i]), f"is {names[predictions.label[i]]}", f"predicted {found}"


def confusion_picture(path: Path, predictions: Predictions, names: list[str]) -> None:
    """Write a confusion matrix, normalised by row (class); of many classes, those of the most frequent confusions."""
    label, first = predictions.label, predictions.best[:, 0]
    shown = np.union1d(label, first)
    title = f"{len(shown)} classes"
    if len(shown) > MAX_CLASSES:
        title = f"the {CONFUSED_CLASSES} most often confused of {len(shown)} classes"
        by_confusion = list(dict.fromkeys([*predictions.confusions()[0].flat, *shown]))
        shown = np.sort(by_confusion[:CONFUSED_CLASSES])
    images = np.bincount(label, minlength=len(names))[shown]
    share = confusion_matrix(label, first, labels=shown) / np.maximum(images, 1)[:, None]
    matrix_picture(path, share, [names[i] for i in shown], f"% of each class's images; {title}")


def matrix_picture(path: Path, share: np.ndarray, names: list[str], title: str) -> None:
    """Write a confusion matrix [K, K]: the share of each class, a row, that is predicted as each class."""
    side = 3 + max(3, 0.25 * len(names))  # inches
    figure = Figure((side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    ticks = [name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…" for name in names]
    axes.set_xticks(range(len(names)), ticks, rotation=90, parse_math=False)
    axes.set_yticks(range(len(names)), ticks, parse_math=False)
    axes.set(xlabel="predicted class", ylabel="class", title=title)
    for row, column in np.argwhere(share >= 0.005) if len(names) <= MAX_CLASSES_WITH_NUMBERS else ():
        text, colour = f"{100 * share[row, column]:.0f}", "white" if share[row, column] > 0.5 else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)
    write_figure(path, figure)


def calibration_picture(path: Path, bins: list[Bin]) -> None:
    """Write a reliability diagram (1706.04599, figure 1): accuracy by confidence, and the distribution of images."""
    full = [bin for bin in bins if bin.images]
    left, width = [bin.low for bin in full], bins[0].high - bins[0].low
    figure = Figure((5, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bars, accuracy = {"align": "edge", "color": "skyblue", "edgecolor": "white"}, [bin.accuracy for bin in full]
    above.bar(left, accuracy, width, label="accuracy", **bars)
    above.plot([bin.confidence for bin in full], accuracy, "ko", markersize=3, label="mean of a bin")
    above.plot([0, 1], [0, 1], "k--", linewidth=1, label="calibrated")
    title = f"Expected calibration error {100 * calibration_error(bins):.2f} %"
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", title=title)
    figure.legend(loc="outside lower center", ncols=3)
    images = sum(bin.images for bin in full)
    below.bar(left, [bin.images / images for bin in full], width, **bars)
    below.set(ylim=(0, 1), xlabel="confidence", ylabel="share of images")
    write_figure(path, figure)
