"""`data/prepare.py --tile`: pixels, origins, background, values, shards, interruption, damage, memory."""

import io
import json
import re
import resource
import subprocess
import sys
import tarfile
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from configs.errors import UserError
from data import decode as decoding
from data import prepare
from data.decode import decode
from data.index import verify
from data.planning import PrepareOptions
from data.pool import Pool
from data.reading import Notes
from data.reencode import reencode
from data.shard_index import read_index
from data.shards import Split
from data.sources import Item
from data.tiles import DROPPED, cut, is_background, measure
from tests.conftest import ROOT, names
from tests.data.helpers import as_folder, as_tar, as_zip, killed, picture
from tests.data.test_dicom import dicom
from tests.data.test_exif import rotated
from tests.data.test_prepare import prepared

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (100, 75, 3), np.uint8)


def saved(pixels: np.ndarray, kind: str, **options) -> bytes:
    out = io.BytesIO()
    if kind == "tiff":
        tifffile.imwrite(out, pixels, **options)
    elif kind == "npy":
        np.save(out, pixels)
    else:
        Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def samples(folder, split="train") -> list[tuple[dict, bytes]]:
    """The json and the image of each sample of a split."""
    found = {}
    for shard in read_index(folder).splits[split]:
        with tarfile.open(folder / shard.file) as tar:
            for member in tar:
                key, kind = member.name.split(".")  # no other dot
                found.setdefault(key, {})["json" if kind == "json" else "cls" if kind == "cls" else "image"] = (
                    tar.extractfile(member).read()
                )
    return [(json.loads(sample["json"]), sample["image"]) for sample in found.values()]


DEEP = PIXELS.astype(np.uint16) * 200
BANDS = RNG.integers(0, 60000, (100, 75, 13)).astype(np.uint16)
FILES = {
    "rgb.tif": saved(PIXELS, "tiff", photometric="rgb", tile=(32, 48), compression="deflate"),
    "deep.tif": saved(DEEP, "tiff", photometric="rgb", rowsperstrip=9),
    "bands.tif": saved(BANDS, "tiff", photometric="minisblack", planarconfig="contig", compression="zstd"),
    "planes.tif": saved(np.moveaxis(BANDS, 2, 0), "tiff", photometric="minisblack", planarconfig="separate"),
    "float.tif": saved(PIXELS[..., 0] / np.float32(255), "tiff", compression="lzw"),
    "white-is-0.tif": saved(PIXELS[..., 0], "tiff", photometric="miniswhite"),
    "bits.tif": saved(PIXELS[..., 0] > 99, "tiff", photometric="minisblack"),
    "volume.tif": saved(DEEP[None, ..., 0].repeat(3, 0), "tiff", photometric="minisblack", imagej=False, metadata=None),
    "turned.tif": saved(PIXELS, "tiff", photometric="rgb", extratags=[(274, 3, 1, 6, True)]),
    "rgb.png": saved(PIXELS, "png"),
    "deep.png": saved(DEEP[..., 0], "png"),
    "alpha.png": saved(np.dstack([PIXELS, PIXELS[..., :1] | 1]), "png"),
    "turned.png": rotated("png", 8, PIXELS),
    "palette.gif": saved(PIXELS[..., 0], "gif"),
    "rgb.webp": saved(PIXELS, "webp", lossless=True),
    "rgb.npy": saved(PIXELS, "npy"),
    "fortran.npy": saved(np.asfortranarray(BANDS), "npy"),
    "rgb.bmp": saved(PIXELS, "bmp"),
    "rgb.jp2": saved(PIXELS, "jpeg2000", irreversible=False),
    "rgb.avif": saved(PIXELS, "avif", quality=100, subsampling="4:4:4"),
    "scan.dcm": dicom(BANDS[..., 0], RescaleSlope=1, RescaleIntercept=-1024),
    "colour.dcm": dicom(PIXELS, "RGB"),
}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_tiles_of_every_reader_are_crops_of_the_whole_image(name, large, tmp_path, monkeypatch):
    if large:
        monkeypatch.setattr(decoding, "LARGE", 0)  # PNGs are read by rows
    limits = {"scan.dcm": (-1024, 60000), "float.tif": (0, 1)}.get(name)
    options = PrepareOptions(source="in", tile=32, overlap=5, keep_empty=True, pages="first", value_range=limits)
    (tmp_path / name).write_bytes(FILES[name])
    item = Item(name, str(tmp_path / name))
    image = decode(reencode(FILES[name], name, reading=options)[1])
    height, width = image.shape[1:]
    assert measure([item], options)[item] in ([(height, width)], [(width, height)])
    found = list(cut(item, range(99), options, Notes()))
    assert len(found) == 4 * 3
    for tile in found:
        y, x = tile.place["y"], tile.place["x"]
        assert tile.name == f"{name}@{y},{x}"
        assert tile.place == {"source": name, "y": y, "x": x, "height": height, "width": width}
        pixels = decode(tile.image[1])
        assert pixels.shape[1:] == (32, 32)
        assert np.array_equal(pixels, image[:, y : y + 32, x : x + 32])
    assert {y + 32 for y in (tile.place["y"] for tile in found)} >= {32, height}


