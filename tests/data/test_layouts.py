"""Splits and classes from folders: what is known, what is refused, what is printed."""

import os

import pytest

from configs.errors import UserError
from data.classes import split_name
from data.shard_index import read_index
from tests.conftest import has
from tests.data.helpers import as_folder, as_tar, as_zip, collection, picture
from tests.data.test_prepare import content, prepared


def sizes(folder) -> dict[str, int]:
    """Images of each split."""
    return {name: sum(s.samples for s in shards) for name, shards in read_index(folder).splits.items()}


def refusal(source, out, *args) -> str:
    """The message that a source is refused with; nothing may be written."""
    with pytest.raises(UserError) as error:
        prepared(source, out, *args)
    assert not out.exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("names", "split"),
    [
        ("train Training TRAIN tr train2017 train_images TrainSet trainset 01_train", "train"),
        ("val Valid validation dev eval Evaluation val2017 validation-set", "val"),
        ("test Testing test_set tests TEST", "test"),
        ("unlabeled Unlabelled extra unlabeled_images", "unlabeled"),
        ("cat seg_train PublicTest devkit trainer images train_val n01440764", None),
    ],
)
def test_names_of_splits(names, split):
    assert {name: split_name(name) for name in names.split()} == dict.fromkeys(names.split(), split)


def test_split_folders_in_any_case(tmp_path):
    source = as_folder(collection({"Training/a": 3, "Training/b": 2, "Testing/a": 1, "Testing/b": 1}), tmp_path / "in")
    prepared(source, tmp_path / "out")
    assert sizes(tmp_path / "out") == {"test": 2, "train": 5} and read_index(tmp_path / "out").classes == ["a", "b"]


def test_unlabelled_images_are_a_split_without_labels(tmp_path, capsys):
    parts = {"train/a": 2, "train/b": 1, "test/a": 1, "test/b": 1, "unlabeled/x": 2, "unlabeled/y/z": 1}
    prepared(as_folder(collection(parts), tmp_path / "in"), tmp_path / "out")
    assert sizes(tmp_path / "out") == {"test": 2, "train": 3, "unlabeled": 3}
    assert read_index(tmp_path / "out").classes == ["a", "b"]
    assert set(content(tmp_path / "out", "unlabeled").values()) == {-1}
    assert "sub-folders are not classes" in capsys.readouterr().out


def test_splits_below_the_classes(tmp_path, capsys):
    parts = {"a/train": 2, "a/test": 1, "b/train": 1, "b/test": 1}
    prepared(as_folder(collection(parts), tmp_path / "in"), tmp_path / "out")
    assert sizes(tmp_path / "out") == {"test": 2, "train": 3} and read_index(tmp_path / "out").classes == ["a", "b"]
    assert "splits are below the classes: test, train" in capsys.readouterr().out


def test_folders_of_images_above_the_classes(tmp_path):
    parts = {"train/train/a": 1, "train/train/b": 1, "val/images/a": 1, "val/images/b": 1}
    prepared(as_folder(collection(parts), tmp_path / "in"), tmp_path / "out")
    assert sizes(tmp_path / "out") == {"train": 2, "val": 2} and read_index(tmp_path / "out").classes == ["a", "b"]


def test_a_folder_of_images_is_not_a_class(tmp_path, capsys):
    prepared(as_folder(collection({"train/images": 2, "val/images": 1}), tmp_path / "in"), tmp_path / "out")
    assert read_index(tmp_path / "out").classes is None and "images/ is not taken as a class" in capsys.readouterr().out


def test_a_split_without_class_folders_has_no_labels(tmp_path, capsys):
    prepared(as_folder(collection({"train/a": 1, "train/b": 1, "test": 2}), tmp_path / "in"), tmp_path / "out")
    assert set(content(tmp_path / "out", "test").values()) == {-1}
    assert "test: 2 images without a label" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"train/a": 2, "test/a": 1, "misc/a": 1}, "misc (1) test (1) train (2) --splits test=test train=train"),
        ({"bus": 2, "car": 1, "train": 1}, "bus (2) --no-splits"),
        ({"train/a": 2, "test/a": 1, "": 1}, "no folder (1) --splits --no-splits"),
        ({"val/a": 1, "validation/a": 1, "train/a": 1}, "val/, validation/ one split --splits"),
        ({"x/train/a": 1, "x/test/a": 1, "x/x/train/a": 1, "x/x/test/a": 1}, "x/ repeats twice --splits"),
        ({"x/a": 1, "x/b": 1, "x/x/a": 1, "x/x/b": 1}, "x/ repeats twice --no-splits"),
        ({"train/a": 1, "train/b": 1, "train/train/a": 1, "train/train/b": 1}, "split train train/ repeats twice"),
        ({"seg_train/a": 1, "seg_test/a": 1, "seg_pred": 1}, "may be splits --splits test=seg_test train=seg_train"),
        ({"train/a": 1, "train/b": 1, "val/images": 2}, "no class of split val (images) --val-labels"),
        ({"a/train": 1, "a/test": 1, "b/train": 1, "b/more": 1}, "below the classes --no-splits"),
    ],
)
def test_what_could_mean_several_things_is_refused(parts, words, tmp_path):
    message = refusal(as_folder(collection(parts), tmp_path / "in"), tmp_path / "out")
    assert has(message, words.split()[0]) and all(word in message for word in words.split()), message


