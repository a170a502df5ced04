"""Archives: links, names of any bytes, members of one name, archives inside archives."""

import io
import json
import os
import tarfile
import tracemalloc
import warnings
import zipfile
from types import SimpleNamespace

import pytest

from configs.errors import UserError, printable
from data import prepare
from data.folder import sample_names
from data.shard_index import read_index
from data.shards import Split
from data.sources import open_zip, read_member
from data.tars import MAX_NAME_BYTES
from tests.conftest import has
from tests.data.helpers import as_folder, as_tar, as_zip, collection, picture
from tests.data.test_layouts import refusal, sizes
from tests.data.test_prepare import content, prepared
from tests.hostile.archives import bomb, in_directory, patched

CATS = collection({"cat": 2, "dog": 1})
BYTES = os.fsdecode(b"caf\xe9/\xff.jpg")


def linked_tar(path):
    """A tar with a hard link to a member that is no image by name, a link to an image, and a broken one."""
    as_tar({"cat/0.jpg": picture(0), "dog/data.bin": picture(1)}, path)
    with tarfile.open(path, "a") as tar:
        for name, kind, target in (
            ("dog/1.jpg", tarfile.LNKTYPE, "dog/data.bin"),
            ("cat/again.jpg", tarfile.SYMTYPE, "0.jpg"),
            ("cat/broken.jpg", tarfile.SYMTYPE, "../nowhere.jpg"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    return path


def test_links_in_a_tar(tmp_path, capsys):
    prepared(linked_tar(tmp_path / "x.tar"), tmp_path / "out")
    assert content(tmp_path / "out") == {picture(0): 0, picture(1): 1}
    out = capsys.readouterr().out
    assert has(out, "cat/again.jpg = cat/0.jpg") and has(out, "1 link without a file cat/broken.jpg")


@pytest.mark.parametrize("kind", ["folder", "tar", "zip", "tar.gz"])
def test_names_of_any_bytes(kind, tmp_path, capsys):
    images = {BYTES: picture(0), "dog/\x1b[31m.jpg": picture(1), os.fsdecode(b"dog/\xe9.jpg"): b"broken"}
    path = tmp_path / f"x.{kind}"
    if kind == "folder":
        as_folder(images, path)
    elif kind == "zip":
        plain = {name.encode("ascii", "replace").decode().replace("?", "Q"): data for name, data in images.items()}
        data = as_zip(plain, path).read_bytes()
        for name in images:  # zipfile cannot write them
            data = data.replace(name.encode("ascii", "replace").replace(b"?", b"Q"), os.fsencode(name))
        path.write_bytes(data)
    else:
        as_tar(images, path, "w:gz" if kind == "tar.gz" else "w")
    prepared(path, tmp_path / "out")
    assert read_index(tmp_path / "out").classes == ["caf\\xe9", "dog"]
    assert content(tmp_path / "out") == {picture(0): 0, picture(1): 1}
    assert sorted(sample_names(Split(tmp_path / "out", "train"))) == ["caf\\xe9/\\xff.jpg", "dog/\\x1b[31m.jpg"]
    assert (tmp_path / "out/skipped.txt").read_bytes().startswith(b"dog/\\xe9.jpg: ")
    out = capsys.readouterr().out
    assert "\x1b" not in out and "caf\\xe9" in out
    prepared(path, tmp_path / "out")  # the same data set, complete
    assert "complete already" in capsys.readouterr().out


def test_a_message_has_no_control_characters(tmp_path, refused):
    line = refused(prepare.main, tmp_path / "a\x1b[31m\u202e", tmp_path / "out")
    assert "a\\x1b[31m\\u202e does not exist" in line and "\x1b" not in line


def test_printable():
    assert (
        printable("é 日\u200d🙂") == "é 日\u200d🙂"
        and printable("a\n\t\x7f\udce9\u2028") == "a\\x0a\\x09\\x7f\\xe9\\u2028"
    )


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_members_of_one_name_are_two_images(kind, tmp_path, capsys):
    path = tmp_path / f"x.{kind}"
    if kind == "zip":
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
            warnings.simplefilter("ignore")  # zipfile's own word on it
            for i in range(2):
                archive.writestr("cat/0.jpg", picture(i))
    else:
        with tarfile.open(path, "w") as tar:
            for i in range(2):
                member = tarfile.TarInfo("cat/0.jpg")
                member.size = len(picture(i))
                tar.addfile(member, io.BytesIO(picture(i)))
    prepared(path, tmp_path / "out")
    assert content(tmp_path / "out").keys() == {picture(0), picture(1)}
    assert has(capsys.readouterr().out, "1 name of several images cat/0.jpg")


def test_names_outside_the_source_are_no_classes(tmp_path):
    images = {"../a/0.jpg": picture(0), "/b/1.jpg": picture(1), "./a/2.jpg": picture(2), "../../b/3.jpg": picture(3)}
    for make, name in ((as_tar, "x.tar"), (as_zip, "x.zip")):
        prepared(make(images, tmp_path / name), tmp_path / f"out-{name}")
        assert read_index(tmp_path / f"out-{name}").classes == ["a", "b"]


@pytest.mark.parametrize("outer", ["folder", "tar", "zip"])
def test_archives_inside_are_classes(outer, tmp_path):
    inner = {
        "cat.tar": as_tar({"0.jpg": picture(0)}, tmp_path / "1").read_bytes(),
        "dog.zip": as_zip({"1.jpg": picture(1)}, tmp_path / "2").read_bytes(),
        "emu.tar.gz": as_tar({"./2.jpg": picture(2)}, tmp_path / "3", "w:gz").read_bytes(),
    }
    path = {"folder": as_folder, "tar": as_tar, "zip": as_zip}[outer](inner, tmp_path / f"x.{outer}")
    prepared(path, tmp_path / "out")
    assert read_index(tmp_path / "out").classes == ["cat", "dog", "emu"]
    assert content(tmp_path / "out") == {picture(i): i for i in range(3)}
    assert not [file for file in (tmp_path / "out").iterdir() if file.name.startswith(".")]


def test_an_archive_beside_its_images_is_counted(tmp_path, capsys):
    source = as_folder(CATS, tmp_path / "in")
    as_zip(CATS, source / "download.zip")
    prepared(source, tmp_path / "out")
    assert sizes(tmp_path / "out") == {"train": 3} and "1 file ignored: 1 .zip" in capsys.readouterr().out


def test_archives_of_archives_are_refused(tmp_path):
    inner = as_tar({"a.tar": as_tar(CATS, tmp_path / "1").read_bytes()}, tmp_path / "2")
    source = as_folder({"t.tar": inner.read_bytes()}, tmp_path / "in")
    assert has(refusal(source, tmp_path / "out"), "t.tar contains archives itself, 1 .tar give it as SOURCE")


def test_names_with_dots_are_images_of_their_own(tmp_path):
    images = {"cat/a.b.jpg": picture(0), "cat/a.c.jpg": picture(1), "dog/a.jpg": picture(2)}
    prepared(as_tar(images, tmp_path / "x.tar"), tmp_path / "out")
    assert sizes(tmp_path / "out") == {"train": 3}


SAMPLES = {
    "s/0.jpg": picture(0), "s/0.cls": b"dog", "s/1.jpg": picture(1), "s/1.cls": b"cat\n", "s/1.seg.png": picture(9),
    "s/2.jpg": picture(2), "s/2.json": json.dumps({"label": "dog", "boxes": [[1, 2, 3, 4]]}).encode(),
    "s/3.x.jpg": picture(3), "s/3.x.cls": b"cat", "s/4.jpg": picture(4),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_webdataset_tar_is_a_labelled_source(mode, tmp_path, capsys):
    prepared(as_tar(SAMPLES, tmp_path / "x.tar.gz", mode), tmp_path / "out")
    assert read_index(tmp_path / "out").classes == ["cat", "dog"]
    assert content(tmp_path / "out") == {picture(0): 1, picture(1): 0, picture(2): 1, picture(3): 0}
    assert content(tmp_path / "out", "unlabeled") == {picture(4): -1}
    out = capsys.readouterr().out
    assert has(out, "4 of 5 images") and "1 .seg.png" in out and has(out, "1 image without a row s/4.jpg unlabeled")
    with tarfile.open(tmp_path / "out/train-000000.tar") as tar:
        about = [json.loads(tar.extractfile(name).read()) for name in tar.getnames() if name.endswith("json")]
    assert {"name": "s/2.jpg", "class": "dog", "boxes": [[1, 2, 3, 4]]} in about


def test_numeric_labels_keep_their_order(tmp_path):
    members = {f"{i}.{kind}": value for i in range(12) for kind, value in (("jpg", picture(i)), ("cls", b"%d" % i))}
    prepared(as_tar(members, tmp_path / "x.tar"), tmp_path / "out")
    assert read_index(tmp_path / "out").classes == [str(i) for i in range(12)]
    assert content(tmp_path / "out") == {picture(i): i for i in range(12)}


def test_a_folder_of_numbered_tars(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i, split in enumerate(("train", "train", "val")):
        members = {"0.jpg": picture(i), "0.cls": b"%d" % (i % 2), "1.jpg": picture(i + 5), "1.cls": b"1"}
        as_tar(members, tmp_path / f"in/x-{split}-000{i}.tar")
    prepared(tmp_path / "in", tmp_path / "out")
    assert sizes(tmp_path / "out") == {"train": 4, "val": 2} and read_index(tmp_path / "out").classes == ["0", "1"]
    assert "3 archives" in capsys.readouterr().out


def test_a_member_that_unpacks_to_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr("data.reading.MAX_FILE_BYTES", 1000)
    images = {"a/0.jpg": picture(0), "a/1.png": bytes(2000)}
    prepared(as_zip(images, tmp_path / "x.zip"), tmp_path / "out", "--max-pixels", "400")
    assert "2,000 bytes" in (tmp_path / "out/skipped.txt").read_text()


def test_a_damaged_zip_is_refused(tmp_path):
    path = as_zip(CATS, tmp_path / "x.zip")
    path.write_bytes(path.read_bytes().replace(b"PK\1\2", b"PK\1\7"))
    with pytest.raises(UserError, match="damaged zip"):
        prepared(path, tmp_path / "out")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_member_that_is_larger_than_it_declares(method, tmp_path):
    """No more than the declared bytes are unpacked, and the others are used."""
    path = bomb(tmp_path / "x.zip", method, 20)
    patched(path, in_directory(24, "<I", 100))
    archive, members = open_zip(str(path), os.getpid())
    member = max(members.values(), key=lambda member: member.header_offset)
    tracemalloc.start()
    with pytest.raises(zipfile.BadZipFile):
        read_member(archive, member)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    prepared(path, tmp_path / "out")
    assert "cat/bomb.png: damaged" in (tmp_path / "out/skipped.txt").read_text()


def test_unpacking_leaves_free_space(tmp_path, monkeypatch):
    path = as_tar(CATS, tmp_path / "x.tar.gz", "w:gz")
    monkeypatch.setattr("data.archives.disk_usage", lambda folder: SimpleNamespace(free=4096))
    with pytest.raises(UserError, match=r"x\.tar\.gz unpacks to more than .* of the free space of .*out"):
        prepared(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_huge_name_is_not_read(kind, tmp_path):
    member = tarfile.TarInfo("long")
    member.type, member.size = kind, MAX_NAME_BYTES + 1
    (tmp_path / "x.tar").write_bytes(member.tobuf() + bytes(MAX_NAME_BYTES + 2048))
    with pytest.raises(UserError, match=r"x\.tar"):
        prepared(tmp_path / "x.tar", tmp_path / "out")


def test_a_damaged_file_of_labels_in_a_zip(tmp_path):
    path = as_zip({**CATS, "labels.csv": b"file,label" * 100, "extra.json": b"{}"}, tmp_path / "x.zip")
    data = bytearray(path.read_bytes())
    for name in (b"labels.csv", b"extra.json"):
        start = data.index(name) + len(name)
        data[start : start + 2] = b"\xff\xff"
    path.write_bytes(data)
    prepared(path, tmp_path / "out")
    assert sizes(tmp_path / "out") == {"train": len(CATS)}


def test_an_image_file_of_many_gigabytes(tmp_path):
    as_folder(CATS, tmp_path / "in")
    with (next((tmp_path / "in").rglob("*.jpg")).with_name("big.jpg")).open("wb") as file:
        file.truncate(100 << 30)
    prepared(tmp_path / "in", tmp_path / "out")
    assert "107,374,182,400 bytes" in (tmp_path / "out/skipped.txt").read_text()
