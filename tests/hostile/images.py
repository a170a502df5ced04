"""Hostile images: by file name, their bytes."""

import io
import pickle
import struct
import zlib

import numpy as np
import tifffile
from PIL import Image

from tests.data.helpers import picture


def png(width: int, height: int, depth: int = 8, colour: int = 2, data: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG of any header; `data` are its pixels, or those that would be there are missing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    )


def saved(size: tuple[int, int], mode: str, kind: str, **more: object) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, kind, **more)
    return out.getvalue()


def changed(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def tiff(**more: object) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, np.zeros((8, 8, 3), np.uint8), photometric="rgb", **more)
    return out.getvalue()


def npy(shape: tuple[int, ...], kind: str, content: bytes = b"") -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": kind, "fortran_order": False, "shape": shape})
    return out.getvalue() + content


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: object):
        self.path = str(path)

    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


def pickled_npy(path: object) -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([Payload(path)], object), allow_pickle=True)
    return out.getvalue()


JPEG, PNG = picture(0), picture(0, kind="png")
BIG = 13_000
IMAGES = {
    "bomb.png": lambda: saved((BIG, BIG), "RGB", "png"),
    "palette.png": lambda: saved((BIG, BIG), "P", "png"),
    "bits.png": lambda: saved((30_000, 30_000), "1", "png"),
    "empty.jpg": lambda: b"",
    "random.jpg": lambda: np.random.default_rng(0).bytes(5000),
    "cut.jpg": lambda: JPEG[: len(JPEG) // 2],
    "huge-header.jpg": lambda: changed(JPEG, JPEG.index(b"\xff\xc0") + 5, b"\xff\xff\xff\xff"),
    "no-size.jpg": lambda: changed(JPEG, JPEG.index(b"\xff\xc0") + 5, bytes(4)),
    "cut.png": lambda: PNG[:-40],
    "huge-header.png": lambda: png(1 << 30, 1 << 30),
    "no-pixels.png": lambda: png(100, 100),
    "too-many-pixels.png": lambda: png(10, 10, data=bytes(50 << 20)),
    "no-size.png": lambda: png(0, 0),
    "odd-depth.png": lambda: png(8, 8, depth=77, colour=99),
    "text-bomb.png": lambda: (
        changed(PNG, 33, b"")[:33]
        + struct.pack(">I", 9 + len(zlib.compress(bytes(100 << 20))))
        + b"zTXt"
        + b"comment\0\0"
        + zlib.compress(bytes(100 << 20))
        + bytes(4)
        + PNG[33:]
    ),
    "wrong-checksum.png": lambda: changed(PNG, 29, b"\0\0\0\0"),
    "huge.gif": lambda: changed(saved((8, 8), "P", "gif"), 6, b"\xff\xff\xff\xff"),
    "huge.webp": lambda: changed(saved((8, 8), "RGB", "webp"), 24, b"\xff\x3f\xff\x3f"),
    "cut.webp": lambda: saved((64, 64), "RGB", "webp")[:30],
    "huge.bmp": lambda: changed(saved((8, 8), "RGB", "bmp"), 18, struct.pack("<ii", 1 << 30, 1 << 30)),
    "negative.bmp": lambda: changed(saved((8, 8), "RGB", "bmp"), 18, struct.pack("<ii", -8, 8)),
    "huge.ppm": lambda: b"P6\n999999999 999999999\n255\n",
    "huge.tga": lambda: bytes((0, 0, 2, *[0] * 9, 255, 255, 255, 255, 24, 0)),
    "huge.qoi": lambda: b"qoif" + struct.pack(">IIBB", 1 << 31, 1 << 31, 3, 0),
    "huge.tif": lambda: tiff().replace(struct.pack("<HHII", 256, 3, 1, 8)[:8], struct.pack("<HHI", 256, 4, 1)),
    "loop.tif": lambda: struct.pack("<2sHIHI", b"II", 42, 8, 0, 8),
    "far.tif": lambda: struct.pack("<2sHI", b"II", 42, 0xFFFFFFF0),
    "pages.tif": lambda: b"".join([tiff()]) + bytes(100),
    "bomb.tif": lambda: _bomb_tiff(),
    "objects.npy": lambda: npy((2, 2), "|O", pickle.dumps([1])),
    "huge.npy": lambda: npy((1 << 40, 1 << 20), "<f8"),
    "negative.npy": lambda: npy((-5, 5), "<f8"),
    "odd-header.npy": lambda: b"\x93NUMPY\x01\x00\x40\x00" + b"{'descr': __import__('os').getcwd(), }".ljust(64),
    "deep.npy": lambda: b"\x93NUMPY\x01\x00\x00\x20" + b"[" * 8192,
    "junk.dcm": lambda: bytes(128) + b"DICM" + np.random.default_rng(1).bytes(500),
    "long.dcm": lambda: bytes(128) + b"DICM" + b"\x02\x00\x00\x00UL\xff\xff" + bytes(20),
    "junk.heic": lambda: b"\0\0\0\x18ftypheic" + bytes(200),
    "junk.avif": lambda: b"\0\0\0\x18ftypavif" + bytes(200),
    "junk.jp2": lambda: b"\xff\x4f\xff\x51" + b"\xff" * 200,
    "page.jpg": lambda: b"<html><script>alert(1)</script></html>",
    "program.eps.jpg": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(evil) (w) file\n",
    "vector.jpg": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "pointer.png": lambda: b"version https://git-lfs.github.com/spec/v1\n",
    "archive.jpg": lambda: b"PK\x03\x04" + bytes(100),
}


def _bomb_tiff() -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, np.zeros((BIG, BIG, 3), np.uint8), compression="zlib", photometric="rgb")
    return out.getvalue()
