"""EXIF orientation of encoded pictures: found without decoding, removed, applied; rare kinds of JPEG. Free of torch."""

import struct
import zlib
from typing import TypeVar

Pixels = TypeVar("Pixels")  # an array or a tensor
ORIENTATION = 0x0112  # tag
SEGMENT, CHUNK = struct.Struct(">BBH"), struct.Struct(">I4s")  # of a JPEG: 0xFF, marker, size; of a PNG: size, name
# markers of a JPEG's frame: SOF0 to SOF2 are common, JPEG-LS is SOF55
FRAMES = {0xC0: "", 0xC1: "", 0xC2: "", 0xC3: "lossless", 0xC5: "hierarchical", 0xC6: "hierarchical", 0xC7: "lossless",
          0xC9: "arithmetic-coded", 0xCA: "arithmetic-coded", 0xCB: "lossless", 0xF7: "lossless (JPEG-LS)"}  # fmt: skip
# axes to flip after swapping height and width for orientations 5 to 8: "v" = rows, "h" = columns
FLIPS = {1: "", 2: "h", 3: "vh", 4: "v", 5: "", 6: "h", 7: "vh", 8: "v"}


def orientation(data: bytes) -> int:
    """EXIF orientation of a JPEG, PNG or WebP, 1 to 8; 1 = upright, also without or with damaged EXIF data."""
    if (found := _find(data)) is None:
        return 1
    return _orientation_in(data[found[2] : found[1]])


def without_exif(data: bytes) -> bytes:
    """A JPEG, PNG or WebP without its EXIF data."""
    while (found := _find(data)) is not None:
        data = data[: found[0]] + data[found[1] :]
        if data[:4] == b"RIFF":
            data = b"RIFF" + struct.pack("<I", len(data) - 8) + data[8:]
            if data[12:16] == b"VP8X":  # clear the flag that announces the chunk
                data = data[:20] + bytes([data[20] & ~0x08]) + data[21:]
    return data


def swaps(orientation: int) -> bool:
    """Whether an orientation exchanges height and width."""
    return orientation >= 5


def upright(image: Pixels, orientation: int, rows: int = 0) -> Pixels:
    """An image turned upright: an array or tensor whose axes `rows` and `rows + 1` are height and width."""
    if swaps(orientation):
        image = image.swapaxes(rows, rows + 1)
    axes = [rows + "vh".index(axis) for axis in FLIPS[orientation]]
    if not axes:
        return image
    if hasattr(image, "flip"):  # torch has no negative strides
        return image.flip(axes)
    return image[tuple(slice(None, None, -1 if axis in axes else None) for axis in range(rows + 2))]


def _find(data: bytes) -> tuple[int, int, int] | None:
    """Begin and end of the segment or chunk with EXIF data, and the place of the TIFF header in it."""
    if data[:2] == b"\xff\xd8":
        return _find_in_jpeg(data)
    if data[:4] == b"\x89PNG":
        return _find_in_png(data)
    return _find_in_webp(data) if data[:4] == b"RIFF" else None


def rare_jpeg(data: bytes) -> str:
    """What makes a JPEG unreadable here, such as `12-bit` or `lossless`; empty for common ones and damaged headers."""
    at = 2
    while data[:2] == b"\xff\xd8" and at + 5 <= len(data):
        start, marker, size = SEGMENT.unpack_from(data, at)
        if start != 0xFF or marker in (0xD9, 0xDA):
            break
        if marker in FRAMES:
            return FRAMES[marker] or (f"{data[at + 4]}-bit" if data[at + 4] != 8 else "")
        at += 1 if marker == 0xFF else 2 + size
    return ""


def _find_in_jpeg(data: bytes) -> tuple[int, int, int] | None:
    at, last = 2, len(data) - 4
    while at <= last:
        start, marker, size = SEGMENT.unpack_from(data, at)
        if (start, marker) == (0xFF, 0xFF):  # padding
            at += 1
            continue
        end = at + 2 + size
        if start != 0xFF or marker in (0xD9, 0xDA) or size < 2:  # the compressed pixels begin, or damage
            return None
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return at, end, at + 10
        at = end
    return None


def _find_in_png(data: bytes) -> tuple[int, int, int] | None:
    at, last = 8, len(data) - 12
    while at <= last:
        size, name = CHUNK.unpack_from(data, at)
        end = at + 12 + size
        if name == b"eXIf":
            intact = data[end - 4 : end] == zlib.crc32(data[at + 4 : end - 4]).to_bytes(4, "big")
            return (at, end, at + 8) if intact else None
        at = end
    return None


def _find_in_webp(data: bytes) -> tuple[int, int, int] | None:
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"EXIF":
            header = at + 8 + (6 if data[at + 8 : at + 14] == b"Exif\0\0" else 0)
            return at, at + 8 + size + size % 2, header
        at += 8 + size + size % 2
    return None


def _orientation_in(exif: bytes) -> int:
    """Orientation in the first directory of a TIFF structure."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return 1
    (at,) = struct.unpack_from(f"{order}I", exif, 4)
    if at + 2 > len(exif):
        return 1
    (entries,) = struct.unpack_from(f"{order}H", exif, at)
    for place in range(at + 2, min(at + 2 + 12 * entries, len(exif) - 11), 12):
        tag, kind, count, value = struct.unpack_from(f"{order}HHIH", exif, place)
        if tag == ORIENTATION:
            return value if (kind, count) == (3, 1) and value in FLIPS else 1
    return 1
