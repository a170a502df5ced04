"""Regions of TIFFs, arrays and PNGs equal those of the whole image, and damage is found where it is."""

import io

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image
from tifffile import TiffFile

from data import regions
from data.reading import MAX_PIXELS, ImageError
from data.regions import check_png, png_regions, stored_rows, tiff_regions
from tests.data.test_exif import rotated

PIXELS = np.random.default_rng(0).integers(0, 256, (100, 75, 3), np.uint8)
PLACES = [(0, 0, 10, 75), (0, 40, 30, 35), (5, 3, 90, 20), (60, 0, 40, 75), (99, 74, 1, 1)]


def tiff(pixels: np.ndarray, **options) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, pixels, **({"photometric": "rgb"} | options))
    return out.getvalue()


def check(read, pixels: np.ndarray) -> None:
    for row, column, height, width in PLACES:
        found = read(row, column, height, width)
        assert found.dtype == pixels.dtype
        assert np.array_equal(found, pixels[row : row + height, column : column + width])


@pytest.mark.parametrize(
    "options",
    [
        {}, {"byteorder": ">"}, {"rowsperstrip": 7}, {"compression": "lzw", "predictor": True}, {"tile": (16, 48)},
        {"tile": (32, 16), "compression": "zstd"}, {"compression": "deflate", "predictor": True, "byteorder": ">"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_tiff(dtype, planar, options):
    pixels = PIXELS.astype(dtype)
    array = np.moveaxis(pixels, 2, 0) if planar else pixels
    data = tiff(array, planarconfig="separate" if planar else "contig", **options)
    with TiffFile(io.BytesIO(data)) as tif:
        check(tiff_regions(tif, tif.pages[0], MAX_PIXELS), pixels)


@pytest.mark.parametrize("rows", [100, 70])
@pytest.mark.parametrize(("dtype", "predictor"), [("u1", 1), ("u1", 2), ("u2", 2), ("f4", 1), ("f4", 3)])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_large_deflated_strip_is_decoded_in_pieces(order, dtype, predictor, rows, monkeypatch):
    pixels = PIXELS.astype(dtype)
    data = tiff(pixels, compression="deflate", predictor=predictor, rowsperstrip=rows, byteorder=order)
    monkeypatch.setattr(regions, "LARGE_STRIP", 1000)
    monkeypatch.setattr(TiffFile, "asarray", None)
    with TiffFile(io.BytesIO(data)) as tif:
        check(tiff_regions(tif, tif.pages[0], 1), pixels)  # within any limit
    with TiffFile(io.BytesIO(data[: len(data) * 9 // 10])) as tif:
        read = tiff_regions(tif, tif.pages[0], 1)
        assert np.array_equal(read(0, 0, 10, 75), pixels[:10])
        with pytest.raises(ImageError, match="cut short"):
            read(90, 0, 10, 75)


def test_a_large_strip_that_must_be_decoded_as_a_whole_is_refused():
    with (
        TiffFile(io.BytesIO(tiff(PIXELS, compression="lzw", rowsperstrip=100))) as tif,
        pytest.raises(ImageError, match=r"22,500 decoded bytes, more than the limit of 4,000: add --max-pixels 5700"),
    ):
        tiff_regions(tif, tif.pages[0], 1000)


def test_a_damaged_tile_harms_no_other():
    data = bytearray(tiff(PIXELS, tile=(32, 32), compression="deflate"))
    with TiffFile(io.BytesIO(data)) as tif:
        at = tif.pages[0].dataoffsets[4]  # the second row's second
    data[at : at + 20] = bytes(20)
    with TiffFile(io.BytesIO(data)) as tif:
        read = tiff_regions(tif, tif.pages[0], MAX_PIXELS)
        assert np.array_equal(read(32, 0, 32, 32), PIXELS[32:64, :32])
        with pytest.raises(ImageError, match="damaged"):
            read(32, 0, 32, 33)
        assert np.array_equal(read(32, 64, 32, 11), PIXELS[32:64, 64:])


def test_tiles_that_are_not_stored_have_the_nodata_value(tmp_path):
    tag = [(42113, 2, 0, "7", True)]
    path = tmp_path / "a.tif"
    path.write_bytes(
        tiff(PIXELS[..., 0], photometric="minisblack", tile=(32, 32), compression="deflate", extratags=tag)
    )
    with TiffFile(path, mode="r+b") as tif:
        sizes = tif.pages[0].databytecounts
        tif.pages[0].tags["TileByteCounts"].overwrite([0, *sizes[1:]])
    with TiffFile(path) as tif:
        read = tiff_regions(tif, tif.pages[0], MAX_PIXELS)
        found = read(0, 0, 100, 75)[..., 0]
        assert (
            (found[:32, :32] == 7).all()
            and (found[32:] == PIXELS[32:, :, 0]).all()
            and np.array_equal(found, tif.pages[0].asarray())
        )


@pytest.mark.parametrize("order", ["<", ">"])
def test_rows_of_an_array(order):
    pixels = PIXELS.astype("u2") * 200
    file = io.BytesIO(b"head" + pixels.astype(f"{order}u2").tobytes())
    check(stored_rows(file, 4, np.dtype(f"{order}u2"), (1, *pixels.shape)), pixels)
    file.truncate(5000)
    with pytest.raises(ImageError, match="cut short"):
        stored_rows(file, 4, np.dtype("u2"), (1, *pixels.shape))(90, 0, 10, 10)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_png(dtype, channels):
    """With all filters, which depend on the row above."""
    smooth = np.add.outer(np.arange(100), np.arange(75))[..., None] * np.arange(1, channels + 1)
    pixels = (smooth * (1 if dtype == "u1" else 130) % np.iinfo(dtype).max).astype(dtype)
    pixels[50:] += np.random.default_rng(1).integers(0, 9, pixels[50:].shape).astype(dtype)
    data = imagecodecs.png_encode(pixels if channels > 1 else pixels[..., 0], filter=imagecodecs.PNG.FILTER.ALL)
    check(png_regions(io.BytesIO(data)), pixels)
    for harm in (data[: len(data) // 2], data[:-30] + bytes(9) + data[-21:]):
        with pytest.raises(ImageError):
            check_png(io.BytesIO(harm))
    with pytest.raises(ImageError):
        png_regions(io.BytesIO(data[: len(data) // 2]))(99, 0, 1, 75)


def test_pngs_that_are_decoded_as_a_whole():
    for picture in (Image.new("P", (9, 9)), Image.new("1", (9, 9))):
        out = io.BytesIO()
        picture.save(out, "png")
        assert png_regions(out) is None


@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_of_a_png(turn):
    data = rotated("png", turn)
    assert check_png(io.BytesIO(data)) == turn
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    behind = data[:start] + data[end:-12] + data[start:end] + data[-12:]  # after the pixels
    assert check_png(io.BytesIO(behind)) == turn
