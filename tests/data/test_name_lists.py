"""Lists of image names: escaping, files, and `--only` and `--without` of data/prepare.py."""

import csv
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from data.name_lists import NameList, csv_cell, escape_name, read_names, select, write_list
from data.sources import Item
from tests.conftest import has
from tests.data.helpers import as_folder, collection, picture
from tests.data.test_prepare import content, prepared

ODD = ["=1+1.jpg", "\uff1d1.jpg", "\t=1.jpg", "+a.jpg", "-b.jpg", "@c.jpg",
       "'d.jpg", "'=e.jpg", "a,b.jpg", 'q"r.jpg', "li\nne.jpg",
       "\x1b[31m.jpg", "bytes\udce9.jpg", "back\\slash.jpg", "\u202egpj.exe.jpg", "é.jpg", "\x85.jpg"]  # fmt: skip


def listed(path, names):
    write_list(path, ["name", "score"], [(escape_name(name), -0.5) for name in names])
    return path


def test_escaped_names_are_printable():
    assert escape_name("é\x1b\udce9\\\u202e\x85") == "é\\u001b\\xe9\\\\\\u202e\\u0085"
    assert all(escape_name(name).isprintable() for name in ODD)


@given(st.text(st.characters(codec=None)), st.text(st.characters(codec=None)))
def test_different_names_stay_different(a, b):
    assert (escape_name(a) == escape_name(b)) == (a == b)
    escape_name(a).encode()  # never a surrogate


def test_files_round_trip(tmp_path):
    assert read_names(listed(tmp_path / "x.csv", ODD)) == {escape_name(name) for name in ODD}


def test_no_cell_is_a_formula(tmp_path):
    with listed(tmp_path / "x.csv", ODD).open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["name", "score"] and len(rows) == 1 + len(ODD)
    assert not [row for row in rows if row[0][:1] in ("=", "+", "-", "@", "\uff1d", "\t", "\r")]
    assert {row[1] for row in rows[1:]} == {"-0.5"}  # a number is not a formula


@pytest.mark.parametrize(
    ("value", "cell"),
    [("-5", "-5"), ("+1.5e3", "+1.5e3"), ("-5+1", "'-5+1"), ("-", "'-"), (-5, -5), ("'", "''"), ("a=1", "a=1")],
)
def test_numbers_stay_numbers(value, cell):
    assert csv_cell(value) == cell


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a, b.jpg\r\nc.jpg\n\n", {"a, b.jpg", "c.jpg"}),
        ("\ufeffscore,name\n1,a.jpg\n2,\n3\n", {"a.jpg"}),
        ('name\n"a\nb"\n', {"a\nb"}),
        ("", set()),
    ],
)
def test_files_of_others(text, names, tmp_path):
    (tmp_path / "x.txt").write_bytes(text.encode())
    assert read_names(tmp_path / "x.txt") == names


@pytest.fixture
def photos(tmp_path):
    return as_folder(collection({"cat": 3, "dog": 2}), tmp_path / "photos")


def test_only(photos, tmp_path, capsys):
    names = listed(tmp_path / "only.csv", ["cat/0.jpg", "cat/2.jpg", "cow/0.jpg"])
    prepared(photos, tmp_path / "out", "--only", names)
    assert set(content(tmp_path / "out")) == {(photos / f"cat/{i}.jpg").read_bytes() for i in (0, 2)}
    text = capsys.readouterr().out
    assert has(text, "2 used") and has(text, "1 names match no image: cow/0.jpg") and has(text, "1 classes: dog")


def test_without(photos, tmp_path):
    (tmp_path / "a.txt").write_text("cat/0.jpg\n")
    names = listed(tmp_path / "b.csv", ["cat/1.jpg", "dog/0.jpg"]), listed(tmp_path / "none.csv", [])
    prepared(photos, tmp_path / "out", "--without", tmp_path / "a.txt", *names)
    assert set(content(tmp_path / "out")) == {(photos / name).read_bytes() for name in ("cat/2.jpg", "dog/1.jpg")}


def test_another_list_is_another_data_set(photos, tmp_path, capsys):
    for number, name in enumerate(["cat/0.jpg", "cat/0.jpg", "cat/1.jpg"]):
        (tmp_path / "only.txt").write_text(name)
        if number < 2:
            prepared(photos, tmp_path / "out", "--only", tmp_path / "only.txt")
    assert "complete already" in capsys.readouterr().out
    with pytest.raises(UserError, match="another data set"):
        prepared(photos, tmp_path / "out", "--only", tmp_path / "only.txt")


@pytest.mark.parametrize("escaped", [True, False])
def test_names_of_any_bytes(escaped, tmp_path, capsys):
    photos = as_folder({name: picture(i) for i, name in enumerate(ODD)}, tmp_path / "photos")
    odd = [name for name in ODD if escaped or "\n" not in name]
    if escaped:
        listed(tmp_path / "x", odd)
    else:
        (tmp_path / "x").write_bytes(b"\n".join(map(os.fsencode, odd)))
    prepared(photos, tmp_path / "out", "--only", tmp_path / "x")
    assert len(content(tmp_path / "out")) == len(odd)
    assert "match no image" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out", "--only", "none.txt"], "none.txt no image cat/0.jpg"),
        (["out", "--without", "none.txt"], "none.txt no image"),
        (["out", "--only", "empty.txt"], "empty.txt no image"),
        (["out", "--without", "all.txt"], "leave no image"),
        (["--index", "--only", "all.txt"], "--only OUT"),
    ],
)
def test_bad_lists(words, message, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file, text in {
        "none.txt": "x.jpg",
        "empty.txt": "",
        "all.txt": "\n".join(collection({"cat": 3, "dog": 2})),
    }.items():
        (tmp_path / file).write_text(text)
    with pytest.raises(UserError) as error:
        prepared("photos", *words)
    assert has(error.value, message)
    assert not (tmp_path / "out").exists()


def test_a_missing_list_is_reported(photos, tmp_path):
    with pytest.raises(FileNotFoundError):  # `run_main` names the file
        prepared(photos, tmp_path / "out", "--only", tmp_path / "nowhere.csv")


def test_what_is_escaped_in_messages(capsys):
    items = [Item("a\x1b.jpg", ""), Item("b.jpg", "")]
    select(items, [NameList("x", frozenset({"b.jpg", "c\x1b"}), True)], "photos")
    assert "\x1b" not in capsys.readouterr().out
