"""Every hostile input ends with exit code 0 or 2 and one line; nothing runs, nothing is written elsewhere.

`python -m tests.hostile` runs them all and prints the counts.
"""

import pytest

from tests.hostile.cases import CASES
from tests.hostile.trial import COUNTED, LIMIT, SECRET, Case, attempt

QUICK = {  # of each kind one that takes about a second
    "index.json: a trillion samples", "index.json: numbers as classes", "idx.npy: objects", "zip: members of one name",
    "zip: declares less", "tar: negative size", "zip name: up", "tar name: escape", "image: huge-header.png",
    "name: not UTF-8", "table: formula", "boxes: laughs in xml", "weights: code in a checkpoint",
    "secret: key and secret in SOURCE", "recipe: name above",
}  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.title, marks=() if c.title in QUICK else pytest.mark.slow) for c in CASES],
)
def test_nothing_runs_leaks_or_ends_in_a_traceback(case, tmp_path):
    found = attempt(case, tmp_path / "x")
    assert not found.wrong
    assert found.memory < LIMIT


def test_there_are_enough_and_the_quick_ones_exist():
    titles = [case.title for case in CASES]
    assert len(set(titles)) == len(titles) >= 150 and set(titles) >= QUICK


def _broken(base):
    """A command that does everything that is counted."""
    return [base]


def _misbehave():
    import sys
    from pathlib import Path

    base = Path(sys.argv[1])
    (base / "ran/evil").mkdir()
    (base.parent / "evil").touch()
    print(f"\x1b[2J{SECRET}")
    raise ValueError


def test_misbehaviour_is_noticed(tmp_path):
    found = attempt(Case("own", "evil", _misbehave, _broken), tmp_path / "x")
    assert set(found.wrong) == set(COUNTED)
