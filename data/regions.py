"""Regions of images that are too large for the memory: of TIFF pages, of arrays on disk, of PNGs. Free of torch."""

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

import imagecodecs
import numpy as np
import tifffile
from tifffile import TiffFile, TiffPage

from data.exif import orientation
from data.reading import BYTES_PER_PIXEL, TOO_LARGE, ImageError, Page, check_size, damage_as_error, raise_limit

BLOCK_ROWS = 64  # decoded at a time
LARGE_STRIP = 1 << 26  # bytes; larger strips are decoded in pieces if their compression allows it
DEFLATE, JPEG = (8, 32946), (6, 7, 34892, 33007)  # numbers of TIFF compressions
PNG_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # by colour type, without palettes
PNG = b"\x89PNG\r\n\x1a\n"
CUT = "not a readable image (cut short)"

Blocks = Callable[[int], Iterator[tuple[int, np.ndarray]]]  # from a row on, or from the top: (row, pixels [h, W, C])
Read = Callable[[int, int, int, int], np.ndarray]  # row, column, height, width -> pixels [h, w, C]


@dataclass(frozen=True, eq=False)
class View:
    """An image of a file whose pixels are read later: `size` is height and width as stored.

    `open` returns the EXIF orientation, and a function that reads a region (row, column, height, width). Regions must
    be read from top to bottom. Both raise `ImageError`. `number` counts the pages of a file with several from 1, `kind`
    is the file's type by `data.reading.sniff`.
    """

    size: tuple[int, int]
    open: Callable[[], tuple[int, Callable[[int, int, int, int], Page]]]
    number: int = 0
    kind: str = ""


def whole(page: Page) -> tuple[int, Callable[[int, int, int, int], Page]]:
    """What `View.open` returns for a page in memory."""

    def crop(row: int, column: int, height: int, width: int) -> Page:
        return replace(page, pixels=page.pixels[row : row + height, column : column + width])

    return page.orientation, crop


def check_band(size: tuple[int, int], rows: int, pixel_bytes: int, max_pixels: int) -> None:
    """Raise `ImageError` if `rows` rows of an image, which tiles of one row need, exceed the limit of decoded bytes."""
    rows = min(rows, size[0])
    advice = f": add --max-pixels {raise_limit(rows, size[1], pixel_bytes)}, or choose smaller tiles"
    check_size(rows, size[1], pixel_bytes, max_pixels, advice)


class Rows:
    """Regions of an image that is decoded in blocks of rows, from top to bottom; blocks above a region are dropped."""

    def __init__(self, blocks: Blocks):
        self.blocks, self.source, self.kept, self.end = blocks, None, [], 0

    def read(self, row: int, column: int, height: int, width: int) -> np.ndarray:
        """Pixels [h, w, C]. Raises `ImageError` for damage."""
        if self.source is None:
            self.source = self.blocks(row)
        self.kept = [(first, block) for first, block in self.kept if first + len(block) > row]
        while self.end < row + height:
            with damage_as_error():
                first, block = next(self.source, (0, None))
            if block is None:  # the end, or damage before
                raise ImageError(CUT)
            self.end = first + len(block)
            if self.end > row:
                self.kept.append((first, block))
        parts = [block[max(0, row - first) : row + height - first] for first, block in self.kept]
        return np.concatenate([part[:, column : column + width] for part in parts])


def stored_rows(file: BinaryIO, offset: int, dtype: np.dtype, shape: tuple[int, int, int, int]) -> Read:
    """Regions of an uncompressed array of `shape` [planes, H, W, C], whose planes become channels."""
    planes, height, width, channels = shape
    row_bytes = width * channels * dtype.itemsize

    def blocks(first: int) -> Iterator[tuple[int, np.ndarray]]:
        for row in range(first, height, BLOCK_ROWS):
            count, parts = min(BLOCK_ROWS, height - row), []
            for plane in range(planes):
                file.seek(offset + (plane * height + row) * row_bytes)
                data = file.read(count * row_bytes)
                if len(data) < count * row_bytes:
                    raise ImageError(CUT)
                parts.append(np.frombuffer(data, dtype).reshape(count, width, channels))
            pixels = parts[0] if planes == 1 else np.concatenate(parts, 2)
            yield row, pixels.astype(dtype.newbyteorder("="), copy=False)

    return Rows(blocks).read