def test_tiles_of_a_jpeg_are_its_pixels_encoded_again(tmp_path):
    smooth = np.asarray(Image.fromarray(PIXELS[:10, :8]).resize((75, 100)))
    data = saved(smooth, "jpeg")
    (tmp_path / "a.jpg").write_bytes(data)
    found = list(cut(Item("a.jpg", str(tmp_path / "a.jpg")), range(99), PrepareOptions(source="in", tile=64), Notes()))
    assert len(found) == 4
    for tile in found:
        y, x = tile.place["y"], tile.place["x"]
        crop = decode(data)[:, y : y + 64, x : x + 64].permute(1, 2, 0).numpy()
        assert tile.image == ("jpg", saved(crop, "jpeg", quality=95))


@pytest.mark.parametrize("make", [as_folder, as_tar, as_zip])
def test_origins_and_labels(make, tmp_path):
    images = {"cat/a.b.tif": FILES["rgb.tif"], "dog/c.png": FILES["rgb.png"]}
    prepared(make(images, tmp_path / "in"), tmp_path / "out", "--tile", "50")
    found = samples(tmp_path / "out")
    expected = {(name, y, x) for name in images for y in (0, 50) for x in (0, 25)}
    assert {(about["source"], about["y"], about["x"]) for about, _ in found} == expected
    canvas = {name: np.zeros((100, 75, 3), np.uint8) for name in images}
    for about, data in found:
        assert about["name"] == f"{about['source']}@{about['y']},{about['x']}"
        assert about["class"] == about["source"].split("/")[0]
        y, x = about["y"], about["x"]
        canvas[about["source"]][y : y + 50, x : x + 50] = decode(data).permute(1, 2, 0)
    assert all(np.array_equal(image, PIXELS) for image in canvas.values())  # assembled again
    assert sorted(Split(tmp_path / "out", "train").labels()) == [0] * 4 + [1] * 4
    assert json.loads((tmp_path / "out/source.json").read_text())["tile"] == 50


def test_pages_have_tiles_of_their_own(tmp_path):
    pages = RNG.integers(0, 256, (2, 40, 70), np.uint8)
    source = as_folder({"a.tif": saved(pages, "tiff", photometric="minisblack")}, tmp_path / "in")
    with pytest.raises(UserError, match=r"a\.tif has 2 pages: add --pages first or --pages all"):
        prepared(source, tmp_path / "out", "--tile", "40")
    prepared(source, tmp_path / "out", "--tile", "40", "--pages", "all")
    found = {about["name"]: decode(data)[0].numpy() for about, data in samples(tmp_path / "out")}
    assert found.keys() == {f"a.tif#{page}@0,{x}" for page in (1, 2) for x in (0, 30)}
    assert np.array_equal(found["a.tif#2@0,30"], pages[1, :, 30:])


