"""How tests are distributed over processes."""

import sys

import pytest

from tests.conftest import ROOT, run

SHARED = """
import os, pytest

@pytest.fixture(scope="module")
def made():
    open(f"{__file__}.{os.getpid()}", "w").close()

@pytest.mark.parametrize("i", range(8))
def test_it(i, made):
    pass
"""


@pytest.mark.slow
def test_tests_of_a_file_that_share_fixtures_run_in_one_process(tmp_path):
    """The fixtures take up to a minute. pytest 9.2 hides such groups from pytest-xdist 3.8."""
    (tmp_path / "test_shared.py").write_text(SHARED)
    words = ("-n", "2", "--dist", "loadgroup", "-p", "tests.conftest", "--rootdir", ROOT)
    run(sys.executable, "-m", "pytest", *words, tmp_path / "test_shared.py")
    assert len(list(tmp_path.glob("test_shared.py.*"))) == 1
