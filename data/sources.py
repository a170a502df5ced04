"""An image of a source, and where its bytes are: a file, a part of a tar, a member of a zip, or the built-in digits.

`data/listing.py` lists the images of a source; they are read later, in any order, by several processes.
"""

import errno
import io
import os
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from configs.errors import reason
from data.cache import RemoteUserError
from data.reading import MAX_FILE_BYTES, UNSUPPORTED, ImageError, check_file_size
from data.remote import is_url
from data.remote_files import REGION_BYTES, SMALL_BLOCK_BYTES, open_binary, read_url
from data.tars import DamagedArchive

SMALL_READ = 1 << 12  # compressed bytes of a bz2 or lzma member, which unpack to at most some 100 MB
DIGITS_VAL_SHARE = 5  # every fifth image of a class is held out


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source, or a file that may hold labels."""

    name: str  # bytes that are not UTF-8 are surrogates, see PEP 383
    container: str  # file, tar or zip; `digits` = the built-in images
    stamp: str = ""  # changes with the image: size and time, offset, or checksum
    offset: int | None = None  # in a tar, with size; in a zip, of the header
    size: int | None = None
    zipped: bool = False
    split: str | None = None  # None: not divided
    label: str | None = None
    mask: "Item | None" = field(default=None, compare=False)  # of semantic segmentation
    targets: dict | None = field(default=None, compare=False)  # `labels`, `numbers`, `boxes` of a table, for tasks

    @property
    def is_file(self) -> bool:
        """Whether the image is a file of its own."""
        return self.container != "digits" and self.offset is None and not self.zipped

    def placed(self, split: str | None, label: str | None) -> "Item":
        """The image with a split and a label; quicker than `dataclasses.replace`."""
        place = self.name, self.container, self.stamp, self.offset, self.size, self.zipped
        return Item(*place, split, label, self.mask, self.targets)

    def image_bytes(self, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        """The encoded image.

        Raises `ImageError` if it is larger than `max_bytes` or damaged in a zip, `OSError` or `RemoteUserError` if the
        source cannot be read.
        """
        if self.container == "digits":
            return digits()[self.name][0]
        check_file_size(self._bytes(), max_bytes)
        if self.zipped:
            return self._from_zip()
        if self.remote:
            return read_url(self.container, self.offset, self.size)
        if self.offset is not None:
            with Path(self.container).open("rb") as file:
                return os.pread(file.fileno(), self.size, self.offset)
        return Path(self.container).read_bytes()

    @property
    def remote(self) -> bool:
        """Whether the image is at a URL."""
        return is_url(self.container)

    def _bytes(self) -> int:
        """Bytes of the encoded image; of a member of a zip, those that its directory declares."""
        if self.zipped:
            return open_zip(self.container, os.getpid())[1][self.offset].file_size
        if self.offset is not None:
            return self.size
        return int(self.byte_size) if self.remote else Path(self.container).stat().st_size

    @property
    def byte_size(self) -> int | str | None:
        """Something that equal images have in common without being read: the size or, in a zip, the checksum."""
        return self.stamp.partition(" ")[0] if self.is_file or self.zipped else self.size

    def open(self) -> BinaryIO:
        """The encoded image as a file; a member of a zip is read into memory. Errors as `image_bytes`."""
        if self.zipped or self.container == "digits":
            return io.BytesIO(self.image_bytes())
        if self.remote:
            return open_binary(self.container, REGION_BYTES, self.offset or 0, int(self.byte_size))
        file = Path(self.container).open("rb")  # noqa: SIM115  # the caller closes it
        return file if self.offset is None else io.BufferedReader(_Section(file, self.offset, self.size))

    def head(self, count: int) -> bytes:
        """The first bytes; none if the file cannot be read."""
        try:
            if self.zipped:
                archive, members = open_zip(self.container, os.getpid())
                with archive.open(members[self.offset]) as file:
                    return file.read(count)
            if self.remote:
                return read_url(self.container, self.offset or 0, min(count, int(self.byte_size)))
            with Path(self.container).open("rb") as file:
                return os.pread(file.fileno(), min(count, self.size or count), self.offset or 0)
        except RemoteUserError:
            raise
        except Exception:  # of the disk, or almost any of a damaged or encrypted member of a zip
            return b""

    def _from_zip(self) -> bytes:
        archive, members = open_zip(self.container, os.getpid())
        member = members[self.offset]
        if member.flag_bits & 1:
            raise ImageError("is encrypted: unpack the zip with its password", UNSUPPORTED)
        try:
            return read_member(archive, member)
        except NotImplementedError:
            problem = f"is compressed by a method of zip that is not supported ({member.compress_type}): unpack it"
            raise ImageError(problem, UNSUPPORTED) from None
        except RemoteUserError:
            raise
        except Exception as error:  # damaged members raise almost any exception
            if isinstance(error, OSError) and error.errno == errno.EIO:  # the disk
                raise
            raise ImageError("is damaged in the zip: fetch it again") from None


class _Section(io.RawIOBase):
    """A part of an open file, which it closes."""

    def __init__(self, file: BinaryIO, offset: int, size: int):
        self.file, self.offset, self.size, self.at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer: memoryview) -> int:
        count = max(0, min(len(buffer), self.size - self.at))
        data = os.pread(self.file.fileno(), count, self.offset + self.at)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """Content of a member of a zip. More than the declared bytes are never unpacked at once: `ZipFile.read` may."""
    packed = member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    parts, left = [], member.file_size
    with archive.open(member) as file:
        while part := file.read(min(left, SMALL_READ) if packed else left):
            parts.append(part)
            left -= len(part)
    return b"".join(parts)


@lru_cache(4)
def open_zip(path: str, process: int) -> tuple[zipfile.ZipFile, dict[int, zipfile.ZipInfo]]:
    """A zip and its members by the offset of their header; names are not unique.

    Opened once per process: a forked process would share its parent's file position. Raises `DamagedArchive`.
    """
    try:
        archive = zipfile.ZipFile(open_binary(path, SMALL_BLOCK_BYTES) if is_url(path) else path)
    except (OSError, RemoteUserError):
        raise
    except Exception as error:  # damaged directories raise almost any exception
        raise DamagedArchive(f"{path} is a damaged zip ({reason(error)}): fetch it again") from None
    return archive, {member.header_offset: member for member in archive.infolist()}


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
