"""Classes of images from the folders below their splits; words that name splits and folders.

A folder that looks like anything but a class is refused: masks, parts of a collection, versions, copies.
"""

import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path, PurePosixPath

from configs.errors import UserError, counted, printable
from data.sources import Item

Folder = tuple[str, ...]  # of an image, from the top
Places = dict[Folder, tuple[str | None, Folder]]  # split of a folder, and what is below it
Group = dict[Folder, Folder]  # of one split: a folder, and what is below the split
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
    "masks", "mask", "labels", "label", "annotations", "annotation", "segmentationclass", "segmentationclassaug",
    "segmentation", "segmentations", "seg", "gt", "gtfine", "gtcoarse", "groundtruth", "ground_truth", "targets",
}  # fmt: skip
NO_CLASSES = MASK_FOLDERS | {"trimaps", "depth", "edges"}  # beside images
PARTS = {"part", "batch", "chunk", "shard", "fold", "subset", "volume", "cv"}
WAY_OUT = "(options of data/prepare.py)"


@lru_cache(1 << 12)
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


def folders_of(name: str) -> Folder:
    """Folders of a member; a root or `..` is none."""
    return parts_of(name.rpartition("/")[0])


@lru_cache(1 << 20)
def parts_of(folder: str) -> Folder:
    """Folders of a path; a root or `..` is none."""
    return tuple(part for part in PurePosixPath(folder).parts if part not in ("/", "//", ".."))


def listed(names: Iterable[str]) -> str:
    """Names of folders, for a message."""
    return ", ".join(f"{printable(name)}/" for name in sorted(names))


def classes_of(
    places: Places, counts: Counter[Folder], items: list[Item], source: str, notes: list[str], decided: bool
) -> dict[Folder, str]:
    """Class of each folder: the first one below its split, if all images of the split are in one.

    Args:
        counts: images of each folder
        notes: lines on what was decided are added
        decided: the user has said which folders are classes, so that none is refused for its name
    Raises:
        UserError: the folders could mean several things
    """
    labels: dict[Folder, str] = {}
    below = {parts for _, parts in places.values()}
    if len(below) == 1 and len(only := next(iter(below))) == 1 and only[0].lower() in IMAGE_FOLDERS:
        notes.append(f"{only[0]}/ is not taken as a class")
        return labels
    groups: dict[str | None, Group] = defaultdict(dict)
    for folder, (split, parts) in places.items():
        groups[split][folder] = parts
    groups = {split: _below(group, split, notes) for split, group in groups.items()}
    if not decided:
        _check_folders(groups, source)
    for split, group in groups.items():
        where = source if split is None else f"{source}, split {split}"
        if split == UNLABELED:
            if any(group.values()):
                notes.append(f"split {UNLABELED}: its sub-folders are not classes")
        elif all(group.values()):
            labels |= {folder: printable(parts[0]) for folder, parts in group.items()}
            if split is not None:
                check_repeats(group.values(), where)
        elif any(group.values()):
            stray = {folder for folder, parts in group.items() if not parts}
            number = counted(sum(counts[folder] for folder in stray), "image")
            first = printable(next(item.name for item in items if folders_of(item.name) in stray))
            one = f"`--splits {split or 'train'}=FOLDER` to read one folder only"
            way_out = f"move such images away, or say `--no-labels`, or {one} {WAY_OUT}"
            raise UserError(f"{where}: {number} outside of the class folders, such as {first}: {way_out}")
    odd = {parts[0] for _, parts in places.values() if parts and printable(parts[0]) != parts[0]}
    if odd and labels:
        names = counted(len(odd), "class name")
        notes.append(f"{names} with bytes that cannot be printed, written like {printable(min(odd))}")
    return labels


def _below(group: Group, split: str | None, notes: list[str]) -> Group:
    """Without a single folder in a split that only repeats its name or is named like `images`.

    Above the classes it is none; in place of them only in split test, which often has no labels.
    """
    while split and all(group.values()) and len({parts[0] for parts in group.values()}) == 1:
        top = next(iter(group.values()))[0]
        if top.lower() not in IMAGE_FOLDERS and split_name(top) != split:
            break
        if any(len(parts) == 1 for parts in group.values()):
            if split != "test" or any(len(parts) > 1 for parts in group.values()):
                break
            notes.append(f"split test: {printable(top)}/ is not taken as a class")
        group = {folder: parts[1:] for folder, parts in group.items()}
    return group


