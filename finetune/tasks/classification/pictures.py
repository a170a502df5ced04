"""Confusion matrix, reliability diagram, examples."""

from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import counted, printable
from configs.style import FILL, INK, PAPER, SERIES, SHADES, WIDTH
from finetune.tasks.classification.scores import Bin, Predictions, calibration_error
from finetune.tasks.examples import ROW, Example, spread, write_examples
from finetune.tasks.pictures import figure_file

MAX_CLASSES, CONFUSED_CLASSES = 100, 20  # in a confusion matrix; with more classes the most confused are shown
MAX_CLASSES_WITH_NUMBERS = 30  # in the cells
MAX_NAME = 24  # characters of a class name
MARGIN, CELL, PLAIN_CELL = 1.3, 0.36, 0.2  # inches: for names; side of a cell with and without a number


FILES = "confusion.png, calibration.png, examples.png"


def write_pictures(folder: Path, predictions: Predictions, names: list[str], images: Any) -> None:
    """Write the pictures `FILES`; `images` is the split of the predictions."""
    confusion_picture(folder / "confusion.png", predictions, names)
    calibration_picture(folder / "calibration.png", predictions.calibration())
    wrong, count = predictions.best[:, 0] != predictions.label, len(predictions.label)
    sure = np.argsort(-predictions.confidence, kind="stable")
    mistakes = sure[wrong[sure]]
    others, right = np.sort(mistakes[ROW:]), np.flatnonzero(~wrong)
    groups = {
        f"Most confident mistakes of {len(mistakes):,}": mistakes[:ROW],
        f"Wrong: {len(mistakes):,} of {counted(count, 'image')}, some of the others": spread(others),
        f"Right: {len(right):,} of {counted(count, 'image')}, some of them": spread(right),
    }
    lines = {title: [_example(predictions, i, names) for i in chosen] for title, chosen in groups.items()}
    write_examples(folder / "examples.png", images, lines)


def _example(predictions: Predictions, i: int, names: list[str]) -> Example:
    share = 100 * float(predictions.confidence[i])
    found = f"{names[predictions.best[i, 0]]} {f'{share:.0f}' if share >= 1 else f'{share:.1g}'} %"
    return int(predictions.sample[i]), f"is {names[predictions.label[i]]}", f"predicted {found}"


def confusion_picture(path: Path, predictions: Predictions, names: list[str]) -> None:
    """Write a confusion matrix of images; of many classes, those of the most frequent confusions."""
    label, first = predictions.label, predictions.best[:, 0]
    shown = np.union1d(label, first)
    title = f"{counted(len(label), 'image')} of {counted(len(shown), 'class', 'classes')}"
    if len(shown) > MAX_CLASSES:
        title = f"{counted(len(label), 'image')}\nthe {CONFUSED_CLASSES} most often confused of {len(shown):,} classes"
        by_confusion = list(dict.fromkeys([*predictions.confusions()[0].flat, *shown]))
        shown = np.sort(by_confusion[:CONFUSED_CLASSES])
    images = np.bincount(label, minlength=len(names))[shown]
    matrix_picture(path, _matrix(label, first, shown), images, [names[i] for i in shown], title)


def _matrix(label: np.ndarray, first: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Counts [K, K] of images by class and prediction, both of the K classes `shown`, in ascending order."""
    row, column = np.searchsorted(shown, label), np.searchsorted(shown, first)
    last, count = len(shown) - 1, len(shown)
    inside = (shown[np.minimum(row, last)] == label) & (shown[np.minimum(column, last)] == first)
    return np.bincount(row[inside] * count + column[inside], minlength=count**2).reshape(count, count)


def matrix_picture(
    path: Path, count: np.ndarray, total: np.ndarray, names: list[str], title: str, unit: str = ""
) -> None:
    """Write a confusion matrix: how many of each class, a row of `count` [K, K], are predicted as each class.

    Colours are shares of `total` [K], which may include classes that are not shown. Cells of few classes have numbers:
    the counts, or with the `unit` % the shares.
    """
    share, ticks = count / np.maximum(total, 1)[:, None], [_short(name) for name in names]
    longest = max(map(len, ticks))
    numbers = len(names) <= MAX_CLASSES_WITH_NUMBERS
    side = max(WIDTH, MARGIN + 0.06 * longest + (CELL if numbers else PLAIN_CELL) * len(names))
    with figure_file(path, side, side + 0.3) as figure:
        axes = figure.subplots()
        axes.imshow(share, cmap=SHADES, vmin=0, vmax=1)
        turned = longest > 2 and len(names) * longest > 24
        axes.set_xticks(range(len(names)), ticks, rotation=90 if turned else 0, parse_math=False)
        axes.set_yticks(range(len(names)), ticks, parse_math=False)
        axes.set(xlabel="predicted", ylabel="class")
        axes.set_title(f"{title}\ncolour: share of the row" + (f", number: {unit}" if unit else ""), loc="left")
        axes.spines[:].set_visible(True)
        size = 9.5 if len(names) <= 12 else 8
        for row, column in np.argwhere(share >= 0.005 if unit else count > 0) if numbers else ():
            text = f"{100 * share[row, column]:.0f}" if unit else _number(count[row, column])
            colour = PAPER if share[row, column] > 0.5 else INK
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"


def _number(count: int) -> str:
    """A count in at most four characters."""
    return str(count) if count < 10_000 else f"{count / 1000:.0f}k" if count < 1_000_000 else f"{count / 1e6:.0f}M"


def calibration_picture(path: Path, bins: list[Bin]) -> None:
    """Write a reliability diagram (1706.04599, figure 1): accuracy by confidence, and the images of each bin."""
    full = [bin for bin in bins if bin.images]
    left, width = [bin.low for bin in full], bins[0].high - bins[0].low
    count = [bin.images for bin in full]
    with figure_file(path, WIDTH, WIDTH + 0.3) as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.2))
        bars, accuracy = {"align": "edge", "color": FILL, "edgecolor": PAPER}, [bin.accuracy for bin in full]
        above.bar(left, accuracy, width, label="accuracy", **bars)
        means = [bin.confidence for bin in full]
        above.plot(means, accuracy, "o", markersize=4, color=SERIES[0], label="mean of a bin", clip_on=False)
        above.plot([0, 1], [0, 1], "--", linewidth=1, color=INK, label="calibrated")
        above.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
        title = f"{counted(sum(count), 'image')}\ncalibration error {100 * calibration_error(bins):.2f} %"
        above.set_title(title, loc="left")
        above.legend(loc="upper left")
        below.bar(left, count, width, **bars)
        for x, images in zip(left, count, strict=True):
            below.annotate(
                _number(images), (x + width / 2, images), (0, 2), textcoords="offset points", ha="center", va="bottom",
                rotation=90, fontsize=8,
            )  # fmt: skip
        below.set(ylim=(0, 1.7 * max(count, default=1)), xlabel="confidence", ylabel="images")
        below.yaxis.get_major_locator().set_params(integer=True, nbins=3)
