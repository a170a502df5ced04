"""The order of an epoch, as a pure function: (seed, epoch, position) -> sample.

No state is kept and nothing is drawn in sequence, so a run can begin at any position, on any number of ranks and loader
processes, and see the same samples in the same global batches.
"""

from collections.abc import Callable, Iterator

import numpy as np

# What a random number is for: the second word of every generator's key, so that no two purposes share a stream
SHARDS, WINDOWS, SAMPLES, STEPS, SUBSTITUTES = 1, 2, 3, 4, 5
WINDOW = 16  # shards that are shuffled together


class EpochOrder:
    """A permutation of all samples for each epoch: shards in random order, samples shuffled in windows of shards.

    Memory is bounded by one window. Windows keep reads local: a loader touches `window` shards at a time.

    Args:
        counts: samples in each shard
        seed: of the run
        window: shards shuffled together
    """

    def __init__(self, counts: np.ndarray, seed: int, window: int = WINDOW):
        self.counts, self.seed, self.window = counts, seed, window
        self.first = np.concatenate([[0], np.cumsum(counts)])[:-1]
        self._shards: tuple[int, np.ndarray, np.ndarray] | None = None
        self._window: tuple[tuple[int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self.counts.sum())

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the shards, and the position at which each window starts (and the last one ends)."""
        if self._shards is None or self._shards[0] != epoch:
            order = np.random.default_rng([self.seed, SHARDS, epoch]).permutation(len(self.counts))
            ends = np.cumsum(self.counts[order])
            starts = np.concatenate([[0], ends[self.window - 1 :: self.window], ends[-1:]])
            self._shards = epoch, order, starts
        return self._shards[1:]

    def _window_ids(self, epoch: int, number: int) -> np.ndarray:
        if self._window is None or self._window[0] != (epoch, number):
            order, _ = self._shard_order(epoch)
            shards = order[number * self.window : (number + 1) * self.window]
            ids = np.concatenate([np.arange(self.first[s], self.first[s] + self.counts[s]) for s in shards])
            self._window = (epoch, number), np.random.default_rng([self.seed, WINDOWS, epoch, number]).permutation(ids)
        return self._window[1]

    def windows(self, epoch: int, start: int, stop: int) -> range:
        """Windows that hold positions start to stop (exclusive, and beyond start) of an epoch."""
        first, last = np.searchsorted(self._shard_order(epoch)[1], [start, stop - 1], "right") - 1
        return range(first, last + 1)

    def shards(self, epoch: int, number: int) -> list[int]:
        """Shards of a window of an epoch."""
        return self._shard_order(epoch)[0][number * self.window : (number + 1) * self.window].tolist()

    def ids(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Samples at positions start to stop (exclusive) of an epoch."""
        _, starts = self._shard_order(epoch)
        parts = []
        while start < stop:
            number = int(np.searchsorted(starts, start, "right")) - 1
            end = min(stop, int(starts[number + 1]))
            parts.append(self._window_ids(epoch, number)[start - starts[number] : end - starts[number]])
            start = end
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


class TrainBatches:
    """Micro batches of one rank, from a step of an epoch to the end of training.

    A global batch is `batch_size` consecutive positions; rank r takes its r-th part. An epoch's tail that does not fill
    a global batch is left out, so ranks always agree on the number of steps. Yields lists of (epoch, sample).
    """

    def __init__(self, order: EpochOrder, batch_size: int, micro: int, rank: int, ranks: int, epochs: int):
        self.order, self.batch_size, self.micro = order, batch_size, micro
        self.rank, self.ranks, self.epochs = rank, ranks, epochs
        self.steps_per_epoch = len(order) // batch_size
        self.first_step = 0  # optimizer steps already done, over all epochs
        self.ahead: Callable[[list[int]], None] | None = None  # told which shards come next, when a new window begins

    def _coming(self, epoch: int, now: range) -> list[int]:
        """Shards of some windows, then those of the window after them."""
        last = self.order.windows(epoch, 0, self.steps_per_epoch * self.batch_size)[-1]  # of those that are used
        shards = [shard for number in now for shard in self.order.shards(epoch, number)]
        if now[-1] < last:
            return shards + self.order.shards(epoch, now[-1] + 1)
        return shards + (self.order.shards(epoch + 1, 0) if epoch + 1 < self.epochs else [])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch_size // self.ranks
        told = None
        for step in range(self.first_step, self.epochs * self.steps_per_epoch):
            epoch, batch = divmod(step, self.steps_per_epoch)
            now = epoch, self.order.windows(epoch, batch * self.batch_size, (batch + 1) * self.batch_size)
            if self.ahead and now != told:
                self.ahead(self._coming(*now))
                told = now
            start = batch * self.batch_size + self.rank * share
            ids = self.order.ids(epoch, start, start + share).tolist()
            for i in range(0, share, self.micro):
                yield [(epoch, sample) for sample in ids[i : i + self.micro]]


class EvalBatches:
    """Batches of one rank over all samples once, in order. Ranks get equal numbers of batches; filling is sample -1."""

    def __init__(self, samples: int, batch: int, rank: int, ranks: int):
        per_rank = -(-samples // ranks)
        ids = np.arange(rank, per_rank * ranks, ranks)
        self.ids, self.batch = np.where(ids < samples, ids, -1).tolist(), batch

    def __len__(self) -> int:
        return -(-len(self.ids) // self.batch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for i in range(0, len(self.ids), self.batch):
            yield [(0, sample) for sample in self.ids[i : i + self.batch]]
