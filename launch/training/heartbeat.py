"""Progress of all ranks, shared through a TCP store of the first rank, apart from the training's collectives."""

import os
import threading
import time
from contextlib import suppress
from datetime import timedelta

from torch.distributed import TCPStore

from launch.training.world import World, broadcast

INTERVAL = 1.0  # seconds between two reports to the store
TIMEOUT = 10.0  # seconds the store may take to answer
NO_STORE = "; rank 0 does not answer"


class Heartbeat:
    """Reports this rank's progress and spreads requests to stop. A thread does it: a frozen first rank would block."""

    def __init__(self, world: World):
        self.world = world
        self.count, self.activity = 0, "start-up"  # activities begun so far, and the present one
        self.stopping = False  # whether any rank was asked to stop; may be set here
        self.done = threading.Event()
        if world.ranks > 1:
            self.store = _shared_store(world)
            self.thread = threading.Thread(target=self._exchange, name="heartbeat", daemon=True)
            self.thread.start()

    def begin(self, activity: str) -> None:
        """Count progress; all ranks call this in the same order."""
        self.count, self.activity = self.count + 1, activity

    def close(self) -> None:
        self.done.set()
        if self.world.ranks > 1:
            self.thread.join(TIMEOUT)

    def _exchange(self) -> None:
        with suppress(RuntimeError):  # the first rank is gone; the launcher or a collective reports that
            while not self.done.wait(INTERVAL):
                self.store.set(f"rank {self.world.rank}", f"{self.count} {time.monotonic()} {self.activity}")
                if self.stopping:
                    self.store.set("stop", "1")
                self.stopping = self.stopping or self.store.check(["stop"])

    def late_ranks(self) -> str:
        """End of a sentence that names the ranks that do not answer, or else those with the least progress."""
        if self.world.ranks == 1:
            return ""
        answer: list[str] = []
        thread = threading.Thread(target=lambda: answer.append(self._query_store()), daemon=True)
        thread.start()
        thread.join(TIMEOUT)
        return answer[0] if answer else NO_STORE

    def _query_store(self) -> str:
        names, own = [f"rank {rank}" for rank in range(self.world.ranks)], self.world.rank
        try:
            first = second = self.store.multi_get(names)
            while second[own] == first[own]:  # on a stalled machine all ranks would look frozen
                time.sleep(3 * INTERVAL)
                second = self.store.multi_get(names)
        except RuntimeError:
            return NO_STORE
        frozen = [name for name, before, after in zip(names, first, second, strict=True) if before == after]
        if frozen:
            return f"; no answer from {', '.join(frozen)}"
        counts, _, activities = zip(*(entry.decode().split(" ", 2) for entry in second), strict=True)
        if len(set(counts)) == 1:
            return "; all ranks have made the same progress"
        lowest = min(counts, key=int)
        late = [f"{names[i]} ({activities[i]})" for i, count in enumerate(counts) if count == lowest]
        return f"; waiting for {', '.join(late)}"


def _shared_store(world: World) -> TCPStore:
    host, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=TIMEOUT)
    first = TCPStore(host, 0, None, True, timeout, False) if world.first else None
    port = broadcast(first.port if first else None)
    return first or TCPStore(host, port, None, False, timeout, False)
