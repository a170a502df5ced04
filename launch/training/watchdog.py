"""Watches a rank from a thread of its own: signals, a launcher that died, a run that hangs.

The training loop tells where it is (`at`) and asks whether it should stop (`requested`). The thread does what the loop
cannot while it waits for another rank: it sees signals at once, and ends a process that will never go on.
"""

import contextlib
import faulthandler
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from configs.errors import HUNG, INTERRUPTED, Stopped
from launch.training.heartbeat import INTERVAL, Heartbeat
from launch.training.world import World, barrier

# SLURM announces the end of a job's time with SIGUSR1. The last one wins: at Ctrl-C a launcher sends SIGTERM as well
REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
GRACE = 20.0  # seconds without progress after a request to stop; DeepSpeed's launcher kills after 30
# (steps, their count, what they do) -> the same steps, while a watchdog counts them or a bar shows them
Watch = Callable[[Iterable, int, str], Iterable]
LAUNCHERS = {"deepspeed", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run"}


class Watchdog:
    """A context around training.

    Args:
        folder: the run's; stacks of a hanging rank are written there
        limit: seconds without progress after which the process ends
    """

    def __init__(self, world: World, folder: Path, limit: float):
        self.world, self.folder, self.limit = world, folder, limit
        self.requested = 0  # place in REQUESTS, counted from 1, of the signal that asked for a stop
        self.interrupted = math.inf  # when Ctrl-C came first
        self.patient = False
        self.launchers = _launchers()
        self.heartbeat = Heartbeat(world)
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, place: str, patient: bool = False) -> None:
        """Another part of the work begins; a `patient` one may end after a request to stop, however long it takes."""
        self.heartbeat.at(place)
        self.patient = patient

    def __enter__(self) -> "Watchdog":
        self.inbox, self.outbox = os.pipe()
        os.set_blocking(self.outbox, False)
        # Python's own handlers wait until the main thread returns from what it calls; the pipe gets signals at once
        self.before = {number: signal.signal(number, lambda *_: None) for number in REQUESTS}
        self.wakeup = signal.set_wakeup_fd(self.outbox, warn_on_full_buffer=False)
        self.thread.start()
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        self.done.set()
        self.thread.join()
        self.heartbeat.close()
        if kind in (None, Stopped):  # on all ranks alike: then the first keeps the store until all have left it
            barrier()
        signal.set_wakeup_fd(self.wakeup)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        os.close(self.inbox)
        os.close(self.outbox)

    def _watch(self) -> None:
        seen, since, told = -1, time.monotonic(), False
        while not self.done.is_set():
            before = time.monotonic()
            self._read_signals()
            if time.monotonic() - before > 10 * INTERVAL:  # this process was suspended: by Ctrl-Z, a machine asleep
                since = time.monotonic()
            if not self.requested and any(not _alive(launcher) for launcher in self.launchers):
                self.requested = 1  # nobody would end this rank
            self.heartbeat.stopping = stopping = self.heartbeat.stopping or self.requested > 0
            if stopping and not told:
                told = True
                if self.world.first:
                    print("stopping: saving a checkpoint after this step", file=sys.stderr, flush=True)
            if self.heartbeat.count != seen:
                seen, since = self.heartbeat.count, time.monotonic()
            idle = time.monotonic() - since
            if idle > self.limit:
                self._end(f"no progress for {idle:.0f} s")
            if stopping and idle > GRACE and not self.patient:
                self._end(f"asked to stop, but no progress for {idle:.0f} s (the last checkpoint stands)")

    def _read_signals(self) -> None:
        """Take up requests; waits for `INTERVAL` if there are none."""
        if not select.select([self.inbox], [], [], INTERVAL)[0]:
            return
        for number in os.read(self.inbox, 64):
            if number == signal.SIGINT:
                if time.monotonic() - self.interrupted > INTERVAL:
                    print("\nstopped by a second Ctrl-C: the last checkpoint stands", file=sys.stderr, flush=True)
                    os._exit(INTERRUPTED)
                self.interrupted = min(self.interrupted, time.monotonic())
            if number in REQUESTS:
                self.requested = max(self.requested, 1 + REQUESTS.index(number))

    def _end(self, why: str) -> None:
        """Say which rank is waited for, write where this one is, and end the process."""
        stacks = self.folder / f"hang-rank{self.world.rank}.txt"
        with contextlib.suppress(OSError), stacks.open("w") as file:  # a full disk must not keep a dead run alive
            faulthandler.dump_traceback(file)
        behind = self.heartbeat.behind()
        line = f"error: [rank {self.world.rank}] {why}, in {self.heartbeat.place}{behind}; stacks are in {stacks}"
        print(line, file=sys.stderr, flush=True)
        if self.world.first:
            time.sleep(5 * INTERVAL)  # until the others have asked, too
        for child in psutil.Process().children(recursive=True):  # a frozen loader process would stay
            child.kill()
        os._exit(HUNG)


def _launchers() -> list[psutil.Process]:
    """The launchers above this process, nearest first. A shell above them may end and leave them at work."""
    found = []
    for process in psutil.Process().parents():
        try:
            words = {Path(word).name for word in process.cmdline()[:5]}
        except psutil.Error:
            break
        if not words & LAUNCHERS and not process.name().startswith("slurmstepd"):
            break
        found.append(process)
    return found


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
