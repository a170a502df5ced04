"""Splits and class names of images from their paths.

    train/CAT/1.jpg  test/DOG/2.jpg     top folders are splits if all of them have names of splits
    CAT/train/1.jpg  DOG/test/2.jpg     the same below the classes
    CAT/1.jpg        DOG/more/2.jpg     the next folder is the class, if every image of the split is in one
    1.jpg            2.jpg              no classes

What could mean several things is refused; `--splits` and `--no-splits` say what is meant.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from configs.errors import UserError, counted, printable
from data.listing import Listing
from data.sources import Item

Folders = list[tuple[str, ...]]
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
    items, notes, labelled = listing.images, [], labelled and not listing.sidecars
    if listing.shards:
        return _from_shards(listing), notes
    full = [_folders(item.name) for item in items]
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
        labels = _labels(names, folders, items, listing.source, notes)
    return [replace(item, split=s, label=c) for item, s, c in zip(items, names, labels, strict=True)], notes


def _folders(name: str) -> tuple[str, ...]:
    """Folders of a member; a root or `..` is none."""
    return tuple(part for part in PurePosixPath(name).parts[:-1] if part not in ("/", "//", ".."))


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
    pairs = " ".join(f"{split}={printable(top)}" for top, split in sorted(tops.items()))
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
        raise UserError(f"{seen}: only {_listed(splits)} {_is_or_are(splits)} named like splits: {_advice(splits)}")
    if splits:
        for split, same in _inverted(splits).items():
            if len(same) > 1 and split != UNLABELED:
                one = _advice({top: name for top, name in splits.items() if top not in same[1:]})
                raise UserError(f"{seen}: {_listed(same)} are names of one split, {split}: {one}")
        return [splits[parts[0]] for parts in folders], [parts[1:] for parts in folders]
    hints = {top: hint for top in tops if (hint := _hint(top))}
    if len(set(hints.values())) > 1:
        raise UserError(f"{seen}: {_listed(hints)} may be splits: {_advice(hints)}")
    below = {parts[1] if len(parts) > 1 else "" for parts in folders}
    names = {name: split_name(name) for name in below}
    if len(set(names.values())) > 1 and any(names.values()):
        if not all(names.values()):
            problem = f"below the classes, only {_listed(n for n in names if names[n])} are named like splits"
            raise UserError(f"{seen}: {problem}: say `--no-splits` if all are parts of their classes {WAY_OUT}")
        notes.append(f"splits are below the classes: {', '.join(sorted(set(names.values())))}")
        return [names[parts[1]] for parts in folders], [(parts[0], *parts[2:]) for parts in folders]
    _check_repeats(folders, source)
    return [None] * len(items), folders


def _hint(top: str) -> str | None:
    """The split that one of the words of a name stands for."""
    words = [word for word in _words(top) if len(word) > 2 and word in SPLIT_WORDS]
    return SPLIT_WORDS[words[0]] if len(words) == 1 else None


def _inverted(splits: dict[str, str]) -> dict[str, list[str]]:
    found = defaultdict(list)
    for top, split in sorted(splits.items()):
        found[split].append(top)
    return found


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"{printable(name)}/" for name in sorted(names))


def _is_or_are(names: dict) -> str:
    return "is" if len(names) == 1 else "are"


def _check_repeats(folders: Folders, source: str) -> None:
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


def _chosen(
    pairs: tuple[str, ...], full: Folders, stripped: Folders, source: str
) -> tuple[list[str], Folders, list[int]]:
    """Split, remaining folders and number of each image in a folder of `--splits`."""
    wanted = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z]\w*", name) or not _folders(f"{folder}/x"):
            raise UserError(f"--splits {printable(pair)}: write NAME=FOLDER, such as train=Training")
        wanted[_folders(f"{folder}/x")] = name
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


def _labels(
    names: list[str | None], folders: Folders, items: list[Item], source: str, notes: list[str]
) -> list[str | None]:
    """Class of each image: its folder, if all images of its split are in one."""
    labels: list[str | None] = [None] * len(items)
    by_split = defaultdict(list)
    for i, name in enumerate(names):
        by_split[name].append(i)
    if all(len(parts) == 1 and parts[0].lower() in IMAGE_FOLDERS for parts in folders) and len(set(folders)) == 1:
        notes.append(f"{folders[0][0]}/ is not taken as a class")
        folders = [()] * len(folders)
    for split, members in by_split.items():
        group = _without_image_folder([folders[i] for i in members], split)
        if split == UNLABELED:
            if any(group):
                notes.append(f"split {UNLABELED}: its sub-folders are not classes")
        elif all(group):
            for i, parts in zip(members, group, strict=True):
                labels[i] = printable(parts[0])
            if split is not None:
                _check_repeats(group, f"{source}, split {split}")
        elif any(group):
            stray = next(items[i].name for i, parts in zip(members, group, strict=True) if not parts)
            problem = f"some images are in class folders, others, like {printable(stray)}, are not"
            raise UserError(f"{source}: {problem}: move them, or use --no-labels (option of data/prepare.py)")
    odd = {part for parts in folders for part in parts[:1] if printable(part) != part}
    if odd and any(labels):
        names = counted(len(odd), "class name")
        notes.append(f"{names} with bytes that cannot be printed, written like {printable(min(odd))}")
    return labels


def _without_image_folder(group: Folders, split: str | None) -> Folders:
    """Without a single folder in a split that only repeats its name or is named like `images`, above the classes."""
    while split and all(len(parts) > 1 for parts in group) and len({parts[0] for parts in group}) == 1:
        top = group[0][0]
        if top.lower() not in IMAGE_FOLDERS and split_name(top) != split:
            break
        group = [parts[1:] for parts in group]
    return group
