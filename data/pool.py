"""Run tasks in several processes of this machine, or on a Ray cluster, with a progress bar."""

import gc
import multiprocessing
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from configs.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

_images_done = None  # counter shared by all processes; set in each worker


@dataclass(frozen=True)
class Pool:
    """Where tasks run: in `workers` processes of this machine, or on the Ray cluster at an address."""

    workers: int
    ray: str | None = None  # HOST:PORT, or `auto` for Ray's own way to find it


def add_progress(images: int) -> None:
    """Advance the progress bar; called in a worker process."""
    with _images_done.get_lock():
        _images_done.value += images


def start_counting(done) -> None:
    """Let `add_progress` count in a shared `multiprocessing.Value`; called once in a worker process."""
    global _images_done
    _images_done = done


def run_tasks(
    function: Callable[[Task], Result], tasks: Sequence[Task], pool: Pool, images: int, folder: Path | None = None
) -> list[Result]:
    """Call `function(task)` for every task in worker processes, and return the results in the order of the tasks.

    The first error stops the other tasks and is raised; Ctrl-C stops the workers at once. `images` is the total of the
    progress bar, see `add_progress`. `folder` is where tasks write: on Ray, all nodes must share it. Raises `UserError`
    if a process is killed.
    """
    bar = Progress("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with bar:
        line = bar.add_task("images", total=images)
        if pool.ray is None:
            return _run_here(function, tasks, pool.workers, lambda done: bar.update(line, completed=done))
        from data.ray_pool import run_on_ray  # optional

        return list(run_on_ray(function, tasks, pool.ray, lambda count: bar.advance(line, count), folder))


def _run_here(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, update: Callable[[int], None]
) -> list[Result]:
    done = multiprocessing.Value("q", 0)
    with ProcessPoolExecutor(min(workers, len(tasks)), initializer=_start, initargs=(done,)) as pool:
        futures = [pool.submit(function, task) for task in tasks]
        try:
            pending = set(futures)
            while pending:
                finished, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                update(done.value)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            if isinstance(error, BrokenProcessPool):
                problem = "a worker process was killed, perhaps because memory ran out"
                way_out = f"run `python {shlex.join(sys.argv)}` again, with fewer --workers; what is complete is kept"
                raise UserError(f"{problem}: {way_out}") from None
            raise
    return [future.result() for future in futures]


def _start(done) -> None:
    gc.freeze()  # never delete here what the parent left behind: it may wait for threads, which only the parent has
    start_counting(done)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