def test_small_images_stay_whole(tmp_path, capsys):
    small, thin = picture(0, (20, 16)), saved(PIXELS[:, :20], "png")
    source = as_folder({"small.jpg": small, "thin.png": thin, "exact.jpg": picture(1, (32, 32))}, tmp_path / "in")
    prepared(source, tmp_path / "out", "--tile", "32")
    found = {about["name"]: data for about, data in samples(tmp_path / "out")}
    assert found["small.jpg@0,0"] == small  # its own bytes
    assert [decode(found[f"thin.png@{y},0"]).shape for y in (0, 32, 64, 68)] == [(3, 32, 20)] * 4 and len(found) == 6
    assert "5 tiles are smaller than --tile" in capsys.readouterr().out


def test_all_tiles_of_an_image_are_in_one_split(tmp_path):
    images = {f"{i}.tif": saved(PIXELS + i, "tiff", photometric="rgb") for i in range(5)}
    prepared(as_folder(images, tmp_path / "in"), tmp_path / "out", "--tile", "25", "--val-fraction", "0.4")
    train, val = ({about["source"] for about, _ in samples(tmp_path / "out", split)} for split in ("train", "val"))
    assert (len(train), len(val)) == (3, 2) and not train & val
    one = as_folder({"0.tif": images["0.tif"]}, tmp_path / "one")
    with pytest.raises(UserError, match="has 1 image, whose tiles stay together: add images, or --val SOURCE"):
        prepared(one, tmp_path / "out1", "--tile", "25", "--val-fraction", "0.4")


def noisy(mean: tuple, noise: float, slope: float = 0, quality: int = 75) -> np.ndarray:
    """A tile with noise and a gradient, after JPEG."""
    pixels = np.array(mean) + RNG.normal(0, noise, (128, 128, 3)) + np.linspace(-slope, slope, 128)[:, None, None]
    out = saved(pixels.clip(0, 255).astype(np.uint8), "jpeg", quality=quality)
    return np.asarray(Image.open(io.BytesIO(out)))


@pytest.mark.parametrize(
    ("pixels", "background"),
    [
        (noisy((242, 240, 243), 2), True),  # the glass of a slide
        (noisy((235, 228, 232), 3, slope=3), True),
        (noisy((0, 0, 0), 1, quality=30), True),  # a border without data, through JPEG
        (np.full((64, 64, 3), 117, np.uint8), True),
        (np.zeros((64, 64, 5), np.uint16), True),
        (noisy((110, 160, 225), 1, slope=3), False),  # a clear sky
        (noisy((231, 240, 250), 2, slope=9), False),  # a pale one
        (noisy((12, 25, 38), 2), False),  # deep water
        (noisy((60, 90, 70), 2), False),
        (noisy((225, 190, 215), 2), False),  # pale tissue
        (RNG.integers(300, 320, (64, 64, 4)).astype(np.uint16), False),  # water in 16 bits, dark in its range
        (RNG.random((64, 64, 1)).astype(np.float32) * 1e-3, False),
    ],
)
def test_background(pixels, background):
    assert is_background(pixels, 0) == background
    assert is_background(pixels, 0.91)


def test_background_is_dropped_and_counted(tmp_path, capsys):
    slide = np.full((128, 96, 3), 250, np.uint8)
    slide[32:64, :64] = RNG.integers(100, 200, (32, 64, 3))
    source = as_folder({"slide.tif": saved(slide, "tiff", photometric="rgb")}, tmp_path / "in")
    prepared(source, tmp_path / "out", "--tile", "32")
    assert {about["name"] for about, _ in samples(tmp_path / "out")} == {"slide.tif@32,0", "slide.tif@32,32"}
    said = capsys.readouterr().out
    assert "10 tiles were dropped as background (--keep-empty keeps them)" in said and "2 tiles were kept" in said
    prepared(source, tmp_path / "all", "--tile", "32", "--keep-empty")
    assert len(Split(tmp_path / "all", "train")) == 12
    blank = as_folder({"a.png": saved(slide[:32], "png")}, tmp_path / "blank")
    with pytest.raises(UserError, match="all tiles are background: add --keep-empty"):
        prepared(blank, tmp_path / "none", "--tile", "16")
    assert not (tmp_path / "none/index.json").exists()


