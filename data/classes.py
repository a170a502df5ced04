"""Classes of images from the folders below their splits; words that name splits and folders.

A folder that looks like anything but a class is refused: masks, parts of a collection, versions, copies.
"""

import re
import shlex
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from configs.errors import UserError, counted, printable
from data.sources import Item

Folders = list[tuple[str, ...]]
UNLABELED = "unlabeled"
SPLIT_WORDS = {
    "train": "train", "training": "train", "tr": "train", "trn": "train", "trainval": "train",
    "val": "val", "vali": "val", "valid": "val", "validate": "val", "validation": "val", "dev": "val",
    "development": "val", "eval": "val", "evaluate": "val", "evaluation": "val",
    "test": "test", "tests": "test", "testing": "test", "tst": "test", "te": "test", "ts": "test",
    "unlabeled": UNLABELED, "unlabelled": UNLABELED, "unlab": UNLABELED, "extra": UNLABELED, "nolabel": UNLABELED,
    "nolabels": UNLABELED, "unannotated": UNLABELED, "unsupervised": UNLABELED, "unsup": UNLABELED,
}  # fmt: skip
STARTS = ("train", "test", "valid")  # of words in several languages
PLAIN_WORDS = {"set", "split", "data", "dataset", "image", "images", "img", "imgs", "photos", "pictures", "folder"}
IMAGE_FOLDERS = {"images", "image", "imgs", "img", "jpegimages", "jpeg", "jpg", "png", "photos", "pictures", "data"}
MASK_FOLDERS = {
    "mask", "masks", "label", "labels", "annotation", "annotations", "segmentation", "segmentations", "seg", "gt",
    "groundtruth", "ground_truth", "trimaps", "depth", "edges", "targets",
}  # fmt: skip
PARTS = {"part", "batch", "chunk", "shard", "fold", "subset", "volume", "cv"}
WAY_OUT = "(options of data/prepare.py)"


def split_name(folder: str) -> str | None:
    """The split that a folder's name stands for, such as val for `Validation_images` or `val2017`; None if no split."""
    words = words_of(folder)
    splits = [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS]
    return splits[0] if len(splits) == 1 and all(w in SPLIT_WORDS or w in PLAIN_WORDS for w in words) else None


