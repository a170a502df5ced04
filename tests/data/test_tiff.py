"""TIFF: bands, depths, layouts, pages, and values that need a decision."""

import io
import struct

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from configs.errors import UserError
from data.decode import decode
from data.reading import PAGES, TOO_LARGE, UNSUPPORTED, ImageError, Notes, Reading
from data.reencode import reencode, reencode_all
from data.shard_index import read_index
from tests.data.helpers import as_folder, picture
from tests.data.test_prepare import content, prepared

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (40, 30, 3), np.uint8)
DEEP = PIXELS.astype(np.uint16) * 16


def tiff(pixels: np.ndarray, **options) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, pixels, **options)
    return out.getvalue()


def stored(data: bytes, **reading) -> np.ndarray:
    """The array [H, W, C] that a shard gets."""
    kind, data = reencode(data, "a.tif", reading=Reading(**reading))
    if kind == "npy":
        return np.load(io.BytesIO(data))
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    return pixels[..., None] if pixels.ndim == 2 else pixels


@pytest.mark.parametrize(
    "options",
    [
        {}, {"compression": "lzw", "predictor": True}, {"compression": "deflate"}, {"tile": (16, 16)},
        {"tile": (16, 16), "compression": "zstd"}, {"bigtiff": True}, {"byteorder": ">"}, {"rowsperstrip": 7},
    ],
)  # fmt: skip
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("pixels", [PIXELS, DEEP], ids=["8", "12"])
def test_layouts_and_compressions_keep_the_values(pixels, planar, options):
    options = {"photometric": "rgb"} | options
    array = np.moveaxis(pixels, 2, 0) if planar else pixels
    data = tiff(array, planarconfig="separate" if planar else "contig", **options)
    kind, _ = reencode(data, "a.tif")
    assert kind == ("png" if pixels.dtype == np.uint8 else "npy")
    found = stored(data)
    assert found.dtype == pixels.dtype and np.array_equal(found, pixels)


def test_jpeg_in_tiff():
    smooth = np.tile(np.linspace(0, 255, 32).astype(np.uint8)[:, None, None], (1, 48, 3))
    found = stored(tiff(smooth, photometric="rgb", compression="jpeg"))
    assert np.abs(found.astype(int) - smooth).max() < 12