def test_floats_with_borders_of_nan(tmp_path):
    scene = RNG.normal(250, 20, (128, 128)).astype(np.float32)
    scene[5, 7], scene[100, 90] = 100, 400
    scene[:, :64] = np.nan
    scene[100:, 64:70] = np.nan
    scene[7, 100] = 100
    source = as_folder({"a.tif": saved(scene, "tiff", tile=(32, 32), compression="deflate")}, tmp_path / "in")
    with pytest.raises(
        UserError,
        match=r"a\.tif has float32 values from 100 to 400 and 8,360 values without data \(NaN\): "
        "add --value-range 100 400 --nodata nan",
    ):
        prepared(source, tmp_path / "out", "--tile", "32")
    prepared(source, tmp_path / "out", "--tile", "32", "--value-range", "100", "400", "--nodata", "nan")
    found = {about["name"]: decode(data)[0].numpy() for about, data in samples(tmp_path / "out")}
    assert found.keys() == {f"a.tif@{y},{x}" for y in range(0, 128, 32) for x in (64, 96)}
    expected = (np.nan_to_num(scene[96:, 64:96], nan=100) - 100) / 300
    assert np.allclose(found["a.tif@96,64"], expected, atol=1e-6)


def test_tiles_with_a_declared_nodata_value(tmp_path):
    scene = RNG.integers(1, 3000, (64, 64), np.uint16)
    scene[:32], scene[:4, :8] = 0, 5
    tag = [(42113, 2, 0, "0", True)]
    (tmp_path / "a.tif").write_bytes(saved(scene, "tiff", photometric="minisblack", extratags=tag))
    notes = Notes()
    options = PrepareOptions(source="in", tile=32)
    found = list(cut(Item("a.tif", str(tmp_path / "a.tif")), range(4), options, notes))
    assert [tile.name for tile in found] == ["a.tif@32,0", "a.tif@32,32"] and notes[DROPPED] == 2


SCENES = {
    f"{i}.tif": saved(RNG.integers(0, 256, (90 + i, 120, 3), np.uint8), "tiff", photometric="rgb") for i in range(3)
}


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".png"}


def test_tiles_of_one_image_fill_several_shards(tmp_path):
    source = as_folder(SCENES, tmp_path / "in")
    args = ("--tile", "20", "--shard-size", "13")
    for workers in (1, 2):
        prepared(source, tmp_path / f"out{workers}", *args, "--workers", workers)
    shards = read_index(tmp_path / "out1").splits["train"]
    assert sum(shard.samples for shard in shards) == 3 * 5 * 6 and max(shard.samples for shard in shards) == 13
    assert files(tmp_path / "out1") == files(tmp_path / "out2")
    about = [about for about, _ in samples(tmp_path / "out1")]
    assert len({a["name"] for a in about}) == 90
    (tmp_path / "out2/train-000003.tar").unlink()
    prepared(source, tmp_path / "out2", *args)
    assert files(tmp_path / "out1") == files(tmp_path / "out2")
    with pytest.raises(UserError, match="tile was 20, is 24"):
        prepared(source, tmp_path / "out2", "--tile", "24", "--shard-size", "13")
    with pytest.raises(UserError, match="tile was 20, is None"):
        prepared(source, tmp_path / "out2", "--shard-size", "13")


