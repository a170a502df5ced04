"""A table of files as the source of images."""

import json

import pytest

from configs.errors import UserError
from configs.schema import Data
from data.folder import Folder, list_collection, open_splits
from data.shards import Split
from tests.data.helpers import as_folder, collection
from tests.data.test_prepare import prepared

IMAGES = collection({"a": 2, "b": 2})
ROWS = [{"path": name, "label": f"class {name[0]}"} for name in IMAGES]


def as_csv(rows, path, separator=","):
    lines = [separator.join(rows[0]), *(separator.join(row.values()) for row in rows)]
    path.write_text("\n".join(lines))


def write(kind, rows, path):
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        as_csv(rows, path, "\t" if kind == "tsv" else ",")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_training_and_prepare_read_the_files_of_a_table(kind, tmp_path, monkeypatch, capsys):
    as_folder(IMAGES | {"not-listed.jpg": b"x"}, tmp_path / "in")
    table = tmp_path / f"in/t.{kind}"
    write(kind, [*ROWS, {"path": "gone.jpg", "label": "a"}], table)
    monkeypatch.chdir("/")  # paths are relative to the table
    images = Folder(list_collection(str(table)), "train")
    assert has_all(capsys.readouterr().out, "4 images", "1 row without an image, such as gone.jpg")
    prepared(table, tmp_path / "out")
    shards = Split(tmp_path / "out", "train")
    assert images.classes == shards.classes == ["class a", "class b"]
    assert sorted(images.read(i) for i in range(4)) == sorted(shards.read(i) for i in range(4))
    assert [images.read(i)[0] for i in range(4)] == [IMAGES[row["path"]] for row in ROWS]


def has_all(text, *parts):
    return all(part in text for part in parts)


def test_absolute_paths_splits_and_files_outside_of_the_folder(tmp_path):
    as_folder(IMAGES, tmp_path / "in")
    (tmp_path / "tables").mkdir()
    rows = [
        {"file": str(tmp_path / "in/a/0.jpg"), "class": "x", "split": "train"},
        {"file": "../in/b/0.jpg", "class": "y", "split": "train"},
        {"file": "../in/b/1.jpg", "class": "y", "split": "val"},
    ]
    as_csv(rows, tmp_path / "tables/t.csv")
    train, val = open_splits(Data(str(tmp_path / "tables/t.csv")), ["train", "val"])
    assert train.classes == ["x", "y"] and val.read(0) == (IMAGES["b/1.jpg"], 1)
    assert sorted(train.read(i) for i in range(2)) == sorted([(IMAGES["a/0.jpg"], 0), (IMAGES["b/0.jpg"], 1)])


def test_without_labels(tmp_path, capsys):
    as_folder(IMAGES, tmp_path)
    as_csv([{"path": name} for name in IMAGES], tmp_path / "t.csv")
    images = Folder(list_collection(str(tmp_path / "t.csv")), "train")
    assert images.classes is None and len(images) == 4
    assert "t.csv has no column of labels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "pattern"),
    [
        ([{"path": "x/1.jpg", "label": "a"}], r"no file that it names exists, such as .*/x/1\.jpg"),
        ([{"colour": "red", "label": "a"}], r"--path-column.*colour"),
        ([{"path": "a/0.jpg", "label": "a", "class": "b"}], r"label, class may all be the label"),
        ([{"path": "a/0.jpg", "label": "a", "split": "moon"}], r"moon: write train, val or test"),
    ],
)
def test_tables_that_are_refused(rows, pattern, tmp_path):
    as_folder(IMAGES, tmp_path)
    as_csv(rows, tmp_path / "t.csv")
    with pytest.raises(UserError, match=pattern):
        list_collection(str(tmp_path / "t.csv"))


def test_a_row_names_its_own_file_not_one_with_the_same_tail(tmp_path):
    images = collection({"x": 1, "deep/x": 1})
    as_folder(images, tmp_path)
    as_csv([{"path": "x/0.jpg", "label": "one"}, {"path": "deep/x/0.jpg", "label": "two"}], tmp_path / "t.csv")
    found = Folder(list_collection(str(tmp_path / "t.csv")), "train")
    assert {found.item(i).name: found.classes[found.read(i)[1]] for i in range(2)} == {
        "x/0.jpg": "one", "deep/x/0.jpg": "two",
    }  # fmt: skip
