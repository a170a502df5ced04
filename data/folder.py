"""A plain folder of images with the reading interface of shards, and opening either of the two."""

import json
import os
import tarfile
from pathlib import Path

import numpy as np

from configs.errors import UserError, nearest
from configs.log import say
from configs.schema import Data
from data.loader import open_split
from data.place import is_url
from data.reencode import Options, convert
from data.remote import Remote
from data.shards import IMAGE_TYPES, Shard, Split, split_name
from data.sources import SPLITS, Item, open_source


class Folder:
    """The labelled images of a folder: what evaluation needs of a `data.shards.Split`, without shards.

    Sub-folders are classes; top folders named like splits (train, val, test) are splits, else everything is in the one
    split asked for. Class names are those of all splits, sorted, as `data/prepare.py` numbers them; None where some
    image lies outside of the class folders.

    Args:
        folder: searched recursively
        name: of the split
    Raises:
        UserError: no image, or no such split
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        items = list_images(folder)
        labelled = all(item.label is not None for item in items)
        self.classes = sorted({item.label for item in items}) if labelled else None
        if _has_splits(items):
            held = {item.split for item in items}
            if name not in held:
                raise UserError(f"{folder} has no split {name} {nearest(name, held)}")
            items = [item for item in items if item.split == name]
        else:
            say(f"{folder} has no splits: split {name} is all its {len(items):,} images")
        self.items = items
        number = {label: i for i, label in enumerate(self.classes or [])}
        self._labels = np.array([number.get(item.label, -1) for item in items], np.int32)

    def __len__(self) -> int:
        return len(self.items)

    def read(self, sample: int) -> tuple[bytes, int]:
        """Image bytes, as the loader decodes them, and label (-1 = none) of a sample.

        Raises:
            UserError: the file cannot be read
        """
        return read_image(Path(self.items[sample].container)), int(self._labels[sample])

    def labels(self) -> np.ndarray:
        """Label of every sample, -1 = none."""
        return self._labels


def list_images(folder: Path) -> list[Item]:
    """All images below a folder, sorted by name. Raises `UserError` where there is none."""
    path = str(folder.absolute())  # a folder named digits is not the built-in source
    with open_source(path, folder, ignore_labels=True) as items:
        return items


def _has_splits(items: list[Item]) -> bool:
    """Whether top folders are splits. Where they are not, all items are listed as those of `train`."""
    return any(item.split != "train" for item in items) or all(
        any(part.lower() in SPLITS for part in item.name.split("/")[:-1]) for item in items
    )


def read_image(path: Path) -> bytes:
    """A file's bytes, as `data.transforms.decode` takes them: pictures of other types (bmp, tif, ppm) are converted.

    Raises:
        UserError: the file cannot be read
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror.lower()})") from None
    if path.suffix.lower().removeprefix(".") in IMAGE_TYPES:
        return data
    return convert(data, path.name, Options())[1]


def open_images(path: str, split: str) -> Split | Folder:
    """A split of shards (a folder with index.json, or its URL) or of a plain folder of images.

    Raises:
        UserError: neither is there, or it has no such split
    """
    place = Path(path)
    if is_url(path) or (place / "index.json").exists() or (place.is_dir() and any(place.glob("*.tar"))):
        return open_split(Data(path), split)
    if not place.is_dir():
        what = "is a file" if place.exists() else "does not exist"
        raise UserError(f"{path} {what}: give a folder of shards or of images, or the URL of a folder of shards")
    return Folder(place, split)


def sample_names(images: Split | Folder) -> list[str]:
    """Where each sample came from: its path in the folder, or the name that the shard keeps of it."""
    if isinstance(images, Folder):
        return [item.name for item in images.items]
    return [name for shard in images.shards for name in _shard_names(images.folder, shard)]


def _shard_names(folder: Path | Remote, shard: Shard) -> list[str]:
    """The original name of each sample of a shard, or else that of its image in the tar."""
    members: dict[str, str] = {}  # by key, in the order of the samples
    originals: dict[str, str] = {}
    file = (
        (folder / shard.file).open("rb")
        if isinstance(folder, Path)
        else os.fdopen(folder.open(shard.file, shard.sha256, shard.bytes), "rb")
    )
    try:
        with file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, kind = split_name(member.name)
                if member.isreg() and kind in IMAGE_TYPES:
                    members.setdefault(key, member.name)
                elif member.isreg() and kind == "json" and (name := _told(tar.extractfile(member).read())):
                    originals[key] = name
    except tarfile.TarError:  # damaged: its images are read by their offsets all the same
        pass
    if len(members) != shard.samples:
        return [f"{shard.file}, sample {i}" for i in range(shard.samples)]
    return [originals.get(key, member) for key, member in members.items()]


def _told(data: bytes) -> str | None:
    """The name in a sample's json member, as `data/prepare.py` writes it; None = it holds none."""
    try:
        content = json.loads(data)
    except ValueError:
        return None
    name = content.get("name") if isinstance(content, dict) else None
    return name if isinstance(name, str) else None
