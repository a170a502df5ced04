"""Sources of images: the built-in digits, a folder, a zip, a tar (compressed or not), the ILSVRC2012 train tar.

A source is listed first; its images are read later, in any order, by several processes. Splits and class names come
from the paths:

    train/CAT/1.jpg  test/DOG/2.jpg     top folders are splits if all of them have names of splits
    CAT/1.jpg        DOG/more/2.jpg     the next folder is the class, if every image is in one
    1.jpg            2.jpg              no classes
"""

import io
import os
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from shutil import copyfileobj
from typing import BinaryIO

from configs.errors import UserError, reason
from data.tars import CHUNK_BYTES, IMAGE_TYPES, check_end, member_end

READABLE = (*IMAGE_TYPES, "bmp", "tif", "tiff", "ppm", "pgm")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
DIGITS_VAL_SHARE = 5  # every fifth image of a class is held out


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source. Its bytes are a file, a part of a tar, or a member of a zip."""

    name: str
    container: str  # file, tar or zip; `digits` = the built-in images
    stamp: str = ""  # changes with the image: size and time, offset, or checksum
    offset: int | None = None  # in a tar, with size
    size: int | None = None
    zipped: bool = False
    split: str | None = None  # None: not divided
    label: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether the image is a file of its own."""
        return self.container != "digits" and self.offset is None and not self.zipped

    def image_bytes(self) -> bytes:
        """The encoded image. Raises `UserError` if it is damaged in a zip, `OSError` if the source has disappeared."""
        if self.container == "digits":
            return digits()[self.name][0]
        if self.offset is not None:
            with Path(self.container).open("rb") as file:
                return os.pread(file.fileno(), self.size, self.offset)
        if not self.zipped:
            return Path(self.container).read_bytes()
        try:
            return _open_zip(self.container, os.getpid()).read(self.name)
        except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:  # RuntimeError: encrypted
            raise UserError(f"cannot be read from the zip ({reason(error)})") from None


@contextmanager
def open_source(source: str, scratch: Path, ignore_labels: bool = False) -> Iterator[list[Item]]:
    """List the images of a source, sorted by name. A compressed tar stays unpacked in `scratch` until the block ends.

    Raises `UserError` if the source does not exist, is of an unknown type, damaged, or without images.
    """
    if source == "digits":
        items = [Item(name, "digits", split=split, label=label) for name, (_, split, label) in digits().items()]
        yield sorted(items, key=lambda item: item.name)
        return
    path = Path(source)
    if (path / "index.json").exists():
        raise UserError(f"{source} contains shards already: train on them, or give the original images")
    if not path.exists():
        raise UserError(f"{source} does not exist: give a folder, a zip, a tar, or `digits`")
    unpacked = scratch / f".{path.name}.unpacked"
    try:
        if path.is_file() and not is_tar(path) and not zipfile.is_zipfile(path):
            _unpack(path, unpacked)
            path = unpacked
        yield sorted(_from_paths(_list(path), source, ignore_labels), key=lambda item: item.name)
    finally:
        if unpacked.exists():  # checked first: on a read-only disk, removing a missing file is an error
            unpacked.unlink()


def _list(path: Path) -> Iterator[Item]:
    """All images of a folder, zip or uncompressed tar, without split and class."""
    if path.is_dir():
        for file in path.rglob("*"):
            if _is_image(file.name) and file.is_file():
                about = file.stat()
                yield Item(file.relative_to(path).as_posix(), str(file), f"{about.st_size} {about.st_mtime_ns}")
    elif is_tar(path):  # before zip: a tar whose last member is a zip looks like a zip
        yield from _list_tar(path)
    else:
        for entry in _open_zip(str(path), os.getpid()).infolist():
            if _is_image(entry.filename) and not entry.is_dir():
                yield Item(entry.filename, str(path), f"{entry.CRC}", zipped=True)


def _list_tar(path: Path) -> Iterator[Item]:
    """Images of a tar, and of tars inside it (ILSVRC2012_img_train.tar contains one tar per class)."""
    try:
        with path.open("rb") as file:
            yield from _list_members(file, path, path.stat().st_size)
    except tarfile.TarError as error:
        raise UserError(f"{path} is damaged ({error}): fetch it again") from None


