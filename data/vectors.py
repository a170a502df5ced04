"""Targets that are one row per image: several labels (0 or 1 for each name), or numbers (NaN = missing).

The first half is for `data/prepare.py`, the second reads KEY.json of the samples. Free of torch.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from configs.errors import UserError, counted, nearest, printable
from data.layouts import UNLABELED
from data.shards import Split
from data.sources import Item

KINDS = ("labels", "numbers")
SHOWN = 10  # labels or numbers in a preview
Read = Callable[[bytes], np.ndarray | None]  # KEY.json to float32 [names]; None = without a target


def settle_targets(items: list[Item]) -> tuple[list[Item], dict | None]:
    """The images with labels and numbers as KEY.json has them, and `targets` of index.json.

    Targets of another kind (boxes, masks) are left alone. Raises `UserError` for values that are neither.
    """
    if any(key not in KINDS for item in items for key in item.targets or ()):
        return items, None
    kind = next((kind for kind in KINDS if any(kind in (item.targets or ()) for item in items)), None)
    if kind is None:
        return items, None
    labels = [_labels(item) for item in items]
    columns = dict.fromkeys(name for item in items for name in _named(item))
    settled = []
    for item, found in zip(items, labels, strict=True):
        numbers = _named(item)
        targets = {} if found is None else {"labels": found}
        if any(value is not None for value in numbers.values()):
            targets["numbers"] = [numbers.get(name) for name in columns]
        settled.append(replace(item, targets=targets or None))
    names = _sorted({label for found in labels for label in found or ()})
    return settled, {"kind": kind, "names": names if kind == "labels" else list(columns)}


def _sorted(names: set[str]) -> list[str]:
    """Names of labels as text, or as numbers if all of them are."""
    return sorted(names, key=int if all(map(str.isdecimal, names)) else None)


def _labels(item: Item) -> list[str] | None:
    value = (item.targets or {}).get("labels")
    if value is None:
        return None
    if isinstance(value, str):
        value = [part.strip() for part in value.split("|")]
    if not isinstance(value, (list, tuple)) or not all(isinstance(x, (str, int)) for x in value):
        problem = f"labels are {str(value)[:80]!r}"
        raise UserError(f"{printable(item.name)}: {problem}: write a list of names, or a|b in a table")
    return list(dict.fromkeys(printable(str(label)) for label in value if str(label)))


def _named(item: Item) -> dict[str, float | None]:
    """An image's numbers by name; a list without names gets number_1, number_2, ..."""
    value = (item.targets or {}).get("numbers")
    if value is None:
        return {}
    if isinstance(value, (int, float, str)):
        value = [value]
    if not isinstance(value, dict):
        value = {f"number_{i}": x for i, x in enumerate(value, 1)}
    try:
        numbers = {printable(str(key)): None if x in (None, "") else float(x) for key, x in value.items()}
    except (TypeError, ValueError):
        numbers = {"": math.inf}
    if not all(x is None or math.isfinite(x) for x in numbers.values()):
        problem = f"numbers are {str(value)[:80]!r}"
        raise UserError(f"{printable(item.name)}: {problem}: write finite numbers, null where one is missing")
    return numbers


def preview_lines(splits: dict[str, list[Item]], targets: dict | None) -> list[str]:
    """Lines on the targets of each split: counts of labels or boxes, or range, mean and missing values of numbers."""
    lines = []
    for split, items in sorted(splits.items()) if targets else ():
        if split == UNLABELED and targets["kind"] == "boxes":
            continue
        found = [item.targets[targets["kind"]] for item in items if targets["kind"] in (item.targets or ())]
        without = f"; {counted(len(items) - len(found), 'image')} without" if len(found) < len(items) else ""
        if targets["kind"] != "numbers":
            names = "label", "labels"
            if targets["kind"] == "boxes":
                names, found = ("class of boxes", "classes of boxes"), [[box["class"] for box in x] for x in found]
            counts = Counter(dict.fromkeys(targets["names"], 0))
            counts.update(label for labels in found for label in labels)
            shown = ", ".join(f"{printable(name)} {count:,}" for name, count in counts.most_common(SHOWN))
            more = f", ... to {min(counts.values()):,}" if len(counts) > SHOWN else ""
            none = sum(not labels for labels in found)
            empty = f"; {counted(none, 'image')} with none of them" if none else ""
            lines.append(f"{split:<9} {counted(len(counts), *names)}: {shown}{more}{empty}{without}")
            continue
        for i, name in enumerate(targets["names"][:SHOWN]):
            values = [numbers[i] for numbers in found if numbers[i] is not None]
            missing = f", {len(items) - len(values):,} missing" if len(values) < len(items) else ""
            about = f"{min(values):g} to {max(values):g}, mean {sum(values) / len(values):g}" if values else "no values"
            constant = ", all alike" if len(set(values)) == 1 and len(values) > 1 else ""
            lines.append(f"{split:<9} {printable(name)}: {about}{missing}{constant}")
    return lines


