"""How far each rank is, known to all: kept in a store of the first one's, apart from the training's collectives."""

import os
import threading
import time
from datetime import timedelta

from torch.distributed import TCPStore

from launch.training.world import World, agree

INTERVAL = 1.0  # seconds between two reports
ANSWER = 10.0  # seconds that the store may take to answer


class Heartbeat:
    """What this rank tells the others, and what they told.

    A thread of its own talks to the store, because a frozen first rank would keep it waiting.
    """

    def __init__(self, world: World):
        self.world = world
        self.count, self.place = 0, "the start"  # what this rank has done so far, and is doing
        self.stopping = False  # whether any rank was asked to stop; set here, it spreads
        self.done = threading.Event()
        if world.ranks > 1:
            self.store = _shared_store(world)
            self.thread = threading.Thread(target=self._exchange, name="progress", daemon=True)
            self.thread.start()

    def at(self, place: str) -> None:
        """Another part of the work begins; every rank calls this in the same order."""
        self.count, self.place = self.count + 1, place

    def close(self) -> None:
        """End the exchange; another rank's may go on."""
        self.done.set()
        if self.world.ranks > 1:
            self.thread.join(ANSWER)

    def _exchange(self) -> None:
        try:
            while not self.done.wait(INTERVAL):
                self.store.set(f"rank {self.world.rank}", f"{self.count} {time.monotonic()} {self.place}")
                if self.stopping:
                    self.store.set("stop", "1")
                self.stopping = self.stopping or self.store.check(["stop"])
        except RuntimeError:  # the first rank is gone; its launcher or the collectives will tell
            return

    def behind(self) -> str:
        """Which ranks the others wait for, as the end of a sentence: those that do not answer, or the least far."""
        if self.world.ranks == 1:
            return ""
        found: list[str] = []
        asking = threading.Thread(target=lambda: found.append(self._behind()), daemon=True)
        asking.start()
        asking.join(ANSWER)
        return found[0] if found else "; rank 0 does not answer"

    def _behind(self) -> str:
        names, own = [f"rank {rank}" for rank in range(self.world.ranks)], self.world.rank
        try:
            first = second = self.store.multi_get(names)
            while second[own] == first[own]:  # on a machine that stalls, all would look frozen
                time.sleep(3 * INTERVAL)
                second = self.store.multi_get(names)
        except RuntimeError:
            return "; rank 0 does not answer"
        frozen = [name for name, before, after in zip(names, first, second, strict=True) if before == after]
        if frozen:
            return f"; no answer from {', '.join(frozen)}"
        places = {name: entry.decode().split(" ", 2) for name, entry in zip(names, second, strict=True)}
        counts = {name: int(count) for name, (count, *_) in places.items()}
        late = [name for name in names if counts[name] == min(counts.values())]
        if len(late) == len(names):
            return "; all ranks are there"
        return f"; waiting for {', '.join(f'{name} (in {places[name][2]})' for name in late)}"


def _shared_store(world: World) -> TCPStore:
    host, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=ANSWER)
    first = TCPStore(host, 0, None, True, timeout, False) if world.first else None
    port = int(agree(str(first.port) if first else ""))
    return first or TCPStore(host, port, None, False, timeout, False)
