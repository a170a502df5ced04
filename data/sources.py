"""Where images come from: the built-in digits, a folder, a zip, a tar (compressed or not), the ILSVRC2012 train tar.

A source is listed first and read later, image by image and in any order, by several processes. Class names and splits
are read off the paths:

    train/CAT/1.jpg  test/DOG/2.jpg     top folders that are all split names are splits
    CAT/1.jpg        DOG/more/2.jpg     the next folder is the class, if every image has one
    1.jpg            2.jpg              no classes
"""

import io
import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from shutil import copyfileobj
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from configs.errors import UserError, reason
from data.shards import IMAGE_TYPES, PIECE, check_end, member_end

READABLE = (*IMAGE_TYPES, "bmp", "tif", "tiff", "ppm", "pgm")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
DIGITS_VAL_SHARE = 5  # every fifth image of a class is held out


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source, and where its bytes are: a whole file, a part of a tar, or a member of a zip."""

    name: str
    container: str  # file, tar or zip; `digits` for the built-in ones
    stamp: str = ""  # changes when the image does: size and time, offset, or checksum
    offset: int | None = None  # in a tar, with size
    size: int | None = None
    zipped: bool = False
    split: str = "train"
    label: str | None = None

    def read_bytes(self) -> bytes:
        """The image's bytes."""
        if self.container == "digits":
            return _digits()[self.name][0]
        if self.offset is not None:
            with Path(self.container).open("rb") as file:
                return os.pread(file.fileno(), self.size, self.offset)
        if self.zipped:
            return _zip(self.container, os.getpid()).read(self.name)
        return Path(self.container).read_bytes()


@contextmanager
def open_source(source: str, scratch: Path, ignore_labels: bool = False) -> Iterator[list[Item]]:
    """List the images of a source, sorted by name. A compressed tar is unpacked to a file in `scratch` meanwhile.

    Raises:
        UserError: no such source, of an unknown kind, damaged, or without an image
    """
    unpacked = None
    try:
        if source == "digits":
            items = [Item(name, "digits", split=split, label=label) for name, (_, split, label) in _digits().items()]
        else:
            path = Path(source)
            if (path / "index.json").exists():
                raise UserError(f"{source} holds shards already: train on them, or give the original images")
            if not path.exists():
                raise UserError(f"{source} does not exist: give a folder, a zip, a tar, or `digits`")
            if path.is_file() and not _is_tar(path) and not zipfile.is_zipfile(path):
                unpacked = scratch / f".{path.name}.unpacked"
                _unpack(path, unpacked)
                path = unpacked
            items = _from_paths(_list(path), source, ignore_labels)
        yield sorted(items, key=lambda item: item.name)
    finally:
        if unpacked is not None:
            unpacked.unlink(missing_ok=True)


def _list(path: Path) -> Iterator[Item]:
    """All images of a folder, zip or uncompressed tar, without split and class."""
    if path.is_dir():
        for file in path.rglob("*"):
            if _is_image(file.name) and file.is_file():
                about = file.stat()
                yield Item(file.relative_to(path).as_posix(), str(file), f"{about.st_size} {about.st_mtime_ns}")
    elif _is_tar(path):  # before zip: a tar that ends in a zip passes for one
        yield from _list_tar(path)
    else:
        for entry in _zip(str(path), os.getpid()).infolist():
            if _is_image(entry.filename) and not entry.is_dir():
                yield Item(entry.filename, str(path), f"{entry.CRC}", zipped=True)


def _list_tar(path: Path) -> Iterator[Item]:
    """Images of a tar, and of the tars inside it (ILSVRC2012_img_train.tar: one tar a class, its name the class)."""
    try:
        with tarfile.open(path, "r:") as outer, path.open("rb") as file:
            end = 0
            for member in outer:
                end = _next(member, path, 0)
                if member.isreg() and member.name.endswith(".tar"):
                    yield from _list_inner_tar(path, file, outer, member)
                elif member.isreg() and member.name.endswith(".cls"):
                    raise UserError(
                        f"{path} holds WebDataset shards: run `python data/prepare.py {path.parent} --index`"
                    )
                elif member.isreg() and _is_image(member.name):
                    yield _tar_item(member.name.removeprefix("./"), path, member.offset_data, member.size)
            check_end(file, end, path.stat().st_size, path)
    except tarfile.TarError as error:
        raise UserError(f"{path} is damaged ({error}): fetch it again") from None


