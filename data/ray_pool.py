"""Run tasks on an existing Ray cluster. The only module that imports ray, an optional package.

All nodes must have this project, its packages, the current folder and the data at the same paths: a shared file system.
A task whose worker or node dies runs again elsewhere, so a task must be safe to repeat.
"""

import multiprocessing
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from configs.errors import UserError, reason

try:
    import ray
except ImportError:
    raise UserError("--ray needs a package on all nodes: pip install 'ray>=2.50'") from None

from ray._private.services import canonicalize_bootstrap_address_or_die  # how Ray finds its cluster
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from data.pool import start_counting

ROOT = Path(__file__).resolve().parents[1]
RETRIES = 3  # of a task whose worker or node has died
CONNECT_SECONDS = 5
AHEAD = 4  # tasks in flight or finished out of order, per slot of the cluster
NO_CLUSTER = (
    "start one with `ray start --head` here and `ray start --address HOST:6379` on other machines, or give its address"
)

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Place:
    """Where tasks find what the driver has."""

    cwd: str
    token: Path | None  # a file that exists if the folder to write to is shared


def run_on_ray(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    address: str,
    advance: Callable[[int], None] = lambda images: None,
    folder: Path | None = None,
    cpus: int = 1,
    gpus: int = 0,
) -> Iterator[Result]:
    """Yield `function(task)` for every task, in their order; a bounded number of results wait for earlier ones.

    Args:
        address: of the cluster, or `auto`
        advance: called with the images that a finished task has counted by `data.pool.add_progress`
        folder: where tasks write; checked to be shared
        cpus, gpus: that a task occupies
    Raises:
        UserError: of a task, which stops the others; no cluster; workers that die again and again
    """
    with _cluster(address), _shared(folder) as token:
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": RETRIES}
        submit = ray.remote(**options)(_work).remote
        call = ray.put(partial(_call, function, Place(str(Path.cwd()), token)))
        numbers, waiting, pending, position = iter(range(len(tasks))), {}, {}, 0  # finished; running
        while position < len(tasks):
            room = AHEAD * _slots(cpus, gpus) - len(pending) - len(waiting)
            for number in (number for _, number in zip(range(room), numbers, strict=False)):
                pending[submit(call, tasks[number])] = number
            for done in ray.wait(list(pending), timeout=0.5)[0]:
                waiting[pending.pop(done)], images = _result(done)
                advance(images)
            while position in waiting:
                yield waiting.pop(position)
                position += 1


def find_cluster(address: str) -> str:
    """HOST:PORT of a running cluster. Raises `UserError` if nothing answers there: Ray itself tries for minutes."""
    try:
        place = canonicalize_bootstrap_address_or_die(address)
        host, _, port = place.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise UserError(f"--ray {address}: no cluster ({reason(error).split('. ')[0]}): {NO_CLUSTER}") from None
    return place


@contextmanager
def _cluster(address: str) -> Iterator[None]:
    # the current folder is not sent to the nodes: it is shared
    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    try:
        ray.init(find_cluster(address), log_to_driver=False, logging_level="ERROR", runtime_env=environment)
    except (OSError, RuntimeError, SystemExit) as error:
        raise UserError(f"--ray {address}: cannot join the cluster ({reason(error)}): {NO_CLUSTER}") from None
    try:
        yield
    finally:
        ray.shutdown()  # kills running tasks; `ray.cancel` can abort this process if a task ends at the same time


@contextmanager
def _shared(folder: Path | None) -> Iterator[Path | None]:
    """A new file in a folder, by which workers know that they share it."""
    if folder is None:
        yield None
        return
    token = folder.absolute() / f".{secrets.token_hex(8)}.part"
    token.touch()
    try:
        yield token
    finally:
        token.unlink(missing_ok=True)


def cluster_resources(address: str) -> dict[str, float]:
    """Numbers of `CPU` and, if there are any, `GPU` of all nodes."""
    with _cluster(address):
        return ray.cluster_resources()


def _slots(cpus: int, gpus: int) -> int:
    """Tasks that can run at once. It may change: clusters grow and shrink."""
    found = ray.cluster_resources()
    slots = [int(found.get(name, 0) // each) for name, each in (("CPU", cpus), ("GPU", gpus)) if each]
    return max(1, min(slots))


def _result(done: ray.ObjectRef) -> tuple[object, int]:
    """Result of a finished task, and the images that it has counted. Raises its `UserError` or `OSError`."""
    try:
        result, images = ray.get(done)
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        memory = "it needs more memory" if isinstance(error, OutOfMemoryError) else "see `ray logs` and their memory"
        problem = (
            f"Ray workers died {RETRIES + 1} times on a task ({re.split(r'[.:] |$', reason(error), maxsplit=1)[0]})"
        )
        raise UserError(f"{problem}: {memory}, then run the same command again: what is done is kept") from None
    if isinstance(result, Exception):
        raise result
    return result, images


def _work(call: Callable[[Task], tuple[object, int]], task: Task) -> tuple[object, int]:
    return call(task)


def _call(function: Callable[[Task], Result], place: Place, task: Task) -> tuple[Result | Exception, int]:
    """In a worker: call the function in the driver's folder. Errors that the user can correct are returned."""
    try:
        if not Path(place.cwd).is_dir():
            raise UserError(f"{_here()} has no folder {place.cwd}: all nodes must share the file system")
        os.chdir(place.cwd)
        if place.token and not place.token.exists():
            raise UserError(f"{_here()} has another {place.token.parent}: all nodes must share it")
        done = multiprocessing.Value("q", 0)
        start_counting(done)
        return function(task), done.value
    except (UserError, OSError) as error:
        return error, 0


def _here() -> str:
    return f"Ray's node {socket.gethostname()}"
