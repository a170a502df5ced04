"""index.json and .idx.npy: nothing in them is believed before it is checked."""

import json
from dataclasses import replace

import numpy as np
import pytest

from configs.errors import UserError
from configs.files import sha256
from data.index import verify
from data.pool import Pool
from data.shard_index import index_file, read_index, read_index_rows, write_index
from data.shards import Split
from tests.data.helpers import as_folder, collection
from tests.data.test_prepare import prepared


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    prepared(as_folder(collection({"a": 3, "b": 3}), folder / "in"), folder / "out")
    return folder / "out"


@pytest.fixture
def content(made):
    """The content of index.json, which is restored."""
    before = (made / "index.json").read_bytes()
    yield json.loads(before)
    (made / "index.json").write_bytes(before)


@pytest.mark.parametrize(
    ("keys", "value", "named"),
    [
        (("splits", "train", 0, "samples"), 10**12, "no room for 1,000,000,000,000 samples"),
        (("splits", "train", 0, "samples"), True, r"splits\.train\.0\.samples"),
        (("splits", "train", 0, "bytes"), 10**30, r"splits\.train\.0\.bytes"),
        (("splits", "train"), {}, r"splits\.train"),
        (("splits", "train"), [], r"splits\.train"),
        (("splits",), {}, "splits"),
        (("classes",), [1, 2, 3], r"classes\.0"),
        (("classes",), [], "classes"),
        (("targets",), {"kind": "boxes", "names": ["a"], "ids": [1, 2]}, r"targets\.ids"),
        (("targets",), {"kind": "mask", "names": ["a"]}, r"targets\.ignore"),
        (("survey", "preview"), "x", r"survey\.preview"),
    ],
)
def test_a_wrong_value_is_named(keys, value, named, made, content):
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (made / "index.json").write_text(json.dumps(content))
    for use in (read_index, lambda folder: verify(folder, Pool(1)), lambda folder: Split(folder, "train")):
        with pytest.raises(UserError, match=rf"index\.json is damaged: .*{named}"):
            use(made)


def test_names_that_are_not_utf8_are_kept(made, content):
    (made / "index.json").write_text(json.dumps(content | {"classes": ["caf\udce9", "b"]}))
    assert read_index(made).classes == ["caf\udce9", "b"]


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("offset", 1 << 60, "beyond"),
        ("size", 1 << 31, "beyond"),
        ("label", -2, "below -1"),
        ("label", 2, "2 classes"),
    ],
)
def test_rows_that_index_json_vouches_for(column, value, problem, made, content, capsys):
    """Its digest is right, so only the values tell."""
    index, file = read_index(made), index_file(made / "train-000000.tar")
    before = file.read_bytes()
    try:
        rows = np.load(file)
        rows[column][1] = value
        np.save(file, rows)
        shard = replace(index.splits["train"][0], index_sha256=sha256(file))
        write_index(made, replace(index, splits={"train": [shard]}))
        with pytest.raises(UserError, match=problem):
            Split(made, "train").labels()
        with pytest.raises(UserError, match="1 of 1 shards are damaged"):
            verify(made, Pool(1))
        assert problem in capsys.readouterr().out
    finally:
        file.write_bytes(before)


def test_a_header_allocates_nothing(made):
    shard, data = read_index(made).splits["train"][0], index_file(made / "train-000000.tar").read_bytes()
    huge = data.replace(b"'shape': (6,)", b"'shape': (9" + b"9" * 12 + b",)", 1)
    for wrong in (huge[: len(data)], data[:-1], data + b"\0", b"", data[:40], data.replace(b"label", b"lebal")):
        with pytest.raises(ValueError):
            read_index_rows(wrong, shard)
