"""Reading shards: an index is checked before use."""

import json
import pickle
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest

from configs.errors import UserError
from configs.files import sha256
from data.decode import decode
from data.index import index_folder, verify
from data.pool import Pool
from data.repair import repair
from data.shard_index import Index, index_file, read_index, write_index
from data.shards import MAX_OPEN_SHARDS, Split
from data.tars import ROW
from data.writing import write_tar
from tests.data.helpers import as_folder, collection, open_files, picture
from tests.data.test_prepare import HARMS, harm, prepared


@pytest.fixture
def shards(tmp_path):
    prepared(as_folder(collection({"a": 6}), tmp_path / "in"), tmp_path / "out", "--shard-size", "2")
    return tmp_path / "out"


def test_no_shards_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"/none: .*python data/prepare\.py SOURCE"):
        read_index(tmp_path / "none")
    (tmp_path / "x.tar").touch()
    with pytest.raises(UserError, match="--index"):
        read_index(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"format": "convnext-fcmae-shards/1"}', '{"format": "other"}'])
def test_damaged_index(text, shards):
    (shards / "index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json"):
        read_index(shards)


@pytest.mark.parametrize(
    ("key", "value", "pattern"),
    [
        ("file", "../train-000001.tar", "only files beside it"),
        ("file", "/etc/passwd", "only files beside it"),
        ("file", "a\\b.tar", "only files beside it"),
        ("file", ".hidden.tar", "only files beside it"),
        ("file", "", "only files beside it"),
        ("sha256", "../../x", "has no SHA-256"),
        ("index_sha256", "A" * 64, "has no SHA-256"),
        ("samples", -1, "is damaged"),
        ("bytes", "12", "is damaged"),
        ("file", 5, "is damaged"),
    ],
)
def test_an_index_that_points_elsewhere(key, value, pattern, shards):
    content = json.loads((shards / "index.json").read_text())
    content["splits"]["train"][1][key] = value
    (shards / "index.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"index\.json.* {pattern}"):
        read_index(shards)


def test_unknown_split_names_the_nearest(shards):
    with pytest.raises(UserError, match=r"no split trian \(nearest: train\)"):
        Split(shards, "trian")


def test_the_error_names_a_missing_shard(shards):
    (shards / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"train-000001\.tar is missing"):
        Split(shards, "train")


def test_the_error_names_a_shard_of_another_length(shards):
    with (shards / "train-000001.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(UserError, match=r"train-000001\.tar has \d+ bytes"):
        Split(shards, "train")


def test_an_index_that_disagrees(shards):
    file = shards / "train-000001.idx.npy"
    rows = np.load(file)
    rows["label"] = 7
    for do in (lambda: np.save(file, rows), lambda: np.save(file, np.zeros(5)), lambda: file.write_bytes(b"\x93NUM")):
        do()
        with pytest.raises(UserError, match="disagrees"):
            Split(shards, "train").read(2)


def test_a_shard_replaced_by_another_is_noticed(shards):
    shard = shards / "train-000000.tar"
    other = np.random.default_rng(0).bytes(shard.stat().st_size)
    shard.write_bytes(other)
    with pytest.raises(UserError, match="checksum"):
        Split(shards, "train").read(0)


@pytest.mark.parametrize("how", HARMS)
def test_damage_is_found_before_use(how, tmp_path):
    """Truncation when the split is opened; zeros, which keep the length, when a damaged image is read."""
    prepared(as_folder(collection({"a": 8}), tmp_path / "in"), tmp_path / "out", "--shard-size", "4")
    before = [Split(tmp_path / "out", "train").read(i) for i in range(8)]
    harm(tmp_path / "out/train-000001.tar", how)
    if how.startswith("cut"):
        with pytest.raises(UserError, match=r"train-000001\.tar has \d+ bytes"):
            Split(tmp_path / "out", "train")
        return
    split = Split(tmp_path / "out", "train")
    for i in range(8):
        if how == "zeroed to the end" and i > 5:
            with pytest.raises(UserError, match=r"train-000001\.tar is damaged at byte \d+ .checksum."):
                split.read(i)
        else:
            assert split.read(i) == before[i]


def test_five_flipped_bytes_are_noticed(shards):
    """The checksum is needed: such an image often decodes, to other pixels."""
    shard, rng, decoded = shards / "train-000000.tar", np.random.default_rng(0), 0
    whole, row = shard.read_bytes(), np.load(shards / "train-000000.idx.npy")[1]
    for _ in range(20):
        data = bytearray(whole)
        for place in rng.choice(int(row["size"]), 5, replace=False):
            data[int(row["offset"]) + int(place)] ^= int(rng.integers(1, 256))
        shard.write_bytes(data)
        split = Split(shards, "train")
        with pytest.raises(UserError, match="checksum"):
            split.read(1)
        assert split.read(0)[0] in whole
        with suppress(UserError):
            decode(bytes(data[int(row["offset"]) :][: int(row["size"])]))
            decoded += 1
    assert decoded > 0


def test_many_shards_few_open_files(tmp_path):
    prepared(as_folder(collection({"a": MAX_OPEN_SHARDS + 20}), tmp_path / "in"), tmp_path / "out", "--shard-size", "1")
    split = Split(tmp_path / "out", "train")
    first = [split.read(i) for i in range(len(split))]
    assert open_files(tmp_path / "out") == MAX_OPEN_SHARDS
    assert [split.read(i) for i in range(len(split))] == first
    assert pickle.loads(pickle.dumps(split)).read(3) == first[3]


def with_targets(folder):
    """A shard of three samples: a mask and numbers, labels, no target."""
    mask, about = picture(9, mode="L", kind="png"), json.dumps({"name": "a", "numbers": [1.5]}).encode()
    folder.mkdir()
    samples = [
        {"__key__": "a", "jpg": picture(0), "mask.png": mask, "json": about},
        {"__key__": "b", "png": picture(1, kind="png"), "json": b'{"labels": []}'},
        {"__key__": "c", "webp": picture(2, kind="webp"), "json": b'{"name": "c"}', "cls": b"2"},
    ]
    write_tar(folder / "train-0.tar", iter(samples))
    index_folder(folder, Pool(1))
    return [mask, b'{"labels": []}', b""]


def test_targets(tmp_path):
    """A mask goes before json; json without a target is none."""
    expected = with_targets(tmp_path / "x")
    split = Split(tmp_path / "x", "train")
    assert [split.read_target(i) for i in range(3)] == expected
    assert [decode(split.read(i)[0]).shape for i in range(3)] == [(3, 16, 20)] * 3
    assert split.labels().tolist() == [-1, -1, 2]
    verify(tmp_path / "x", Pool(1))


def test_a_sample_with_a_damaged_target_is_damaged(tmp_path, capsys):
    expected = with_targets(tmp_path / "x")
    tar = tmp_path / "x/train-0.tar"
    place = np.load(index_file(tar))["target_offset"][0]
    with tar.open("r+b") as file:
        file.seek(int(place) + 20)
        file.write(b"damaged")
    with pytest.raises(UserError, match="checksum"):
        Split(tmp_path / "x", "train").read_target(0)
    repair(tmp_path / "x", Pool(1))
    assert "image 0, key 'a'" in (tmp_path / "x/lost.txt").read_text()
    split = Split(tmp_path / "x", "train")
    assert [split.read_target(i) for i in range(2)] == expected[1:]


def test_an_index_without_targets_is_still_read(tmp_path):
    """Of an older version: the same rows without the target's columns."""
    with_targets(tmp_path / "x")
    index, file = read_index(tmp_path / "x"), tmp_path / "x/train-0.idx.npy"
    np.save(file, np.load(file)[list(ROW.names)].astype(ROW))
    shard = replace(index.splits["train"][0], index_sha256=sha256(file))
    write_index(tmp_path / "x", Index({"train": [shard]}, None))
    split = Split(tmp_path / "x", "train")
    assert split.read_target(0) == b"" and decode(split.read(0)[0]).shape == (3, 16, 20)
    verify(tmp_path / "x", Pool(1))
