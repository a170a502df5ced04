"""Images that were not prepared, with the interface of `data.shards.Split`; opening either of the two.

This module does not import torch.
"""

import hashlib
import json
import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from configs.errors import UserError, nearest, printable
from configs.log import say
from configs.schema import Data
from data.layouts import arrange
from data.listing import Listing, list_source
from data.reading import KEPT, Reading, sniff
from data.remote import is_url
from data.shards import Split, open_folder, open_split, read_index
from data.sources import Item
from data.tars import IMAGE_TYPES, split_member_name

DEFAULT = Reading()


class Folder:
    """The images of a folder, zip or uncompressed tar, with the interface of `data.shards.Split`.

    Sub-folders are classes. Top folders named like splits (train, val, test) are splits; without them, the split
    contains all images or, with `strict` and a name other than train, is missing. Classes are those of all splits,
    sorted by name as in `data/prepare.py`; None if all images are outside of class folders. `reading` decides how files
    are read. Raises `UserError` if there are no images, no such split, or the folders could mean several things.
    """

    shards = ()  # none to fetch

    def __init__(self, folder: Path, name: str, reading: Reading = DEFAULT, strict: bool = False):
        self.folder, self.name, self.reading = folder, name, reading
        self.items, notes = arrange(_listed(folder))
        for note in notes:
            say(f"{printable(folder)}: {printable(note)}")
        self.classes = sorted({item.label for item in self.items} - {None}) or None
        splits = {item.split for item in self.items}
        if splits == {None} and strict and name != "train":
            way_out = f"make folders train/ and {name}/ in it, or shards with `data/prepare.py --val-fraction 0.1`"
            raise UserError(f"{folder} has no split {name}: {way_out}")
        if splits == {None}:
            say(f"{folder} has no split folders: using all {len(self.items):,} images as split {name}")
        elif name not in splits:
            raise UserError(f"{folder} has no split {name} {nearest(name, splits)}")
        else:
            self.items = [item for item in self.items if item.split == name]
        number = {label: i for i, label in enumerate(self.classes or [])}
        self._labels = np.array([number.get(item.label, -1) for item in self.items], np.int32)
        self.counts = np.array([len(self.items)])

    def __len__(self) -> int:
        return len(self.items)

    @property
    def digest(self) -> str:
        """Digest of names, labels, sizes and times of the images, compared on resume."""
        listed = hashlib.sha256()
        for item in self.items:
            listed.update(f"{item.name}\0{item.stamp}\0{item.label}\0".encode(errors="surrogateescape"))
        return listed.hexdigest()[:16]

    def read(self, sample: int) -> tuple[bytes, int]:
        """Image bytes for `data.decode.decode` and label (-1 = none); errors as `read_image`."""
        item = self.items[sample]
        if item.is_file:
            data = read_image(Path(item.container), self.reading)
        else:
            data = loadable(item.image_bytes(), item.name, self.reading)
        return data, int(self._labels[sample])

    def labels(self) -> np.ndarray:
        """Label of every sample, -1 = none."""
        return self._labels


def list_images(folder: Path) -> list[Item]:
    """All images of a folder, zip or uncompressed tar, sorted by name. Raises `UserError` if there are none."""
    return _listed(folder).images


def _listed(folder: Path) -> Listing:
    """Files below a folder; says what is left out."""
    with list_source(str(folder), None) as listing:
        for note in listing.notes():
            say(f"{printable(folder)}: {printable(note)}")
        return listing


