"""Pictures of segmentation: examples beside their masks, overlays with a legend, confusion matrix."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from configs.files import atomic_file
from data.masks import class_colours, decode_mask, overlay
from data.transforms import to_rgb
from finetune.tasks.classification.pictures import CONFUSED_CLASSES, MAX_CLASSES, matrix_picture
from finetune.tasks.pictures import FONT
from finetune.tasks.segmentation.scores import Example, Predictions

GAP, LETTERS = 8, 13  # pixels
MIN_WIDTH = 480  # of an overlay with its legend
MAX_LEGEND = 60  # classes


def draw_confusion(path: Path, predictions: Predictions, names: list[str]) -> None:
    """Write the confusion matrix of pixels; of many classes, those of the most frequent confusions."""
    matrix = predictions.confusion
    shown = np.flatnonzero(matrix.sum(0) + matrix.sum(1))
    title = f"{len(shown)} classes"
    if len(shown) > MAX_CLASSES:
        title = f"the {CONFUSED_CLASSES} most often confused of {len(shown)} classes"
        wrong = matrix - np.diag(np.diag(matrix))
        shown = np.sort(np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")[:CONFUSED_CLASSES])
    share = matrix[shown][:, shown] / np.maximum(matrix.sum(1)[shown], 1)[:, None]
    matrix_picture(path, share, [names[i] for i in shown], f"% of each class's pixels; {title}")


def draw_examples(path: Path, examples: list[Example], names: list[str], files: list[str] | None = None) -> None:
    """Write the worst and the best images in rows: image, mask, prediction; `files` are names of the samples."""
    if not examples:
        return
    font = ImageFont.truetype(str(FONT), LETTERS)
    width = max(example.image.shape[1] for example in examples)
    rows, classes = [], set()
    for example in examples:
        row = Image.new("RGB", (3 * (width + GAP) + GAP, example.image.shape[0] + LETTERS + 3 * GAP), "white")
        name = files[example.sample] if files else f"sample {example.sample}"
        line = f"{name}   mIoU {100 * example.score:.1f} %"
        ImageDraw.Draw(row).text((GAP, GAP), line, "black", font)
        shown = [overlay(example.image, mask, len(names)) for mask in (example.truth, example.guess)]
        for column, pixels in enumerate([example.image, *shown]):
            row.paste(Image.fromarray(pixels), (GAP + column * (width + GAP), LETTERS + 2 * GAP))
        rows.append(row)
        classes |= {*np.unique(example.truth).tolist(), *np.unique(example.guess).tolist()}
    head = Image.new("RGB", (rows[0].width, LETTERS + 2 * GAP), "white")
    titles = "image", "mask (grey: no class)", f"prediction; worst first, {len(examples)} images"
    for column, title in enumerate(titles):
        ImageDraw.Draw(head).text((GAP + column * (width + GAP), GAP), title, "black", font)
    with atomic_file(path) as file:
        stack([head, *rows, legend(sorted(classes), names, rows[0].width)]).save(file, "png")


def draw_overlay(image: Tensor, mask: bytes, names: list[str]) -> Image.Image:
    """An image [C, H, W] in the colours of its predicted mask, with a legend below."""
    pixels, classes = to_rgb(image).permute(1, 2, 0).numpy(), decode_mask(mask)
    picture = Image.fromarray(overlay(pixels, classes, len(names)))
    zoom = -(-MIN_WIDTH // picture.width) if picture.width < MIN_WIDTH else 1
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    order = np.argsort(-np.bincount(classes.ravel(), minlength=len(names)), kind="stable")
    present = [i for i in order.tolist() if (classes == i).any()]
    return stack([picture, legend(present, names, picture.width)])


def legend(classes: list[int], names: list[str], width: int) -> Image.Image:
    """Colours and names of classes, in lines of `width` pixels."""
    font, side = ImageFont.truetype(str(FONT), LETTERS), LETTERS + 2
    colours, places, x, y = class_colours(len(names)), [], GAP, GAP
    for i in [i for i in classes if i < len(names)][:MAX_LEGEND]:
        wide = side + 5 + int(font.getlength(names[i])) + 2 * GAP
        if x + wide > width and x > GAP:
            x, y = GAP, y + side + GAP
        places.append((i, x, y))
        x += wide
    sheet = Image.new("RGB", (width, y + side + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, x, y in places:
        draw.rectangle((x, y, x + side, y + side), tuple(colours[i].tolist()))
        draw.text((x + side + 5, y), names[i], "black", font)
    return sheet


def stack(pictures: list[Image.Image]) -> Image.Image:
    """Pictures below each other."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet
