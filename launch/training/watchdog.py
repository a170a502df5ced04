"""A thread per rank that handles signals, a dead launcher and hangs, while the main thread may wait for other ranks."""

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

# SLURM sends SIGUSR1 before the time limit. A later one has priority: at Ctrl-C, launchers send SIGTERM as well
REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
GRACE = 20.0  # seconds without progress after a request to stop; DeepSpeed's launcher kills after 30
Progress = Callable[[Iterable, int, str], Iterable]  # (steps, their number, description) -> the same steps
LAUNCHERS = {"deepspeed", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run", "agent.py"}


class Watchdog:
    """Context manager around training. The loop calls `begin` to report progress and reads `requested`.

    After `limit` seconds without progress the process writes its stacks to the run's `folder` and ends.
    """

    def __init__(self, world: World, folder: Path, limit: float):
        self.world, self.folder, self.limit = world, folder, limit
        self.requested = 0  # 1 + index in REQUESTS of the signal that asked to stop; 0 = none
        self.interrupted = math.inf  # time of the first Ctrl-C
        self.patient = False
        self.launchers = _launchers()
        self.heartbeat = Heartbeat(world)
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def begin(self, activity: str, patient: bool = False) -> None:
        """Count progress. A `patient` activity may take longer than `GRACE` after a request to stop."""
        self.heartbeat.begin(activity)
        self.patient = patient

    def __enter__(self) -> None:
        self.inbox, self.outbox = os.pipe()
        os.set_blocking(self.outbox, False)
        # Python runs signal handlers only when the main thread returns from C code; the pipe gets signals at once
        self.handlers = {number: signal.signal(number, lambda *_: None) for number in REQUESTS}
        self.wakeup = signal.set_wakeup_fd(self.outbox, warn_on_full_buffer=False)
        self.thread.start()

    def __exit__(self, kind: type | None, *_) -> None:
        self.done.set()
        self.thread.join()
        self.heartbeat.close()
        if kind in (None, Stopped):  # on all ranks alike; the first rank's store must outlive the other heartbeats
            barrier()
        signal.set_wakeup_fd(self.wakeup)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        os.close(self.inbox)
        os.close(self.outbox)

    def _watch(self) -> None:
        count, since, announced = -1, time.monotonic(), False
        while not self.done.is_set():
            before = time.monotonic()
            self._read_signals()
            if time.monotonic() - before > 10 * INTERVAL:  # this process was suspended, by Ctrl-Z or with the machine
                since = time.monotonic()
            if not self.requested and not all(map(_alive, self.launchers)):
                self.requested = 1  # no launcher would end this rank
            self.heartbeat.stopping = stopping = self.heartbeat.stopping or self.requested > 0
            if stopping and not announced and self.world.first:
                print("stopping: saving a checkpoint after this step", file=sys.stderr, flush=True)
            announced = stopping
            if self.heartbeat.count != count:
                count, since = self.heartbeat.count, time.monotonic()
            idle = time.monotonic() - since
            if idle > self.limit:
                self._end(f"no progress for {idle:.0f} s")
            if stopping and idle > GRACE and not self.patient:
                self._end(f"asked to stop, but no progress for {idle:.0f} s (resume from the last checkpoint)")

    def _read_signals(self) -> None:
        """Update `requested`; waits up to `INTERVAL` for a signal."""
        poll = select.poll()  # `select.select` fails for descriptors from 1,024 on
        poll.register(self.inbox, select.POLLIN)
        if not poll.poll(1000 * INTERVAL):
            return
        for number in os.read(self.inbox, 64):
            if number == signal.SIGINT:
                if time.monotonic() - self.interrupted > INTERVAL:
                    print("\nstopped by a second Ctrl-C: resume from the last checkpoint", file=sys.stderr, flush=True)
                    os._exit(INTERRUPTED)
                self.interrupted = min(self.interrupted, time.monotonic())
            if number in REQUESTS:
                self.requested = max(self.requested, 1 + REQUESTS.index(number))

    def _end(self, why: str) -> None:
        """Write this rank's stacks, name the ranks it waits for, and end the process."""
        stacks = self.folder / f"hang-rank{self.world.rank}.txt"
        with contextlib.suppress(OSError), stacks.open("w") as file:  # a full disk must not prevent the exit
            faulthandler.dump_traceback(file)
        where = f"during {self.heartbeat.activity}{self.heartbeat.late_ranks()}"
        print(f"error: [rank {self.world.rank}] {why} {where}; see {stacks}", file=sys.stderr, flush=True)
        if self.world.first:
            time.sleep(5 * INTERVAL)  # other ranks may still query the store
        for child in psutil.Process().children(recursive=True):  # a frozen loader process would survive
            child.kill()
        os._exit(HUNG)


def _launchers() -> list[psutil.Process]:
    """The launchers among the parents of this process. All count: a shell above them may end before they do."""
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
