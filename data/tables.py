"""Read files of labels: csv, tsv, JSON lines, parquet, and `path label` lines. Values are data, never code."""

import csv
import io
import json
import re
import shlex
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError, few, printable, reason
from data.classes import WAY_OUT, split_name
from data.listing import Listing, suffix
from data.sources import Item
from data.tars import READABLE
from data.tars import TARGETS as JSON_TARGETS

PATH_NAMES = {
    "path", "paths", "file", "filename", "filenames", "filepath", "image", "images", "imageid", "imagename",
    "imagepath", "imagefile", "imagefilename", "imageindex", "img", "imgid", "imgname", "imgpath", "imgfile", "id",
    "idcode", "key", "name", "fname", "relpath", "relativepath", "photo", "picture", "isicid", "uri", "url",
}  # fmt: skip
LABEL_NAMES = {
    "label", "labels", "class", "classes", "category", "target", "targets", "classname", "labelname", "categoryname",
    "classid", "labelid", "categoryid", "classlabel", "diagnosis", "dx", "species", "breed", "tag", "tags", "y", "cls",
    "finelabel", "groundtruth", "annotation", "findinglabels",
}  # fmt: skip
SPLIT_NAMES = {"split", "splits", "subset", "partition", "set"}
FLAGS = {"0", "1", "0.0", "1.0", "True", "False"}  # of one column for each class
TARGETS = (*JSON_TARGETS, "mask")  # columns that are kept for tasks, whatever the label
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")  # first bytes of texts that Excel and PowerShell write
READS = "csv, tsv, json lines, parquet or `path label` lines (.txt)"
MAX_SHOWN_COLUMNS = 20
Row = dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what."""

    path: tuple[str, ...]  # candidates: the one that names the images is used
    labels: tuple[str, ...]
    split: str | None


def read_table(data: bytes, name: str) -> list[Row]:
    """The rows of a file of labels. Raises `UserError` for a file that cannot be read."""
    kind = suffix(name)
    try:
        if kind == "parquet":
            return _parquet(data)
        text = data.decode("utf-16" if data[:2] in UTF16_MARKS else "utf-8-sig", "surrogateescape")
        if kind in ("jsonl", "ndjson", "json"):
            return _json_rows(text, kind, name)
        if kind in ("csv", "tsv"):
            return _csv(text, kind, name)
        if kind in ("txt", "lst"):
            return _lines(text, name)
    except (ValueError, csv.Error, RecursionError) as error:  # pyarrow's errors are ValueErrors too
        raise UserError(f"{printable(name)} cannot be read ({reason(error)}): it must be {READS}") from None
    raise UserError(f"{printable(name)} is of an unknown type: labels are read from {READS}")


def _parquet(data: bytes) -> list[Row]:
    import pyarrow
    from pyarrow import parquet  # slow to import

    try:
        return parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except (pyarrow.ArrowException, OSError):
        raise ValueError("it is damaged, cut short or not parquet") from None


def _json_rows(text: str, kind: str, name: str) -> list[Row]:
    if kind == "json":
        content = json.loads(text)
        values = content.values() if isinstance(content, dict) else ()
        if any(isinstance(part, (dict, list)) for value in values if isinstance(value, list) for part in value):
            forms = '{"PATH": LABEL, ...} or [{"path": PATH, "label": LABEL}, ...]'
            raise UserError(f"{printable(name)} has a structure that is not known: write {forms}")
        if isinstance(content, dict) and not any(isinstance(value, dict) for value in content.values()):
            return [{"path": path, "label": label} for path, label in content.items()]
        rows = content
    else:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f'{printable(name)}: every row must be an object, such as {{"path": ..., "label": ...}}')
    return rows


def _csv(text: str, kind: str, name: str) -> list[Row]:
    header = text.split("\n", 1)[0]
    delimiter = "\t" if kind == "tsv" else max(",;\t", key=header.count)
    lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    lines = [line for line in lines if any(cell.strip() for cell in line)]
    if not lines:
        raise UserError(f"{printable(name)} is empty")
    columns = [column.strip() for column in lines[0]]
    while columns and not columns[-1] and not any(line[len(columns) - 1 :] and line[-1].strip() for line in lines):
        columns.pop()
        lines = [line[: len(columns)] for line in lines]
    if any(suffix(cell) in READABLE for cell in columns):
        way_out = f"put a line such as `file{delimiter}label` first"
        raise UserError(f"{printable(name)} has no header, its first line is {printable(header.strip())}: {way_out}")
    if len(set(columns)) < len(columns):
        raise UserError(f"{printable(name)} has two columns of one name: {shown(columns)}: rename one")
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(columns):
            problem = f"row {number} has {len(line)} cells, the header {len(columns)}"
            raise UserError(f"{printable(name)}: {problem}: put texts that contain {delimiter!r} in quotes")
    return [dict(zip(columns, (cell.strip() for cell in line), strict=True)) for line in lines[1:]]


def _lines(text: str, name: str) -> list[Row]:
    rows = [line.rsplit(None, 1) for line in text.split("\n") if line.strip()]
    if not all(len(row) == 2 for row in rows):
        one = "lines without a path are only known for the ILSVRC2012 validation images"
        raise UserError(f"{printable(name)}: write `path label` in every line; {one}")
    if rows and all(suffix(label) in READABLE for _, label in rows):
        raise UserError(f"{printable(name)} names an image last in each line: write `path label`")
    return [{"path": path.strip(), "label": label} for path, label in rows]


def find_columns(
    rows: list[Row], name: str, path: str | None, labels: tuple[str, ...], optional: bool = False
) -> Columns:
    """The columns of a table by their names, or those that the user names. With `optional`, there may be no labels.

    Raises `UserError`, with the columns, if there is none, or several may be the label.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for wanted in (*([path] if path else []), *labels):
        if wanted not in columns:
            raise UserError(f"{printable(name)} has no column {printable(wanted)}, but {shown(columns)}")
    paths = (path,) if path else tuple(c for c in columns if plain(c) in PATH_NAMES and c not in labels)
    if not paths:
        way_out = f"name the column of file names with --path-column {WAY_OUT}"
        raise UserError(f"{printable(name)}: {way_out}: {shown(columns)}")
    found = labels or tuple(c for c in columns if plain(c) in LABEL_NAMES and c not in (path,))
    if len(found) > 1 and not labels:
        found = tuple(c for c in found if c not in TARGETS)
    if not found and any(c in TARGETS for c in columns):
        labels = found = ()
    elif len(found) != 1 and not labels and (found or not optional):
        problem = f"{few(found)} may all be the label" if found else "no column is named like a label"
        way_out = (not found and one_hot(rows)) or f"name it with --label-column {WAY_OUT}: {shown(columns)}"
        raise UserError(f"{printable(name)}: {problem}: {way_out}")
    others = [c for c in columns if c not in (*paths, *found, *TARGETS)]
    split = next((c for c in others if plain(c) in SPLIT_NAMES), None)
    return Columns(paths, found, split or next((c for c in others if _has_splits(c, rows)), None))


