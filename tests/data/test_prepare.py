"""`data/prepare.py`: every kind of source, options, interruption, verification, foreign shards, bad input."""

import gc
import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import warnings

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from configs.errors import UserError
from data import prepare
from data.decode import decode
from data.index import index_folder, verify
from data.pool import Pool, run_tasks
from data.reading import FIRST_FRAME, FIRST_PAGE, Plural, Reading
from data.reencode import NOT_TURNED, reencode
from data.shard_index import index_file, read_index
from data.shards import Split
from data.values import CLIPPED
from data.writing import ARRAYS
from tests.conftest import ROOT, names, run
from tests.data.helpers import as_folder, as_ilsvrc, as_tar, as_zip, collection, killed, picture
from tests.data.test_transforms import bomb


def prepared(*args) -> None:
    """Run data/prepare.py in this process."""
    prepare.main([str(arg) for arg in ("--workers", "1", *args)])


def content(folder, split="train") -> dict[bytes, int]:
    """Image bytes -> label of a split."""
    samples = Split(folder, split)
    return dict(samples.read(i) for i in range(len(samples)))


class Payload:
    """Unpickling it creates a folder, which proves that something was executed."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def with_object(mark) -> bytes:
    """An .npy array of objects, which numpy would unpickle with allow_pickle=True."""
    out = io.BytesIO()
    np.save(out, np.full((4, 4, 3), Payload(mark)), allow_pickle=True)
    return out.getvalue()


CATS = collection({"cat": 5, "dog": 3})
MAKERS = {
    "folder": as_folder,
    "x.zip": as_zip,
    "x.tar": as_tar,
    "x.tar.gz": lambda images, path: as_tar(images, path, "w:gz"),
    "x.tar.xz": lambda images, path: as_tar(images, path, "w:xz"),
    "x.tar.bz2": lambda images, path: as_tar(images, path, "w:bz2"),
    "ILSVRC2012_img_train.tar": as_ilsvrc,
}


@pytest.mark.parametrize("name", MAKERS)
def test_every_kind_of_source(name, tmp_path):
    source = MAKERS[name](CATS, tmp_path / name)
    prepared(source, tmp_path / "out", "--shard-size", "3")
    index = read_index(tmp_path / "out")
    assert index.classes == ["cat", "dog"]
    assert [shard.samples for shard in index.splits["train"]] == [3, 3, 2]
    expected = {data: ["cat", "dog"].index(key.split("/")[0]) for key, data in CATS.items()}
    assert content(tmp_path / "out") == expected
    assert not [name for name in names(tmp_path / "out") if name.startswith(".")]


def test_digits(digits):
    index = read_index(digits)
    assert index.classes == [str(i) for i in range(10)]
    assert {split: sum(s.samples for s in shards) for split, shards in index.splits.items()} == {
        "train": 1442,
        "val": 355,
    }
    train, val = Split(digits, "train"), Split(digits, "val")
    assert decode(train.read(0)[0]).shape == (1, 8, 8)
    assert np.bincount(val.labels()).min() >= 34  # each class, a fifth


def test_splits_of_the_source(tmp_path):
    images = collection({"data/train/a": 4, "data/train/b": 4, "data/test/a": 2, "data/test/b": 1})
    prepared(as_tar(images, tmp_path / "x.tar"), tmp_path / "out")
    assert len(content(tmp_path / "out")) == 8
    assert sorted(content(tmp_path / "out", "test").values()) == [0, 0, 1]


def test_val_fraction_takes_its_share_of_each_class(tmp_path):
    source = as_folder(collection({"a": 20, "b": 10}), tmp_path / "in")
    for out in ("one", "two"):
        prepared(source, tmp_path / out, "--val-fraction", "0.2")
    train, val = content(tmp_path / "one"), content(tmp_path / "one", "val")
    assert sorted(val.values()) == [0] * 4 + [1] * 2
    assert len(train) == 24
    assert not train.keys() & val.keys()
    assert content(tmp_path / "two", "val") == val  # always the same ones


@pytest.mark.parametrize("classes", [{"": 4}, {"patient1": 2, "patient2": 2}])
def test_label_free(classes, tmp_path):
    source = as_folder(collection(classes), tmp_path / "in")
    prepared(source, tmp_path / "out", *(["--no-labels"] if len(classes) > 1 else []))
    assert read_index(tmp_path / "out").classes is None
    assert set(content(tmp_path / "out").values()) == {-1}


def test_resize_and_quality(tmp_path):
    source = as_folder({"a.png": picture(0, (80, 40), kind="png"), "b.jpg": picture(1, (10, 20))}, tmp_path / "in")
    prepared(source, tmp_path / "small", "--resize", "20")
    shapes = sorted(tuple(decode(data).shape) for data in content(tmp_path / "small"))
    assert shapes == [(3, 20, 10), (3, 20, 40)]
    prepared(source, tmp_path / "jpeg", "--quality", "50")
    assert all(data.startswith(b"\xff\xd8") for data in content(tmp_path / "jpeg"))


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_resize_keeps_the_depth_of_grey_pictures(kind):
    columns = np.linspace(0, 60000, 64).astype(kind)
    columns[32:] = 60000  # an edge, where bicubic overshoots
    out = io.BytesIO()
    Image.fromarray(np.tile(columns, (32, 1))).save(out, "tiff")
    reading = Reading(value_range=None if kind == np.uint16 else (0, 65535))
    name, data = reencode(out.getvalue(), "scan.tif", resize=16, reading=reading)
    small = np.load(io.BytesIO(data))
    stored = np.float32 if kind == np.float32 else np.uint16
    assert (name, small.dtype, small.shape) == ("npy", np.dtype(stored), (16, 32, 1))
    small = small[..., 0] * (65535 if kind == np.float32 else 1.0)
    assert np.allclose(small[:, :14], columns.reshape(32, 2).mean(1)[:14], atol=400) and np.isclose(small.max(), 60000)


def test_types_the_loader_cannot_decode_are_converted_without_loss(tmp_path):
    deep = np.arange(20 * 16, dtype=np.uint16).reshape(16, 20) * 200
    out = io.BytesIO()
    Image.fromarray(deep).save(out, "png")
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 5), np.uint8)
    array = io.BytesIO()
    np.save(array, pixels)
    tiff = picture(0, kind="tiff")
    source = as_folder({"0.tiff": tiff, "1.png": out.getvalue(), "2.npy": array.getvalue()}, tmp_path / "in")
    prepared(source, tmp_path / "out")
    images = sorted((decode(data) for data in content(tmp_path / "out")), key=len)
    assert torch.allclose(images[0][0], torch.from_numpy(deep.astype(np.float32) / 65535))
    assert np.array_equal(images[1].permute(1, 2, 0).numpy(), np.asarray(Image.open(io.BytesIO(tiff))))
    assert np.array_equal(images[2].permute(1, 2, 0).numpy(), pixels)


def test_damaged_images_are_left_out_and_listed(tmp_path, capsys):
    whole = picture(0)
    images = {
        "a/good.jpg": whole,
        "a/cut.jpg": whole[: len(whole) // 2],
        "a/page.jpg": b"<html>404</html>",
        "a/none.png": b"",
    }
    prepared(as_folder(images, tmp_path / "in"), tmp_path / "out")
    assert content(tmp_path / "out") == {whole: 0}
    listed = (tmp_path / "out/skipped.txt").read_text()
    assert all(name in listed for name in ("a/cut.jpg", "a/page.jpg", "a/none.png"))
    assert "3 images were left out" in capsys.readouterr().out


def test_unusual_images_stay_and_bombs_are_left_out(tmp_path, capsys):
    """Types come from the content, not from the name; sizes above `MAX_PIXELS` are refused."""
    good = {
        "png.jpg": picture(0, kind="png"),
        "cmyk.jpg": picture(1, mode="CMYK"),
        "grey.jpg": picture(2, mode="L"),
        "webp.jpg": picture(3, kind="webp"),
    }
    flipped = bytearray(picture(4, kind="png"))
    flipped[200:205] = b"\0\1\2\3\4"
    array = io.BytesIO()
    np.save(array, np.zeros((2, 2, 3), np.uint8))
    bad = {
        **{f"bomb.{kind}": bomb(kind) for kind in ("jpeg", "png", "webp", "gif")},
        "bomb.npy": array.getvalue().replace(b"(2, 2, 3), }          ", b"(2000000, 2000000, 3)}"),
        "objects.npy": with_object(tmp_path / "executed"),
        "flipped.png": flipped,
    }
    prepared(as_folder(good | bad, tmp_path / "in"), tmp_path / "out")
    assert content(tmp_path / "out").keys() == set(good.values())
    assert all(decode(data, channels).shape == (channels, 16, 20) for data in good.values() for channels in (1, 3, 4))
    listed = (tmp_path / "out/skipped.txt").read_text().splitlines()
    assert {line.split(": ")[0] for line in listed} == set(bad)
    assert "7 images were left out" in capsys.readouterr().out
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("maker", [as_tar, as_zip])
def test_names_outside_the_folder(maker, tmp_path):
    """They are used as names only; nothing is unpacked."""
    images = {"../../out.jpg": picture(0), f"{tmp_path}/absolute.jpg": picture(1), "in.jpg": picture(2)}
    source = maker(images, tmp_path / "x")
    prepared(source, tmp_path / "deep/out", "--no-labels")
    assert content(tmp_path / "deep/out").keys() == set(images.values())
    assert names(tmp_path) == {"x", "deep"} and names(tmp_path / "deep") == {"out"}


def test_webdataset_reads_our_shards(digits):
    files = [str(digits / shard.file) for shard in read_index(digits).splits["train"]]
    assert len(files) == 3
    split = Split(digits, "train")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset lets the garbage collector close its files
        read = list(webdataset.WebDataset(files, shardshuffle=False, empty_check=False))
        gc.collect()
    assert len(read) == len(split)
    for i, sample in enumerate(read):
        assert (sample["png"], int(sample["cls"])) == split.read(i)
    assert json.loads(read[0]["json"])["name"].startswith("train/")


def test_reads_a_webdataset_tar_made_elsewhere(tmp_path):
    data = [picture(i) for i in range(5)]
    members = {}
    for i, image in enumerate(data):
        members |= {
            f"photos/{i:03}.txt": b"a caption",
            f"photos/{i:03}.jpg": image,
            f"photos/{i:03}.cls": b"%d" % (i % 3),
        }
    as_tar(members, tmp_path / "set-train-0001.tar")
    as_tar({"9.seg.png": b"x", "9.jpeg": data[0]}, tmp_path / "set-val-0000.tar")
    index_folder(tmp_path, Pool(1))
    assert content(tmp_path, "set-train") == {image: i % 3 for i, image in enumerate(data)}
    assert content(tmp_path, "set-val") == {data[0]: -1}
    assert read_index(tmp_path).classes == ["0", "1", "2"]
    (tmp_path / "classes.txt").write_text("x\ny\nz\n")
    index_folder(tmp_path, Pool(1))
    assert read_index(tmp_path).classes == ["x", "y", "z"]


def test_same_input_same_bytes(tmp_path):
    source = as_folder(CATS, tmp_path / "in")
    for out in ("one", "two"):
        prepared(source, tmp_path / out)
    assert (tmp_path / "one/index.json").read_bytes() == (tmp_path / "two/index.json").read_bytes()


def test_a_killed_run_is_completed(tmp_path):
    """A killed run leaves no index; the next one keeps its finished shards, and has the same result."""
    source, out = as_folder(collection({"a": 24}), tmp_path / "in"), tmp_path / "out"
    assert killed(out, 30, lambda folder: prepared(source, folder, "--shard-size", "3", "--workers", "1"))
    assert not (out / "index.json").exists()
    finished = {record.name[1:13]: record for record in out.glob(".train-*.record.json")}
    before = {name: (out / f"{name}.tar").stat().st_mtime_ns for name in finished}
    assert 2 < len(before) < 8
    prepared(source, out, "--shard-size", "3")
    assert all((out / f"{name}.tar").stat().st_mtime_ns == time for name, time in before.items())
    prepared(source, tmp_path / "whole", "--shard-size", "3")
    assert (out / "index.json").read_bytes() == (tmp_path / "whole/index.json").read_bytes()


def test_verify_names_the_damage(tmp_path, capsys):
    prepared(as_folder(collection({"a": 8}), tmp_path / "in"), tmp_path / "out", "--shard-size", "4")
    verify(tmp_path / "out", Pool(1))
    assert "no damage" in capsys.readouterr().out
    shard = tmp_path / "out/train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[int(np.load(index_file(shard))["offset"][0]) + 50] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="1 of 2 shards"):
        verify(tmp_path / "out", Pool(1))
    assert re.search(r"train-000001\.tar .*\(images 0 differ\)", capsys.readouterr().out)
    with pytest.raises(UserError, match=r"train-000001\.tar is damaged.*--verify"):
        content(tmp_path / "out")


HARMS = ("cut in the payload", "cut in a header", "cut at a boundary", "header zeroed", "zeroed to the end")


def harm(path, how: str) -> None:
    """Damage a tar at its third image."""
    with tarfile.open(path) as tar:
        third = [member for member in tar if member.name.endswith(".jpg")][2]
    data = bytearray(path.read_bytes())
    if how == "header zeroed":
        data[third.offset : third.offset_data] = bytes(512)
    if how == "zeroed to the end":
        data[third.offset_data + 100 :] = bytes(len(data) - third.offset_data - 100)
    cuts = {
        "cut in the payload": third.offset_data + 100,
        "cut in a header": third.offset + 100,
        "cut at a boundary": third.offset,
    }
    path.write_bytes(data[: cuts.get(how)])


@pytest.mark.parametrize("how", HARMS)
def test_a_damaged_foreign_tar_is_not_indexed(how, tmp_path):
    path = as_tar({f"{i}.jpg": picture(i) for i in range(4)}, tmp_path / "x-0.tar")
    harm(path, how)
    if how == "zeroed to the end":  # the image has the right size, and the zeros look like the end of a tar
        index_folder(tmp_path, Pool(1))
        found = list(content(tmp_path, "x"))
        assert found[:2] == [picture(0), picture(1)]
        with pytest.raises(UserError, match="not a readable image"):
            decode(found[2])
        return
    with pytest.raises(UserError, match=r"x-0\.tar"):
        index_folder(tmp_path, Pool(1))
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize("how", HARMS)
def test_verify_names_a_damaged_tar(how, tmp_path, capsys):
    prepared(as_folder(CATS, tmp_path / "in"), tmp_path / "out", "--shard-size", "4")
    harm(tmp_path / "out/train-000001.tar", how)
    with pytest.raises(UserError, match=r"1 of 2 shards.*/out --repair"):
        verify(tmp_path / "out", Pool(1))
    assert "out/train-000001.tar " in capsys.readouterr().out


@pytest.mark.parametrize("what", ["gone", "other bytes", "another table"])
def test_verify_names_a_damaged_index(what, tmp_path, capsys):
    prepared(as_folder(CATS, tmp_path / "in"), tmp_path / "out")
    index = tmp_path / "out/train-000000.idx.npy"
    if what == "gone":
        index.unlink()
    elif what == "other bytes":
        index.write_bytes(index.read_bytes()[:-4] + b"\0\0\0\1")
    else:
        np.save(index, np.zeros(8))
        (tmp_path / "out/train-000000.tar").write_bytes(bytes(10240))  # so that the tables are compared
    with pytest.raises(UserError, match="1 of 1 shards"):
        verify(tmp_path / "out", Pool(1))
    expected = {"gone": "no .idx.npy", "other bytes": "train-000000.idx.npy", "another table": "tar has 10240"}
    assert expected[what] in capsys.readouterr().out


def test_bad_input_as_a_command(tmp_path):
    (tmp_path / "empty").mkdir()
    line = run("python", "data/prepare.py", "--no-plan", tmp_path / "empty", tmp_path / "out", code=2).stderr
    assert line.startswith("error: ") and line.count("\n") == 1 and f"{tmp_path}/empty" in line
    assert not (tmp_path / "out").exists()


def test_checks_and_help_do_not_import_torch():
    """It takes seconds."""
    modules = "data.prepare, data.folder, data.shards"
    check = f"import sys, {modules}; print({{'torch', 'webdataset', 'sklearn'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)  # no fork has torch
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda path: path / "nowhere", "does not exist"),
        (lambda path: as_folder({"notes.txt": b"x"}, path / "in"), "has no image"),
        (
            lambda path: as_folder({"x.tar": b"not a tar" * 99}, path / "in") / "x.tar",
            "x.tar is not a folder",
        ),
        (lambda path: as_zip({"x.jpg": b""}, path / "x.zip"), "no image of the source could be read"),
        (lambda path: as_folder({"x.jpg": b"broken"}, path / "in"), "no image of the source could be read"),
    ],
)
def test_bad_source(make, pattern, tmp_path):
    with pytest.raises(UserError, match=pattern):
        prepared(make(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()  # nothing half-written


def test_a_folder_with_another_data_set_is_not_changed(tmp_path):
    first = as_folder(CATS, tmp_path / "in")
    prepared(first, tmp_path / "out")
    before = sorted((file.name, file.read_bytes()) for file in (tmp_path / "out").iterdir())
    with pytest.raises(UserError, match=r"another data set .*images .*8.* 9.*another folder"):
        prepared(as_folder(CATS | {"cat/x.jpg": picture(1)}, tmp_path / "more"), tmp_path / "out")
    with pytest.raises(UserError, match=r"resize .*None.* 10"):
        prepared(first, tmp_path / "out", "--resize", "10")
    with pytest.raises(UserError, match="not empty"):
        prepared(first, first)
    assert sorted((file.name, file.read_bytes()) for file in (tmp_path / "out").iterdir()) == before


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["a"], "--help"), (["a", "b", "--verify"], "--help"), (["a", "--verify", "--repair"], "--help"),
        (["a", "--index", "--repair"], "--help"), (["a", "b", "--repair", "--index"], "--help"),
        (["a", "b", "--resize", "0"], "--resize is 0"), (["a", "b", "--val-fraction", "1"], "--val-fraction is 1"),
        (["a", "b", "--quality", "101"], "--quality is 101"),
    ],
)  # fmt: skip
def test_bad_arguments(args, names):
    with pytest.raises(UserError, match=names):
        prepare.parse(args)


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "ILSVRC2012_img_train.tar"])
def test_many_images_by_many_processes(name, tmp_path):
    images = collection({"cat": 150, "dog": 150})
    prepared(MAKERS[name](images, tmp_path / name), tmp_path / "out", "--shard-size", "20", "--workers", "4")
    assert sorted(content(tmp_path / "out")) == sorted(set(images.values()))


@pytest.mark.parametrize("maker", [as_tar, as_ilsvrc])
def test_a_cut_tar_is_refused(maker, tmp_path):
    """At a member's boundary, where tarfile itself raises no error."""
    path = maker(collection({"cat": 3, "dog": 3}), tmp_path / "x.tar")
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset])
    with pytest.raises(UserError, match="cut short"):
        prepared(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_archives_in_a_folder_are_left_out_and_named(tmp_path, capsys):
    """The others are used; with none left, the source is refused."""
    folder = tmp_path / "classes"
    folder.mkdir()
    for name in ("cat", "dog", "emu", "fox"):
        as_tar(collection({name: 3}), folder / f"{name}.tar")
    whole = (folder / "dog.tar").read_bytes()
    (folder / "dog.tar").write_bytes(whole[: len(whole) // 2])
    (folder / "emu.tar").write_bytes(b"<html>not found</html>")
    (folder / "fox.tar").rename(folder / "fox.zip")
    (folder / "gnu.tar.gz").write_bytes(gzip.compress(whole)[:-100])
    (folder / "hen.zip").write_bytes(b"PK\x03\x04 cut")
    out = tmp_path / "out"
    prepared(folder, out)
    text = capsys.readouterr().out
    assert "4 damaged archives left out" in text and all(name in text for name in ("dog.", "emu.", "gnu.", "hen."))
    assert read_index(out).classes == ["cat", "fox"]
    for name in ("cat.tar", "fox.zip"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"no image.*4 damaged archives"):
        prepared(folder, tmp_path / "none")


def test_a_tar_with_a_negative_size_is_refused(tmp_path):
    """A header with a negative size would be an endless loop."""
    path = as_tar(collection({"cat": 2}), tmp_path / "x.tar")
    with tarfile.open(path) as tar:
        member = tar.getmembers()[1]
    member.size = -tarfile.BLOCKSIZE
    data = bytearray(path.read_bytes())
    data[member.offset : member.offset + tarfile.BLOCKSIZE] = member.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x\.tar is damaged or cut short at byte"):
        prepared(path, tmp_path / "out")


def test_changed_images_are_another_data_set(tmp_path):
    source = as_folder(CATS, tmp_path / "in")
    prepared(source, tmp_path / "out")
    prepared(source, tmp_path / "out")  # the same: nothing to do
    (source / "cat/0.jpg").write_bytes(picture(99))
    with pytest.raises(UserError, match=r"another data set \(content"):
        prepared(source, tmp_path / "out")


def test_a_damaged_shard_is_written_again(tmp_path):
    source = as_folder(CATS, tmp_path / "in")
    prepared(source, tmp_path / "out", "--shard-size", "3")
    before = (tmp_path / "out/index.json").read_bytes()
    (tmp_path / "out/train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"train-000001\.tar is missing.*run the same"):
        Split(tmp_path / "out", "train")
    prepared(source, tmp_path / "out", "--shard-size", "3")
    assert (tmp_path / "out/index.json").read_bytes() == before
    verify(tmp_path / "out", Pool(1))


def test_our_own_shards_are_not_indexed_as_foreign(tmp_path):
    prepared(as_folder(CATS, tmp_path / "in"), tmp_path / "out")
    with pytest.raises(UserError, match="made by this command"):
        index_folder(tmp_path / "out", Pool(1))
    assert read_index(tmp_path / "out").classes == ["cat", "dog"]


def test_an_image_outside_the_class_folders(tmp_path):
    source = as_folder({f"x/{name}": data for name, data in CATS.items()} | {"stray.jpg": picture(0)}, tmp_path / "in")
    with pytest.raises(UserError, match=r"such as stray\.jpg.*--no-labels.*--splits train=FOLDER"):
        prepared(source, tmp_path / "out")
    prepared(source, tmp_path / "out", "--no-labels")
    assert set(Split(tmp_path / "out", "train").labels().tolist()) == {-1}
    prepared(source, tmp_path / "two", "--splits", "train=x")
    assert sorted(Split(tmp_path / "two", "train").labels().tolist()) == [0, 0, 0, 0, 0, 1, 1, 1]


def _killed(task):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_ends_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["data/prepare.py", "my photos", "out"])
    with pytest.raises(UserError, match=r"process was killed.*run `python data/prepare\.py 'my photos' out` again"):
        run_tasks(_killed, [1, 2, 3], Pool(2), 3)


def test_one_image_and_several_in_the_notes():
    notes = [ARRAYS, CLIPPED, FIRST_PAGE, FIRST_FRAME, NOT_TURNED]
    assert [note.format(Plural(1)).split(" ")[:2] for note in notes] == [
        ["1", "image"], ["1", "value"], ["1", "file"], ["1", "picture"], ["1", "image"]
    ]  # fmt: skip
    assert CLIPPED.format(Plural(1200)).startswith("1,200 values outside of the range of values were clipped")


@pytest.mark.parametrize("label", [b"x", b"-5", b"1.5", b"9" * 40])
def test_a_label_that_is_not_a_number(label, tmp_path):
    as_tar({"0.jpg": picture(0), "0.cls": label}, tmp_path / "x-0.tar")
    with pytest.raises(UserError, match=r"0\.cls .*whole number"):
        index_folder(tmp_path, Pool(1))


def test_out_cannot_be_written(refused, tmp_path):
    source = as_folder(CATS, tmp_path / "in")
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="is a file"):
        prepared(source, tmp_path / "out")
    assert refused(prepare.main, source, tmp_path / "out/below").startswith(f"error: {tmp_path}/out/below: ")


def test_shards_are_refused_as_a_source(digits, tmp_path):
    with pytest.raises(UserError, match="contains shards already"):
        prepared(digits, tmp_path / "out")


def test_a_val_fraction_that_leaves_a_split_empty(tmp_path):
    with pytest.raises(UserError, match=r"--val-fraction .*split empty"):
        prepared(as_folder(CATS, tmp_path / "in"), tmp_path / "out", "--val-fraction", "0.001")
    assert not (tmp_path / "out").exists()
