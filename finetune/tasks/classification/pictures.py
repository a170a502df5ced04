"""Confusion matrix, reliability diagram, and annotated pictures."""

import math
import warnings
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from sklearn.metrics import confusion_matrix
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from configs.files import atomic_file
from data.transforms import to_rgb
from finetune.tasks.classification.scores import Bin, Predictions, calibration_error

MAX_CLASSES, CONFUSED_CLASSES = 100, 30  # in a confusion matrix; with more classes the most confused are shown
MAX_CLASSES_WITH_NUMBERS = 30  # in the cells
MAX_NAME = 30  # characters of a class name
MIN_SIDE = 256  # pixels: smaller pictures are enlarged before annotation
MIN_LETTERS, LETTERS = 14, 1 / 24  # height of letters: minimum in pixels, and relative to the width
FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"  # PIL's default has Latin letters only


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
    _write(path, figure)


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
    _write(path, figure)


def _write(path: Path, figure: Figure) -> None:
    with atomic_file(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as a box
        figure.savefig(file, format="png", dpi=120)


def annotate(image: Tensor, lines: list[str]) -> Image.Image:
    """A decoded image [C, H, W], enlarged if small, with lines of text below it, shortened in the middle if long."""
    picture = F.to_pil_image(to_rgb(image))
    zoom = max(1, math.ceil(MIN_SIDE / max(picture.size)))
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    width = max(picture.width, MIN_SIDE)
    height = max(MIN_LETTERS, round(width * LETTERS))
    font, space = ImageFont.truetype(FONT, height), height // 2
    sheet = Image.new("RGB", (width, picture.height + space + len(lines) * (height + space)), "white")
    sheet.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        top = picture.height + space + i * (height + space)
        draw.text((space, top), _shorten(" ".join(line.split()), font, width - 2 * space), "black", font)
    return sheet


def _shorten(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Remove letters from the middle of a line until it is at most `width` pixels wide."""
    cut = line
    while font.getlength(cut) > width and len(cut) > 2:
        keep = len(cut) // 2 - 1
        cut = f"{cut[:keep]}…{cut[len(cut) - keep :]}"
    return cut
