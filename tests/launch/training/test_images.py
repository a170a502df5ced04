"""The images of a run: listed once, read by all ranks and by a resumed run."""

import os
import shutil

import pytest
import torch

from configs.errors import UserError
from configs.schema import Data, Run
from launch.training import images as module
from launch.training.images import Images
from launch.training.world import World
from tests.data.helpers import as_folder, as_zip, collection, picture

ONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Opens a split for run `r`, as one rank."""
    monkeypatch.setattr(module, "barrier", lambda: None)
    monkeypatch.setattr(module, "gather", lambda value: [value])

    def call(source, resumed=False, world=ONE, split="train"):
        return Images(Run("r", str(tmp_path)), world, resumed).open(Data(str(source)), [split])[0]

    return call


def test_a_new_run_lists_and_a_resumed_one_reads(opened, tmp_path, capsys):
    folder = as_folder(collection({"train/a": 2, "val/a": 1}), tmp_path / "in")
    first = opened(folder)
    assert "3 images" in capsys.readouterr().out
    as_folder({"train/a/new.jpg": picture(5)}, folder)
    again = opened(folder, resumed=True)
    assert "listed in" in capsys.readouterr().out
    assert len(first) == len(again) == 2 and first.digest == again.digest
    assert len(opened(folder)) == 3  # no checkpoint: a new run


def test_a_dry_run_writes_nothing(opened, tmp_path):
    assert len(opened(as_folder(collection({"a": 2}), tmp_path / "in"), world=None)) == 2
    assert not (tmp_path / "r").exists()


def test_other_ranks_read_what_the_first_has_written(opened, tmp_path):
    folder, second = as_folder(collection({"a": 2}), tmp_path / "in"), World(1, 2, torch.device("cpu"))
    with pytest.raises(UserError, match=r"collection\.npz of rank 0 is missing.*run\.folder"):
        opened(folder, world=second)
    first = opened(folder)
    as_folder({"a/new.jpg": picture(5)}, folder)
    assert opened(folder, world=second).digest == first.digest


def test_a_resumed_run_may_find_its_images_elsewhere(opened, tmp_path):
    folder = as_folder(collection({"a": 2}), tmp_path / "in")
    first = opened(folder)
    shutil.copytree(folder, tmp_path / "copy")  # keeps times
    assert opened(tmp_path / "copy", resumed=True).digest == first.digest
    os.utime(tmp_path / "in/a/1.jpg", (1, 1))
    with pytest.raises(UserError, match=r"with which the run began: a/1\.jpg has another size or time"):
        opened(folder, resumed=True)
    assert opened(tmp_path / "copy", resumed=True).digest == first.digest


def test_a_changed_archive_is_refused_on_resume(opened, tmp_path):
    source = as_zip(collection({"a": 2}), tmp_path / "in.zip")
    opened(source)
    as_zip(collection({"a": 3}), source)
    with pytest.raises(UserError, match=r"in\.zip has changed since the run began"):
        opened(source, resumed=True)


def test_a_shard_that_another_rank_misses_is_an_error_of_all(digits, tmp_path, monkeypatch):
    """The ranks of a machine share the look at the shards."""
    shards = tmp_path / "shards"
    shutil.copytree(digits, shards)
    (shards / "train-000001.tar").unlink()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank, sees in ((0, False), (1, True)):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        own = []
        monkeypatch.setattr(module, "gather", lambda value: own.append(value) or [value, "rank 1: is missing"])  # noqa: B023
        with pytest.raises(UserError, match="is missing"):
            Images(Run("r", str(tmp_path)), ONE, False).open(Data(str(shards)), ["train"])
        assert bool(own[0]) == sees


def test_a_read_only_folder(opened, tmp_path, monkeypatch):
    """Nothing is half-written when the disk is full."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data.catalog.np.savez", full)
    with pytest.raises(OSError, match="No space left") as error:
        opened(as_folder(collection({"a": 2}), tmp_path / "in"))
    assert error.value.filename.endswith("collection.npz") and not [*(tmp_path / "r").iterdir()]