def _list_inner_tar(path: Path, file: BinaryIO, outer: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[Item]:
    folder, end = member.name.removesuffix(".tar"), 0
    with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
        for image in inner:
            end = _next(image, path, member.offset_data)
            if image.isreg() and _is_image(image.name):
                yield _tar_item(f"{folder}/{image.name}", path, member.offset_data + image.offset_data, image.size)
    check_end(file, member.offset_data + end, member.offset_data + member.size, path)


def _next(member: tarfile.TarInfo, path: Path, start: int) -> int:
    """Where the next header begins, in a tar that begins at byte `start` of `path`."""
    if member.size < 0:  # which would lead back, and round in circles
        raise UserError(f"{path} is damaged at byte {start + member.offset}: fetch it again")
    return member_end(member)


def _tar_item(name: str, path: Path, offset: int, size: int) -> Item:
    return Item(name, str(path), f"{offset} {size}", offset, size)


def _from_paths(items: Iterator[Item], source: str, ignore_labels: bool) -> list[Item]:
    """Read split and class off each image's path."""
    items = list(items)
    if not items:
        raise UserError(f"{source} has no image ({', '.join(READABLE)})")
    folders = [PurePosixPath(item.name).parts[:-1] for item in items]
    while all(len(parts) > 1 for parts in folders) and len({parts[0] for parts in folders}) == 1:
        if folders[0][0].lower() in SPLITS:
            break
        folders = [parts[1:] for parts in folders]  # a folder around everything
    splits = ["train"] * len(items)
    if all(parts and parts[0].lower() in SPLITS for parts in folders):
        splits = [SPLITS[parts[0].lower()] for parts in folders]
        folders = [parts[1:] for parts in folders]
    labelled = all(folders)
    if any(folders) and not labelled and not ignore_labels:
        stray = next(item.name for item, parts in zip(items, folders, strict=True) if not parts)
        raise UserError(f"{source}: some images lie in class folders, others like {stray} beside them: use --no-labels")
    return [
        replace(item, split=split, label=parts[0] if labelled else None)
        for item, split, parts in zip(items, splits, folders, strict=True)
    ]


def _is_image(name: str) -> bool:
    base = name.rsplit("/", 1)[-1]
    return not base.startswith(".") and base.rsplit(".", 1)[-1].lower() in READABLE


def _is_tar(path: Path) -> bool:
    """Whether a file is a tar that is not compressed."""
    try:
        tarfile.open(path, "r:").close()
    except tarfile.TarError:
        return False
    return True


def _unpack(path: Path, target: Path) -> None:
    """Unpack a gz, bz2 or xz file, so that any image can be read. The caller removes `target` in any case."""
    import bz2
    import gzip
    import lzma

    openers = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
    with path.open("rb") as file:
        magic = file.read(2)
    if magic not in openers:
        raise UserError(f"{path} is not a folder, a zip or a tar (plain, gz, bz2 or xz)")
    try:
        with openers[magic](path) as packed, target.open("wb") as out:
            copyfileobj(packed, out, PIECE)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{path} cannot be unpacked into {target.parent} ({error})") from None


@lru_cache(4)
def _zip(path: str, process: int) -> zipfile.ZipFile:
    """A zip, opened by each process for itself: a forked one would share its parent's place in the file."""
    return zipfile.ZipFile(path)


@lru_cache(1)
def _digits() -> dict[str, tuple[bytes, str, str]]:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey: name -> (PNG bytes, split, label)."""
    from sklearn.datasets import load_digits

    digits, seen = load_digits(), Counter()
    images = {}
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        seen[label] += 1
        png = io.BytesIO()
        Image.fromarray((pixels * (255 / 16)).round().astype("uint8")).save(png, "png")
        split = "val" if seen[label] % DIGITS_VAL_SHARE == 0 else "train"
        images[f"{split}/{label}/{number:04}.png"] = png.getvalue(), split, str(label)
    return images


def open_picture(data: bytes) -> Image.Image:
    """Decode a picture with PIL. Raises `UserError` if it is damaged or too large to be a picture."""
    try:
        picture = Image.open(io.BytesIO(data))
        picture.load()
        return picture
    except UnidentifiedImageError:
        raise UserError("not an image of a known type") from None
    except Exception as error:  # damaged files make PIL's decoders raise nearly anything
        raise UserError(f"not a readable image ({reason(error)})") from None