@pytest.mark.parametrize("event", [8, 20])
def test_a_killed_run_is_completed(event, tmp_path):
    source, args = as_folder(SCENES, tmp_path / "in"), ("--tile", "20", "--shard-size", "13")
    prepared(source, tmp_path / "whole", *args)
    out = tmp_path / "out"
    assert killed(out, event, lambda folder: prepared(source, folder, *args, "--workers", "2"))
    assert not (out / "index.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    finished = {f"{path.name[1:].split('.')[0]}.tar" for path in out.glob(".*.record.json")}
    prepared(source, out, *args)
    assert all((out / name).stat().st_mtime_ns == before[name] for name in finished)
    assert files(out) == files(tmp_path / "whole")


def test_repair(tmp_path, capsys):
    source, args = as_folder(SCENES, tmp_path / "in"), ("--tile", "20", "--shard-size", "13")
    out = tmp_path / "out"
    prepared(source, out, *args)
    before = files(out)
    tar = bytearray(before["train-000002.tar"])
    at = int(np.load(out / "train-000002.idx.npy")["offset"][0])
    tar[at + 50 : at + 60] = bytes(10)
    (out / "train-000002.tar").write_bytes(tar)
    prepared(source, out, *args, "--repair")
    assert files(out) == before
    (out / "train-000002.tar").write_bytes(tar)
    prepare.main([str(out), "--repair", "--workers", "1"])
    verify(out, Pool(1))
    assert "1 images are lost" in capsys.readouterr().out


def test_damage_is_listed_by_image(tmp_path, capsys):
    good = saved(PIXELS, "tiff", photometric="rgb", tile=(16, 16), compression="deflate")
    images = {
        "good.tif": good,
        "cut.tif": good[: len(good) // 2],
        "cut.png": FILES["rgb.png"][:9000],
        "cut.jpg": picture(0, (60, 60))[:900],
        "empty.tif": b"",
        "page.jpg": b"<html>",
        "bomb.tif": good.replace(
            b"\x00\x01\x03\x00\x01\x00\x00\x00\x4b\x00", b"\x00\x01\x03\x00\x01\x00\x00\x00\xff\xff"
        ),
        "na\udce9me.tif": good,
        "cut.npy": FILES["rgb.npy"][:9000],
    }
    prepared(as_folder(images, tmp_path / "in"), tmp_path / "out", "--tile", "32", "--shard-size", "5")
    found = [about for about, _ in samples(tmp_path / "out")]
    assert sum(about["source"] == "good.tif" for about in found) == 12
    assert sum(about["source"] == "na\udce9me.tif" for about in found) == 12
    assert 0 < sum(about["source"] == "cut.tif" for about in found) < 12
    lines = (tmp_path / "out/skipped.txt").read_text().splitlines()
    listed = {line.split(": ")[0] for line in lines}
    assert listed >= {"cut.tif", "cut.png", "cut.jpg", "empty.tif", "page.jpg", "cut.npy"}
    assert len(lines) == len(set(lines))
    assert re.search(r"cut\.tif: damaged: \d+ of its tiles, the first at \d+,\d+: not a readable", "\n".join(lines))
    capsys.readouterr()
    before = files(tmp_path / "out")
    (tmp_path / "out/train-000001.tar").unlink()
    prepared(tmp_path / "in", tmp_path / "out", "--tile", "32", "--shard-size", "5")
    after = files(tmp_path / "out")
    assert sorted(after.pop("skipped.txt").splitlines()) == sorted(before.pop("skipped.txt").splitlines())
    assert after == before


def test_images_over_the_limit(tmp_path, monkeypatch):
    """PNG, TIFF and npy are read in pieces, the others are refused with the option that allows them."""
    monkeypatch.setattr(decoding, "LARGE", 0)
    large = {name: FILES[name] for name in ("rgb.tif", "rgb.png", "deep.png", "rgb.npy")}
    whole = {"a.jpg": picture(0, (75, 100)), "a.webp": FILES["rgb.webp"], "a.bmp": FILES["rgb.bmp"]}
    source = as_folder(large | whole, tmp_path / "in")
    limit = 7499  # pixels; the band that a row of tiles needs is smaller
    monkeypatch.setattr("data.tiles.BLOCK_ROWS", 8)
    prepared(source, tmp_path / "out", "--tile", "32", "--max-pixels", limit)
    assert {about["source"] for about, _ in samples(tmp_path / "out")} == large.keys()
    lines = (tmp_path / "out/skipped.txt").read_text()
    assert all(f"{name}: too large: has 7,500 pixels" in lines for name in whole)
    assert "decoded as a whole: add --max-pixels 7500" in lines


def test_dry_run_counts_and_shows_tiles(tmp_path, capsys):
    slide = np.full((128, 128, 3), 250, np.uint8)
    slide[:64] = (200, 30, 90)
    slide[:64] += RNG.integers(0, 9, (64, 128, 3), np.uint8)
    source = as_folder({"slide.tif": saved(slide, "tiff", photometric="rgb")}, tmp_path / "in")
    prepared(source, tmp_path / "out", "--tile", "32", "--dry-run")
    said = capsys.readouterr().out
    assert "16 of 32 x 32 pixels before background is dropped; 8 of 16 looked at are background" in said
    assert "height 128, width 128" in said and not (tmp_path / "out").exists()
    sheet = np.asarray(Image.open(tmp_path / "out.preview.png"))
    assert sheet.shape == (4 + 116, 4 + 8 * 116, 3)  # eight tiles in a row
    assert np.abs(sheet[60, 60].astype(int) - (204, 34, 94)).max() < 9


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["--overlap", "3"], "--overlap needs --tile"),
        (["--keep-empty"], "--keep-empty needs --tile"),
        (["--tile", "32", "--overlap", "32"], "--overlap is 32, must be less than --tile 32"),
        (["--tile", "32", "--resize", "16"], "exclude each other"),
        (["--tile", "8"], "--tile is 8"),
    ],
)
def test_bad_arguments(args, problem):
    with pytest.raises(UserError, match=problem):
        prepare.parse(["a", "b", *args])


