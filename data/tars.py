"""Reading WebDataset tars: member names, the position and checksum of each image, damage.

Free of torch. `data/writing.py` writes tars.
"""

import tarfile
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from configs.errors import UserError

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp", "gif", "npy")  # what the loader decodes
ROW = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc", "<u4"), ("label", "<i4")])
CHUNK_BYTES = 1 << 20  # read at a time from files that may be large


def read_rows(tar: Path) -> np.ndarray:
    """Rows [samples] of `ROW`: position and checksum of each sample's image, and its label.

    A sample's key is its path up to the first dot of the file name. Its image is its first member whose type is in
    `IMAGE_TYPES`; samples without an image are skipped. Its label is the number in its `cls` member, -1 without one.

    Raises `UserError` if the tar is truncated or damaged, or a label is not a whole number.
    """
    rows: dict[str, tuple[int, int, int]] = {}
    labels: dict[str, int] = {}
    end, length = 0, tar.stat().st_size
    try:
        with tarfile.open(tar, "r:") as archive, tar.open("rb") as file:
            for member in archive:
                end = member_end(member)
                if member.size < 0 or (member.isreg() and member.offset_data + member.size > length):
                    raise UserError(f"{tar} is truncated or damaged inside {member.name}: fetch or write it again")
                if not member.isreg():
                    continue
                key, kind = split_member_name(member.name)
                if kind != "cls" and (kind not in IMAGE_TYPES or key in rows):
                    continue
                file.seek(member.offset_data)
                data = file.read(member.size)
                if kind != "cls":
                    rows[key] = member.offset_data, member.size, zlib.crc32(data)
                elif (label := parse_label(data)) >= 0:
                    labels[key] = label
                else:
                    problem = f"the label in {member.name} is {data[:20]!r}; a .cls member must be a whole number"
                    raise UserError(f"{tar}: {problem}")
            check_end(file, end, length, tar)
    except (tarfile.TarError, ValueError, OverflowError) as error:  # the last two: an impossible size in a header
        raise UserError(f"{tar} is not a readable tar ({error}): fetch or write it again") from None
    return np.array([(*row, labels.get(key, -1)) for key, row in rows.items()], ROW)


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
    `UserError`, which names `tar`, if anything else follows.
    """
    file.seek(end)
    intact = limit - end >= 2 * tarfile.BLOCKSIZE
    while intact and file.tell() < limit:  # in chunks: after damage the tail may be most of the archive
        chunk = file.read(min(CHUNK_BYTES, limit - file.tell()))
        intact = len(chunk) > 0 and not chunk.strip(b"\0")
    if not intact:
        raise UserError(f"{tar} is cut short or damaged after byte {end}: fetch or write it again")


def parse_label(data: bytes) -> int:
    """The label in a `cls` member; -1 if it is not a whole number of at most 9 digits."""
    return int(data) if data.strip().isdigit() and len(data) <= 9 else -1
