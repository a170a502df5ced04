"""Labels and other targets from the cells of a table."""

import math
import re
from collections.abc import Callable
from typing import Any

from configs.errors import UserError, counted, printable
from data.tables import TARGETS, Columns, Row

MISSING = {"na", "n/a", "nan", "null", "none", "-1", "?"}  # labels that may mean that there is none
LABELS_TASK, NUMBERS_TASK = "for --task.name labels", "for --task.name numbers"


def cell_reader(
    columns: Columns, rows: list[Row], name: str, notes: list[str]
) -> Callable[[Row], tuple[str | None, dict[str, Any]]]:
    """A function from a row to its label, None if it has none, and to its other targets."""
    values = [[row.get(column) for column in columns.labels] or [None] for row in rows]
    kept = [column for column in TARGETS if column not in columns.labels and any(column in row for row in rows)]
    if kept and not columns.labels:
        notes.append(f"{printable(name)}: {', '.join(kept)} of each image, no class")
    numeric = all(number_in(v) is not None for row in values for v in row if not empty(v))
    whole = numeric and all(number_in(v).is_integer() for row in values for v in row if not empty(v))
    several, what = len(columns.labels) > 1, ""
    if not numeric:
        _check_numbers(columns.labels, rows, name, several)
    flags = several and whole and {number_in(v) for row in values for v in row if not empty(v)} <= {0, 1}
    if not several and any(isinstance(row[0], (list, tuple)) or "|" in str(row[0]) for row in values):
        kind, what = _several_labels, f"has several labels per image, {LABELS_TASK}"
    elif flags and all(sum(not empty(v) and number_in(v) == 1 for v in row) == 1 for row in values):
        kind = _one_hot
        notes.append(f"{printable(name)}: one of the label columns is 1 in each row: its name is the class")
    elif flags:
        kind, what = _flags, f"columns are 0 or 1, so each column with 1 is a label, {LABELS_TASK}"
    elif numeric and (several or not whole):
        kind, what = _numbers, f"has numbers, {NUMBERS_TASK}"
    elif several:
        kind, what = _several_columns, f"has several labels per image, {LABELS_TASK}"
    else:
        kind = _whole if whole else _single
        notes += _doubts({as_label(row[0]) for row in values if not empty(row[0])}, name)
    if what:
        notes.append(f"{printable(name)}: {', '.join(map(printable, columns.labels))}: {what}")

    def read(row: Row) -> tuple[str | None, dict[str, Any]]:
        label, targets = kind([row.get(column) for column in columns.labels] or [None], columns)
        return label, {column: row[column] for column in kept if not empty(row.get(column))} | targets

    return read


def _check_numbers(columns: tuple[str, ...], rows: list[Row], name: str, several: bool) -> None:
    """Raise `UserError` for a cell among numbers that is none; whole numbers of one column may be names of classes."""
    for column in columns:
        cells = [row.get(column) for row in rows if not empty(row.get(column))]
        numbers = [number for cell in cells if (number := number_in(cell)) is not None]
        odd = [cell for cell in cells if number_in(cell) is None]
        if odd and len(numbers) > len(odd) and (several or not all(number.is_integer() for number in numbers)):
            where = f"{printable(name)}, column {printable(column)}"
            way_out = "correct the cell, or leave it empty"
            raise UserError(f"{where}: {printable(str(odd[0])[:80])} is no number, but most cells are: {way_out}")
        if odd and len(odd) == len(cells) and all(re.fullmatch(r"-?\d+,\d+", str(cell).strip()) for cell in cells):
            way_out = "write 1.5 for numbers, a|b for several labels"
            raise UserError(f"{printable(name)}, column {printable(column)} has cells like {cells[0]}: {way_out}")


def _single(values: list, columns: Columns) -> tuple[str | None, dict]:
    return (None if empty(values[0]) else as_label(values[0])), {}


def _whole(values: list, columns: Columns) -> tuple[str | None, dict]:
    """A whole number: `3` from `3.0`, while `007` stays."""
    text = str(values[0]).strip()
    return _single([text.partition(".")[0] if re.fullmatch(r"-?\d+\.0*", text) else values[0]], columns)


def _one_hot(values: list, columns: Columns) -> tuple[str | None, dict]:
    return _flags(values, columns)[1]["labels"][0], {}


def _several_labels(values: list, columns: Columns) -> tuple[str | None, dict]:
    value = values[0]
    if empty(value):
        return None, {}
    parts = value if isinstance(value, (list, tuple)) else str(value).split("|")
    return None, {"labels": [as_label(part) for part in parts if not empty(part)]}


def _several_columns(values: list, columns: Columns) -> tuple[str | None, dict]:
    if all(map(empty, values)):
        return None, {}
    return None, {"labels": [as_label(value) for value in values if not empty(value)]}


def _flags(values: list, columns: Columns) -> tuple[str | None, dict]:
    if all(map(empty, values)):
        return None, {}
    flagged = [column for column, v in zip(columns.labels, values, strict=True) if not empty(v) and number_in(v) == 1]
    return None, {"labels": [printable(column) for column in flagged]}


def _numbers(values: list, columns: Columns) -> tuple[str | None, dict]:
    numbers = [None if empty(value) else number_in(value) for value in values]
    known = any(number is not None for number in numbers)
    return None, {"numbers": dict(zip(columns.labels, numbers, strict=True))} if known else {}


def _doubts(labels: set[str], name: str) -> list[str]:
    """Warnings about labels that may be none, or several in one cell."""
    lines = []
    if missing := sorted(label for label in labels if label.lower() in MISSING):
        lines.append(f"label {', '.join(missing)} is a class; where it means none, leave the cell empty")
    if several := sorted(label for label in labels if _looks_like_several(label, labels)):
        number = f"{counted(len(several), 'label')} such as `{several[0][:80]}`"
        lines.append(f"{number} may be several in one cell, but each is a class: separate several labels with |")
    return [f"warning: {printable(name)}: {line}" for line in lines]


def _looks_like_several(label: str, labels: set[str]) -> bool:
    """Whether a label is a list, or its parts are labels too."""
    parts, words = [part.strip() for part in re.split("[,;]", label)], label.split()
    combined = len(words) > 1 and (labels.issuperset(words) or all(word.isdecimal() for word in words))
    return label[:1] in ("[", "{", "(") or combined or (len(parts) > 1 and not labels.isdisjoint(parts))


def empty(value: Any) -> bool:
    """Whether a cell has no value."""
    missing = isinstance(value, float) and math.isnan(value)
    return value is None or missing or (isinstance(value, str) and not value.strip())


def number_in(value: Any) -> float | None:
    """A finite number, None if the value is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


def as_label(value: Any) -> str:
    """A class name from a cell: `3` from 3.0, and text that can be printed."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return printable(str(value).strip())