def test_red_green_blue_and_near_infrared_are_four_bands():
    pixels = np.dstack([PIXELS, PIXELS[..., :1] // 2])
    data = tiff(pixels, photometric="rgb", extrasamples=["unspecified"])
    kind, encoded = reencode(data, "a.tif")
    assert kind == "npy" and np.array_equal(np.load(io.BytesIO(encoded)), pixels)
    assert np.array_equal(decode(encoded, 4).permute(1, 2, 0).numpy(), pixels)


def test_alpha_is_alpha():
    pixels = np.dstack([PIXELS, PIXELS[..., :1] | 1])
    kind, encoded = reencode(tiff(pixels, photometric="rgb", extrasamples=["unassalpha"]), "a.tif")
    assert kind == "png" and np.array_equal(decode(encoded, 4).permute(1, 2, 0).numpy(), pixels)
    assert np.array_equal(decode(encoded, 3).permute(1, 2, 0).numpy(), PIXELS)
    premultiplied = pixels.copy()
    premultiplied[..., :3] = 100
    premultiplied[..., 3] = 200
    found = stored(tiff(premultiplied, photometric="rgb", extrasamples=["assocalpha"]))
    assert np.unique(found[..., :3]) == [128] and np.unique(found[..., 3]) == [200]
    kind, encoded = reencode(tiff(pixels.astype("u2") * 257, photometric="rgb", extrasamples=["unassalpha"]), "a.tif")
    assert kind == "png" and torch.allclose(decode(encoded, 4)[3] * 255, torch.from_numpy(pixels[..., 3]).float())


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_thirteen_bands(planar, tmp_path):
    pixels = RNG.integers(0, 10000, (20, 24, 13)).astype(np.uint16)
    array = pixels if planar == "contig" else np.moveaxis(pixels, 2, 0)
    source = as_folder({"a.tif": tiff(array, photometric="minisblack", planarconfig=planar)}, tmp_path / "in")
    prepared(source, tmp_path / "out")
    (data,) = content(tmp_path / "out")
    assert np.allclose(decode(data, 13).permute(1, 2, 0).numpy() * 65535, pixels, atol=0.01)
    small = np.load(io.BytesIO(reencode((source / "a.tif").read_bytes(), "a.tif", resize=10)[1]))
    assert small.shape == (10, 12, 13) and small.dtype == np.uint16


def test_computed_tomography_in_signed_integers(tmp_path):
    scan = PIXELS[..., 0].astype("i2") * 16 - 1024
    source = as_folder({"a.tif": tiff(scan)}, tmp_path / "in")
    low, high = scan.min(), scan.max()
    with pytest.raises(
        UserError, match=rf"a\.tif has int16 values from {low} to {high}: add --value-range {low} {high}"
    ):
        prepared(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    prepared(source, tmp_path / "out", "--value-range", "-1024", "3071")
    (data,) = content(tmp_path / "out")
    assert np.load(io.BytesIO(data)).dtype == np.uint16
    expected = (scan.astype(float) + 1024) / 4095
    assert np.allclose(decode(data, 1)[0].numpy(), expected, atol=1e-5)
    assert len(decode(data).unique()) == len(np.unique(scan))  # nothing is lost


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "u4", "f2", "f4", "f8"])
def test_values_without_a_known_range_need_one(dtype):
    pixels = (PIXELS[..., 0] // 3).astype(dtype)
    pixels[0, 0] = 100
    with pytest.raises(ImageError, match=r"values from 0 to 100: add --value-range 0 100"):
        stored(tiff(pixels))
    found = stored(tiff(pixels), value_range=(0, 100))
    unit = 65535 if found.dtype == np.uint16 else 1
    assert found.dtype == (np.uint16 if dtype[0] in "iu" else np.float32)
    assert np.allclose(found[..., 0] / unit, pixels.astype(float) / 100, atol=1e-5)


def test_wide_integers_become_floats():
    pixels = np.array([[0, 1], [500_000, 1_000_000]], np.uint32)
    found = stored(tiff(pixels), value_range=(0, 1_000_000))
    assert found.dtype == np.float32 and np.allclose(found[..., 0], pixels / 1e6)


def test_clipped_values_are_counted():
    notes = Notes()
    data = tiff(np.array([[-5, 0], [10, 30]], np.int16))
    _, encoded = reencode(data, "a.tif", reading=Reading(value_range=(0, 20)), notes=notes)
    assert np.allclose(decode(encoded)[0], torch.tensor([[0, 0], [0.5, 1]]), atol=1e-5)
    assert [count for note, count in notes.items() if "clipped" in note] == [2]


def test_nan_and_nodata_are_named_and_replaced_on_demand():
    pixels = RNG.random((6, 5)).astype(np.float32)
    pixels[2, 3], pixels[0, 0] = np.nan, np.inf
    with pytest.raises(ImageError, match=r"2 values without data \(NaN, inf\).* --value-range 0 1 --nodata nan"):
        stored(tiff(pixels))
    with pytest.raises(ImageError, match="--nodata nan"):
        stored(tiff(pixels), value_range=(0, 1))
    found = stored(tiff(pixels), value_range=(0, 1), nodata="nan")[..., 0]
    assert found[2, 3] == found[0, 0] == 0 and np.array_equal(found[3:], pixels[3:])
    tagged = np.array([[-9999, 0], [5, 10]], np.int16)
    data = tiff(tagged, extratags=[(42113, 2, 0, "-9999", True)])
    with pytest.raises(ImageError, match=r"values from 0 to 10 and 1 value without data \(-9999\)"):
        stored(data)
    assert np.array_equal(stored(data, value_range=(0, 10), nodata="nan")[..., 0], [[0, 0], [32768, 65535]])
    unmarked = stored(tiff(tagged), value_range=(0, 10), nodata=-9999)
    assert np.array_equal(unmarked[..., 0], [[0, 0], [32768, 65535]])
    zero = tiff(DEEP, photometric="rgb", extratags=[(42113, 2, 0, "0", True)])  # 0 is the lowest value anyway
    assert np.array_equal(stored(zero), DEEP)


def test_pages():
    pages = np.stack([PIXELS, 255 - PIXELS, PIXELS // 2])
    data = tiff(pages, photometric="rgb")
    with pytest.raises(ImageError, match=r"has 3 pages: add --pages first or --pages all") as error:
        stored(data)
    assert error.value.kind == PAGES
    assert np.array_equal(stored(data, pages="first"), PIXELS)
    found = list(reencode_all(data, "a.tif", None, None, Reading(pages="all"), Notes()))
    assert [name for name, _ in found] == ["a.tif#1", "a.tif#2", "a.tif#3"]
    for (_, (kind, encoded)), page in zip(found, pages, strict=True):
        assert kind == "png" and np.array_equal(decode(encoded).permute(1, 2, 0).numpy(), page)


@pytest.mark.parametrize(
    "options",
    [{"imagej": True}, {"truncate": True, "photometric": "minisblack"}, {"volumetric": True, "tile": (4, 16, 16)}],
)
def test_stacks_are_pages(options):
    stack = RNG.integers(0, 60000, (5, 40, 30)).astype(np.uint16)
    data = tiff(stack, **({"photometric": "minisblack"} | options if "imagej" not in options else options))
    with pytest.raises(ImageError, match=r"has 5 pages: add --pages"):
        stored(data)
    found = list(reencode_all(data, "a.tif", None, None, Reading(pages="all"), Notes()))
    assert len(found) == 5
    for (_, (_, encoded)), page in zip(found, stack, strict=True):
        assert np.array_equal(np.load(io.BytesIO(encoded))[..., 0], page)


def test_pages_in_shards(tmp_path, capsys):
    pages = RNG.random((3, 8, 8)).astype(np.float32)
    pages[1, 0, 0] = np.nan
    source = as_folder({"cat/a.tif": tiff(pages, photometric="minisblack"), "dog/b.jpg": picture(0)}, tmp_path / "in")
    prepared(source, tmp_path / "one", "--pages", "all", "--value-range", "0", "1", "--nodata", "nan")
    assert sum(shard.samples for shard in read_index(tmp_path / "one").shards) == 4
    assert sorted(content(tmp_path / "one").values()) == [0, 0, 0, 1]
    with pytest.raises(UserError, match=r"cat/a\.tif#2 has .*--nodata nan"):
        prepared(source, tmp_path / "two", "--pages", "all", "--value-range", "0", "1")


def test_an_overview_is_not_a_page():
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        writer.write(PIXELS, photometric="rgb")
        writer.write(PIXELS[::2, ::2], photometric="rgb", subfiletype=1)
    assert np.array_equal(stored(out.getvalue()), PIXELS)


def test_palettes_bits_and_white_is_zero():
    colours = RNG.integers(0, 256, (3, 256)).astype(np.uint16) * 257
    indices = PIXELS[..., 0]
    found = stored(tiff(indices, photometric="palette", colormap=colours))
    assert found.dtype == np.uint8 and np.array_equal(found, np.moveaxis((colours >> 8)[:, indices], 0, -1))
    bits = PIXELS[..., 0] > 100
    assert np.array_equal(stored(tiff(bits, photometric="minisblack"))[..., 0], bits * 255)
    assert np.array_equal(stored(tiff(bits, photometric="miniswhite"))[..., 0], ~bits * 255)
    assert np.array_equal(stored(tiff(indices, photometric="miniswhite"))[..., 0], 255 - indices)


def test_quality_makes_jpegs_of_8_bit_pages_only():
    assert reencode(tiff(PIXELS, photometric="rgb"), "a.tif", quality=90)[0] == "jpg"
    assert reencode(tiff(DEEP, photometric="rgb"), "a.tif", quality=90)[0] == "npy"


@pytest.mark.parametrize(
    "options", [{}, {"tile": (64, 64), "compression": "lzw"}, {"rowsperstrip": 33, "compression": "lzw"}]
)
@pytest.mark.parametrize("planar", [False, True])
def test_a_page_over_the_limit_is_reduced_in_parts(options, planar):
    smooth = np.add.outer(np.arange(400), np.arange(300))[..., None] * np.array([20, 40, 60])
    pixels = smooth.astype(np.uint16)
    array = np.moveaxis(pixels, 2, 0) if planar else pixels
    data = tiff(array, photometric="rgb", planarconfig="separate" if planar else "contig", **options)
    reading = Reading(max_pixels=50_000)
    with pytest.raises(
        ImageError, match=r"120,000 pixels.* 50,000 pixels: add --max-pixels 180000 or --resize"
    ) as error:
        reencode(data, "a.tif", reading=reading)
    assert error.value.kind == TOO_LARGE
    small = np.load(io.BytesIO(reencode(data, "a.tif", resize=20, reading=reading)[1]))
    whole = np.load(io.BytesIO(reencode(data, "a.tif", resize=20)[1]))
    assert small.shape == whole.shape == (27, 20, 3) and small.dtype == np.uint16
    assert np.abs(small.astype(int) - whole)[1:-1, 1:-1].max() < 0.02 * pixels.max()


@pytest.mark.parametrize(
    ("data", "kind", "pattern"),
    [
        (tiff(np.zeros((4, 5), np.complex64)), UNSUPPORTED, "complex64"),
        (tiff(PIXELS, photometric="rgb", compression="lzw")[:2000], "damaged", "damaged TIFF"),
        (tiff(PIXELS, photometric="rgb")[:2000], "damaged", "damaged TIFF"),
        (b"II*\0\x08\0\0\0", "damaged", "damaged TIFF"),
        (b"MM\0*" + bytes(200), "damaged", "damaged TIFF"),
    ],
)
def test_refusals_name_their_kind_and_no_library(data, kind, pattern):
    with pytest.raises(ImageError, match=pattern) as error:
        stored(data)
    assert error.value.kind == kind and "/" not in str(error.value) and "tifffile" not in str(error.value)


def test_a_tiff_named_png_is_read_as_what_it_is(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.png").write_bytes(tiff(PIXELS, photometric="rgb"))
    prepared(tmp_path / "in", tmp_path / "out")
    (data,) = content(tmp_path / "out")
    assert np.array_equal(decode(data).permute(1, 2, 0).numpy(), PIXELS)


@pytest.mark.parametrize("before", [0, 150])
def test_pages_in_a_circle_end(before):
    """tifffile notices a circle only among the first hundred pages, and only if it is asked for their number."""
    page = struct.Struct("<HI")  # without tags
    chain = b"".join(page.pack(0, 8 + 6 * (i + 1)) for i in range(before)) + page.pack(0, 8 + 6 * before)
    data = struct.pack("<2sHI", b"II", 42, 8) + chain + bytes(20)
    _, image = next(reencode_all(data, "a.tif", None, None, Reading(), Notes()))
    assert isinstance(image, UserError) and "circle" in str(image)
