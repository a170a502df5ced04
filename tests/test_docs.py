"""What the pages point to is there."""

import re

from tests.conftest import ROOT


def test_every_test_that_the_reliability_page_names_exists():
    named = re.findall(r"`((?:launch|data|models)/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs/reliability.md").read_text())
    assert len(named) > 20
    for file, test in named:
        path = ROOT / "tests" / file
        assert path.exists(), file
        assert not test or f"def {test}(" in path.read_text(), f"{file}::{test}"
