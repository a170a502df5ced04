"""Images that were not prepared, with the interface of `data.shards.Split`; opening either of the two.

This module does not import torch.
"""

import json
import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from configs.errors import UserError, counted, nearest, printable
from configs.log import say
from configs.schema import Data
from configs.shell import quote
from data.catalog import Catalog, make_catalog
from data.classes import WAY_OUT
from data.collection import read_collection
from data.listing import TABLES, suffix
from data.reading import KEPT, NEED_OPTION, ImageError, Reading, check_file_size, sniff
from data.remote import is_url
from data.shard_index import read_index
from data.shards import Split, open_folder, open_split
from data.sources import Item
from data.tars import IMAGE_TYPES, open_tar, split_member_name
from data.walk import list_source

DEFAULT = Reading()
OF_FILES = ("pages", "value_range", "nodata", "no_exif")  # options of `Reading` that shards were written with


class Folder:
    """A split of a collection that is read in place, with the interface of `data.shards.Split`.

    Without split folders, the split contains all images or, with `strict` and a name other than train, is missing.
    `reading` decides how files are read; `advice` is put after refusals that name an option of it. Raises `UserError`
    if there is no such split.
    """

    shards = ()  # none to fetch

    def __init__(self, catalog: Catalog, name: str, reading: Reading = DEFAULT, strict: bool = False, advice: str = ""):
        self.catalog, self.folder, self.name, self.reading = catalog, Path(catalog.source), name, reading
        self.advice = advice
        self.classes, number = catalog.classes, 0
        if catalog.splits != [None]:
            if name not in catalog.splits:
                known = [split or "train" for split in catalog.splits]
                raise UserError(f"{self.folder} has no split {name} {nearest(name, known)}")
            number = catalog.splits.index(name)
        elif strict and name != "train":
            make = f"`python data/prepare.py {quote(catalog.source)} OUT --val-fraction 0.1`"
            way_out = f"make folders train/ and {name}/ in it, or shards in a new folder OUT with {make}"
            raise UserError(f"{self.folder} has no split {name}: {way_out}")
        else:
            say(f"{self.folder} has no split folders: using its {counted(len(catalog.rows), 'image')} as split {name}")
        self._numbers = np.flatnonzero(catalog.rows["split"] == number)  # of the samples in the catalog
        self._labels = catalog.rows["label"][self._numbers]
        self.digest = catalog.digests[number]  # of names, labels, sizes and times of the images, compared on resume
        self.counts = np.array([len(self._numbers)])

    def __len__(self) -> int:
        return len(self._numbers)

    def item(self, sample: int) -> Item:
        """Name and place of a sample."""
        return self.catalog.item(self._numbers[sample])

    def read(self, sample: int) -> tuple[bytes, int]:
        """Image bytes for `data.decode.decode` and label (-1 = none).

        Raises `UserError` if the image cannot be used, or its file has changed since it was listed.
        """
        item = self.item(sample)
        try:
            limit = self.reading.max_file_bytes
            data = _unchanged(item, limit) if item.is_file else item.image_bytes(limit)
        except OSError as error:
            raise UserError(f"cannot be read ({error.strerror.lower()})") from None
        try:
            return loadable(data, item.name, self.reading), int(self._labels[sample])
        except ImageError as error:
            if self.advice and error.kind in NEED_OPTION:
                raise ImageError(f"{error} {self.advice}", error.kind, error.found) from None
            raise

    def labels(self) -> np.ndarray:
        """Label of every sample, -1 = none."""
        return self._labels

    def place(self, sample: int) -> str:
        """Where a sample is, for messages."""
        return f"{self.folder}, split {self.name}, sample {sample} ({printable(self.item(sample).name)})"


def _unchanged(item: Item, max_bytes: int) -> bytes:
    """The content of a file, if its size and time are still those that were listed."""
    with Path(item.container).open("rb") as file:
        about = os.fstat(file.fileno())
        if f"{about.st_size} {about.st_mtime_ns}" != item.stamp:
            raise UserError("has changed since the images were listed")
        check_file_size(about.st_size, max_bytes)
        return file.read()


