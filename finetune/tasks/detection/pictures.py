"""Pictures of detections: boxes with names and per cent, and examples next to the truth."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as rle
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from configs.style import LETTERS, font
from data.boxes import colour_of
from data.decode import decode
from data.folder import names_of
from data.shards import Split
from data.sheets import Cell, Group, Sheet, write_sheet
from data.transforms import to_rgb
from finetune.tasks.detection.scores import SURE, Predictions

Object = tuple[str, float | None, Sequence[float], bytes]  # class, score, box [x, y, width, height], RLE
CELL = 480  # pixels: width of an example
PER_GROUP = 3  # examples
MIN_LETTERS = 11
TINT = 0.35  # opacity of masks


def draw_objects(picture: Image.Image, objects: Sequence[Object], letters: int = 0) -> Image.Image:
    """A copy of a picture with boxes, outlines, names and per cent; `letters` is the height of the text in pixels."""
    picture = painted(picture, objects)
    letters = letters or max(MIN_LETTERS, round(min(picture.size) / 40))
    draw, face = ImageDraw.Draw(picture), font(letters)
    line = max(1, letters // 7)
    for name, _, (x, y, w, h), _ in objects:
        draw.rectangle((x, y, x + w, y + h), outline=colour_of(name), width=line)
    taken: list[tuple[float, float, float, float]] = []
    for name, score, (x, y, _, h), _ in sorted(objects, key=lambda entry: -(entry[1] or 0)):
        text = name if score is None else f"{name} {100 * score:.0f} %"
        width, height = face.getlength(text) + 4, letters + 4
        left = min(max(0, x), max(0, picture.width - width))
        places = [(left, y - height), (left, y + line), (left, y + h - height), (left, y + h)]
        places = [(a, b, a + width, b + height) for a, b in places if 0 <= b <= picture.height - height]
        place = next((box for box in places if not any(_overlap(box, other) for other in taken)), None)
        if place is None:
            continue  # in a crowd the colour says the class
        taken.append(place)
        draw.rectangle(place, fill=colour_of(name))
        draw.text((place[0] + 2, place[1] + 1), text, "white", face)
    return picture


def painted(picture: Image.Image, objects: Sequence[Object]) -> Image.Image:
    """A copy of a picture, tinted where objects have masks."""
    picture = picture.convert("RGB")
    for name, _, _, packed in objects:
        if packed:
            shape = Image.fromarray(rle.decode({"size": picture.size[::-1], "counts": packed}) * round(255 * TINT))
            picture.paste(Image.new("RGB", picture.size, colour_of(name)), mask=shape)
    return picture


def _overlap(one: tuple, other: tuple) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def to_picture(image: Tensor) -> Image.Image:
    """A decoded image [C, H, W] for display."""
    return F.to_pil_image(to_rgb(image))


def examples(path: Path, predictions: Predictions, split: Split, names: Sequence[str]) -> None:
    """Write a PNG: the worst and best images by F1 at score 0.5, and the most confident mistakes, next to the truth."""
    every = predictions.quality()
    rows = [row for row in every if row["right"] or row["wrong"] or row["missed"]] or every  # something is to be seen
    for row in rows:
        row["f1"] = 2 * row["right"] / max(1, 2 * row["right"] + row["wrong"] + row["missed"])
    by_quality = sorted(rows, key=lambda row: (row["f1"], -row["wrong"] - row["missed"], row["sample"]))
    by_mistake = sorted((row for row in rows if row["mistake"]), key=lambda row: -row["mistake"])
    groups = {"most confident mistakes": by_mistake, "worst": by_quality, "best": by_quality[::-1]}
    pairs, seen = [], set()
    for title, ordered in groups.items():
        for row in [row for row in ordered if row["sample"] not in seen][:PER_GROUP]:
            seen.add(row["sample"])
            (name,) = names_of(split, [row["sample"]])
            text = f"{title}: {row['right']} found, {row['missed']} missed, {row['wrong']} wrong; {name}"
            captions = "truth", f"detections from {SURE:.0%}"
            cells = zip(_pair(predictions, split, names, row["sample"]), captions, strict=True)
            pairs.append(Group(text, [Cell(picture, (caption,)) for picture, caption in cells], together=True))
    write_sheet(path, Sheet(pairs, f"examples of {len(every):,} images"))


def _pair(predictions: Predictions, split: Split, names: Sequence[str], sample: int) -> list[Image.Image]:
    picture = to_picture(decode(split.read(sample)[0]))
    zoom = CELL / picture.width
    size = CELL, max(1, round(picture.height * zoom))
    pair = []
    for table in ("true", "found"):
        chosen = getattr(predictions, f"{table}_sample") == sample
        if table == "found":
            chosen &= predictions.found_score >= SURE
        scores = predictions.found_score[chosen].tolist() if table == "found" else [None] * int(chosen.sum())
        columns = [getattr(predictions, f"{table}_{part}")[chosen].tolist() for part in ("label", "box", "mask")]
        objects = [(names[i], s, box, packed) for i, box, packed, s in zip(*columns, scores, strict=True)]
        small = painted(picture, objects).resize(size)
        objects = [(name, score, np.multiply(box, zoom).tolist(), b"") for name, score, box, _ in objects]
        pair.append(draw_objects(small, objects, LETTERS))
    return pair
