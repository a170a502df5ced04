"""Splits and class names of images from their paths.

    train/CAT/1.jpg  test/DOG/2.jpg     top folders are splits if all of them have names of splits
    CAT/train/1.jpg  DOG/test/2.jpg     the same below the classes
    CAT/1.jpg        DOG/more/2.jpg     the next folder is the class; images beside the folders have none
    1.jpg            2.jpg              no classes

What could mean several things is refused; `--splits` and `--no-splits` say what is meant.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path, PurePosixPath

from configs.errors import UserError, counted, few, printable
from data.listing import Listing
from data.sources import Item

Folder = tuple[str, ...]  # of an image, from the top
Places = dict[Folder, tuple[str | None, Folder]]  # split of a folder, and what is below it
UNLABELED = "unlabeled"
SPLIT_WORDS = {
    "train": "train", "training": "train", "tr": "train", "trn": "train", "trainval": "train",
    "val": "val", "vali": "val", "valid": "val", "validate": "val", "validation": "val", "dev": "val",
    "development": "val", "eval": "val", "evaluate": "val", "evaluation": "val",
    "test": "test", "tests": "test", "testing": "test", "tst": "test", "te": "test",
    "unlabeled": UNLABELED, "unlabelled": UNLABELED, "unlab": UNLABELED, "extra": UNLABELED, "nolabel": UNLABELED,
    "nolabels": UNLABELED, "unannotated": UNLABELED, "unsupervised": UNLABELED, "unsup": UNLABELED,
}  # fmt: skip
PLAIN_WORDS = {"set", "split", "data", "dataset", "image", "images", "img", "imgs", "photos", "pictures", "folder"}
IMAGE_FOLDERS = {"images", "image", "imgs", "img", "jpegimages", "jpeg", "jpg", "png", "photos", "pictures", "data"}
WAY_OUT = "(options of data/prepare.py)"


def split_name(folder: str) -> str | None:
    """The split that a folder's name stands for, such as val for `Validation_images` or `val2017`; None if no split."""
    words = _words(folder)
    splits = [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS]
    return splits[0] if len(splits) == 1 and all(w in SPLIT_WORDS or w in PLAIN_WORDS for w in words) else None


