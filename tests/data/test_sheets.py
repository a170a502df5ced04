"""Sheets: what is drawn, and what report.html reads back."""

import json

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from configs.style import GAP, font
from data.sheets import COLUMNS, KEY, LINE, Cell, Group, Sheet, draw_sheet, fit_text, read_sheet, write_sheet


def plain(colour: tuple, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, colour)


SHEET = Sheet(
    [
        Group("first <b>", [Cell(plain((9, 0, 0)), ("is a", "predicted \x1b[31mb")), Cell(plain((0, 9, 0), (20, 50)))]),
        Group("none", []),
        Group("", [Cell(plain((0, 0, 200)), ("input",)) for _ in range(8)], together=True),
    ],
    "a note", [("#102030", "cat"), ("#405060", "a very long name " * 9)], across=2,
)  # fmt: skip


def test_a_sheet_is_read_as_it_was_written(tmp_path):
    write_sheet(tmp_path / "x.png", SHEET)
    found = read_sheet(tmp_path / "x.png")
    assert [group.title for group in found.groups] == ["first <b>", ""] and found.note == "a note"
    assert [tuple(entry) for entry in found.legend] == SHEET.legend
    assert [group.together for group in found.groups] == [False, True]
    for group, original in zip(found.groups, (SHEET.groups[0], SHEET.groups[2]), strict=True):
        for cell, first in zip(group.cells, original.cells, strict=True):
            assert np.array_equal(np.asarray(cell.picture), np.asarray(first.picture))
    assert found.groups[0].cells[0].lines == ("is a", "predicted \\x1b[31mb")  # nothing for a terminal


def test_pictures_wrap_unless_they_belong_together():
    cells = [Cell(plain((9, 9, 9)), ("x",))] * (COLUMNS + 1)
    wrapped, one = (draw_sheet(Sheet([Group("", cells, together)]))[0] for together in (False, True))
    step = 30 + LINE + GAP
    assert wrapped.height - one.height == step and one.width - wrapped.width == 40 + GAP


def test_nothing_is_written_without_pictures(tmp_path):
    write_sheet(tmp_path / "x.png", Sheet([Group("none", [])]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [None, "no json", "[]", '{"groups": 5}', {"box": [0, 0, 99, 9]}, {"box": [5, 5, 5, 9]}, {"box": ["x", 0, 1, 1]},
     {"lines": 5}],
)  # fmt: skip
def test_other_pictures_are_no_sheets(text, tmp_path):
    about = PngImagePlugin.PngInfo()
    if isinstance(text, dict):
        cell = {"box": [0, 0, 9, 9], "lines": []} | text
        text = json.dumps({"groups": [{"title": "", "together": False, "cells": [cell]}], "note": "", "legend": []})
    if text:
        about.add_text(KEY, text)
    plain((0, 0, 0)).save(tmp_path / "x.png", pnginfo=about)
    assert read_sheet(tmp_path / "x.png") is None


def test_long_lines_are_cut():
    letters = font()
    assert fit_text("folder/name.png", letters, 60).startswith("…") and fit_text("short", letters, 60) == "short"
    assert fit_text("a long title of a group", letters, 60, keep_start=True).startswith("a")
    assert letters.getlength(fit_text("W" * 500, letters, 60)) <= 60
