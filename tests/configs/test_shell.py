"""Commands to paste: words of any kind survive the shell, programs and scripts are found from any folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.shell import command, quote
from tests.conftest import ROOT


@pytest.mark.parametrize("word", ["plain", "my scans", "it's", 'a"b', "$HOME", "ü", "a\x1b[31m\nb'\\c", "a\udcff", ""])
def test_bash_reads_the_word_that_was_quoted(word):
    quoted = quote(word)
    assert quoted.isprintable()
    assert subprocess.run(["bash", "-c", f"printf %s {quoted}"], capture_output=True).stdout == os.fsencode(word)


def test_in_the_project_and_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.chdir(ROOT)
    assert command("launch/plan.py", Path("shards/x")) == "python launch/plan.py shards/x"
    monkeypatch.chdir(tmp_path)
    assert command("launch/plan.py") == f"python {ROOT}/launch/plan.py"


def test_without_the_environment_in_path(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", "/nowhere")
    assert command("launch/plan.py", launcher="deepspeed").split()[0] == str(Path(sys.executable).parent / "deepspeed")
