"""Pictures of segmentation: examples beside their masks, overlays with a legend, confusion matrix."""

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from configs.style import PAPER
from data.masks import class_colours, decode_mask, overlay
from data.sheets import Cell, Group, Sheet, draw_legend, write_sheet
from data.transforms import to_rgb
from finetune.tasks.classification.pictures import CONFUSED_CLASSES, MAX_CLASSES, matrix_picture
from finetune.tasks.segmentation.scores import Example, Predictions

MIN_WIDTH = 480  # of an overlay with its legend
MAX_LEGEND = 60  # classes


def draw_confusion(path: Path, predictions: Predictions, names: list[str]) -> None:
    """Write the confusion matrix of pixels; of many classes, those of the most frequent confusions."""
    matrix = predictions.confusion
    shown = np.flatnonzero(matrix.sum(0) + matrix.sum(1))
    if not len(shown):  # no pixel has a class
        return
    title = f"{len(shown)} classes"
    if len(shown) > MAX_CLASSES:
        title = f"the {CONFUSED_CLASSES} most often confused of {len(shown)} classes"
        wrong = matrix - np.diag(np.diag(matrix))
        shown = np.sort(np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")[:CONFUSED_CLASSES])
    count, total = matrix[shown][:, shown], matrix.sum(1)[shown]
    title = f"{len(predictions.sample):,} images, {int(matrix.sum()):,} pixels\n{title}"
    matrix_picture(path, count, total, [names[i] for i in shown], title, "%")


def draw_examples(path: Path, examples: list[Example], names: list[str], files: list[str]) -> None:
    """Write the worst and the best images in rows: image, mask, prediction; `files` are the examples' names."""
    groups, classes, best = [], set(), len(examples) // 2
    for i, (example, name) in enumerate(zip(examples, files, strict=True)):
        which = "worst" if i < len(examples) - best else "best"
        masks = (("mask", example.truth), ("prediction", example.guess))
        cells = [Cell(Image.fromarray(example.image), ("image",))]
        cells += [Cell(Image.fromarray(overlay(example.image, mask, len(names))), (text,)) for text, mask in masks]
        groups.append(Group(f"{which}: mIoU {100 * example.score:.1f} %, {name}", cells, together=True))
        classes |= {*np.unique(example.truth).tolist(), *np.unique(example.guess).tolist()}
    note = "grey in a mask: no class" if any(i >= len(names) for i in classes) else ""
    colours = _colours(len(names))
    shown = [(colours[i], names[i]) for i in sorted(classes) if i < len(names)]
    write_sheet(path, Sheet(groups, note, shown[:MAX_LEGEND]))


def draw_overlay(image: Tensor, mask: bytes, names: list[str]) -> Image.Image:
    """An image [C, H, W] in the colours of its predicted mask, with a legend below."""
    pixels, classes = to_rgb(image).permute(1, 2, 0).numpy(), decode_mask(mask)
    picture = Image.fromarray(overlay(pixels, classes, len(names)))
    zoom = -(-MIN_WIDTH // picture.width) if picture.width < MIN_WIDTH else 1
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    order = np.argsort(-np.bincount(classes.ravel(), minlength=len(names))[: len(names)], kind="stable")
    colours = _colours(len(names))
    present = [(colours[i], names[i]) for i in order.tolist() if (classes == i).any()][:MAX_LEGEND]
    legend = draw_legend(present, picture.width)
    sheet = Image.new("RGB", (picture.width, picture.height + (legend.height if legend else 0)), PAPER)
    sheet.paste(picture, (0, 0))
    if legend:
        sheet.paste(legend, (0, picture.height))
    return sheet


def _colours(classes: int) -> list[str]:
    """Colours of the classes as #rrggbb."""
    return [f"#{bytes(colour).hex()}" for colour in class_colours(classes)]
