"""Lists of images by name: CSV files that finetune/curate.py writes and data/prepare.py reads.

Names are escaped, so that any file name can be written as UTF-8 and printed: control characters as \\u001b, bytes
that are not UTF-8 as \\xe9, a backslash as \\\\. Cells that look like formulas to a spreadsheet get an apostrophe.
"""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from configs.files import write_atomic
from configs.log import say
from data.sources import Item

# backslash, control characters, line separators, characters that change the direction of text, surrogates
SPECIAL = re.compile("[\\\\\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# first characters of cells that get an apostrophe; it is one itself, so that none is ambiguous; tabs are escaped
FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20", "'")
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")
MAX_NAMES = 5  # in a message


@dataclass(frozen=True)
class NameList:
    """The names in a file: those of the images to keep, or to leave out."""

    path: Path
    names: frozenset[str]
    keep: bool


def escape_name(name: str) -> str:
    """A name as printable text; different names stay different."""
    return SPECIAL.sub(lambda match: _escape(match[0]), name)


def _escape(character: str) -> str:
    if character == "\\":
        return "\\\\"
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8, as Python reads file names
        return f"\\x{ord(character) - 0xDC00:02x}"
    return f"\\u{ord(character):04x}"


def csv_cell(value: object) -> object:
    """A value of a CSV file: text that a spreadsheet would take for a formula gets an apostrophe; numbers stay."""
    if not isinstance(value, str):
        return value
    return f"'{value}" if value.startswith(FORMULA) and not NUMBER.fullmatch(value) else value


def csv_rows(rows: Iterable[Sequence[object]]) -> bytes:
    """Rows of a CSV file, whose texts are escaped already."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(map(csv_cell, row) for row in rows)
    return text.getvalue().encode()


def write_list(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str | float]]) -> None:
    """Write a CSV file; its first column is `name`. Names are escaped already."""
    write_atomic(path, csv_rows([columns, *rows]))


def read_names(path: Path) -> frozenset[str]:
    """The column `name` of a CSV file, or else all lines of a text file. Raises `UserError` if it cannot be read."""
    text = path.read_text("utf-8-sig", "surrogateescape")
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    try:
        header = next(csv.reader(lines[:1]), [])
        if "name" not in header:
            return frozenset(filter(None, lines))
        column = header.index("name")
        rows = csv.reader(io.StringIO(text, newline=""))
        next(rows)
        cells = [row[column] for row in rows if len(row) > column]
    except csv.Error as error:
        raise UserError(
            f"{path} is not a CSV file ({error}): give one with a column `name`, or a name a line"
        ) from None
    return frozenset(cell[1:] if cell[:1] == "'" and cell[1:].startswith(FORMULA) else cell for cell in cells if cell)


def read_lists(only: Path | None, without: Iterable[Path]) -> list[NameList]:
    """The lists of `--only` and `--without`. Raises `UserError` if one cannot be read."""
    files = [*([(only, True)] if only else []), *((path, False) for path in without)]
    return [NameList(path, read_names(path), keep) for path, keep in files]


def select(items: list[Item], lists: Iterable[NameList], source: str) -> list[Item]:
    """The items that the lists leave, in order. Prints their number, names without an image, and classes that are lost.

    A name is listed as it is or escaped. Raises `UserError` if a list names no image of the source, or none is left.
    """
    left = items
    for given in lists:
        matched = {name for item in items for name in (item.name, escape_name(item.name)) if name in given.names}
        if not matched and (given.names or given.keep):
            problem = f"{given.path} names no image of {source}, whose names are like {escape_name(items[0].name)}"
            raise UserError(f"{problem}: give a list of its images")
        left = [item for item in left if given.keep == (item.name in matched or escape_name(item.name) in matched)]
        say(f"{given.path}: {len(matched):,} names {'used' if given.keep else 'left out'}, {len(left):,} images remain")
        if unknown := sorted(map(escape_name, given.names - matched)):
            say(f"{given.path}: {len(unknown):,} names match no image: {_some(unknown)}")
    if not left:
        raise UserError(f"--only and --without leave no image of {source}")
    if lost := sorted({item.label or "" for item in items} - {item.label or "" for item in left}):
        say(f"no image is left of {len(lost):,} classes: {_some([escape_name(name) for name in lost])}")
    return left


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + (", ..." if names[MAX_NAMES:] else "")
