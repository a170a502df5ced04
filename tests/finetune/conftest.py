"""Digits with targets of several kinds, made once."""

import pytest

from tests.conftest import make_once
from tests.finetune.tasks.helpers import pictures, shards


@pytest.fixture(scope="session")
def source(shared):
    return make_once(shared / "tagged", pictures)


@pytest.fixture(scope="session")
def tagged(source, shared):
    """Shards with several labels."""
    return make_once(shared / "tagged-shards", lambda folder: shards(source, folder, "tags"))


@pytest.fixture(scope="session")
def measured(source, shared):
    """Shards with two numbers."""
    return make_once(shared / "measured-shards", lambda folder: shards(source, folder, "value", "ink"))


@pytest.fixture(scope="session")
def graded(source, shared):
    """Shards with a grade, which is a class too."""
    return make_once(shared / "graded-shards", lambda folder: shards(source, folder, "grade"))
