"""The choice of slow tests, and the fixtures that workers share."""

import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, make_once
from tests.sampling import sampled

TESTS = [f"tests/x/test_y.py::test_{i}[{j}]" for i in range(30) for j in (0, 1)]


def test_successive_commits_take_every_test_once():
    for every in (1, 3, 7):
        for start in (0, 100):
            taken = [node for number in range(start, start + every) for node in TESTS if sampled(node, number, every)]
            assert sorted(taken) == sorted(TESTS)


def test_samples_have_about_the_same_size():
    sizes = [sum(sampled(node, number, 3) for node in TESTS) for number in range(3)]
    assert sum(sizes) == len(TESTS) and min(sizes) > len(TESTS) / 6


def test_the_choice_is_the_same_in_every_process():
    """Unlike that of Python's own hash of a string."""
    assert [sampled("tests/x.py::test_a", number, 5) for number in range(5)].index(True) == 4


@pytest.fixture
def repository(tmp_path) -> Path:
    """Three commits."""
    for words in (["init", "-q"], *[["commit", "-q", "--allow-empty", "-m", "x"]] * 3):
        git(tmp_path, *words)
    return tmp_path


def git(folder: Path, *words: object) -> None:
    me = ["-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "protocol.file.allow=always"]
    subprocess.run(["git", *me, *map(str, words)], cwd=folder, check=True, capture_output=True)


def number_of(folder: Path) -> tuple[int, str]:
    done = subprocess.run(
        ["bash", ROOT / "launch/sample.sh"], cwd=folder, check=True, capture_output=True, text=True, timeout=60
    )
    return int(done.stdout), done.stderr


def test_the_number_of_a_commit_counts_the_commits_before_it(repository):
    assert number_of(repository) == (3, "")
    git(repository, "commit", "-q", "--allow-empty", "-m", "x")
    assert number_of(repository) == (4, "")


def test_a_shallow_clone_counts_hours_and_says_so(repository, tmp_path):
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{repository}", tmp_path / "shallow")
    number, warning = number_of(tmp_path / "shallow")
    assert number > 400_000 and "shallow" in warning


def test_what_is_made_once_is_made_once(tmp_path):
    made = []

    def fail(folder: Path) -> None:
        made.append("failed")
        raise OSError

    with pytest.raises(OSError):
        make_once(tmp_path / "x", fail)
    for _ in range(2):
        assert make_once(tmp_path / "x", lambda folder: made.append(folder)) == tmp_path / "x"
    assert made == ["failed", tmp_path / "x"]
