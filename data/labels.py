"""Give images the labels of a table, of files beside each image, or of known data sets."""

import json
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any
from unicodedata import normalize

from configs.errors import UserError, counted, printable
from data.cells import LABELS_TASK, as_label, cell_reader, empty
from data.classes import UNLABELED, split_name
from data.listing import SIDECARS, Listing, suffix
from data.reading import ImageError
from data.sources import Item
from data.tables import LABEL_NAMES, TARGETS, Columns, Row, as_path, plain
from data.tars import READABLE, split_member_name

SHOWN = 10  # columns in a line


def label_by_table(items: list[Item], rows: list[Row], columns: Columns, name: str) -> tuple[list[Item], list[str]]:
    """The images with the labels and splits of a table's rows, and lines on what was decided.

    Raises `UserError` if no row names an image, or the rows contradict each other.
    """
    matches, column = _match(items, rows, columns.path, name)
    notes, by_image = [], defaultdict(list)
    for number, image in enumerate(matches):
        if image is not None:
            by_image[image].append(rows[number])
    without_image = [rows[i][column] for i, image in enumerate(matches) if image is None]
    if without_image:
        number, first = counted(len(without_image), "row"), _cell(without_image[0])
        notes.append(f"{printable(name)}: {number} without an image, such as {first}")
    repeated = sum(len(found) - 1 for found in by_image.values())
    read = cell_reader(columns, [rows[i] for i, image in enumerate(matches) if image is not None], name, notes)
    used = {column, *columns.labels, columns.split, *TARGETS}
    if columns.split:
        notes.append(f"splits from column {printable(columns.split)} of {printable(name)}")
    if unused := [c for c in dict.fromkeys(c for row in rows for c in row) if c not in used]:
        shown = ", ".join(printable(c) or "without a name" for c in unused[:SHOWN])
        more = ", ..." if len(unused) > SHOWN else ""
        notes.append(f"{printable(name)}: {counted(len(unused), 'column')} not used: {shown}{more}")
    out, several, found = [], [], []
    for i, item in enumerate(items):
        values = [read(row) for row in by_image[i]] if i in by_image else []
        labels = list(dict.fromkeys(label for label, _ in values if label is not None))
        targets: dict[str, Any] = {}
        for _, more in values:
            for key in more.keys() & targets.keys() - {"labels"}:
                if more[key] != targets[key]:
                    both = f"{_cell(targets[key])} and {_cell(more[key])}"
                    raise UserError(f"{printable(name)}: {printable(item.name)} has {key} {both}: remove one row")
            if "labels" in targets and "labels" in more:  # of several rows
                more = more | {"labels": [*targets["labels"], *more["labels"]]}
            targets |= more
        if len(labels) > 1:
            several.append(f"{printable(item.name)}: {', '.join(labels[:3])}")
        split = _split_of(by_image[i], columns.split, name) if i in by_image else None
        found.append((labels, targets, split or item.split))
    for item, (labels, targets, split) in zip(items, found, strict=True):
        if several and labels:  # also those of one label, so that all have targets of the same kind
            targets = {"labels": labels} | targets
        out.append(_labelled(item, labels[0] if len(labels) == 1 else None, targets, split))
    if several:
        images = f"{counted(len(several), 'image')} with rows of several labels, such as {several[0]}"
        notes.append(f"{images}: {LABELS_TASK}")
    elif repeated:
        notes.append(f"{printable(name)}: {counted(repeated, 'row')} of images that have one already")
    return set_apart(out, set(by_image), name, notes), notes


def _cell(value: Any) -> str:
    return printable(str(value)[:80])


def _labelled(item: Item, label: str | None, targets: dict[str, Any], split: str | None) -> Item:
    """The image with its labels, which its stamp contains, so that other labels are another data set."""
    stamp = f"{item.stamp} {split} {label} {json.dumps(targets, default=str)}"
    return replace(item, label=label, split=split, targets=targets or None, stamp=stamp)


def set_apart(items: list[Item], labelled: set[int], name: str, notes: list[str], unit: str = "row") -> list[Item]:
    """Images without a `unit` in `name` go to split `unlabeled`, but a split without any stays together.

    `labelled` has the positions of the others.
    """
    by_split = defaultdict(list)
    for i, item in enumerate(items):
        by_split[item.split].append(i)
    moved = []
    for split, members in by_split.items():
        if split == UNLABELED:
            continue
        without = [i for i in members if i not in labelled]
        if len(without) == len(members) and split is not None:
            notes.append(
                f"{printable(name)} has no {unit}s for split {split}: {counted(len(without), 'image')} without a label"
            )
        else:
            moved += without
    if moved:
        first = printable(items[min(moved)].name)
        notes.append(
            f"{counted(len(moved), 'image')} without a {unit} in {printable(name)}, such as {first}: split {UNLABELED}"
        )
    gone = set(moved)
    return [replace(item, split=UNLABELED) if i in gone else item for i, item in enumerate(items)]


