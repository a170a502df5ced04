"""Work on many shards in several processes, under a progress bar."""

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

Task = TypeVar("Task")
Result = TypeVar("Result")

_done = None  # images done by all processes, a shared counter; set in each worker


def count(images: int) -> None:
    """Called by a worker: so many more images are done."""
    with _done.get_lock():
        _done.value += images


def run_tasks(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, images: int) -> list[Result]:
    """`function(task)` for every task, in processes; results in the order of the tasks.

    The first error stops the rest and is raised; Ctrl-C stops the workers at once.
    """
    done = multiprocessing.Value("q", 0)
    bar = Progress("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with bar, ProcessPoolExecutor(min(workers, len(tasks)), initializer=_start, initargs=(done,)) as pool:
        shown = bar.add_task("images", total=images)
        futures = [pool.submit(function, task) for task in tasks]
        try:
            pending = set(futures)
            while pending:
                finished, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                bar.update(shown, completed=done.value)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
    return [future.result() for future in futures]


def _start(done) -> None:
    global _done
    _done = done
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
