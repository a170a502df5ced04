"""The images of a collection that is read in place, as arrays: a run keeps them, its loader processes share them.

    RUN/collection.npz    names, places, sizes, times, splits and labels of all images; `about` is JSON; no pickle

Free of torch. `data/folder.py` reads the images.
"""

import hashlib
import json
import zipfile
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from configs.errors import UserError, printable
from configs.files import atomic_file
from data.sources import Item

FORMAT = "convnext-fcmae-collection/1"
FILE = -1  # number of the archive of an image that is a file of its own
ROW = np.dtype([
    ("name_end", "<i8"), ("archive", "<i4"), ("zipped", "?"), ("offset", "<i8"), ("size", "<i8"), ("time", "<i8"),
    ("split", "<i2"), ("label", "<i4"),
])  # fmt: skip


@dataclass(frozen=True, eq=False)
class Catalog:
    """The images of a collection, in order; a million take about 80 MB."""

    source: str  # folder, zip, tar or table, as the user named it
    root: str  # folder that the names of files are relative to
    archives: list[tuple[str, int, int]]  # path, size and time of zips and tars
    splits: list[str | None]  # by number; None: the collection is not divided
    classes: list[str] | None
    digests: list[str]  # of each split's names, stamps and labels
    names: np.ndarray  # [bytes] uint8, UTF-8, one after the other
    rows: np.ndarray  # [images] ROW

    def name(self, number: int) -> str:
        """The name of an image."""
        start = int(self.rows["name_end"][number - 1]) if number else 0
        return self.names[start : int(self.rows["name_end"][number])].tobytes().decode("utf-8", "surrogatepass")

    def item(self, number: int) -> Item:
        """An image: its name and where its bytes are."""
        _, archive, zipped, offset, size, time, *_ = self.rows[number].item()
        name = self.name(number)
        if archive == FILE:
            return Item(name, str(Path(self.root, name)), f"{size} {time}")
        return Item(name, self.archives[archive][0], "", offset, size, zipped)

    def check_archives(self) -> None:
        """Raise `UserError` if a zip or tar has changed since it was listed. Files are checked when they are read."""
        for path, *listed in self.archives:
            try:
                about = Path(path).stat()
            except OSError as error:
                raise UserError(f"{path}: {error.strerror.lower()}, but the run reads images from it") from None
            if [about.st_size, about.st_mtime_ns] != listed:
                raise UserError(f"{path} has changed since the run began: restore it, or start another --run.name")


def make_catalog(source: str, items: list[Item], classes: list[str] | None) -> Catalog:
    """The catalog of the images of a folder, zip, tar or table."""
    splits = sorted({item.split for item in items}, key=str)
    split_number = {split: i for i, split in enumerate(splits)}
    label_number = {label: i for i, label in enumerate(classes or [])} | {None: -1}
    archive_number = {path: i for i, path in enumerate(sorted({i.container for i in items if not i.is_file}))}
    digests = defaultdict(hashlib.sha256)
    names, rows, end = [], np.zeros(len(items), ROW), 0
    for i, item in enumerate(items):
        digests[item.split].update(f"{item.name}\0{item.stamp}\0{item.label}\0".encode("utf-8", "surrogatepass"))
        names.append(item.name.encode("utf-8", "surrogatepass"))
        end += len(names[-1])
        place = archive_number.get(item.container, FILE), item.zipped, item.offset or 0, item.size or 0, 0
        if item.is_file:
            size, time = item.stamp.split()[:2]
            place = FILE, False, 0, int(size), int(time)
        rows[i] = end, *place, split_number[item.split], label_number[item.label]
    archives = [(path, (about := Path(path).stat()).st_size, about.st_mtime_ns) for path in archive_number]
    root = source if Path(source).is_dir() else str(Path(source).parent)
    order = [digests[split].hexdigest()[:16] for split in splits]
    return Catalog(source, root, archives, splits, classes, order, np.frombuffer(b"".join(names), np.uint8), rows)


def write_catalog(path: Path, catalog: Catalog) -> None:
    """Write a catalog; the file appears when it is complete."""
    fields = ("source", "root", "archives", "splits", "classes", "digests")
    about = {"format": FORMAT} | {field: getattr(catalog, field) for field in fields}
    with atomic_file(path) as file:
        text = np.frombuffer(json.dumps(about).encode(), np.uint8)
        np.savez(file, about=text, names=catalog.names, rows=catalog.rows)


def read_catalog(path: Path) -> Catalog:
    """Read a catalog. Raises `UserError` if it is damaged."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            about, names, rows = json.loads(file["about"].tobytes()), file["names"], file["rows"]
        if about.pop("format") != FORMAT or rows.dtype != ROW or rows["name_end"][-1] != len(names):
            raise ValueError
        return replace(Catalog(**about, names=names, rows=rows), archives=[tuple(a) for a in about["archives"]])
    except (ValueError, KeyError, TypeError, IndexError, EOFError, zipfile.BadZipFile):
        way_out = "remove it, and the same command lists the images again"
        raise UserError(f"{path} is damaged or of another version: {way_out}") from None


def difference(old: Catalog, new: Catalog) -> str | None:
    """The first image in which two catalogs differ, for a message; None if they are equal."""
    if (old.splits, old.digests, old.classes) == (new.splits, new.digests, new.classes):
        return None
    before, now = ({c.name(i): c.rows[i].item()[1:] for i in range(len(c.rows))} for c in (old, new))
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            what = "is missing" if name not in now else "is new" if name not in before else "has another size or time"
            return f"{printable(name)} {what}"
    return "its labels or splits are others"
