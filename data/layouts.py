"""Splits and class names of images from their paths.

    train/CAT/1.jpg  test/DOG/2.jpg     top folders are splits if all of them have names of splits
    CAT/train/1.jpg  DOG/test/2.jpg     the same below the classes
    CAT/1.jpg        DOG/more/2.jpg     the next folder is the class, if every image of the split is in one
    1.jpg            2.jpg              no classes

What could mean several things is refused; `--splits` and `--no-splits` say what is meant.
"""

import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import PurePosixPath

from configs.errors import UserError, counted, printable
from data.classes import (
    SPLIT_WORDS,
    STARTS,
    UNLABELED,
    WAY_OUT,
    Folders,
    check_repeats,
    classes_of,
    folders_of,
    listed,
    split_name,
    words_of,
)
from data.listing import Listing
from data.sources import Item


def arrange(
    listing: Listing, splits: tuple[str, ...] = (), no_splits: bool = False, labelled: bool = True
) -> tuple[list[Item], list[str]]:
    """The images with their splits and, if `labelled`, their classes; and lines on what was decided.

    Args:
        splits: `NAME=FOLDER` pairs; images outside of the folders are left out
        no_splits: top folders are classes, whatever their names
        labelled: False: folders are not classes; labels that the images have already are kept
    Raises:
        UserError: the folders could mean several things
    """
    items, notes, labelled = listing.images, [], labelled and not listing.sidecars
    decided = bool(splits) or no_splits
    if listing.shards:
        return _from_shards(listing), notes
    full = [folders_of(item.name) for item in items]
    folders = _without_common(full, keep_splits=not no_splits)
    if splits:
        names, folders, kept = _chosen(splits, full, folders, listing.source)
        if len(kept) < len(items):
            notes.append(f"{counted(len(items) - len(kept), 'image')} outside of --splits left out")
        items = [items[i] for i in kept]
    elif no_splits:
        names = [None] * len(items)
    else:
        names, folders = _found(folders, items, listing.source, notes)
    labels = [None if split == UNLABELED else item.label for item, split in zip(items, names, strict=True)]
    if labelled:
        labels = classes_of(names, folders, items, listing.source, notes, decided)
    return [replace(item, split=s, label=c) for item, s, c in zip(items, names, labels, strict=True)], notes


def _from_shards(listing: Listing) -> list[Item]:
    """Numbered archives like train-0001.tar or train/0001.tar: classes are beside the images."""
    found = []
    for item in listing.images:
        shard = next((p for p in PurePosixPath(item.name).parents if str(p) in listing.shards), PurePosixPath())
        stem = shard.name.rstrip("0123456789").rstrip("-_.")
        words = [*map(split_name, shard.parts[:-1]), *map(split_name, re.split(r"[-_.]", stem))]
        found.append(replace(item, split=next(filter(None, reversed(words)), None)))
    if any(item.split for item in found) and not all(item.split for item in found):
        raise UserError(f"{listing.source}: only some archives have a split in their names: prepare them one by one")
    return found


def _without_common(folders: Folders, keep_splits: bool) -> Folders:
    """Without the folders that contain everything."""
    while all(len(parts) > 1 for parts in folders) and len({parts[0] for parts in folders}) == 1:
        if keep_splits and split_name(folders[0][0]):
            break
        folders = [parts[1:] for parts in folders]
    return folders


def _counts(names: Iterable[str]) -> str:
    """Names with numbers of images, for a message."""
    counts = Counter(names)
    shown = ", ".join(f"{printable(name) or 'no folder'} ({count:,})" for name, count in sorted(counts.items())[:8])
    return f"{shown}{', ...' if len(counts) > 8 else ''}"


def _advice(tops: dict[str, str]) -> str:
    """The options that say what folders (name -> split) mean."""
    pairs = shlex.join(f"{split}={printable(top)}" for top, split in sorted(tops.items()))
    return f"say `--splits {pairs}` to read those and leave out the rest, or `--no-splits` if all are classes {WAY_OUT}"