def tiff_regions(tif: TiffFile, page: TiffPage, max_pixels: int) -> Read:
    """Regions of a TIFF page. Raises `ImageError` for strips or tiles that exceed the limit of decoded bytes."""
    planes = page.samplesperpixel if page.planarconfig == 2 else 1
    if page.is_contiguous:
        shape = planes, page.imagelength, page.imagewidth, page.samplesperpixel // planes
        return stored_rows(tif.filehandle, page.dataoffsets[0], page.dtype.newbyteorder(tif.byteorder), shape)
    rows, columns = _segment_size(page)
    segment = rows * columns * page.samplesperpixel // planes * page.dtype.itemsize
    plain = page.bitspersample == 8 * page.dtype.itemsize and page.fillorder == 1 and page.predictor in (1, 2, 3)
    if segment > LARGE_STRIP and not page.is_tiled and planes == 1 and plain and page.compression in DEFLATE:
        return Rows(lambda row: _inflated_strips(tif, page)).read
    if segment > max_pixels * BYTES_PER_PIXEL:
        needed = raise_limit(1, segment, 1)
        whole = f"strips or tiles of {segment:,} decoded bytes, more than the limit of {max_pixels * BYTES_PER_PIXEL:,}"
        raise ImageError(f"has {whole}: add --max-pixels {needed}", TOO_LARGE)
    return _Segments(tif, page).read


def _segment_size(page: TiffPage) -> tuple[int, int]:
    if page.is_tiled:
        return page.tilelength, page.tilewidth
    return min(page.rowsperstrip, page.imagelength), page.imagewidth