def one_hot(rows: list[Row]) -> str:
    """Advice if exactly one of the columns that are 0 or 1 everywhere is 1 in each row; empty otherwise."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    flags = [column for column in columns if all(str(row.get(column)).strip() in FLAGS for row in rows)]
    ones = {sum(str(row[column]).strip() in ("1", "1.0", "True") for column in flags) for row in rows}
    if len(flags) < 2 or ones != {1}:
        return ""
    return f"add `--label-column {shlex.join(map(printable, flags))}` {WAY_OUT}, of which one is 1 in each row"


def _has_splits(column: str, rows: list[Row]) -> bool:
    """Whether all values of a column name splits, and not all the same."""
    found = set()
    for row in rows:
        found.add(split_name(str(row.get(column) or "")))
        if None in found:
            return False
    return len(found) > 1


def list_table(path: Path, columns: Columns, rows: list[Row]) -> Listing:
    """The files that a table names in one of its columns, relative to its folder; files that are missing are left out.

    Raises `UserError` if there are none.
    """
    listing, first = Listing(str(path), rows=rows), None
    for column in columns.path:
        names = dict.fromkeys(name for row in rows if (name := as_path(row.get(column))))
        first = first or next(iter(names), None)
        for name in names:
            with suppress(OSError, ValueError):  # ValueError: a null byte
                file = path.parent / name
                about = file.stat()
                if stat.S_ISREG(about.st_mode):
                    listing.images.append(Item(name, str(file), f"{about.st_size} {about.st_mtime_ns}"))
        if listing.images:
            listing.images.sort(key=lambda item: item.name)
            return listing
    problem = f"no file that it names exists, such as {printable(path.parent / (first or ''))}"
    raise UserError(f"{printable(path)}: {problem}: write paths relative to the table, with suffix")


def as_path(value: Any) -> str:
    """The path in a cell; empty if there is none."""
    if value is None or isinstance(value, (bool, float, dict, list)):
        return ""
    return str(value).strip().replace("\\", "/")


def may_hold_labels(data: bytes, name: str) -> bool:
    """Whether a file looks like a table of labels, from its first bytes."""
    if suffix(name) not in ("csv", "tsv"):
        return True
    header = data.decode("utf-8-sig", "replace").split("\n", 1)[0]
    return len(re.split(r"[,;\t]", header)) > 1


def shown(columns: list[str]) -> str:
    """Names of columns, for a message."""
    return f"its columns are {few(columns, MAX_SHOWN_COLUMNS)}"


def plain(column: str) -> str:
    """A column's name without case and punctuation."""
    return re.sub(r"[^a-z0-9]", "", column.lower())
