"""Reading WebDataset tars: member names, the position and checksum of each image and target, damage.

Free of torch. `data/writing.py` writes tars.
"""

import json
import tarfile
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from configs.errors import UserError

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp", "gif", "npy")  # what the loader decodes
# with those that data/reencode.py converts
READABLE = (
    *IMAGE_TYPES, "jpe", "jfif", "bmp", "dib", "tif", "tiff", "btf", "ppm", "pgm", "pbm", "pnm", "tga", "pcx", "sgi",
    "qoi", "jp2", "j2k", "j2c", "jpf", "jpx", "avif", "heic", "heif", "hif", "dcm", "dicom",
)  # fmt: skip
ROW = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc", "<u4"), ("label", "<i4")])
TARGET_ROW = np.dtype([*ROW.descr, ("target_offset", "<u8"), ("target_size", "<u4"), ("target_crc", "<u4")])
LONG_HEADERS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip
MAX_NAME_BYTES = 1 << 20
MASK = "mask.png"  # type of the member with a sample's mask
TARGETS = ("labels", "numbers", "boxes")  # keys of the `json` member that are targets of tasks
BLOCK_BYTES = tarfile.BLOCKSIZE  # of a header, and what members are padded to
CHUNK_BYTES = 1 << 20  # read at a time from files that may be large


class DamagedArchive(UserError):  # noqa: N818  # as UserError
    """An archive is damaged or cut short."""


class Header(tarfile.TarInfo):
    """Refuses headers that hold a name or attributes of more than `MAX_NAME_BYTES`, which tarfile reads into memory."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        header = super().frombuf(buf, encoding, errors)
        if header.type in LONG_HEADERS and header.size > MAX_NAME_BYTES:
            raise tarfile.InvalidHeaderError(f"a header of {header.size:,} bytes")
        return header


def open_tar(file: BinaryIO, ignore_zeros: bool = False) -> tarfile.TarFile:
    """An uncompressed tar for reading; names that are not UTF-8 have surrogates. Raises `tarfile.TarError`."""
    options = {"tarinfo": Header, "errors": "surrogateescape", "ignore_zeros": ignore_zeros}
    return tarfile.open(fileobj=file, mode="r:", **options)


def read_rows(tar: Path) -> np.ndarray:
    """Rows [samples] of `ROW`: position and checksum of each sample's image, and its label.

    A sample's key is its path up to the first dot of the file name. Its image is its first member whose type is in
    `IMAGE_TYPES`; samples without an image are skipped. Its label is the number in its `cls` member, -1 without one.
    Its target is its `MASK` member or else its `json` member with one of the keys `TARGETS`. If a sample has a target,
    the rows are of `TARGET_ROW`, with size 0 for samples without.

    Raises `UserError` if the tar is truncated or damaged, or a label is not a whole number.
    """
    rows: dict[str, tuple[int, int, int]] = {}
    labels: dict[str, int] = {}
    targets: dict[str, tuple[int, int, int]] = {}
    end, length = 0, tar.stat().st_size
    try:
        with tar.open("rb") as opened, open_tar(opened) as archive, tar.open("rb") as file:
            for member in archive:
                end = member_end(member)
                if member.size < 0 or (member.isreg() and member.offset_data + member.size > length):
                    raise UserError(f"{tar} is truncated or damaged inside {member.name}: fetch or write it again")
                if not member.isreg():
                    continue
                key, kind = split_member_name(member.name)
                is_image = kind in IMAGE_TYPES and key not in rows
                if not (is_image or kind in ("cls", "json", MASK)):
                    continue
                file.seek(member.offset_data)
                data = file.read(member.size)
                place = member.offset_data, member.size, zlib.crc32(data)
                if is_image:
                    rows[key] = place
                elif kind == MASK or (kind == "json" and key not in targets and _has_target(data)):
                    targets[key] = place
                elif kind == "cls":
                    if (label := parse_label(data)) < 0:
                        problem = f"the label in {member.name} is {data[:20]!r}; a .cls member must be a whole number"
                        raise UserError(f"{tar}: {problem}")
                    labels[key] = label
            check_end(file, end, length, tar)
    except (tarfile.TarError, ValueError, OverflowError) as error:  # the last two: an impossible size in a header
        raise UserError(f"{tar} is not a readable tar ({error}): fetch or write it again") from None
    plain = [(*row, labels.get(key, -1)) for key, row in rows.items()]
    if not targets.keys() & rows.keys():
        return np.array(plain, ROW)
    return np.array([row + targets.get(key, (0, 0, 0)) for key, row in zip(rows, plain, strict=True)], TARGET_ROW)


def _has_target(data: bytes) -> bool:
    """Whether a `json` member has a target."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and any(content.get(key) is not None for key in TARGETS)


def split_member_name(name: str) -> tuple[str, str]:
    """Key and type of a member: its path up to the first dot of the file name, and the rest in lower case."""
    folder, slash, base = name.rpartition("/")
    key, _, kind = base.partition(".")
    return f"{folder}{slash}{key}", kind.lower()


def member_end(member: tarfile.TarInfo) -> int:
    """Byte at which the header after a member begins."""
    return member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def check_end(file: BinaryIO, end: int, limit: int, tar: Path | str) -> None:
    """Check that only zeros, at least two blocks, are in `file` from byte `end`, of the last member, to byte `limit`.

    Python's tarfile takes a truncated or zeroed header for the end of the archive, without an error. Raises
    `DamagedArchive`, which names `tar`, if anything else follows.
    """
    file.seek(end)
    intact = limit - end >= 2 * tarfile.BLOCKSIZE
    while intact and file.tell() < limit:  # in chunks: after damage the tail may be most of the archive
        chunk = file.read(min(CHUNK_BYTES, limit - file.tell()))
        intact = len(chunk) > 0 and not chunk.strip(b"\0")
    if not intact:
        raise DamagedArchive(f"{tar} is cut short or damaged after byte {end}: fetch or write it again")


def parse_label(data: bytes) -> int:
    """The label in a `cls` member; -1 if it is not a whole number of at most 9 digits."""
    return int(data) if data.strip().isdigit() and len(data) <= 9 else -1
