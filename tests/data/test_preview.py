"""The preview of a collection, before shards are written."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.prepare import main
from tests.data.helpers import as_folder, as_tar, as_zip, collection, picture


@pytest.fixture
def preview(tmp_path, capsys):
    """What `prepare.py --dry-run` prints about images; checks that it writes nothing but the contact sheet."""

    def run(images: dict[str, bytes], *options: str, make=as_folder) -> str:
        source = make(images, tmp_path / "in")
        main([str(source), str(tmp_path / "out"), "--dry-run", "--workers", "2", *options])
        assert {path.name for path in tmp_path.iterdir()} <= {"in", "out.preview.png"}
        return capsys.readouterr().out

    return run


def rotated(turn: int) -> bytes:
    out, exif = io.BytesIO(), Image.Exif()
    exif[274] = turn
    Image.new("RGB", (20, 16)).save(out, "jpeg", exif=exif)
    return out.getvalue()


def test_splits_classes_types_and_sizes(preview):
    images = collection({"train/cat": 5, "train/dog": 2, "val/cat": 1, "val/dog": 1})
    images["train/cat/x.png"] = picture(50, kind="png", mode="L")
    said = preview(images)
    for words in ("train", "8 images", "2 classes: dog (2) to cat (6)", "9 jpg, 1 png", "9 colour, 8 bits", "1 grey"):
        assert words in said, words
    assert "height 16, width 20" in said


@pytest.mark.parametrize("make", [as_folder, as_zip, as_tar])
def test_equal_files_within_and_across_splits(make, preview):
    images = collection({"train/cat": 3, "val/cat": 2})
    images["train/cat/copy.jpg"] = images["train/cat/0.jpg"]
    said = preview(images, make=make)
    assert "1 image equal to another" in said and "copy.jpg" in said and "several splits" not in said


def test_an_image_in_two_splits_is_a_leak(preview):
    images = collection({"train/cat": 3, "val/cat": 2})
    images["val/cat/copy.jpg"] = images["train/cat/1.jpg"]
    said = preview(images)
    assert "1 image in several splits" in said and "train/cat/1.jpg (train) = val/cat/copy.jpg (val)" in said


@pytest.mark.parametrize("make", [as_folder, as_zip, as_tar])
def test_equal_files_with_different_labels_in_a_table(make, preview, tmp_path_factory):
    images = collection({"": 3})
    images["copy.jpg"] = images["0.jpg"]
    labels = tmp_path_factory.mktemp("labels") / "in.csv"
    labels.write_text("path,label\n0.jpg,a\n1.jpg,a\n2.jpg,b\ncopy.jpg,b\n")
    said = preview(images, "--labels", str(labels), make=make)
    assert "1 image equal to another" in said and "copy.jpg" in said


def test_files_of_equal_size_are_compared_byte_by_byte(preview):
    data = bytearray(picture(0, kind="bmp"))
    data[-1] ^= 1  # the last pixel: equal size, equal beginning
    assert "equal to another" not in preview({"a/1.bmp": picture(0, kind="bmp"), "a/2.bmp": bytes(data)})


def test_rotated_and_unreadable_images_are_counted(preview):
    images = collection({"a": 2}) | {"a/r.jpg": rotated(6), "a/bad.jpg": picture(1)[:200]}
    said = preview(images)
    assert "1 image turned upright" in said
    assert "warning: 1 damaged, such as a/bad.jpg" in said


def test_the_contact_sheet_shows_the_images(preview, tmp_path):
    out = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(out, "png")
    assert "out.preview.png" in preview({"a/1.png": out.getvalue()})
    middle = np.asarray(Image.open(tmp_path / "out.preview.png"))[50, 50]
    assert np.abs(middle.astype(int) - (200, 30, 30)).max() < 8


def test_shards_keep_the_preview(tmp_path):
    source = as_folder(collection({"train/cat": 3, "val/cat": 2}), tmp_path / "in")
    main([str(source), str(tmp_path / "out"), "--workers", "1"])
    survey = json.loads((tmp_path / "out/index.json").read_text())["survey"]
    assert survey["types"] == {"jpg": 5} and survey["height"] == [16, 16, 16] and survey["duplicates"] == 0
    assert Path(tmp_path / "out/preview.png").exists()
