"""Splits and class names of images from their paths.

    train/CAT/1.jpg  test/DOG/2.jpg     top folders are splits if all of them have names of splits
    CAT/train/1.jpg  DOG/test/2.jpg     the same below the classes
    CAT/1.jpg        DOG/more/2.jpg     the next folder is the class, if every image of the split is in one
    1.jpg            2.jpg              no classes

Ambiguous layouts are refused; `--splits` and `--no-splits` resolve them.
"""

import re
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import PurePosixPath

from configs.errors import UserError, counted, few, printable
from data.classes import (
    SPLIT_WORDS,
    STARTS,
    UNLABELED,
    WAY_OUT,
    Folder,
    Group,
    Places,
    check_repeats,
    classes_of,
    folders_of,
    listed,
    parts_of,
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
    items, notes, source = listing.images, [], listing.source
    if listing.shards:
        return _from_shards(listing), notes
    counts = Counter(folders_of(item.name) for item in items)  # the rest looks at folders, not at every image
    inner = _without_common([*counts], keep_splits=not no_splits)
    if splits:
        places = _chosen(splits, inner, counts, source)
        if left_out := counts.total() - sum(counts[folder] for folder in places):
            notes.append(f"{counted(left_out, 'image')} outside of --splits left out")
    elif no_splits:
        places = {folder: (None, parts) for folder, parts in inner.items()}
    else:
        places = _found(inner, counts, source, notes)
    own_labels = listing.sidecars or not labelled
    labels = {} if own_labels else classes_of(places, counts, items, source, notes, decided=bool(splits) or no_splits)
    arranged = []
    for item in items:
        folder = folders_of(item.name)
        if folder in places:
            split = places[folder][0]
            label = item.label if own_labels and split != UNLABELED else labels.get(folder)
            arranged.append(item.placed(split, label))
    return arranged, notes


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


def _without_common(folders: list[Folder], keep_splits: bool) -> Group:
    """Each folder without those that contain everything."""
    start = 0
    while all(len(parts) > start + 1 for parts in folders) and len({parts[start] for parts in folders}) == 1:
        if keep_splits and split_name(folders[0][start]):
            break
        start += 1
    return {parts: parts[start:] for parts in folders}


def _tops(inner: Group, counts: Counter[Folder]) -> Counter[str]:
    """Number of images in each top folder; those outside of folders are in ``."""
    tops = Counter()
    for folder, parts in inner.items():
        tops[parts[0] if parts else ""] += counts[folder]
    return tops


def _shown(tops: Counter[str]) -> str:
    """Folders with numbers of images, for a message."""
    return few([f"{name or 'no folder'} ({count:,})" for name, count in sorted(tops.items())], 8)


def _advice(tops: dict[str, str]) -> str:
    """The options that say what folders (name -> split) mean."""
    pairs = shlex.join(f"{split}={printable(top)}" for top, split in sorted(tops.items()))
    return f"say `--splits {pairs}` to read those and leave out the rest, or `--no-splits` if all are classes {WAY_OUT}"


def _found(inner: Group, counts: Counter[Folder], source: str, notes: list[str]) -> Places:
    """Splits from the top folders, and the folders below them; raises `UserError` if only some are splits."""
    tops = _tops(inner, counts)
    splits = {top: split for top in tops if (split := split_name(top))}
    seen = f"{source} has {_shown(tops)}"
    if splits and len(splits) < len(tops):
        for top in tops.keys() - splits.keys():
            below = {split_name(parts[1]) for parts in inner.values() if len(parts) > 1 and parts[0] == top}
            if below & set(splits.values()):
                problem = f"{printable(top)}/ repeats the splits beside it, so images would be read twice"
                raise UserError(f"{seen}: {problem}: {_advice(splits)}")
        raise UserError(f"{seen}: only {listed(splits)} {_is_or_are(splits)} named like splits: {_advice(splits)}")
    if splits:
        for split in set(splits.values()) - {UNLABELED}:
            same = sorted(top for top in splits if splits[top] == split)
            if len(same) > 1:
                one = _advice({top: name for top, name in splits.items() if top not in same[1:]})
                both = shlex.join(f"{split}={printable(top)}" for top in same)
                problem = f"{listed(same)} are names of one split, {split}"
                raise UserError(f"{seen}: {problem}: {one}; `{both}` joins them")
        return {folder: (splits[parts[0]], parts[1:]) for folder, parts in inner.items()}
    hints = {top: hint for top in tops if (hint := _hint(top))}
    if len(set(hints.values())) > 1:
        way_out = _advice(hints)
        if len(set(hints.values())) < len(hints):  # cat_train, dog_train: their classes would be lost
            way_out = f"move them into folders train/ and test/, or say `--no-splits` if all are classes {WAY_OUT}"
        raise UserError(f"{seen}: {listed(hints)} may be splits: {way_out}")
    names = {name: split_name(name) for name in {parts[1] if len(parts) > 1 else "" for parts in inner.values()}}
    if len(set(names.values())) > 1 and any(names.values()):
        if not all(names.values()):
            problem = f"below the classes, only {listed(n for n in names if names[n])} are named like splits"
            raise UserError(f"{seen}: {problem}: say `--no-splits` if all are parts of their classes {WAY_OUT}")
        notes.append(f"splits are below the classes: {', '.join(sorted(set(names.values())))}")
        return {folder: (names[parts[1]], (parts[0], *parts[2:])) for folder, parts in inner.items()}
    check_repeats(inner.values(), source)
    return {folder: (None, parts) for folder, parts in inner.items()}


def _hint(top: str) -> str | None:
    """The split that one of the words of a name stands for or begins with, such as train for `Trainingsdaten`."""
    words = words_of(top)
    found = [SPLIT_WORDS[word] for word in words if len(word) > 2 and word in SPLIT_WORDS]
    found = found or [SPLIT_WORDS[start] for word in words for start in STARTS if word.startswith(start)]
    return found[0] if len(found) == 1 else None


def _is_or_are(names: dict) -> str:
    return "is" if len(names) == 1 else "are"


def _chosen(pairs: tuple[str, ...], inner: Group, counts: Counter[Folder], source: str) -> Places:
    """Split and remaining folders of each folder that `--splits` names or contains."""
    wanted = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z]\w*", name) or not parts_of(folder):
            raise UserError(f"--splits {printable(pair)}: write NAME=FOLDER, such as train=Training")
        wanted[parts_of(folder)] = name
    places, used = {}, set()
    for candidates in inner.items():  # with and without the folders that contain everything
        hits = [(path, parts) for parts in candidates for path in wanted if parts[: len(path)] == path]
        if hits:
            path, parts = max(hits, key=lambda hit: len(hit[0]))
            used.add(path)
            places[candidates[0]] = wanted[path], parts[len(path) :]
    for path in wanted.keys() - used:
        way_out = f"it has {_shown(_tops(inner, counts))}"
        raise UserError(f"--splits: {source} has no images in {printable('/'.join(path))}: {way_out}")
    return places
