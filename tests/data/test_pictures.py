"""Pictures of other types, at their full depth; 16-bit PNGs; limits of size; arrays; counts of refusals."""

import io
import subprocess
import sys

import imagecodecs
import numpy as np
import pillow_heif
import pytest
import torch
from PIL import Image

from configs.errors import UserError
from data.decode import decode
from data.folder import read_image
from data.loader import Samples
from data.pool import Pool
from data.reading import TOO_LARGE, ImageError, Reading
from data.reencode import reencode
from data.repair import repair
from data.shard_index import index_file
from data.shards import Split
from tests.conftest import ROOT, names
from tests.data.helpers import as_folder, picture
from tests.data.test_prepare import content, prepared
from tests.data.test_transforms import bomb, deep_png, npy

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 32, 3), np.uint8)


def saved(kind: str, pixels: np.ndarray = PIXELS, **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def heic(pixels: np.ndarray) -> bytes:
    mode = "RGB" if pixels.dtype == np.uint8 else "RGB;16"
    out = io.BytesIO()
    pillow_heif.from_bytes(mode, pixels.shape[1::-1], pixels.tobytes()).save(out, quality=-1, chroma=444)
    return out.getvalue()


FILES = {
    "a.avif": (saved("avif", quality=100, subsampling="4:4:4"), 4),
    "a.heic": (heic(PIXELS), 6),
    "a.jp2": (saved("jpeg2000", irreversible=False), 0),
    "a.tga": (saved("tga"), 0),
    "a.bmp": (saved("bmp"), 0),
    "a.ppm": (saved("ppm"), 0),
    "a.pcx": (saved("pcx"), 0),
    "a.sgi": (saved("sgi"), 0),
    "a.jfif": (saved("jpeg", quality=100, subsampling=0), 4),
}


@pytest.mark.parametrize("name", FILES)
def test_other_types_are_read_in_folders_and_converted_in_shards(name, tmp_path):
    data, tolerance = FILES[name]
    source = as_folder({name: data}, tmp_path / "in")
    prepared(source, tmp_path / "out")
    (stored,) = content(tmp_path / "out")
    for found in (decode(stored, 3), decode(read_image(source / name), 3)):
        difference = found.permute(1, 2, 0).numpy().astype(int) - PIXELS
        assert np.abs(difference).max() <= tolerance
    assert reencode(data, name, quality=90)[0] == "jpg"


def test_deep_pictures_keep_their_depth():
    deep = RNG.integers(0, 1 << 10, (24, 32, 3)).astype(np.uint16)
    files = {
        "a.avif": imagecodecs.avif_encode(deep, level=100, bitspersample=10),
        "a.heic": heic(deep << 6),
        "a.jp2": imagecodecs.jpeg2k_encode(deep, level=0, bitspersample=10, reversible=True),
        "a.ppm": b"P6\n# comment\n32 24\n1023\n" + deep.astype(">u2").tobytes(),
    }
    for name, data in files.items():
        kind, encoded = reencode(data, name)
        found = decode(encoded, 3).permute(1, 2, 0).numpy() * 1023
        assert kind == "npy" and np.abs(found - deep).max() < (40 if name == "a.heic" else 0.1), name


def test_16_bit_pngs_stay_as_they_are_and_mix_with_colours(tmp_path):
    grey = deep_png(RNG.integers(0, 1 << 16, (16, 20, 1)).astype(np.uint16))
    source = as_folder({"a.png": grey, "b.png": picture(0, kind="png"), "c.jpg": picture(1)}, tmp_path / "in")
    prepared(source, tmp_path / "out")
    assert content(tmp_path / "out").keys() == {path.read_bytes() for path in source.iterdir()}
    split = Split(tmp_path / "out", "train")
    samples = Samples(split, 3, 0, lambda image, *_: {"image": image})
    loaded = [samples[0, i, 0] for i in range(3)]
    assert all(sample["image"].shape == (3, 16, 20) and not sample["damaged"] for sample in loaded)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_resize_and_value_range_keep_16_bit_pngs_at_their_depth(channels):
    pixels = np.linspace(0, 60000, 32 * 48 * channels).astype(np.uint16).reshape(32, 48, channels)
    kind, data = reencode(deep_png(pixels), "a.png", resize=16)
    small = imagecodecs.png_decode(data).reshape(16, 24, channels)
    means = pixels.reshape(16, 2, 24, 2, channels).mean((1, 3))
    assert kind == "png" and small.dtype == np.uint16 and np.abs(small - means)[2:-2, 2:-2].max() < 300
    kind, data = reencode(deep_png(pixels), "a.png", reading=Reading(value_range=(0, 30000)))
    found, colours = decode(data).permute(1, 2, 0).numpy(), channels - (channels in (2, 4))
    assert kind == "png" and np.allclose(found[..., :colours], (pixels / 30000).clip(0, 1)[..., :colours], atol=2e-5)
    assert np.allclose(found[..., colours:], pixels[..., colours:] / 65535)


@pytest.mark.parametrize("dtype", ["i2", "f4", "u4"])
def test_arrays_need_a_range_as_well(dtype, tmp_path):
    array = np.arange(24).reshape(4, 6).astype(dtype)
    with pytest.raises(UserError, match=r"a\.npy has .* values from 0 to 23: add --value-range 0 23"):
        prepared(as_folder({"a.npy": npy(array)}, tmp_path / "in"), tmp_path / "out")
    prepared(tmp_path / "in", tmp_path / "out", "--value-range", "0", "23")
    (data,) = content(tmp_path / "out")
    assert np.allclose(decode(data, 1)[0], array / 23, atol=1e-5)
    with pytest.raises(UserError, match="add --value-range 0 23"):
        read_image(tmp_path / "in/a.npy")


def test_arrays_in_earlier_shards_read_as_before():
    assert decode(npy(np.array([[32767, -32767]], np.int16)))[0, 0].tolist() == [1, -1]
    assert decode(npy(np.array([[2**32 - 1]], np.uint32))).item() == 1
    assert decode(npy(np.array([[3.5]], np.float32))).item() == 3.5


def test_arrays_of_known_range_stay_byte_for_byte():
    for array in (RNG.integers(0, 256, (4, 5, 7), np.uint8), RNG.integers(0, 9999, (4, 5)).astype(np.uint16)):
        assert reencode(npy(array), "a.npy") == ("npy", npy(array))
        assert np.load(io.BytesIO(reencode(npy(array), "a.npy", resize=2)[1])).shape[:2] == (2, 2)


def test_too_large_is_not_damaged(tmp_path):
    large, source = saved("png", np.zeros((200, 300), np.uint8)), tmp_path / "in"
    as_folder({"a.png": large, "b.jpg": picture(0)}, source)
    prepared(source, tmp_path / "out", "--max-pixels", "50000")
    line = (tmp_path / "out/skipped.txt").read_text()
    assert line.startswith(f"a.png: {TOO_LARGE}: has 60,000 pixels, more than the limit of 50,000 pixels: ")
    assert line.endswith("add --max-pixels 60000 or --resize\n")
    prepared(source, tmp_path / "small", "--max-pixels", "50000", "--resize", "100")
    assert {tuple(decode(data).shape) for data in content(tmp_path / "small")} == {(1, 100, 150), (3, 16, 20)}
    with pytest.raises(ImageError, match="60,000 pixels"):
        decode(large, max_pixels=50000)
    assert decode(large, max_pixels=60000).shape == (1, 200, 300)


def test_large_jpegs_are_drafted():
    data = saved("jpeg", np.full((800, 1200, 3), 77, np.uint8))
    reading = Reading(max_pixels=100_000)
    kind, small = reencode(data, "a.jpg", resize=100, reading=reading)
    assert kind == "jpg" and decode(small).shape == (3, 100, 150) and (decode(small) == 77).all()
    progressive = saved("jpeg", np.full((800, 1200, 3), 77, np.uint8), progressive=True)
    for picture_, resize in ((progressive, 100), (data, 700), (data, None)):  # none fits after a draft
        with pytest.raises(ImageError, match="pixels") as error:
            reencode(picture_, "a.jpg", resize=resize, reading=reading)
        assert error.value.kind == TOO_LARGE and ("--resize" in str(error.value)) == (resize is None)


def test_decoded_bytes_are_limited_not_only_pixels():
    colours = deep_png(np.zeros((100, 100, 3), np.uint16))  # 12 bytes a pixel in float32
    assert decode(colours, max_pixels=30_000).shape == (3, 100, 100)
    with pytest.raises(ImageError, match=r"10,000 pixels of 12 bytes, more than the limit of 80,000 bytes"):
        decode(colours, max_pixels=20_000)
    with pytest.raises(ImageError, match="--max-pixels 30000"):
        reencode(colours, "a.png", reading=Reading(max_pixels=20_000))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grey of 16 bits", "colours of 8 bits"])
def test_a_png_of_13000_by_13000_pixels_needs_less_than_a_gigabyte(kind, tmp_path):
    code = (
        "import sys; from configs.machine import peak_memory; from data.reencode import reencode\n"
        "data = open(sys.argv[1], 'rb').read(); start = peak_memory()\n"
        "reencode(data, 'a.png'); reencode(data, 'a.png', resize=100)\n"
        "print(peak_memory() - start)"
    )
    deep, side = kind.startswith("grey"), 13000
    pixels = np.zeros((side, side, 1), np.uint16) if deep else np.zeros((side, side, 3), np.uint8)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(pixels.squeeze()))
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.png"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 1e9


