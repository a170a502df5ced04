"""Sheets: pictures with lines of text, in groups, as one PNG. The PNG also says what is where, for report.html."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, PngImagePlugin

from configs.errors import printable
from configs.files import atomic_file
from configs.style import GAP, INK, LETTERS, PAPER, font

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

COLUMNS = 6  # pictures in a row
LINE = LETTERS + 5  # pixels
KEY = "sheet"  # of the text in the PNG
MAX_TEXT = 1 << 20  # characters that are read of it, PIL's own limit


@dataclass(frozen=True)
class Cell:
    """A picture, and lines of text below it."""

    picture: Image.Image
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """Pictures below a title; `together`: in one row, like an image beside its prediction."""

    title: str
    cells: Sequence[Cell]
    together: bool = False


@dataclass(frozen=True)
class Sheet:
    """Groups in `across` columns, a note below them, and a legend: (colour as #rrggbb, name)."""

    groups: Sequence[Group]
    note: str = ""
    legend: Sequence[tuple[str, str]] = field(default=())
    across: int = 1


def draw_sheet(sheet: Sheet) -> tuple[Image.Image, str]:
    """The picture of a sheet, and its text for `write_sheet`."""
    drawn = [_draw_group(group) for group in sheet.groups if group.cells]
    rows = [drawn[i : i + sheet.across] for i in range(0, len(drawn), sheet.across)]
    step = max((picture.width for picture, _ in drawn), default=0) + 2 * GAP
    width = step * min(sheet.across, max(1, len(drawn)))
    feet = [part for part in (draw_legend(sheet.legend, width), _draw_note(sheet.note, width)) if part]
    heights = [max(picture.height for picture, _ in row) + GAP for row in rows]
    total = sum(heights) + sum(foot.height for foot in feet) + GAP
    canvas, top, groups = Image.new("RGB", (max(width, 2 * GAP), total), PAPER), GAP, []
    for row, height in zip(rows, heights, strict=True):
        for i, (picture, about) in enumerate(row):
            canvas.paste(picture, (i * step + GAP, top))
            for cell in about["cells"]:
                cell["box"] = [side + (top if k % 2 else i * step + GAP) for k, side in enumerate(cell["box"])]
            groups.append(about)
        top += height
    for foot in feet:
        canvas.paste(foot, (0, top))
        top += foot.height
    return canvas, json.dumps({"groups": groups, "note": sheet.note, "legend": [list(x) for x in sheet.legend]})


def _draw_group(group: Group) -> tuple[Image.Image, dict]:
    """The picture of a group, and where its cells are."""
    columns = len(group.cells) if group.together else min(COLUMNS, len(group.cells))
    width = max(cell.picture.width for cell in group.cells)
    height = max(cell.picture.height for cell in group.cells)
    lines = max(len(cell.lines) for cell in group.cells)
    head, step = LINE * bool(group.title), height + lines * LINE + GAP
    size = columns * (width + GAP) - GAP, head + -(-len(group.cells) // columns) * step
    canvas, cells, letters = Image.new("RGB", size, PAPER), [], font()
    draw = ImageDraw.Draw(canvas)
    draw.text((0, 0), fit_text(printable(group.title), letters, size[0], keep_start=True), INK, letters)
    for i, cell in enumerate(group.cells):
        left, top = i % columns * (width + GAP), head + i // columns * step
        x, y = left + (width - cell.picture.width) // 2, top + (height - cell.picture.height) // 2
        canvas.paste(cell.picture, (x, y))
        for number, line in enumerate(map(printable, cell.lines)):
            draw.text((left, top + height + 1 + number * LINE), fit_text(line, letters, width), INK, letters)
        box = [x, y, x + cell.picture.width, y + cell.picture.height]
        cells.append({"box": box, "lines": list(map(printable, cell.lines))})
    return canvas, {"title": printable(group.title), "together": group.together, "cells": cells}


def draw_legend(entries: Sequence[tuple[str, str]], width: int) -> Image.Image | None:
    """Colours and names in lines of `width` pixels; None without entries."""
    letters, places, x, y = font(), [], GAP, GAP
    for colour, name in entries:
        wide = LETTERS + 6 + int(letters.getlength(printable(name))) + 2 * GAP
        if x + wide > width and x > GAP:
            x, y = GAP, y + LINE + 2
        places.append((colour, printable(name), x, y))
        x += wide
    if not places:
        return None
    canvas = Image.new("RGB", (width, y + LINE + GAP), PAPER)
    draw = ImageDraw.Draw(canvas)
    for colour, name, x, y in places:
        draw.rectangle((x, y, x + LETTERS, y + LETTERS), colour)
        draw.text((x + LETTERS + 6, y - 1), name, INK, letters)
    return canvas


def _draw_note(note: str, width: int) -> Image.Image | None:
    if not note:
        return None
    canvas = Image.new("RGB", (width, LINE + GAP), PAPER)
    ImageDraw.Draw(canvas).text((GAP, GAP // 2), fit_text(note, font(), width - GAP, keep_start=True), INK, font())
    return canvas


def fit_text(line: str, letters: "FreeTypeFont", width: int, keep_start: bool = False) -> str:
    """The end of a line that is wider than `width` pixels, because names differ there; or its start."""
    if letters.getlength(line) <= width:
        return line
    parts = (f"{line[:-i]}…" if keep_start else f"…{line[i:]}" for i in range(1, len(line) + 1))
    return next((part for part in parts if letters.getlength(part) <= width), "")


def write_sheet(path: Path, sheet: Sheet) -> None:
    """Write a sheet as a PNG; nothing without pictures."""
    if any(group.cells for group in sheet.groups):
        write_drawn(path, *draw_sheet(sheet))


def write_drawn(path: Path, picture: Image.Image, text: str = "") -> None:
    """Write a picture as a PNG with the text of `draw_sheet`, if it has one."""
    about = PngImagePlugin.PngInfo()
    if text and len(text) < MAX_TEXT:
        about.add_text(KEY, text, zip=True)
    with atomic_file(path) as file:
        picture.save(file, "png", pnginfo=about)


def read_sheet(path: Path) -> Sheet | None:
    """The sheet that a PNG was written from; None if it is another picture."""
    with Image.open(path) as picture:
        try:
            about = json.loads(picture.info[KEY])
            groups = [
                Group(
                    str(group["title"]),
                    [Cell(picture.crop(_box(cell["box"], picture.size)), tuple(map(str, cell["lines"])))
                     for cell in group["cells"]],
                    bool(group["together"]),
                )
                for group in about["groups"]
            ]  # fmt: skip
            return Sheet(groups, str(about["note"]), [(str(colour), str(name)) for colour, name in about["legend"]])
        except (KeyError, TypeError, ValueError):  # drawn by something else
            return None


def _box(box: Sequence[int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box within a picture. Raises `ValueError` for another."""
    left, top, right, bottom = map(int, box)
    if not (0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]):
        raise ValueError
    return left, top, right, bottom
