"""The list of a collection that a run keeps: exact, small, without pickle."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from data.catalog import difference, read_catalog, write_catalog
from data.folder import Folder, list_collection
from tests.data.helpers import as_folder, as_ilsvrc, as_tar, as_zip, collection, picture

IMAGES = collection({"train/cat": 2, "train/dog": 1, "val/cat": 1}) | {"train/cat/caf\udce9.jpg": picture(9)}


def as_table(images: dict[str, bytes], path: Path) -> Path:
    as_folder(images, path)
    table = path / "images.csv"
    lines = [f"{name},{name.split('/')[1]},{name.split('/')[0]}" for name in images]
    table.write_bytes("\n".join(["file,label,split", *lines, ""]).encode("utf-8", "surrogateescape"))
    return table


@pytest.mark.parametrize("make", [as_folder, as_zip, as_tar, as_table])
def test_a_written_list_reads_as_it_was(make, tmp_path):
    images = IMAGES if make is not as_zip else collection({"train/cat": 2, "train/dog": 1, "val/cat": 1})
    made = list_collection(str(make(images, tmp_path / "in")))
    write_catalog(tmp_path / "c.npz", made)
    read = read_catalog(tmp_path / "c.npz")
    assert difference(made, read) is None and not (tmp_path / ".c.npz.part").exists()
    for name in ("train", "val"):
        one, other = Folder(made, name), Folder(read, name)
        samples = range(len(one))
        assert [one.read(i) for i in samples] == [other.read(i) for i in samples] and one.digest == other.digest
        assert [images[one.item(i).name] for i in samples] == [one.read(i)[0] for i in samples]
        assert one.classes == ["cat", "dog"]
    assert [len(Folder(read, name)) for name in ("train", "val")] == [len(images) - 1, 1]


def test_a_tar_of_tars_is_read_in_place(tmp_path):
    images = collection({"cat": 2, "dog": 1})
    made = Folder(list_collection(str(as_ilsvrc(images, tmp_path / "in.tar"))), "train")
    assert made.classes == ["cat", "dog"] and made.read(2) == (images["dog/0.jpg"], 1)


@pytest.mark.parametrize("change", ["content", "time", "gone"])
def test_a_changed_file_is_named(change, tmp_path):
    folder = as_folder(IMAGES, tmp_path / "in")
    images = Folder(list_collection(str(folder)), "train")
    file = folder / "train/cat/1.jpg"
    if change == "gone":
        file.unlink()
    elif change == "time":
        os.utime(file, (1, 1))
    else:
        file.write_bytes(picture(5, size=(30, 30)))
    sample = [images.item(i).name for i in range(len(images))].index("train/cat/1.jpg")
    with pytest.raises(UserError, match="cannot be read" if change == "gone" else "has changed since"):
        images.read(sample)
    assert "train/cat/1.jpg" in images.place(sample)
    images.read(0)


@pytest.mark.parametrize(("make", "gone"), [(as_zip, False), (as_tar, True)])
def test_a_changed_archive_is_named(make, gone, tmp_path):
    made = list_collection(str(make(collection({"a": 2}), tmp_path / "in")))
    made.check_archives()
    (tmp_path / "in").unlink()
    if not gone:
        make(collection({"a": 3}), tmp_path / "in")
    with pytest.raises(UserError, match=r"/in: no such file" if gone else r"/in has changed since the run began"):
        made.check_archives()


def test_the_first_difference(tmp_path):
    one, other = (list_collection(str(as_folder(IMAGES, tmp_path / name))) for name in ("one", "two"))
    assert "another size or time" in difference(one, other)
    for name in IMAGES:
        os.utime(tmp_path / "two" / name, ns=(0, (tmp_path / "one" / name).stat().st_mtime_ns))
    assert difference(one, list_collection(str(tmp_path / "two"))) is None  # the same images elsewhere
    (tmp_path / "two/train/dog/0.jpg").unlink()
    as_folder({"train/dog/new.jpg": picture(7)}, tmp_path / "two")
    assert difference(one, list_collection(str(tmp_path / "two"))) == "train/dog/0.jpg is missing"


def harmful(kind: str) -> bytes:
    out = io.BytesIO()
    about = np.frombuffer(json.dumps({"format": "convnext-fcmae-collection/0"}).encode(), np.uint8)
    if kind == "objects":
        np.savez(out, about=np.array([{}], object), names=about, rows=about, allow_pickle=True)
    elif kind == "old":
        np.savez(out, about=about, names=about, rows=about)
    return out.getvalue() or kind.encode()


@pytest.mark.parametrize("kind", ["objects", "old", "text", "cut"])
def test_a_damaged_list(kind, tmp_path):
    path = tmp_path / "collection.npz"
    write_catalog(path, list_collection(str(as_folder(IMAGES, tmp_path / "in"))))
    path.write_bytes(path.read_bytes()[:-300] if kind == "cut" else harmful(kind))
    with pytest.raises(UserError, match=r"collection\.npz is damaged.*remove it"):
        read_catalog(path)