def test_refusals_are_counted_by_kind(tmp_path, capsys):
    files = {
        "a.jpg": picture(0), "b.jpg": picture(1)[:300], "c.jpg": picture(2)[:300], "d.jpg": b"<html>404</html>",
        "e.png": bomb("png"), "f.npy": npy(np.zeros(3, np.uint8)),
    }  # fmt: skip
    prepared(as_folder(files, tmp_path / "in"), tmp_path / "out")
    out = capsys.readouterr().out
    assert (
        "5 images were left out" in out and "skipped.txt: 2 damaged, 1 not an image, 1 too large, 1 unsupported" in out
    )
    assert "damaged images" not in out
    lines = (tmp_path / "out/skipped.txt").read_text().splitlines()
    assert [line.split(": ")[:2] for line in lines if line[0] in "de"] == [
        ["d.jpg", "not an image"],
        ["e.png", "too large"],
    ]


def test_what_was_done_to_values_is_said(tmp_path, capsys):
    files = {f"{i}.npy": npy(np.array([[0, 10], [20, 99]], np.int16)) for i in range(3)}
    prepared(as_folder(files, tmp_path / "in"), tmp_path / "out", "--value-range", "0", "20")
    out = capsys.readouterr().out
    assert "3 images of int16 values: 0 to 20 became 0 to 1" in out and "3 values outside" in out


