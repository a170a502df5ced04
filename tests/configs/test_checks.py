"""Checks of paths before anything slow."""

import os
from pathlib import Path

import pytest

from configs.checks import check_parent, check_png
from configs.errors import UserError


def test_a_file_that_can_be_written(tmp_path):
    check_parent(tmp_path / "new.csv")
    check_png(tmp_path / "new.PNG")


@pytest.mark.parametrize(
    ("name", "problem"), [("no/new.csv", "create it"), (".", "is a folder"), ("new.txt", r"end its name with \.png")]
)
def test_a_file_that_cannot(name, problem, tmp_path):
    with pytest.raises(UserError, match=problem):
        (check_png if name.endswith(".txt") else check_parent)(Path(tmp_path, name))


def test_a_folder_that_is_read_only(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: (Path(path), mode) != (tmp_path, os.W_OK))  # root writes all
    with pytest.raises(UserError, match="is not writable: choose another folder"):
        check_parent(tmp_path / "new.csv")