def write_scene(path, kind: str, side: int) -> None:
    """A slide of `side` x `side` pixels: tissue in the upper left eighth, else glass. Written without holding it."""

    def rows(first: int, count: int) -> np.ndarray:
        band = np.full((count, side, 3), 245, np.uint8)
        if first < side // 8:
            band[:, : side // 8] = np.resize(np.arange(251, dtype=np.uint8), (count, side // 8, 3))
        return band

    def tiles():
        for first in range(0, side, 512):
            band = np.pad(rows(first, min(512, side - first)), ((0, max(0, first + 512 - side)), (0, 512), (0, 0)))
            yield from (band[:, x : x + 512] for x in range(0, side, 512))

    options = {"shape": (side, side, 3), "dtype": np.uint8, "photometric": "rgb"}
    if kind == "tiled":
        tifffile.imwrite(path, tiles(), tile=(512, 512), compression="deflate", **options)
    elif kind == "uncompressed":
        bands = (rows(first, min(64, side - first)) for first in range(0, side, 64))
        tifffile.imwrite(path, bands, rowsperstrip=64, **options)
    else:
        stream = zlib.compressobj(1)
        data = b"".join(stream.compress(rows(first, min(500, side - first))) for first in range(0, side, 500))
        tifffile.imwrite(path, iter([data + stream.flush()]), rowsperstrip=side, compression="deflate", **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiled", "uncompressed", "one strip"])
def test_memory_of_a_huge_image(kind, tmp_path):
    """30,000 x 30,000 pixels, 2.7 GB, are cut within 2 GB: the peak of all processes, and no one allocates more."""
    (tmp_path / "in").mkdir()
    write_scene(tmp_path / "in/scene.tif", kind, 30_000)
    code = (
        "import resource, sys; sys.path.insert(0, '.'); from data.prepare import main; main(sys.argv[1:])\n"
        "from configs.machine import peak_memory; workers = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print('peak', max(peak_memory(), 1024 * workers.ru_maxrss))"
    )
    args = [tmp_path / "in", tmp_path / "out", "--tile", "512", "--workers", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=ROOT, capture_output=True, text=True, timeout=1500,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("peak ")[1]) < 2e9
    assert "3,481 of 512 x 512 pixels" in done.stdout
    assert sum(shard.samples for shard in read_index(tmp_path / "out").shards) == 8 * 8
    assert names(tmp_path / "out") >= {"train-000000.tar", "index.json"}
