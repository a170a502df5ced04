"""Classes of a whole collection: names, numbers of images, and what is doubtful about them."""

import os
import shlex
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

from configs.errors import UserError, counted, few, printable
from configs.log import say
from data.classes import UNLABELED, WAY_OUT
from data.planning import divided
from data.sources import Item

MANY = 10  # classes, from which on one image in each is doubtful


def class_names(items: list[Item], by_number: bool) -> list[str] | None:
    """Class names of all splits, None without labels; sorted, with `by_number` as numbers if all of them are."""
    names = {item.label for item in items} - {None}
    return sorted(names, key=int if by_number and all(map(str.isdecimal, names)) else None) or None


def count_classes(splits: dict[str, list[Item]]) -> dict[str, Counter[str | None]]:
    """Images of each class of each split; None counts those without a label."""
    return {split: Counter(item.label for item in items) for split, items in splits.items()}


def split_lines(splits: dict[str, Counter[str | None]], kind: str | None = None) -> Iterator[str]:
    """A line on the images and classes of each split; `kind` are the targets if they are not classes."""
    for split, classes in sorted(splits.items()):
        line = f"{split:<9} {counted(classes.total(), 'image')}"
        names = sorted(classes.keys() - {None}, key=lambda name: (classes[name], name))
        if not names:
            yield line if kind and split != UNLABELED else f"{line}, no {kind or 'labels'}"
            continue
        line += f", {counted(len(names), 'class', 'classes')}: {printable(names[0])} ({classes[names[0]]:,})"
        line += f" to {printable(names[-1])} ({classes[names[-1]]:,})" if len(names) > 1 else ""
        yield line + (f", {classes[None]:,} without a label" if classes[None] else "")


def check_classes(items: list[Item], source: str) -> None:
    """Print warnings on classes. Raises `UserError` if train and another split have no class in common."""
    splits = count_classes(divided(items))
    labelled = {split: classes.keys() - {None} for split, classes in splits.items()}
    for split in ("test", "val") if any(labelled.values()) else ():
        if without := splits.get(split, {}).get(None):
            number = counted(without, "image")
            say(f"  {split}: {number} without a label: add --{split}-labels FILE {WAY_OUT} to evaluate on them")
    _check_names(set().union(*labelled.values()))
    train = labelled.get("train")
    if not train:
        return
    for split, found in sorted(labelled.items()):
        absent = sorted(found - train)
        if found and len(absent) == len(found) and split != UNLABELED:
            seen = f"no class of split {split} ({few(absent)}) is a class of train ({few(sorted(train))})"
            way_out = f"give its labels with --{split}-labels FILE, or use --no-labels"
            if all(item.split for item in items):
                names = sorted(name for name, classes in labelled.items() if classes)
                folders = shlex.join(f"{name}={_folder(items, name)}" for name in names)
                way_out += f", or say `--splits {folders}` to read it without labels"
            raise UserError(f"{printable(source)}: {seen}: {way_out} {WAY_OUT}")
        if absent:
            say(f"  warning: {few(absent)} of split {split} not in train: can never be predicted")
    if len(train) > MANY and max(splits["train"][name] for name in train) == 1:
        say(f"  warning: each of the {len(train):,} classes has 1 image: are the labels names or values?")
    if len(train) == 1:
        say(f"  warning: 1 class ({next(iter(train))}): fine-tuning cannot learn from it")


def check_val(splits: dict[str, Counter[str | None]]) -> None:
    """Print the classes of train that have no image in val."""
    have = splits.get("val", {}).keys() - {None}
    absent = sorted(splits.get("train", {}).keys() - have - {None})
    if absent and have:
        subject = f"class {absent[0]} has" if len(absent) == 1 else f"classes {few(absent)} have"
        say(f"  warning: {subject} no validation image")


def _folder(items: list[Item], split: str) -> str:
    """The folder of all images of a split, printable."""
    folders = [PurePosixPath(item.name).parent for item in items if item.split == split]
    return printable(PurePosixPath(os.path.commonpath(folders)))


def _check_names(names: Iterable[str]) -> None:
    """Print classes whose names differ only in case, in spaces, or in how Unicode writes them."""
    groups = defaultdict(list)
    for name in sorted(names):
        groups[" ".join(unicodedata.normalize("NFKC", name).casefold().split())].append(name)
    for same in groups.values():
        if len(same) > 1:
            shown = " and ".join(f"`{name}`" for name in same[:MANY])
            say(f"  warning: {shown} are different classes, but look alike: give them one name")
