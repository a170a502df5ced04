"""Benchmarks run in this process, which saves the seconds that a new one takes to import torch."""

from collections.abc import Callable

import pytest


@pytest.fixture
def command(monkeypatch, capsys):
    """Calls an entry point with arguments and returns what it prints."""

    def call(main: Callable[[], None], *words: object) -> str:
        monkeypatch.setattr("sys.argv", ["main.py", *map(str, words)])
        main()
        return capsys.readouterr().out

    return call