def words_of(folder: str) -> list[str]:
    """Words of a name in lower case, without numbers: `trainSet_2017` -> train, set."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", folder)
    joined = re.findall(r"[a-z]+", folder.lower())
    if any(word in SPLIT_WORDS for word in joined):
        words = joined
    found = [word.lower() for word in words]
    ends = [(w, e) for w in found for e in ("set", "data", "images") if w.endswith(e) and w[: -len(e)] in SPLIT_WORDS]
    return [next((w[: -len(e)] for word, e in ends if word == w), w) for w in found]


def folders_of(name: str) -> tuple[str, ...]:
    """Folders of a member; a root or `..` is none."""
    return tuple(part for part in PurePosixPath(name).parts[:-1] if part not in ("/", "//", ".."))


def listed(names: Iterable[str]) -> str:
    """Names of folders, for a message."""
    return ", ".join(f"{printable(name)}/" for name in sorted(names))


def classes_of(
    names: list[str | None], folders: Folders, items: list[Item], source: str, notes: list[str], decided: bool
) -> list[str | None]:
    """Class of each image: its folder, if all images of its split are in one.

    Args:
        names: split of each image; folders: the folders below it
        notes: lines on what was decided are added
        decided: the user has said which folders are classes, so that none is refused for its name
    Raises:
        UserError: the folders could mean several things
    """
    labels: list[str | None] = [None] * len(items)
    by_split = defaultdict(list)
    for i, name in enumerate(names):
        by_split[name].append(i)
    if all(len(parts) == 1 and parts[0].lower() in IMAGE_FOLDERS for parts in folders) and len(set(folders)) == 1:
        notes.append(f"{folders[0][0]}/ is not taken as a class")
        folders = [()] * len(folders)
    groups = {split: _below([folders[i] for i in members], split, notes) for split, members in by_split.items()}
    if not decided:
        _check_folders({split: (groups[split], [items[i] for i in m]) for split, m in by_split.items()}, source)
    for split, group in groups.items():
        members = by_split[split]
        if split == UNLABELED:
            if any(group):
                notes.append(f"split {UNLABELED}: its sub-folders are not classes")
        elif all(group):
            for i, parts in zip(members, group, strict=True):
                labels[i] = printable(parts[0])
            if split is not None:
                check_repeats(group, f"{source}, split {split}")
        elif any(group):
            stray = next(items[i].name for i, parts in zip(members, group, strict=True) if not parts)
            problem = f"some images are in class folders, others, like {printable(stray)}, are not"
            raise UserError(f"{source}: {problem}: move them, or use --no-labels (option of data/prepare.py)")
    odd = {part for parts in folders for part in parts[:1] if printable(part) != part}
    if odd and any(labels):
        names = counted(len(odd), "class name")
        notes.append(f"{names} with bytes that cannot be printed, written like {printable(min(odd))}")
    return labels


def _below(group: Folders, split: str | None, notes: list[str]) -> Folders:
    """Without a single folder in a split that only repeats its name or is named like `images`.

    Above the classes it is none; in place of them only in split test, which often has no labels.
    """
    while split and all(group) and len({parts[0] for parts in group}) == 1:
        top = group[0][0]
        if top.lower() not in IMAGE_FOLDERS and split_name(top) != split:
            break
        if any(len(parts) == 1 for parts in group):
            if split != "test" or any(len(parts) > 1 for parts in group):
                break
            notes.append(f"split test: {printable(top)}/ is not taken as a class")
        group = [parts[1:] for parts in group]
    return group


def check_repeats(folders: Folders, source: str) -> None:
    """Raise `UserError` if a folder contains copies of the folders beside it."""
    below = defaultdict(set)
    for parts in folders:
        if parts:
            below[parts[0]].add(parts[1] if len(parts) > 1 else "")
    for top, names in below.items():
        others = below.keys() - {top}
        if others and others <= names and (len(others) > 1 or top == Path(source).stem):
            problem = f"{printable(top)}/ repeats the folders beside it ({listed(others)}), images would be read twice"
            raise UserError(f"{source}: {problem}: move it away, or say `--no-splits` if it is a class {WAY_OUT}")


def _check_folders(splits: dict[str | None, tuple[Folders, list[Item]]], source: str) -> None:
    """Raise `UserError` if folders in the place of classes look like something else."""
    for split, (group, _) in splits.items():
        if split == UNLABELED or not all(group):
            continue
        below = defaultdict(set)
        for parts in group:
            below[parts[0]].add(parts[1] if len(parts) > 1 else "")
        problem, chosen = _no_classes(below)
        if problem:
            pairs = [_pair(*found) for top in chosen[:3] for found in _places(splits, top)]
            read = f"say `--splits {' '.join(pairs)}` to read only {'those' if len(pairs) > 1 else 'that'}"
            keep = f"{_keep(splits)} if {listed([*below][:3])} are classes {WAY_OUT}"
            way_out = f"{read} (folders of one split are joined), or {keep}"
            raise UserError(f"{source}{f', split {split}' if split else ''}: {problem}: {way_out}")


def _no_classes(below: dict[str, set[str]]) -> tuple[str, list[str]]:
    """Why folders (name -> folders in them) may be no classes, and which of them to read; empty if they may."""
    tops, some = {top.lower() for top in below}, listed([*below][:3])
    pictures, masks = (sorted(top for top in below if top.lower() in kind) for kind in (IMAGE_FOLDERS, MASK_FOLDERS))
    if pictures and masks:
        return f"{listed(masks)} beside {listed(pictures)} are about the images, not classes", pictures
    if len(tops) == 1:
        return "", []
    stems = {re.sub(r"[-_ .]*\d+$", "", top) for top in tops}
    last = set(re.findall("[a-z]+", min(stems))[-1:])
    if len(stems) == 1 and not stems & tops and last & (PARTS | IMAGE_FOLDERS | PLAIN_WORDS):
        return f"{some} are named like parts of one collection, not like classes", sorted(below)
    shared = set.intersection(*below.values()) - {""}
    if len(shared) > 1 and 2 * len(shared) >= len(set.union(*below.values())):
        names = listed(sorted(shared)[:3])
        return f"{some} have the same sub-folders ({names}), so either may be the classes", [min(below)]
    return "", []


def _places(splits: dict[str | None, tuple[Folders, list[Item]]], top: str) -> list[tuple[str | None, str]]:
    """Split and path of each folder of a name in the place of classes."""
    found = {}
    for split, (group, items) in splits.items():
        for parts, item in zip(group, items, strict=True):
            if parts[:1] == (top,) and split not in found:
                full = folders_of(item.name)
                above = len(full) - len(parts)
                found[split] = "/".join(full[: above + 1] if full[above:] == parts else full[:2])  # CAT/train
    return [*found.items()]


def _keep(splits: dict[str | None, tuple[Folders, list[Item]]]) -> str:
    """What makes the folders below the splits classes."""
    pairs = []
    for split, (group, items) in splits.items():
        full = folders_of(items[0].name)
        above = len(full) - len(group[0])
        if split is None:
            return "`--no-splits`"
        if full[above:] != group[0]:  # CAT/train
            return "move the splits above them"
        pairs.append(_pair(split, "/".join(full[:above])))
    return f"`--splits {' '.join(pairs)}`"


def _pair(split: str | None, folder: str) -> str:
    return shlex.quote(f"{split or 'train'}={printable(folder)}")