def _found(folders: Folders, items: list[Item], source: str, notes: list[str]) -> tuple[list[str | None], Folders]:
    """Splits from the top folders, and the folders below them; raises `UserError` if only some are splits."""
    tops = Counter(parts[0] if parts else "" for parts in folders)
    splits = {top: split for top in tops if (split := split_name(top))}
    seen = f"{source} has {_counts(parts[0] if parts else '' for parts in folders)}"
    if splits and len(splits) < len(tops):
        others = [top for top in tops if top not in splits]
        inside = {top: {p[1] for p in folders if len(p) > 1 and p[0] == top} for top in others}
        for top, names in inside.items():
            if {split_name(name) for name in names} & set(splits.values()):
                problem = f"{printable(top)}/ repeats the splits beside it, so images would be read twice"
                raise UserError(f"{seen}: {problem}: {_advice(splits)}")
        raise UserError(f"{seen}: only {listed(splits)} {_is_or_are(splits)} named like splits: {_advice(splits)}")
    if splits:
        for split, same in _inverted(splits).items():
            if len(same) > 1 and split != UNLABELED:
                both = " ".join(f"{split}={printable(top)}" for top in same)
                one = _advice({top: name for top, name in splits.items() if top not in same[1:]})
                problem = f"{listed(same)} are names of one split, {split}"
                raise UserError(f"{seen}: {problem}: {one}; `{both}` joins them")
        return [splits[parts[0]] for parts in folders], [parts[1:] for parts in folders]
    hints = {top: hint for top in tops if (hint := _hint(top))}
    if len(set(hints.values())) > 1:
        way_out = _advice(hints)
        if len(set(hints.values())) < len(hints):  # cat_train, dog_train: their classes would be lost
            way_out = f"move them into folders train/ and test/, or say `--no-splits` if all are classes {WAY_OUT}"
        raise UserError(f"{seen}: {listed(hints)} may be splits: {way_out}")
    below = {parts[1] if len(parts) > 1 else "" for parts in folders}
    names = {name: split_name(name) for name in below}
    if len(set(names.values())) > 1 and any(names.values()):
        if not all(names.values()):
            problem = f"below the classes, only {listed(n for n in names if names[n])} are named like splits"
            raise UserError(f"{seen}: {problem}: say `--no-splits` if all are parts of their classes {WAY_OUT}")
        notes.append(f"splits are below the classes: {', '.join(sorted(set(names.values())))}")
        return [names[parts[1]] for parts in folders], [(parts[0], *parts[2:]) for parts in folders]
    check_repeats(folders, source)
    return [None] * len(items), folders


def _hint(top: str) -> str | None:
    """The split that one of the words of a name stands for or begins with, such as train for `Trainingsdaten`."""
    words = words_of(top)
    found = [SPLIT_WORDS[word] for word in words if len(word) > 2 and word in SPLIT_WORDS]
    found = found or [SPLIT_WORDS[start] for word in words for start in STARTS if word.startswith(start)]
    return found[0] if len(found) == 1 else None


def _inverted(splits: dict[str, str]) -> dict[str, list[str]]:
    found = defaultdict(list)
    for top, split in sorted(splits.items()):
        found[split].append(top)
    return found


def _is_or_are(names: dict) -> str:
    return "is" if len(names) == 1 else "are"


def _chosen(
    pairs: tuple[str, ...], full: Folders, stripped: Folders, source: str
) -> tuple[list[str], Folders, list[int]]:
    """Split, remaining folders and number of each image in a folder of `--splits`."""
    wanted = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z]\w*", name) or not folders_of(f"{folder}/x"):
            raise UserError(f"--splits {printable(pair)}: write NAME=FOLDER, such as train=Training")
        wanted[folders_of(f"{folder}/x")] = name
    names, rest, kept, used = [], [], [], set()
    for i, candidates in enumerate(zip(full, stripped, strict=True)):
        hits = [(path, parts) for parts in candidates for path in wanted if parts[: len(path)] == path]
        if hits:
            path, parts = max(hits, key=lambda hit: len(hit[0]))
            used.add(path)
            names.append(wanted[path])
            rest.append(parts[len(path) :])
            kept.append(i)
    for path in wanted.keys() - used:
        tops = _counts(parts[0] if parts else "" for parts in stripped)
        raise UserError(f"--splits: {source} has no images in {printable('/'.join(path))}: it has {tops}")
    return names, rest, kept