def list_collection(path: str) -> Catalog:
    """List a folder, zip, uncompressed tar or table, with splits and classes as `data/prepare.py` finds them.

    Prints what was found and left out. Raises `UserError` as `data.collection.read_collection`.
    """
    return make_catalog(path, *read_collection(path))


def list_images(folder: Path) -> list[Path]:
    """All image files below a folder, sorted by name; prints what is left out. Raises `UserError` if there are none."""
    with list_source(str(folder), None) as listing:
        for note in listing.notes():
            say(f"{printable(folder)}: {printable(note)}")
        if not listing.images[0].is_file:
            raise UserError(f"{folder} has archives only: unpack them")
        return [Path(item.container) for item in listing.images]


def read_image(path: Path, reading: Reading = DEFAULT) -> bytes:
    """Content of an image file for `data.decode.decode`, converted as in a shard; `UserError` if it cannot be used."""
    try:
        check_file_size(path.stat().st_size, reading.max_file_bytes)
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
    """Whether a path has images that were not prepared: a folder without shards, a zip, a tar, a table of files."""
    folder = Path(path)
    if is_url(path) or (folder / "index.json").exists() or (folder.is_dir() and any(folder.glob("*.tar"))):
        return False
    if not folder.is_file():
        return folder.is_dir()
    return suffix(folder.name) in TABLES or zipfile.is_zipfile(folder) or tarfile.is_tarfile(folder)


def check_images(path: str) -> None:
    """Raise `UserError` unless a path looks like shards (a folder or URL) or a collection."""
    if not (is_url(path) or Path(path).is_dir() or is_collection(path)):
        problem = "is of an unknown type" if Path(path).exists() else "does not exist"
        kinds = "a folder of shards or of images, a zip, a tar, a table of files, or the URL of shards"
        raise UserError(f"{path} {problem}: give {kinds}")


def open_splits(
    data: Data, names: Sequence[str], reading: Reading = DEFAULT, strict: bool = False, catalog: Catalog | None = None
) -> list[Split | Folder]:
    """Open splits of `data.path`: shards (a folder or a URL), or a collection, which is listed once.

    Args:
        reading: how files of a collection are read
        strict: for training, which has no options of reading; a collection without split folders has no other split
            than train, as if several were opened
        catalog: of the collection, if it was listed before
    Raises:
        UserError: the path is neither, has no such split, or is of shards that `reading` cannot apply to
    """
    if catalog is None and is_collection(data.path):
        catalog = list_collection(data.path)
    if catalog is not None:
        advice = WAY_OUT if strict else ""
        return [Folder(catalog, name, reading, strict or len(names) > 1, advice) for name in names]
    check_images(data.path)
    given = [key for key in OF_FILES if getattr(reading, key) != getattr(DEFAULT, key)]
    if given:
        flag = f"--{given[0].replace('_', '-')}"
        raise UserError(f"{flag} applies to files, but {data.path} contains shards: give it to data/prepare.py")
    return [open_split(data, name) for name in names]


def open_images(path: str, split: str, reading: Reading = DEFAULT) -> Split | Folder:
    """Open one split, as `open_splits`."""
    return open_splits(Data(path), [split], reading)[0]


def count_labels(path: str) -> dict[str, Counter]:
    """Images of each class (None = no label) in each split of shards or of a collection, which may be only `train`.

    Raises `UserError` if there are no images.
    """
    counts: dict[str, Counter] = {}
    if is_collection(path):
        catalog = list_collection(path)
        names = [*(catalog.classes or []), None]  # the last: label -1
        for split, label in catalog.rows[["split", "label"]].tolist():
            counts.setdefault(catalog.splits[split] or "train", Counter())[names[label]] += 1
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
        return (images.item(sample).name for sample in range(len(images)))
    return (name for number in range(len(images.shards)) for name in _shard_names(images, number))


def names_of(images: Split | Folder, samples: Iterable[int]) -> list[str]:
    """Original names of some samples, as in `sample_names`; only their shards are read."""
    from data.folds import Part  # which imports this module

    if isinstance(images, Part):
        return names_of(images.split, images.samples[list(samples)].tolist())
    if isinstance(images, Folder):
        return [images.item(sample).name for sample in samples]
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
        with os.fdopen(split.open_tar(number), "rb") as file, open_tar(file) as tar:
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
