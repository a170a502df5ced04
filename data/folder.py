"""A plain folder of images with the interface of `data.shards.Split`; opening either of the two. Free of torch."""

import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from configs.errors import UserError, nearest
from configs.log import say
from configs.schema import Data
from data.remote import is_url
from data.shards import Split, open_split
from data.sources import Item, open_source
from data.tars import IMAGE_TYPES, split_member_name


class Folder:
    """The labelled images of a folder, with the interface of `data.shards.Split` that evaluation uses.

    Sub-folders are classes. Top folders named like splits (train, val, test) are splits; without them, the split
    contains all images. Classes are those of all splits, sorted by name as in `data/prepare.py`; None if an image is
    outside the class folders. Raises `UserError` if there are no images, or no such split.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name, self.items = folder, name, list_images(folder)
        labelled = all(item.label is not None for item in self.items)
        self.classes = sorted({item.label for item in self.items}) if labelled else None
        splits = {item.split for item in self.items}
        if splits == {None}:
            say(f"{folder} has no split folders: using all {len(self.items):,} images as split {name}")
        elif name not in splits:
            raise UserError(f"{folder} has no split {name} {nearest(name, splits)}")
        else:
            self.items = [item for item in self.items if item.split == name]
        number = {label: i for i, label in enumerate(self.classes or [])}
        self._labels = np.array([number.get(item.label, -1) for item in self.items], np.int32)

    def __len__(self) -> int:
        return len(self.items)

    def read(self, sample: int) -> tuple[bytes, int]:
        """Image bytes for `data.decode.decode` and label (-1 = none); errors as `read_image`."""
        return read_image(Path(self.items[sample].container)), int(self._labels[sample])

    def labels(self) -> np.ndarray:
        """Label of every sample, -1 = none."""
        return self._labels


def list_images(folder: Path) -> list[Item]:
    """All images below a folder, sorted by name. Raises `UserError` if there are none."""
    path = str(folder.absolute())  # absolute: a folder named digits is not the built-in source
    with open_source(path, folder, ignore_labels=True) as items:
        return items


def read_image(path: Path) -> bytes:
    """Content of an image file for `data.decode.decode`; bmp, tif, ppm are converted; `UserError` if unreadable."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror.lower()})") from None
    if path.suffix.lower().removeprefix(".") in IMAGE_TYPES:
        return data
    from data.reencode import reencode  # imports torch

    return reencode(data, path.name)[1]


def open_images(path: str, split: str) -> Split | Folder:
    """Open a split of shards (a folder or a URL) or of a plain folder of images; `UserError` if the path is neither."""
    folder = Path(path)
    if is_url(path) or (folder / "index.json").exists() or (folder.is_dir() and any(folder.glob("*.tar"))):
        return open_split(Data(path), split)
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{path} {problem}: give a folder of shards or of images, or the URL of a folder of shards")
    return Folder(folder, split)


def sample_names(images: Split | Folder) -> list[str]:
    """Original name of each sample: its path in the folder, or the name stored in the shard."""
    return list(iterate_names(images))


def iterate_names(images: Split | Folder) -> Iterator[str]:
    """As `sample_names`, a shard at a time: a remote one is fetched when its first name is taken."""
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