class _Segments:
    """Regions of a page in strips or tiles. Decoded ones are kept until the regions are below them."""

    def __init__(self, tif: TiffFile, page: TiffPage):
        self.tif, self.page, self.decoded = tif, page, {}
        self.rows, self.columns = _segment_size(page)
        self.planes = page.samplesperpixel if page.planarconfig == 2 else 1
        self.options = {}
        if page.compression in JPEG:
            self.options = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}

    def read(self, row: int, column: int, height: int, width: int) -> np.ndarray:
        """Pixels [h, w, C]; segments that are not stored have the page's nodata value. Raises `ImageError`."""
        page = self.page
        self.decoded = {key: pixels for key, pixels in self.decoded.items() if (key[1] + 1) * self.rows > row}
        out = np.zeros((height, width, page.samplesperpixel), page.dtype)
        for y in range(row // self.rows, -(-(row + height) // self.rows)):
            for x in range(column // self.columns, -(-(column + width) // self.columns)):
                for plane in range(self.planes):
                    pixels = self._segment(plane, y, x)
                    top, left = y * self.rows - row, x * self.columns - column
                    pixels = pixels[max(0, -top) : height - top, max(0, -left) : width - left]
                    top, left = max(0, top), max(0, left)
                    channels = np.s_[plane : plane + 1] if self.planes > 1 else np.s_[:]
                    out[top : top + pixels.shape[0], left : left + pixels.shape[1], channels] = pixels
        return out

    def _segment(self, plane: int, y: int, x: int) -> np.ndarray:
        key = plane, y, x
        if key in self.decoded:
            return self.decoded[key]
        page, file = self.page, self.tif.filehandle
        down, across = -(-page.imagelength // self.rows), -(-page.imagewidth // self.columns)
        index = (plane * down + y) * across + x
        with damage_as_error():
            file.seek(page.dataoffsets[index])
            size = page.databytecounts[index]
            data = file.read(size) if size else None
            if size and len(data) < size:
                raise ImageError(CUT)
            pixels = page.decode(data, index, **self.options)[0]
            if pixels is None:
                channels = 1 if self.planes > 1 else page.samplesperpixel
                pixels = np.broadcast_to(np.array(page.nodata, page.dtype), (1, self.rows, self.columns, channels))
        self.decoded[key] = pixels[0]
        return self.decoded[key]


def _inflated_strips(tif: TiffFile, page: TiffPage) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of rows of a page in large deflated strips."""
    file, row_bytes = tif.filehandle, page.imagewidth * page.samplesperpixel * page.dtype.itemsize
    dtype = page.dtype if page.predictor == 3 else page.dtype.newbyteorder(tif.byteorder)
    unpredict = None if page.predictor == 1 else tifffile.TIFF.UNPREDICTORS[page.predictor]
    rows = _segment_size(page)[0]
    for index, (offset, size) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=True)):
        first, last = index * rows, min((index + 1) * rows, page.imagelength)
        counts = [min(BLOCK_ROWS, last - row) for row in range(first, last, BLOCK_ROWS)]
        row = first
        for data in inflate(_pieces(file, offset, size), [count * row_bytes for count in counts]):
            pixels = np.frombuffer(data, dtype).reshape(-1, page.imagewidth, page.samplesperpixel)
            pixels = pixels.astype(page.dtype, copy=False)
            yield row, pixels if unpredict is None else unpredict(pixels, axis=-2)
            row += len(pixels)


def _pieces(file: BinaryIO, offset: int, size: int) -> Iterator[bytes]:
    for at in range(offset, offset + size, 1 << 20):
        file.seek(at)
        yield file.read(min(1 << 20, offset + size - at))


def inflate(pieces: Iterator[bytes], sizes: Iterable[int]) -> Iterator[bytes]:
    """Deflated data, which come in pieces, in blocks of `sizes` bytes. Raises `ImageError` if they end before."""
    stream = zlib.decompressobj()
    for size in sizes:
        block = bytearray()
        while len(block) < size:
            data = stream.unconsumed_tail or next(pieces, b"")
            found = stream.decompress(data, size - len(block))
            if not (found or data):
                raise ImageError(CUT)
            block += found
        yield bytes(block)


def png_regions(file: BinaryIO) -> Read | None:
    """Regions of a PNG as uint8 or uint16; None for palettes, interlaced ones, and less than 8 bits per channel.

    Rows depend on the rows above, so a PNG is decoded from its top: each block of rows as a PNG of its own, which
    begins with the last row of the block above.
    """
    file.seek(8)
    header = file.read(25)
    width, height, depth, colours, _, _, interlaced = struct.unpack(">8x2I5B4x", header)
    if depth < 8 or interlaced or colours not in PNG_CHANNELS:
        return None
    row_bytes = 1 + width * PNG_CHANNELS[colours] * depth // 8  # with the filter's number

    def blocks(_: int) -> Iterator[tuple[int, np.ndarray]]:
        counts = [min(BLOCK_ROWS, height - row) for row in range(0, height, BLOCK_ROWS)]
        row, above = 0, bytes(row_bytes)
        for data in inflate(_png_data(file), [count * row_bytes for count in counts]):
            count = len(data) // row_bytes
            pixels = imagecodecs.png_decode(_png(width, count + 1, header[16:21], above + data))[1:]
            pixels = pixels.reshape(count, width, -1)
            above = b"\0" + pixels[-1].astype(pixels.dtype.newbyteorder(">")).tobytes()
            yield row, pixels
            row += count

    return Rows(blocks).read


def check_png(file: BinaryIO) -> int:
    """Check the length and all checksums of a PNG, which decoding ignores. Returns its EXIF orientation."""
    turn = 1
    file.seek(8)
    while len(head := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        crc, exif = zlib.crc32(kind), b""
        for piece in _pieces(file, file.tell(), size):
            crc, exif = zlib.crc32(piece, crc), exif + piece if kind == b"eXIf" else b""
        check = file.read(4)
        if check != crc.to_bytes(4, "big"):
            raise ImageError("not a readable image (damaged or cut short)")
        if kind == b"eXIf":
            turn = orientation(PNG + head + exif + check)
        if kind == b"IEND":
            return turn
    raise ImageError(CUT)


def _png_data(file: BinaryIO) -> Iterator[bytes]:
    """The compressed pixels of a PNG."""
    at = 8
    while file.seek(at) == at and len(head := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        if kind == b"IDAT":
            yield from _pieces(file, at + 8, size)
        at += 12 + size


def _png(width: int, height: int, kind: bytes, rows: bytes) -> bytes:
    """A PNG of filtered rows, not compressed."""
    chunks = (b"IHDR", struct.pack(">2I", width, height) + kind), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b"")
    out = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    return PNG + b"".join(out)