@pytest.mark.parametrize(
    ("numbers", "refused"), [("1 2", False), ("001 002 003", False), ("0 1", True), ("left right", True)]
)
def test_numbered_folders_are_parts_of_a_class(numbers, refused, tmp_path):
    names = [f"{top}/{number}" for top in ("CAT", "DOG") for number in numbers.split()]
    source = as_folder(collection(dict.fromkeys(names, 1)), tmp_path / "in")
    if refused:
        assert has(refusal(source, tmp_path / "out"), "same sub-folders --no-splits")
        prepared(source, tmp_path / "out", "--no-splits")
    else:
        prepared(source, tmp_path / "out")
    assert read_index(tmp_path / "out").classes == ["CAT", "DOG"]


def test_options_say_what_folders_mean(tmp_path, capsys):
    source = as_folder(collection({"train/a": 2, "train/b": 2, "PublicTest/a": 1, "misc/c": 3}), tmp_path / "in")
    prepared(source, tmp_path / "one", "--splits", "train=train", "test=PublicTest", "unlabeled=misc")
    assert sizes(tmp_path / "one") == {"test": 1, "train": 4, "unlabeled": 3}
    assert read_index(tmp_path / "one").classes == ["a", "b"]
    prepared(source, tmp_path / "two", "--splits", "train=train")
    assert sizes(tmp_path / "two") == {"train": 4} and "4 images outside of --splits" in capsys.readouterr().out
    prepared(source, tmp_path / "three", "--no-splits")
    assert read_index(tmp_path / "three").classes == ["PublicTest", "misc", "train"]
    assert has(refusal(source, tmp_path / "four", "--splits", "train=Train"), "no images in Train PublicTest (1)")
    assert "NAME=FOLDER" in refusal(source, tmp_path / "four", "--splits", "train")
    with pytest.raises(UserError, match=r"another data set .*splits"):
        prepared(source, tmp_path / "two", "--splits", "train=train", "test=PublicTest")


def test_a_class_that_is_absent_from_train_is_named(tmp_path, capsys):
    source = as_folder(collection({"train/a": 1, "train/b": 1, "val/b": 1, "val/c": 1}), tmp_path / "in")
    prepared(source, tmp_path / "out")
    assert has(capsys.readouterr().out, "warning: c of split val not in train")


def test_one_class_is_named(tmp_path, capsys):
    prepared(as_folder(collection({"a": 3}), tmp_path / "in"), tmp_path / "out")
    assert has(capsys.readouterr().out, "1 class (a) cannot learn")


@pytest.mark.parametrize("fraction", ["0.2", "0.9"])
def test_a_class_without_validation_images_is_named(fraction, tmp_path, capsys):
    prepared(
        as_folder(collection({"cat": 20, "dog": 1}), tmp_path / "in"), tmp_path / "out", "--val-fraction", fraction
    )
    assert 1 in content(tmp_path / "out").values() and 1 not in content(tmp_path / "out", "val").values()
    assert "class dog has no validation image" in capsys.readouterr().out


def test_links_are_followed_once(tmp_path, capsys):
    source = as_folder(collection({"cat": 2, "dog": 1}), tmp_path / "in")
    as_folder({"x/far.jpg": picture(77)}, tmp_path / "else")
    (source / "emu").symlink_to(tmp_path / "else/x")  # outside of the source
    (source / "cat/again.jpg").symlink_to(source / "cat/0.jpg")
    (source / "cat/loop").symlink_to(source)
    (source / "dog/self.jpg").symlink_to("self.jpg")
    (source / "dog/gone.jpg").symlink_to("nowhere.jpg")
    os.link(source / "cat/1.jpg", source / "cat/hard.jpg")
    prepared(source, tmp_path / "out")
    assert read_index(tmp_path / "out").classes == ["cat", "dog", "emu"] and sizes(tmp_path / "out") == {"train": 4}
    out = capsys.readouterr().out
    assert (
        has(out, "3 links to files of the source, counted once")
        and "cat/hard.jpg" in out
        and "2 links without a file" in out
    )


def test_hidden_files_and_other_types_are_counted(tmp_path, capsys):
    hidden = [".DS_Store", "__MACOSX/cat/._0.jpg", "cat/@eaDir/0.jpg", "cat/Thumbs.db", "cat/.ipynb_checkpoints/0.jpg",
              "$RECYCLE.BIN/0.jpg"]  # fmt: skip
    others = ["cat/a.psd", "cat/b.PSD", "notes.md", "cat/README"]
    files = collection({"cat": 2, "dog": 1}) | {name: picture(5) for name in (*hidden, *others)}
    files["cat/README"] = b"text"  # without a suffix, the content decides
    for make, name in ((as_folder, "in"), (as_zip, "x.zip"), (as_tar, "x.tar")):
        prepared(make(files, tmp_path / name), tmp_path / f"out-{name}")
        assert sizes(tmp_path / f"out-{name}") == {"train": 3}, name
        assert read_index(tmp_path / f"out-{name}").classes == ["cat", "dog"]
        out = capsys.readouterr().out
        assert has(out, "4 files ignored: 2 .psd, 1 .md, 1 without")
        assert "6 hidden files or folders skipped" in out