def _match(items: list[Item], rows: list[Row], candidates: tuple[str, ...], name: str) -> tuple[list[int | None], str]:
    """Number of each row's image, and the column that names it."""
    found = {}
    paths = Paths(items)
    for column in candidates:
        matches = [paths.find(row.get(column), name) for row in rows]
        if any(image is not None for image in matches):
            found[column] = matches
    if not found:
        example = next((row[c] for c in candidates for row in rows if row.get(c) is not None), "")
        compared = f"the images are named like {printable(items[0].name)}, the rows like {_cell(example)}"
        raise UserError(f"{printable(name)}: no row names an image: {compared}: name the column with --path-column")
    best = max(found, key=lambda column: sum(image is not None for image in found[column]))
    if any(matches != found[best] for matches in found.values()):
        columns = ", ".join(map(printable, found))
        raise UserError(f"{printable(name)}: columns {columns} name different images: choose one with --path-column")
    return found[best], best


class Paths:
    """Finds an image by its path, with or without folders or suffix."""

    def __init__(self, items: list[Item]):
        self.names = [normalize("NFC", item.name) for item in items]  # macOS writes NFD
        self.by_name = {name: i for i, name in enumerate(self.names)}
        if len(self.by_name) < len(items):  # members of one name in an archive
            self.by_name = {}
        self.by_tail: dict[int, dict[str, list[int]]] = {}

    def find(self, value: Any, table: str) -> int | None:
        """Number of the image that a cell names, None if there is none; `UserError` if there are several."""
        path = normalize("NFC", as_path(value))
        if not path:
            return None
        if path in self.by_name:
            return self.by_name[path]
        parts = PurePosixPath(path.lstrip("/")).parts
        for first in range(len(parts)):  # a table may name folders that the source does not have
            hits = self._index(len(parts) - first).get("/".join(parts[first:]), ())
            if len(hits) == 1:
                return hits[0]
            if hits:
                one, two = (printable(self.names[i]) for i in hits[:2])
                way_out = "write paths with folders, or choose folders with --splits"
                raise UserError(f"{printable(table)}: {_cell(value)} may be {one} or {two}: {way_out}")
        return None

    def _index(self, length: int) -> dict[str, list[int]]:
        """Images by the last parts of their paths, with and without suffix."""
        if length not in self.by_tail:
            index = self.by_tail[length] = defaultdict(list)
            for i, name in enumerate(self.names):
                tail = "/".join(PurePosixPath(name).parts[-length:])
                index[tail].append(i)
                index[tail.rpartition(".")[0]].append(i)
        return self.by_tail[length]


def _split_of(rows: list[Row], column: str | None, name: str) -> str | None:
    if column is None:
        return None
    values = {str(row[column]).strip() for row in rows if not empty(row.get(column))}
    splits = {split_name(value) for value in values}
    if None in splits or len(splits) > 1:
        listed = ", ".join(sorted(map(_cell, values)))
        way_out = "write train, val or test, one per image"
        raise UserError(f"{printable(name)}, column {printable(column)}: {listed}: {way_out}")
    return next(iter(splits), None)


def label_by_sidecars(listing: Listing) -> list[str]:
    """Label the images from a `.cls` or `.json` file beside each, as in WebDataset tars. Returns lines on it.

    An image has the label of KEY.cls; KEY is its name without suffix, or up to the first dot. Images with a longer
    suffix, like KEY.seg.png, are parts of the sample of KEY.jpg, and left out.
    """
    files = {name: item for name, item in listing.label_files.items() if suffix(name) in SIDECARS}
    if not files:
        return []
    samples = {key for key, kind in (split_member_name(item.name) for item in listing.images) if kind in READABLE}
    out, used, parts = [], set(), Counter()
    for item in listing.images:
        stem, (key, kind) = item.name.rpartition(".")[0], split_member_name(item.name)
        own, shared = ([n for s in SIDECARS if (n := f"{base}.{s}") in files] for base in (stem, key))
        if kind not in READABLE and not own and shared and key in samples:
            parts[f".{kind}"] += 1
            continue
        label, targets = None, {}
        for name in own or shared:
            one, more = _sidecar(files[name], name)
            if one is not None and (label is None or (label.isdecimal() and not one.isdecimal())):
                label = one  # a name tells more than a number
            targets |= more
            if one is not None or more:
                used.add(name)
        out.append(_labelled(item, label, targets, None))
    if not used:
        return []
    listing.images, listing.sidecars = out, True
    listing.ignored += parts
    for name in used:
        del listing.label_files[name]
    count = sum(item.label is not None for item in out)
    notes = [f"labels from .cls or .json files beside the images: {count:,} of {counted(len(out), 'image')}"]
    if found := sorted({key for item in out for key in item.targets or ()}):
        notes.append(f"the .json files have {', '.join(found)}")
    return notes


def _sidecar(item: Item, name: str) -> tuple[str | None, dict[str, Any]]:
    """Label and other targets of a `.cls` or `.json` file."""
    try:
        data = item.image_bytes()
    except ImageError:  # damaged in a zip: the image counts as one without a label
        return None, {}
    if suffix(name) == "cls":
        text = data.decode("utf-8", "surrogateescape").strip()
        return (as_label(text) if text else None), {}
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return None, {}
    if not isinstance(content, dict):
        return None, {}
    targets = {key: content[key] for key in TARGETS if content.get(key) is not None}
    for key, value in content.items():
        if plain(key) in LABEL_NAMES - {"labels"} and isinstance(value, (str, int)):
            return as_label(value), targets
    return None, targets
