"""Pictures of a run for its page: figures, sheets of images in their parts, and others."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from configs.style import FIGURE
from data.sheets import Group, read_sheet

PICTURES = {  # titles by file name; other pictures are shown under their names
    "confusion.png": "Confusion matrix of the best weights",
    "calibration.png": "Calibration of the best weights",
    "scatter.png": "Predictions of the best weights over true values",
    "examples.png": "Examples of the evaluation split, with the predictions of the best weights",
    "reconstruction.png": "Images of the last batch and the model's output",
}
SCREEN_DPI = 96  # pixels of an inch in CSS


@dataclass(frozen=True)
class Picture:
    """A picture of the page: `url` of one image and its `width` in CSS pixels, or the groups of a sheet."""

    title: str
    url: str = ""
    width: int = 0
    figure: bool = False  # drawn on white, to be inverted on a dark page
    groups: list[dict] = field(default_factory=list)
    note: str = ""
    legend: Sequence[tuple[str, str]] = ()


def read_pictures(run: Path, shards: Path) -> list[Picture]:
    """The PNGs of a run, and the preview of its shards."""
    files = [*PICTURES, *sorted(path.name for path in run.glob("*.png") if path.name not in PICTURES)]
    found = [read_picture(run / file, PICTURES.get(file, file)) for file in files if (run / file).exists()]
    if (shards / "preview.png").exists():
        found.append(read_picture(shards / "preview.png", "Some of the images"))
    return found


def read_picture(path: Path, title: str) -> Picture:
    """A PNG: a figure, the parts of a sheet, or another picture."""
    if sheet := read_sheet(path):
        groups = [_group(group) for group in sheet.groups]
        return Picture(title, groups=groups, note=sheet.note, legend=sheet.legend)
    with Image.open(path) as image:
        figure = image.info.get("Description") == FIGURE
        scale = SCREEN_DPI / image.info["dpi"][0] if figure else 1
        return Picture(title, _url(path.read_bytes()), round(image.width * scale), figure)


def _group(group: Group) -> dict:
    cells = []
    for cell in group.cells:
        out = io.BytesIO()
        cell.picture.save(out, "png")
        cells.append({"url": _url(out.getvalue()), "width": max(cell.picture.size), "lines": cell.lines})
    return {"title": group.title, "together": group.together, "cells": cells}


def _url(png: bytes) -> str:
    """A PNG as a URL that contains it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