def _words(folder: str) -> list[str]:
    """Words of a name in lower case, without numbers: `trainSet_2017` -> train, set."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", folder)
    joined = re.findall(r"[a-z]+", folder.lower())
    if any(word in SPLIT_WORDS for word in joined):
        words = joined
    found = [word.lower() for word in words]
    ends = [(w, e) for w in found for e in ("set", "data", "images") if w.endswith(e) and w[: -len(e)] in SPLIT_WORDS]
    return [next((w[: -len(e)] for word, e in ends if word == w), w) for w in found]


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
    counts = Counter(_folders(item.name) for item in items)  # the rest looks at folders, not at every image
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
    labels = {} if own_labels else _labels(places, counts, items, source, notes)
    arranged = []
    for item in items:
        folder = _folders(item.name)
        if folder in places:
            split = places[folder][0]
            label = item.label if own_labels and split != UNLABELED else labels.get(folder)
            arranged.append(item.placed(split, label))
    return arranged, notes


def _folders(name: str) -> Folder:
    """Folders of a member; a root or `..` is none."""
    return _parts(name.rpartition("/")[0])


@lru_cache(1 << 20)
def _parts(folder: str) -> Folder:
    return tuple(part for part in PurePosixPath(folder).parts if part not in ("/", "//", ".."))


def _from_shards(listing: Listing) -> list[Item]:
    """Numbered archives like train-0001.tar: the split is in their names, classes are beside the images."""
    found = []
    for item in listing.images:
        shard = next((p for p in PurePosixPath(item.name).parents if str(p) in listing.shards), PurePosixPath())
        stem = shard.name.rstrip("0123456789").rstrip("-_.")
        words = [split_name(word) for word in re.split(r"[-_.]", stem)]
        found.append(replace(item, split=next(filter(None, reversed(words)), None)))
    if any(item.split for item in found) and not all(item.split for item in found):
        raise UserError(f"{listing.source}: only some archives have a split in their names: prepare them one by one")
    return found


def _without_common(folders: list[Folder], keep_splits: bool) -> dict[Folder, Folder]:
    """Each folder without those that contain everything."""
    start = 0
    while all(len(parts) > start + 1 for parts in folders) and len({parts[start] for parts in folders}) == 1:
        if keep_splits and split_name(folders[0][start]):
            break
        start += 1
    return {parts: parts[start:] for parts in folders}


def _tops(inner: dict[Folder, Folder], counts: Counter[Folder]) -> Counter[str]:
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
    pairs = " ".join(f"{split}={printable(top)}" for top, split in sorted(tops.items()))
    return f"say `--splits {pairs}` to read those and leave out the rest, or `--no-splits` if all are classes {WAY_OUT}"


def _found(inner: dict[Folder, Folder], counts: Counter[Folder], source: str, notes: list[str]) -> Places:
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
        raise UserError(f"{seen}: only {_listed(splits)} {_is_or_are(splits)} named like splits: {_advice(splits)}")
    if splits:
        for split in set(splits.values()) - {UNLABELED}:
            same = sorted(top for top in splits if splits[top] == split)
            if len(same) > 1:
                one = _advice({top: name for top, name in splits.items() if top not in same[1:]})
                raise UserError(f"{seen}: {_listed(same)} are names of one split, {split}: {one}")
        return {folder: (splits[parts[0]], parts[1:]) for folder, parts in inner.items()}
    hints = {top: hint for top in tops if (hint := _hint(top))}
    if len(set(hints.values())) > 1:
        raise UserError(f"{seen}: {_listed(hints)} may be splits: {_advice(hints)}")
    names = {name: split_name(name) for name in {parts[1] if len(parts) > 1 else "" for parts in inner.values()}}
    if len(set(names.values())) > 1 and any(names.values()):
        if not all(names.values()):
            problem = f"below the classes, only {_listed(n for n in names if names[n])} are named like splits"
            raise UserError(f"{seen}: {problem}: say `--no-splits` if all are parts of their classes {WAY_OUT}")
        notes.append(f"splits are below the classes: {', '.join(sorted(set(names.values())))}")
        return {folder: (names[parts[1]], (parts[0], *parts[2:])) for folder, parts in inner.items()}
    _check_repeats(inner.values(), source)
    return {folder: (None, parts) for folder, parts in inner.items()}


def _hint(top: str) -> str | None:
    """The split that one of the words of a name stands for."""
    words = [word for word in _words(top) if len(word) > 2 and word in SPLIT_WORDS]
    return SPLIT_WORDS[words[0]] if len(words) == 1 else None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"{printable(name)}/" for name in sorted(names))


def _is_or_are(names: dict) -> str:
    return "is" if len(names) == 1 else "are"


def _check_repeats(folders: Iterable[Folder], source: str) -> None:
    """Raise `UserError` if a folder contains copies of the folders beside it."""
    below = defaultdict(set)
    for parts in folders:
        if parts:
            below[parts[0]].add(parts[1] if len(parts) > 1 else "")
    for top, names in below.items():
        others = below.keys() - {top}
        if others and others <= names and (len(others) > 1 or top == Path(source).stem):
            problem = f"{printable(top)}/ repeats the folders beside it ({_listed(others)}), images would be read twice"
            raise UserError(f"{source}: {problem}: move it away, or say `--no-splits` if it is a class {WAY_OUT}")


def _chosen(pairs: tuple[str, ...], inner: dict[Folder, Folder], counts: Counter[Folder], source: str) -> Places:
    """Split and remaining folders of each folder that `--splits` names or contains."""
    wanted = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z]\w*", name) or not _parts(folder):
            raise UserError(f"--splits {printable(pair)}: write NAME=FOLDER, such as train=Training")
        wanted[_parts(folder)] = name
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


def _labels(
    places: Places, counts: Counter[Folder], items: list[Item], source: str, notes: list[str]
) -> dict[Folder, str]:
    """Class of each folder; folders without one are missing."""
    labels: dict[Folder, str] = {}
    by_split = defaultdict(dict)
    for folder, (split, parts) in places.items():
        by_split[split][folder] = parts
    below = {parts for _, parts in places.values()}
    if len(below) == 1 and len(only := next(iter(below))) == 1 and only[0].lower() in IMAGE_FOLDERS:
        notes.append(f"{only[0]}/ is not taken as a class")
        return labels
    for split, members in by_split.items():
        group = _without_image_folder(members, split)
        where = source if split is None else f"{source}, split {split}"
        if split == UNLABELED:
            if any(group.values()):
                notes.append(f"split {UNLABELED}: its sub-folders are not classes")
        elif any(group.values()):
            labels |= {folder: printable(parts[0]) for folder, parts in group.items() if parts}
            if split is not None:
                _check_repeats(group.values(), where)
            if stray := {folder for folder, parts in group.items() if not parts}:
                first = next(item.name for item in items if _folders(item.name) in stray)
                number = counted(sum(counts[folder] for folder in stray), "image")
                notes.append(f"warning: {number} outside of the class folders, such as {first}: without a label")
    odd = {parts[0] for _, parts in places.values() if parts and printable(parts[0]) != parts[0]}
    if odd and labels:
        names = counted(len(odd), "class name")
        notes.append(f"{names} with bytes that cannot be printed, written like {printable(min(odd))}")
    return labels


def _without_image_folder(group: dict[Folder, Folder], split: str | None) -> dict[Folder, Folder]:
    """Without a single folder in a split that only repeats its name or is named like `images`, above the classes."""
    while split and all(len(parts) > 1 for parts in group.values()) and len({p[0] for p in group.values()}) == 1:
        top = next(iter(group.values()))[0]
        if top.lower() not in IMAGE_FOLDERS and split_name(top) != split:
            break
        group = {folder: parts[1:] for folder, parts in group.items()}
    return group