def stored_targets(splits: list[Split]) -> dict | None:
    """`targets` of index.json for tars of other tools, from their KEY.json: labels, or else lists of numbers."""
    labels, most = set(), 0
    for split in splits:
        for sample in range(len(split)):
            with suppress(UserError, ValueError, RecursionError, AttributeError):  # another kind, or damaged
                content = json.loads(split.read_target(sample))
                labels.update(map(str, _parse_list(content, "labels") or ()))
                most = max(most, len(_parse_list(content, "numbers") or ()))
    if labels:
        return {"kind": "labels", "names": _sorted(labels)}
    return {"kind": "numbers", "names": [f"number_{i + 1}" for i in range(most)]} if most else None


def target_names(images: Any, kind: str) -> list[str]:
    """Names of a data set's labels or numbers. Raises `UserError` if it has targets of another kind, or none."""
    found = getattr(images, "targets", None) or {}  # folders without shards have none
    if found.get("kind") != kind:
        has = f"targets of kind {found['kind']}, for another task" if found.get("kind") else "none"
        way_out = "give them to data/prepare.py with --labels TABLE --label-column COLUMN ..."
        raise UserError(f"{images.folder}: task {kind} needs {kind} of the images, but it has {has}: {way_out}")
    return found["names"]


def reader(kind: str, names: Sequence[str], own: Sequence[str]) -> Read:
    """Reads KEY.json of a data set with the names `own` into a row with the order of `names`.

    The reader raises `UserError` for a target that is damaged or has another name.
    """
    column = {name: i for i, name in enumerate(names)}
    if kind == "labels":
        return partial(_label_row, column=column)
    return partial(_number_row, column=[column.get(name) for name in own], length=len(names))


def _parse(data: bytes, kind: str) -> list | None:
    """The targets of a kind in KEY.json, None without."""
    try:
        return _parse_list(json.loads(data), kind) if data else None
    except (ValueError, RecursionError, AttributeError):
        raise UserError(f"its json is damaged: {data[:40]!r}") from None


def _parse_list(content: dict, kind: str) -> list | None:
    found = content.get(kind)
    if found is not None and not isinstance(found, list):
        raise UserError(f"its {kind} are {str(found)[:80]!r}, not a list")
    return found


def _label_row(data: bytes, column: dict[str, int]) -> np.ndarray | None:
    labels = _parse(data, "labels")
    if labels is None:
        return None
    row = np.zeros(len(column), np.float32)
    for label in map(str, labels):
        if label not in column:
            raise UserError(f"its label {label} is not in index.json {nearest(label, column)}")
        row[column[label]] = 1
    return row


def _number_row(data: bytes, column: list[int | None], length: int) -> np.ndarray | None:
    numbers = _parse(data, "numbers")
    if numbers is None:
        return None
    if len(numbers) != len(column) or not all(x is None or isinstance(x, (int, float)) for x in numbers):
        raise UserError(f"its numbers are {str(numbers)[:80]}, not {len(column)} numbers")
    row = np.full(length, np.nan, np.float32)
    for place, value in zip(column, numbers, strict=True):
        if place is not None and value is not None:
            row[place] = value
    return row if np.isfinite(row).any() else None


def all_targets(split: Split, read: Read, length: int) -> np.ndarray:
    """Targets [N, length] of all samples; NaN for samples without, and for damaged ones."""
    rows = np.full((len(split), length), np.nan, np.float32)
    for sample in range(len(split)):
        with suppress(UserError):  # damage is reported when training reads the sample
            if (row := read(split.read_target(sample))) is not None:
                rows[sample] = row
    return rows