def read_image(path: Path, reading: Reading = DEFAULT) -> bytes:
    """Content of an image file for `data.decode.decode`, converted as in a shard; `UserError` if it cannot be used."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror.lower()})") from None
    return loadable(data, path.name, reading)


def loadable(data: bytes, name: str, reading: Reading = DEFAULT) -> bytes:
    """The bytes of an image, converted if `data.decode.decode` does not read its type; `UserError` if unreadable."""
    if sniff(data) in KEPT and reading.as_stored:
        return data
    from data.reencode import reencode  # imports torch

    return reencode(data, name, reading=reading)[1]


def is_collection(path: str) -> bool:
    """Whether a path has images that were not prepared: a folder without shards, a zip, a tar."""
    folder = Path(path)
    if is_url(path) or (folder / "index.json").exists() or (folder.is_dir() and any(folder.glob("*.tar"))):
        return False
    return folder.is_dir() or (folder.is_file() and (zipfile.is_zipfile(folder) or tarfile.is_tarfile(folder)))


def open_images(path: str, split: str, reading: Reading = DEFAULT) -> Split | Folder:
    """Open a split of shards (a folder or a URL) or of a collection of images; `UserError` if the path is neither.

    `reading` decides how files of a collection are read.
    """
    if is_collection(path):
        return Folder(Path(path), split, reading)
    if not (is_url(path) or Path(path).is_dir()):
        problem = "is a file" if Path(path).exists() else "does not exist"
        raise UserError(f"{path} {problem}: give a folder of shards or of images, a zip, a tar, or the URL of shards")
    return open_split(Data(path), split)


def open_for_training(data: Data, name: str | None = None) -> Split | Folder:
    """Open split `name`, by default `data.split`, of `data.path`: shards, or a collection that was not prepared."""
    if is_collection(data.path):
        return Folder(Path(data.path), name or data.split, strict=True)
    return open_split(data, name)


def count_labels(path: str) -> dict[str, Counter]:
    """Images of each class (None = no label) in each split of shards or of a collection, which may be only `train`.

    Raises `UserError` if there are no images.
    """
    counts: dict[str, Counter] = {}
    if is_collection(path):
        with list_source(path, None) as listing:
            for item in arrange(listing)[0]:
                counts.setdefault(item.split or "train", Counter())[item.label] += 1
        return counts
    for name in read_index(open_folder(Data(path))).splits:
        counts[name] = Counter(
            label if label >= 0 else None for label in open_split(Data(path), name).labels().tolist()
        )
    return counts


def sample_names(images: Split | Folder) -> list[str]:
    """Original name of each sample, printable: its path in the folder, or the name stored in the shard."""
    return list(map(printable, iterate_names(images)))


def iterate_names(images: Split | Folder) -> Iterator[str]:
    """Original names of the samples, a shard at a time: a remote one is fetched when its first name is taken."""
    if isinstance(images, Folder):
        return (item.name for item in images.items)
    return (name for number in range(len(images.shards)) for name in _shard_names(images, number))


def names_of(images: Split | Folder, samples: Iterable[int]) -> list[str]:
    """Original names of some samples, as in `sample_names`; only their shards are read."""
    if isinstance(images, Folder):
        return [images.items[sample].name for sample in samples]
    names, shards = [], {}
    for sample in samples:
        number = int(np.searchsorted(images.first, sample, "right")) - 1
        shards[number] = shards.get(number) or _shard_names(images, number)
        names.append(shards[number][sample - images.first[number]])
    return names


def _shard_names(split: Split, number: int) -> list[str]:
    """The original name of each sample of a shard or, if none is stored, the name of its image in the tar."""
    members: dict[str, str] = {}  # by key, in the order of the samples
    originals: dict[str, str] = {}
    shard = split.shards[number]
    try:
        with os.fdopen(split.open_tar(number), "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, kind = split_member_name(member.name)
                if member.isreg() and kind in IMAGE_TYPES:
                    members.setdefault(key, member.name)
                elif member.isreg() and kind == "json" and (name := _stored_name(tar.extractfile(member).read())):
                    originals[key] = name
    except tarfile.TarError:  # damaged: images are still readable by their offsets
        pass
    if len(members) != shard.samples:
        return [f"{shard.file}, sample {i}" for i in range(shard.samples)]
    return [originals.get(key, member) for key, member in members.items()]


def _stored_name(data: bytes) -> str | None:
    """The name in a sample's json member, written by `data/prepare.py`; None if there is none."""
    try:
        name = json.loads(data)["name"]
    except (ValueError, KeyError, TypeError):  # not JSON, no such key, not an object
        return None
    return name if isinstance(name, str) else None
