"""EXIF orientation: found, applied once and the same for every format, or removed."""

import io
import timeit

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

from data.decode import decode
from data.exif import orientation, without_exif
from data.folder import read_image
from data.reading import Reading
from data.reencode import reencode
from tests.data.helpers import as_folder, picture
from tests.data.test_prepare import content, prepared

KINDS = {"jpeg": {"quality": 95, "subsampling": 0}, "png": {}, "webp": {"lossless": True}, "tiff": {}}


def blocks(height: int = 48, width: int = 80) -> np.ndarray:
    """Large flat blocks of different colours, which JPEG keeps: [H, W, 3]."""
    colours = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    return colours.repeat(16, 0).repeat(16, 1)


def rotated(kind: str, turn: int, pixels: np.ndarray | None = None) -> bytes:
    """A picture whose stored pixels need the orientation `turn`."""
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = turn
    Image.fromarray(blocks() if pixels is None else pixels).save(out, kind, exif=exif.tobytes(), **KINDS[kind])
    return out.getvalue()


def expected(turn: int) -> torch.Tensor:
    """The upright pixels, by PIL."""
    picture = Image.fromarray(blocks())
    picture.getexif()[0x0112] = turn
    return torch.from_numpy(np.array(ImageOps.exif_transpose(picture))).permute(2, 0, 1)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_all_orientations_are_upright_in_all_formats(kind, turn, tmp_path):
    (tmp_path / f"x.{kind}").write_bytes(rotated(kind, turn))
    found = decode(read_image(tmp_path / f"x.{kind}"), 3)
    assert found.shape == expected(turn).shape
    assert (found.int() - expected(turn).int()).abs().max() <= (3 if kind == "jpeg" else 0)


@pytest.mark.parametrize("options", [(), ("--resize", "24"), ("--quality", "98")])
@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_upright_whether_or_not_pixels_are_rewritten(kind, options, tmp_path):
    prepared(as_folder({f"x.{kind}": rotated(kind, 6)}, tmp_path / "in"), tmp_path / "out", *options)
    (data,) = content(tmp_path / "out")
    found, right = decode(data, 3), expected(6)
    if options == ("--resize", "24"):
        found, right = found.repeat_interleave(2, 1).repeat_interleave(2, 2), right
    assert found.shape == right.shape == (3, 80, 48)
    centres = np.s_[:, 7::16, 7::16]
    assert (found[centres].int() - right[centres].int()).abs().max() <= (20 if options else 3)


@pytest.mark.parametrize("kind", KINDS)
def test_no_exif_keeps_pixels_as_stored_and_removes_the_exif_data(kind, tmp_path):
    source = as_folder({f"x.{kind}": rotated(kind, 6)}, tmp_path / "in")
    prepared(source, tmp_path / "out", "--no-exif")
    (data,) = content(tmp_path / "out")
    found = decode(data, 3)
    assert found.shape == (3, 48, 80)
    assert (found.int() - torch.from_numpy(blocks()).permute(2, 0, 1).int()).abs().max() <= 3
    assert 0x0112 not in Image.open(io.BytesIO(data)).getexif()


def test_the_factor_is_drawn_for_the_upright_size():
    sizes = []

    def shrink(height: int, width: int) -> int:
        sizes.append((height, width))
        return 2

    assert decode(rotated("jpeg", 6), 3, shrink).shape == (3, 40, 24) and sizes == [(80, 48)]


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_damaged_exif_data_mean_upright(kind):
    data = rotated(kind, 6)
    assert orientation(data) == 6 and orientation(without_exif(data)) == 1
    start = data.index(b"MM\0*") if b"MM\0*" in data else data.index(b"II*\0")
    for change in (b"\0\0\0\0", data[start : start + 4] + b"\xff\xff\xff\xff", data[start : start + 4]):
        broken = data[:start] + change + data[start + len(change) :]
        assert orientation(broken) in (1, 6)
    assert orientation(data[: start + 9]) == 1
    for cut in range(0, start + 40, 3):
        assert orientation(data[:cut]) in (1, 6)


def test_a_picture_without_exif_costs_little():
    data = picture(0, (640, 480))
    assert orientation(data) == 1
    assert min(timeit.repeat(lambda: orientation(data), number=200, repeat=5)) / 200 < 20e-6


def test_a_16_bit_tiff_and_png_are_turned():
    deep = np.arange(12, dtype=np.uint16).reshape(3, 4) * 1000
    out = io.BytesIO()
    tifffile.imwrite(out, deep, extratags=[(274, 3, 1, 8, True)])
    kind, data = reencode(out.getvalue(), "x.tif")
    assert kind == "npy" and np.array_equal(np.load(io.BytesIO(data))[..., 0], np.rot90(deep))
    kind, data = reencode(out.getvalue(), "x.tif", reading=Reading(no_exif=True))
    assert np.array_equal(np.load(io.BytesIO(data))[..., 0], deep)
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(deep).save(out, "png", exif=exif)
    found = decode(out.getvalue())
    assert np.allclose(found[0].numpy() * 65535, np.rot90(deep), atol=0.01)
