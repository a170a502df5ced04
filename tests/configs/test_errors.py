"""What commands show of errors and of libraries' warnings."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

NOISY = """
import logging, warnings
from configs.errors import run_main
def main():
    warnings.warn("of a library")
    warnings.warn("of another", DeprecationWarning)
    logging.getLogger("library").warning("in its log")
    print("done")
run_main(main)
"""


@pytest.mark.parametrize(("options", "shown"), [([], False), (["-W", "default"], True)])
def test_warnings_of_libraries_are_not_shown_unless_asked_for(options, shown):
    done = subprocess.run(
        [sys.executable, *options, "-c", NOISY], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "done\n"
    assert ("of a library" in done.stderr, "in its log" in done.stderr) == (shown, shown)
    assert shown or not done.stderr