def _list_members(file: BinaryIO, path: Path, limit: int, outer: str | None = None) -> Iterator[Item]:
    """Images of the tar in `file` from its position to byte `limit`; a tar inside another one has the name `outer`."""
    end = file.tell()
    with tarfile.open(fileobj=file, mode="r:") as tar:  # offsets count from the beginning of the file
        for member in tar:
            if member.size < 0:  # would send tarfile back, into an endless loop
                raise UserError(f"{path} is damaged at byte {member.offset}: fetch it again")
            offset, size, end = member.offset_data, member.size, member_end(member)
            if not member.isreg():
                continue
            if outer is None and member.name.endswith(".tar"):
                file.seek(offset)
                yield from _list_members(file, path, offset + size, member.name.removesuffix(".tar"))
            elif outer is None and member.name.endswith(".cls"):
                way_out = f"run `python data/prepare.py {path.parent} --index`"
                raise UserError(f"{path} contains WebDataset shards: {way_out}")
            elif _is_image(member.name):
                name = member.name.removeprefix("./") if outer is None else f"{outer}/{member.name}"
                yield Item(name, str(path), f"{offset} {size}", offset, size)
    check_end(file, end, limit, path)


def _from_paths(items: Iterator[Item], source: str, ignore_labels: bool) -> list[Item]:
    """Set split and class from each image's path."""
    items = list(items)
    if not items:
        raise UserError(f"{source} has no image ({', '.join(READABLE)})")
    folders = [PurePosixPath(item.name).parts[:-1] for item in items]
    while all(len(parts) > 1 for parts in folders) and len({parts[0] for parts in folders}) == 1:
        if folders[0][0].lower() in SPLITS:
            break
        folders = [parts[1:] for parts in folders]  # one folder contains everything
    splits = [None] * len(items)
    if all(parts and parts[0].lower() in SPLITS for parts in folders):
        splits = [SPLITS[parts[0].lower()] for parts in folders]
        folders = [parts[1:] for parts in folders]
    labelled = all(folders)
    if any(folders) and not labelled and not ignore_labels:
        stray = next(item.name for item, parts in zip(items, folders, strict=True) if not parts)
        raise UserError(f"{source}: some images are in class folders, others, like {stray}, are not: use --no-labels")
    return [
        replace(item, split=split, label=parts[0] if labelled else None)
        for item, split, parts in zip(items, splits, folders, strict=True)
    ]


def _is_image(name: str) -> bool:
    base = name.rsplit("/", 1)[-1]
    return not base.startswith(".") and base.rsplit(".", 1)[-1].lower() in READABLE


def is_tar(path: Path) -> bool:
    """Whether a file is an uncompressed tar."""
    try:
        tarfile.open(path, "r:").close()
    except tarfile.TarError:
        return False
    return True


def _unpack(path: Path, target: Path) -> None:
    """Decompress a gz, bz2 or xz file for random access. The caller removes `target`, also after an error."""
    import bz2
    import gzip
    import lzma

    openers = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}  # by the first bytes
    with path.open("rb") as file:
        opener = openers.get(file.read(2))
    if opener is None:
        raise UserError(f"{path} is not a folder, a zip or a tar (plain, gz, bz2 or xz)")
    try:
        with opener(path) as packed, target.open("wb") as out:
            copyfileobj(packed, out, CHUNK_BYTES)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{path} cannot be unpacked into {target.parent} ({error})") from None


@lru_cache(4)
def _open_zip(path: str, process: int) -> zipfile.ZipFile:
    """A zip, opened once per process: a forked process would share its parent's file position."""
    return zipfile.ZipFile(path)


@lru_cache(1)
def digits() -> dict[str, tuple[bytes, str, str]]:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey: name -> (PNG bytes, split, label)."""
    from PIL import Image
    from sklearn.datasets import load_digits  # slow to import

    dataset, seen = load_digits(), Counter()
    images = {}
    for number, (pixels, label) in enumerate(zip(dataset.images, dataset.target, strict=True)):
        seen[label] += 1
        png = io.BytesIO()
        Image.fromarray((pixels * (255 / 16)).round().astype("uint8")).save(png, "png")
        split = "val" if seen[label] % DIGITS_VAL_SHARE == 0 else "train"
        images[f"{split}/{label}/{number:04}.png"] = png.getvalue(), split, str(label)
    return images
