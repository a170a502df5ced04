"""Tasks in processes of this machine."""

import gc
import os
from pathlib import Path

from data.pool import Pool, run_tasks


class Leftover:
    """Part of a cycle, so that only the garbage collector deletes it; writes a file in the process that does."""

    def __init__(self, folder: Path):
        self.folder, self.itself = folder, self

    def __del__(self):
        (self.folder / str(os.getpid())).touch()


def collect(task: int) -> int:
    gc.collect()
    return task


def test_workers_delete_nothing_of_the_parent(tmp_path):
    """An ONNX session, deleted in a forked process, would wait for threads that are not there."""
    gc.collect()
    gc.disable()
    try:
        Leftover(tmp_path)
        assert run_tasks(collect, [1, 2, 3], Pool(2), 3) == [1, 2, 3]
        assert not list(tmp_path.iterdir())
    finally:
        gc.enable()
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]