def test_a_second_run_with_other_decisions_is_refused(tmp_path):
    source = as_folder({"a.npy": npy(np.array([[0, 10]], np.int16))}, tmp_path / "in")
    prepared(source, tmp_path / "out", "--value-range", "0", "10")
    prepared(source, tmp_path / "out", "--value-range", "0", "10")
    with pytest.raises(UserError, match=r"value_range was \[0.0, 10.0\], is \[0.0, 20.0\]"):
        prepared(source, tmp_path / "out", "--value-range", "0", "20")


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["--value-range", "5", "5"], "--value-range is 5 5: .*LOW below HIGH"),
        (["--value-range", "1"], "2 arguments"),
        (["--value-range", "a", "2"], "a number"), (["--nodata", "nothing"], "--nodata is nothing"),
        (["--pages", "second"], "first or all"), (["--max-pixels", "0"], "--max-pixels is 0"),
    ],
)  # fmt: skip
def test_bad_decisions(words, pattern):
    from data.prepare import parse

    with pytest.raises(UserError, match=pattern):
        parse(["a", "b", *words])
    assert parse(["a", "b", "--value-range", "-1e3", "3e3", "--nodata", "-9999"]).value_range == (-1000, 3000)


def test_a_salvaged_shard_keeps_images_over_the_limit(tmp_path, monkeypatch):
    prepared(as_folder({"a.jpg": picture(0), "b.jpg": picture(1)}, tmp_path / "in"), tmp_path / "out")
    tar = tmp_path / "out/train-000000.tar"
    index_file(tar).unlink()
    tar.write_bytes(tar.read_bytes()[:-512] + b"damage".ljust(512, b"\0"))

    def refuse(data: bytes) -> torch.Tensor:
        raise ImageError("has many pixels", TOO_LARGE)

    monkeypatch.setattr("data.decode.decode", refuse)
    repair(tmp_path / "out", Pool(1))
    assert len(Split(tmp_path / "out", "train")) == 2 and "lost.txt" not in names(tmp_path / "out")
