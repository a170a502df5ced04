"""A plain folder of images reads like a split of shards."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.errors import UserError
from configs.schema import Data
from data.decode import decode
from data.folder import Folder, list_collection, open_images, open_splits, read_image, sample_names
from data.index import index_folder
from data.pool import Pool
from data.reading import VALUES, ImageError
from data.shard_index import index_file, read_index
from data.shards import Split
from tests.conftest import has
from tests.data.helpers import as_folder, as_tar, as_zip, collection, picture
from tests.data.test_prepare import prepared
from tests.data.test_tiff import tiff


def open_folder(folder: Path, split: str = "val") -> Folder:
    return Folder(list_collection(str(folder)), split)


def open_for_training(data: Data, split: str = "train") -> Folder:
    return open_splits(data, [split], strict=True)[0]


SPLITS = {"train/cat": 2, "train/dog": 1, "train/emu": 1, "val/emu": 2, "val/cat": 1}


def test_splits_and_classes_come_from_the_paths(tmp_path):
    images = open_images(str(as_folder(collection(SPLITS), tmp_path / "in")), "val")
    assert isinstance(images, Folder) and len(images) == 3
    assert images.classes == ["cat", "dog", "emu"]  # of all splits, as prepare.py numbers them
    assert sample_names(images) == ["val/cat/0.jpg", "val/emu/0.jpg", "val/emu/1.jpg"]
    assert images.labels().tolist() == [0, 2, 2] == [images.read(i)[1] for i in range(3)]
    assert images.read(2)[0] == collection(SPLITS)["val/emu/1.jpg"]


def test_the_same_classes_and_labels_as_the_shards_made_of_it(tmp_path):
    folder = as_folder(collection(SPLITS), tmp_path / "in")
    prepared(folder, tmp_path / "out")
    plain, sharded = (open_images(str(path), "train") for path in (folder, tmp_path / "out"))
    assert isinstance(sharded, Split) and plain.classes == sharded.classes
    one, other = ({name: images.read(i) for i, name in enumerate(sample_names(images))} for images in (plain, sharded))
    assert one == other


def test_without_split_folders_all_images_are_the_split(tmp_path, capsys):
    images = open_folder(as_folder(collection({"a/more": 2, "b": 1}), tmp_path / "in"))
    assert len(images) == 3 and images.classes == ["a", "b"] and images.labels().tolist() == [0, 0, 1]
    assert "split val" in capsys.readouterr().out


def test_images_beside_class_folders_are_refused(tmp_path):
    pattern = r"1 image outside of the class folders, such as 0\.jpg: .*--no-labels.*--splits.*data/prepare\.py"
    with pytest.raises(UserError, match=pattern):
        open_folder(as_folder(collection({"a": 1, "": 1}), tmp_path / "in"))


def test_training_names_the_command_that_has_the_option(tmp_path):
    as_folder({"a.tif": tiff(np.full((8, 8), -5, np.int16))}, tmp_path / "in")
    for strict in (True, False):
        (images,) = open_splits(Data(str(tmp_path / "in")), ["train"], strict=strict)
        with pytest.raises(ImageError, match="add --value-range") as error:
            images.read(0)
        assert error.value.kind == VALUES and ("(options of data/prepare.py)" in str(error.value)) == strict


def test_images_without_class_folders_have_no_labels(tmp_path):
    images = open_folder(as_folder(collection({"": 2}), tmp_path / "in"))
    assert images.classes is None and images.labels().tolist() == [-1, -1]


def test_what_is_left_out_is_said(tmp_path, capsys):
    images = open_folder(as_folder(collection({"a": 1}) | {"a/x.psd": b"x"}, tmp_path / "in"))
    assert len(images) == 1 and "1 file ignored: 1 .psd" in capsys.readouterr().out


def test_an_unknown_split(tmp_path):
    folder = as_folder(collection({"train/a": 1}), tmp_path / "in")
    with pytest.raises(UserError, match=r"in has no split val .*train"):
        open_folder(folder)


def test_a_folder_named_digits_is_not_the_built_in_source(tmp_path, monkeypatch):
    as_folder(collection({"a": 1}), tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert len(open_images("digits", "val")) == 1


@pytest.mark.parametrize("make", [as_folder, as_zip, as_tar])
def test_training_reads_a_folder_a_zip_or_a_tar(make, tmp_path):
    images = collection(SPLITS) | {"train/cat/7.bmp": picture(7, kind="bmp")}
    data = Data(str(make(images, tmp_path / "in")))
    train, val = open_for_training(data), open_for_training(data, "val")
    assert [len(train), len(val)] == [5, 3] and train.counts.sum() == 5
    assert train.labels().tolist() == [0, 0, 0, 1, 2] and train.classes == val.classes == ["cat", "dog", "emu"]
    assert train.read(1)[0] == images["train/cat/1.jpg"] and decode(train.read(2)[0], 3).shape[0] == 3
    assert train.digest == open_for_training(data).digest != val.digest


def test_the_digest_changes_with_any_image(tmp_path):
    folder = as_folder(collection({"a": 2}), tmp_path / "in")
    before = open_folder(folder, "train").digest
    (folder / "a/1.jpg").write_bytes(picture(5))
    assert open_folder(folder, "train").digest != before


def test_training_does_not_take_all_images_as_validation_split(tmp_path):
    data = Data(str(as_folder(collection({"a": 2, "b": 1}), tmp_path / "in")))
    assert len(open_for_training(data)) == 3
    with pytest.raises(UserError, match=r"no split val.*--val-fraction"):
        open_for_training(data, "val")


def test_a_compressed_tar_cannot_be_read_at_random(tmp_path):
    data = Data(str(as_tar(collection({"a": 2}), tmp_path / "in.tar.gz", "w:gz")))
    with pytest.raises(UserError, match=r"compressed.*prepare"):
        open_for_training(data)


@pytest.mark.parametrize(("mode", "kind"), [("RGB", "bmp"), ("L", "tiff"), ("RGB", "ppm"), ("RGBA", "png")])
def test_types_that_the_loader_cannot_decode_are_converted(mode, kind, tmp_path):
    data = picture(0, mode=mode, kind=kind)
    (tmp_path / f"x.{kind}").write_bytes(data)
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(decode(read_image(tmp_path / f"x.{kind}"), 3), pixels)


def test_a_deleted_file_is_a_damaged_image(tmp_path):
    images = open_folder(as_folder(collection({"a": 1}), tmp_path / "in"))
    Path(images.item(0).container).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        images.read(0)


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda path: None, "does not exist.*folder of shards or of images"),
        (lambda path: path.write_bytes(b"x"), "is of an unknown type.*folder"),
        (lambda path: path.mkdir(), "has no image"),
        (lambda path: (path.mkdir(), (path / "a.tar").touch()), "no index.json.*--index"),
    ],
)
def test_paths_that_cannot_be_opened(make, pattern, tmp_path):
    make(tmp_path / "x")
    with pytest.raises(UserError, match=pattern):
        open_images(str(tmp_path / "x"), "val")


@pytest.mark.parametrize("other", ["a.jpg", "cats/a.jpg", "scan.tiff"])
@pytest.mark.parametrize("tar", [True, False])
def test_a_folder_of_images_is_never_advised_as_an_output(other, tar, tmp_path):
    """Neither `prepare.py SOURCE FOLDER` nor `--index`, which would write into it."""
    folder = as_folder({other: picture(0)}, tmp_path / "photos")
    if tar:
        (folder / "backup.tar").touch()
    with pytest.raises(UserError) as error:
        read_index(folder)
    assert has(error.value, f"prepare.py {folder} OUT") and "--index" not in str(error.value)


def test_unfinished_shards_are_no_images(tmp_path):
    folder = as_folder({"preview.png": b"", "train-0.idx.npy": b"", "train-0.tar": b""}, tmp_path / "shards")
    with pytest.raises(UserError, match="--index"):
        read_index(folder)


def test_names_in_shards_of_other_tools(tmp_path):
    """The json member may contain a name, something else, no JSON at all, or be missing."""
    jpg, folder = picture(0), tmp_path / "in"
    folder.mkdir()
    members = {
        "a/1.json": json.dumps({"name": "first.jpg"}).encode(), "a/1.jpg": jpg, "a/1.cls": b"0",
        "a/2.png": picture(1, kind="png"), "a/2.json": b"[3]", "a/2.cls": b"0",
        "a/3.jpg": jpg, "a/3.json": b"{", "a/3.cls": b"0",
        "a/4.jpg": jpg, "a/4.cls": b"0",
    }  # fmt: skip
    as_tar(members, folder / "train-0.tar")
    index_folder(folder, Pool(1))
    assert sample_names(Split(folder, "train")) == ["first.jpg", "a/2.png", "a/3.jpg", "a/4.jpg"]


def test_names_in_a_damaged_shard(tmp_path):
    """If headers are lost, names could shift, so samples are numbered instead."""
    prepared(as_folder(collection({"a": 3}), tmp_path / "in"), tmp_path / "out")
    shard = tmp_path / "out/train-000000.tar"
    data = bytearray(shard.read_bytes())
    header = int(np.load(index_file(shard))["offset"][1]) - 512
    data[header : header + 512] = bytes(512)
    shard.write_bytes(data)
    assert sample_names(Split(tmp_path / "out", "train")) == [f"train-000000.tar, sample {i}" for i in range(3)]