def _inside(folders: Iterable[Folder]) -> dict[str, set[str]]:
    """Names of the folders in each top folder; `` if it has images itself."""
    inside = defaultdict(set)
    for parts in folders:
        if parts:
            inside[parts[0]].add(parts[1] if len(parts) > 1 else "")
    return inside


def check_repeats(folders: Iterable[Folder], source: str) -> None:
    """Raise `UserError` if a folder contains copies of the folders beside it."""
    inside = _inside(folders)
    for top, names in inside.items():
        others = inside.keys() - {top}
        if others and others <= names and (len(others) > 1 or top == Path(source).stem):
            problem = f"{printable(top)}/ repeats the folders beside it ({listed(others)}), images would be read twice"
            raise UserError(f"{source}: {problem}: move it away, or say `--no-splits` if it is a class {WAY_OUT}")


def _check_folders(groups: dict[str | None, Group], source: str) -> None:
    """Raise `UserError` if folders in the place of classes look like something else."""
    for split, group in groups.items():
        if split == UNLABELED or not all(group.values()):
            continue
        inside = _inside(group.values())
        problem, chosen = _no_classes(inside)
        if problem:
            pairs = [_pair(*found) for top in chosen[:3] for found in _places(groups, top)]
            read = f"say `--splits {' '.join(pairs)}` to read only {'those' if len(pairs) > 1 else 'that'}"
            keep = f"{_keep(groups)} if {listed([*inside][:3])} are classes {WAY_OUT}"
            way_out = f"{read} (folders of one split are joined), or {keep}"
            raise UserError(f"{source}{f', split {split}' if split else ''}: {problem}: {way_out}")


def _no_classes(inside: dict[str, set[str]]) -> tuple[str, list[str]]:
    """Why folders (name -> folders in them) may be no classes, and which of them to read; empty if they may."""
    tops, some = {top.lower() for top in inside}, listed([*inside][:3])
    pictures, masks = (sorted(top for top in inside if top.lower() in kind) for kind in (IMAGE_FOLDERS, NO_CLASSES))
    if pictures and masks:
        return f"{listed(masks)} beside {listed(pictures)} are not classes, --masks reads masks", pictures
    if len(tops) == 1:
        return "", []
    stems = {re.sub(r"[-_ .]*\d+$", "", top) for top in tops}
    last = set(re.findall("[a-z]+", min(stems))[-1:])
    if len(stems) == 1 and not stems & tops and last & (PARTS | IMAGE_FOLDERS | PLAIN_WORDS):
        return f"{some} are named like parts of one collection, not like classes", sorted(inside)
    shared = set.intersection(*inside.values()) - {""}
    if "0" not in shared:  # numbers are visits, sequences or parts of a class; from 0 on they may be classes
        shared = {name for name in shared if re.search(r"[^\W\d_]", name)}
    if len(shared) > 1 and 2 * len(shared) >= len(set.union(*inside.values())):
        names = listed(sorted(shared)[:3])
        return f"{some} have the same sub-folders ({names}), so either may be the classes", [min(inside)]
    return "", []


def _places(groups: dict[str | None, Group], top: str) -> list[tuple[str | None, str]]:
    """Split and path of each folder of a name in the place of classes."""
    found = {}
    for split, group in groups.items():
        for full, parts in group.items():
            if parts[:1] == (top,) and split not in found:
                found[split] = "/".join(full[: len(full) - len(parts) + 1])  # also of CAT/train
    return [*found.items()]


def _keep(groups: dict[str | None, Group]) -> str:
    """What makes the folders below the splits classes."""
    pairs = []
    for split, group in groups.items():
        full, parts = next(iter(group.items()))
        if split is None:
            return "`--no-splits`"
        above = len(full) - len(parts)
        if full[above:] != parts:  # CAT/train
            return "move the splits above them"
        pairs.append(_pair(split, "/".join(full[:above])))
    return f"`--splits {' '.join(pairs)}`"


def _pair(split: str | None, folder: str) -> str:
    return shlex.quote(f"{split or 'train'}={printable(folder)}")
