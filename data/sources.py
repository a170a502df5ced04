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

from PIL import Image

from configs.errors import UserError
from data.shards import IMAGE_TYPES

READABLE = (*IMAGE_TYPES, "bmp", "tif", "tiff", "ppm", "pgm")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
DIGITS_VAL_SHARE = 5  # every fifth image of a class is held out


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source, and where its bytes are: a whole file, a part of one, or a member of a zip."""

    name: str
    container: str
    offset: int | None = None  # with size: a part of the container
    size: int | None = None
    split: str = "train"
    label: str | None = None

    def read(self) -> bytes:
        """The image's bytes."""
        if self.container == "digits":
            return _digits()[self.name][0]
        if self.offset is not None:
            with Path(self.container).open("rb") as file:
                return os.pread(file.fileno(), self.size, self.offset)
        if self.size is not None:
            return _zip(self.container).read(self.name)
        return Path(self.container).read_bytes()


@contextmanager
def open_source(source: str, scratch: Path) -> Iterator[list[Item]]:
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
            if not path.exists():
                raise UserError(f"{source} does not exist: give a folder, a zip, a tar, or `digits`")
            if path.is_file() and not zipfile.is_zipfile(path) and _is_compressed_tar(path):
                path = unpacked = _unpack(path, scratch)
            items = _from_paths(_list(path), source)
        yield sorted(items, key=lambda item: item.name)
    finally:
        if unpacked is not None:
            unpacked.unlink(missing_ok=True)


def _list(path: Path) -> Iterator[Item]:
    """All images of a folder, zip or uncompressed tar, without split and class."""
    if path.is_dir():
        for file in path.rglob("*"):
            if _is_image(file.name) and file.is_file():
                yield Item(file.relative_to(path).as_posix(), str(file))
    elif zipfile.is_zipfile(path):
        for entry in _zip(str(path)).infolist():
            if _is_image(entry.filename) and not entry.is_dir():
                yield Item(entry.filename, str(path), size=entry.file_size)
    else:
        yield from _list_tar(path)


def _list_tar(path: Path) -> Iterator[Item]:
    """Images of a tar, and of the tars inside it (ILSVRC2012_img_train.tar: one tar a class, its name the class)."""
    try:
        with tarfile.open(path, "r:") as outer:
            for member in outer:
                if member.isreg() and member.name.endswith(".tar"):
                    with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                        folder = member.name.removesuffix(".tar")
                        for image in inner:
                            if image.isreg() and _is_image(image.name):
                                offset = member.offset_data + image.offset_data
                                yield Item(f"{folder}/{image.name}", str(path), offset, image.size)
                elif member.isreg() and member.name.endswith(".cls"):
                    raise UserError(
                        f"{path} holds WebDataset shards already: run `python data/prepare.py {path.parent} --index`"
                    )
                elif member.isreg() and _is_image(member.name):
                    yield Item(member.name.removeprefix("./"), str(path), member.offset_data, member.size)
    except tarfile.TarError as error:
        raise UserError(f"{path} is not a folder, a zip or a readable tar ({error})") from None


def _from_paths(items: Iterator[Item], source: str) -> list[Item]:
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
    return [
        replace(item, split=split, label=parts[0] if labelled else None)
        for item, split, parts in zip(items, splits, folders, strict=True)
    ]


def _is_image(name: str) -> bool:
    base = name.rsplit("/", 1)[-1]
    return not base.startswith(".") and base.rsplit(".", 1)[-1].lower() in READABLE


def _is_compressed_tar(path: Path) -> bool:
    try:
        tarfile.open(path, "r:").close()
        return False
    except tarfile.TarError:
        return True


def _unpack(path: Path, scratch: Path) -> Path:
    """Unpack a gz, bz2 or xz file into `scratch`, so that any image can be read at once."""
    import bz2
    import gzip
    import lzma

    openers = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
    with path.open("rb") as file:
        magic = file.read(2)
    if magic not in openers:
        raise UserError(f"{path} is not a folder, a zip or a tar (plain, gz, bz2 or xz)")
    target = scratch / f".{path.name}.unpacked"
    try:
        with openers[magic](path) as packed, target.open("wb") as out:
            copyfileobj(packed, out, 1 << 20)
    except (OSError, EOFError, lzma.LZMAError) as error:
        target.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be unpacked into {scratch} ({error})") from None
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return target


@lru_cache(4)
def _zip(path: str) -> zipfile.ZipFile:
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
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"not a readable image ({error})") from None
