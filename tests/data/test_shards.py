"""Reading shards: what an index promises is checked before use."""

import pickle

import numpy as np
import pytest

from configs.errors import UserError
from data.shards import OPEN_SHARDS, Split, read_index
from tests.data.helpers import as_folder, collection
from tests.data.test_prepare import prepared


@pytest.fixture
def shards(tmp_path):
    prepared(as_folder(collection({"a": 6}), tmp_path / "in"), tmp_path / "out", "--shard-size", "2")
    return tmp_path / "out"


def test_no_shards_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"no shards at .*/none: make them with `python data/prepare\.py"):
        read_index(tmp_path / "none")
    (tmp_path / "x.tar").touch()
    with pytest.raises(UserError, match="--index"):
        read_index(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"format": "convnext-fcmae-shards/1"}', '{"format": "other"}'])
def test_damaged_index(text, shards):
    (shards / "index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json"):
        read_index(shards)


def test_unknown_split_names_the_nearest(shards):
    with pytest.raises(UserError, match=r"no split trian \(nearest: train\)"):
        Split(shards, "trian")


def test_a_missing_shard_is_named(shards):
    (shards / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"train-000001\.tar is missing"):
        Split(shards, "train")


def test_a_shard_of_another_length_is_named(shards):
    with (shards / "train-000001.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(UserError, match=r"train-000001\.tar has \d+ bytes, its index says"):
        Split(shards, "train")


def test_an_index_that_disagrees(shards):
    file = shards / "train-000001.idx.npy"
    rows = np.load(file)
    rows["label"] = 7
    for harm in (lambda: np.save(file, rows), lambda: np.save(file, np.zeros(5)), lambda: file.write_bytes(b"\x93NUM")):
        harm()
        with pytest.raises(UserError, match="disagrees"):
            Split(shards, "train").read(2)


def test_a_shard_replaced_by_another_is_noticed(shards):
    shard = shards / "train-000000.tar"
    other = np.random.default_rng(0).bytes(shard.stat().st_size)
    shard.write_bytes(other)
    with pytest.raises(UserError, match="checksum"):
        Split(shards, "train").read(0)


def test_many_shards_few_open_files(tmp_path):
    prepared(as_folder(collection({"a": OPEN_SHARDS + 20}), tmp_path / "in"), tmp_path / "out", "--shard-size", "1")
    split = Split(tmp_path / "out", "train")
    first = [split.read(i) for i in range(len(split))]
    assert len(split._open) == OPEN_SHARDS
    assert [split.read(i) for i in range(len(split))] == first
    assert pickle.loads(pickle.dumps(split)).read(3) == first[3]
