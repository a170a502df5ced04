"""What the pages point to is there."""

import re

import pytest

from tests.conftest import ROOT

ANSWERS = ("yes", "partly", "no", "not checked")


def named_tests(text: str) -> list[str]:
    """The tests that a text names in `code`; a file or function that is not there is an `AssertionError`."""
    found = re.findall(r"`((?:tests/)?([\w/]+\.py)(?:::(\w+))?)`", text)
    for name, file, function in found:
        path = ROOT / "tests" / file
        assert path.exists(), name
        assert not function or f"def {function}(" in path.read_text(), name
    return [name for name, *_ in found]


def check_features(text: str) -> int:
    """Number of rows in the tables of docs/features.md; `AssertionError` if one of ours does not name its tests."""
    tests = dict(re.findall(r"^\[\^([\w-]+)\]: (.*)$", text, re.MULTILINE))
    for key, line in tests.items():
        named = named_tests(line)
        assert line == ", ".join(f"`{test}`" for test in named), f"{key}: {line}"
        assert all("::" in test for test in named), f"{key}: {line}"
    used, rows = set(), 0
    for table in text.split("| | this project |")[1:]:
        others, _, *lines = table.split("\n\n")[0].splitlines()
        for line in lines:
            feature, ours, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            assert len(cells) == others.count("|") and all(cell.startswith(ANSWERS) for cell in (ours, *cells)), line
            keys = set(re.findall(r"\[\^([\w-]+)\]", ours))
            assert bool(keys) == ours.startswith(("yes", "partly")) and keys <= tests.keys(), f"{feature}: {ours}"
            used, rows = used | keys, rows + 1
    assert used == tests.keys(), tests.keys() - used
    return rows


def test_every_test_that_the_reliability_page_names_exists():
    assert len(named_tests((ROOT / "docs/reliability.md").read_text())) > 20


def test_every_feature_of_ours_names_tests_that_exist():
    assert check_features((ROOT / "docs/features.md").read_text()) > 80


HEAD = "| | this project | other |\n| --- | --- | --- |\n"
THIS = "`tests/test_docs.py::test_the_check_of_features_can_fail`"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("| x | yes | no |", "x: yes"),
        ("| x | yes[^a] | no |", "x: yes"),
        (f"| x | no[^a] | no |\n\n[^a]: {THIS}", "x: no"),
        ("| x | yes[^a] | no |\n\n[^a]: `tests/test_docs.py::test_that_nobody_wrote`", "test_that_nobody_wrote"),
        ("| x | yes[^a] | no |\n\n[^a]: `tests/test_nothing.py::test_x`", "test_nothing"),
        ("| x | yes[^a] | no |\n\n[^a]: `tests/test_docs.py`", "a: "),
        ("| x | yes[^a] | no |\n\n[^a]: believe me", "a: believe me"),
        (f"| x | no | no |\n\n[^a]: {THIS}", "a"),
        ("| x | no | maybe |", "maybe"),
        ("| x | no |", "x"),
    ],
)
def test_the_check_of_features_can_fail(text, wrong):
    assert check_features(f"{HEAD}| x | yes[^a] | no: it is not |\n\n[^a]: {THIS}\n") == 1
    with pytest.raises(AssertionError, match=wrong):
        check_features(HEAD + text + "\n")


def test_every_collection_on_the_data_page_names_a_test_that_exists():
    table = (ROOT / "docs/data.md").read_text().split("| collection | what prepare does | test |\n")[1].split("\n\n")[0]
    rows = table.splitlines()[1:]
    assert len(rows) > 40 and all(len(named_tests(row.rsplit("|", 2)[1])) == 1 for row in rows)
    assert all("::" in row for row in rows)
