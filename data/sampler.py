"""The order of an epoch as a pure function: (seed, epoch, position) -> sample.

There is no state, so a run can be resumed at any position, with any number of ranks and loader processes, and gets the
same samples in the same global batches.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np

# Second word of the seed of every generator: its purpose, so that no two purposes share random numbers
SHARDS, WINDOWS, SAMPLES, STEPS, SUBSTITUTES, DRAWS, SHARE = 1, 2, 3, 4, 5, 6, 7
WINDOW = 16  # shards that are shuffled together
Batch = list[tuple[int, int, int]]  # epoch, sample, view


class EpochOrder:
    """A permutation of all samples for each epoch: shards in random order, samples shuffled in windows of shards.

    Only one window is in memory, and a loader reads from `window` shards at a time.

    Args:
        counts: samples in each shard
        weights: relative frequency of each sample: an epoch may contain a sample several times or not at all, and is
            as long as the number of samples with a weight above 0; None = every sample once
    """

    def __init__(self, counts: np.ndarray, seed: int, weights: np.ndarray | None = None, window: int = WINDOW):
        self.counts, self.seed, self.weights, self.window = counts, seed, weights, window
        self.first = np.cumsum(counts) - counts  # each shard's first sample
        self._copies = lru_cache(1)(self._copies)  # keep the last epoch or window only
        self._shard_order = lru_cache(1)(self._shard_order)
        self._window_ids = lru_cache(1)(self._window_ids)

    def __len__(self) -> int:
        return int(self.counts.sum()) if self.weights is None else np.count_nonzero(self.weights)

    def _copies(self, epoch: int) -> np.ndarray:
        """How often an epoch contains each sample: its scaled weight, rounded to give the right length."""
        share = np.cumsum(self.weights, dtype=np.float64)
        start = np.random.default_rng([self.seed, DRAWS, epoch]).random()
        edges = np.floor(share * (len(self) / share[-1]) + start).astype(np.int64)
        edges[share == share[-1]] = len(self)  # rounding could lose one
        return np.diff(edges, prepend=0)

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the shards, and the positions [windows + 1] at which windows start (and the last one ends)."""
        order, counts = np.random.default_rng([self.seed, SHARDS, epoch]).permutation(len(self.counts)), self.counts
        if self.weights is not None:
            before = np.concatenate([[0], np.cumsum(self._copies(epoch))])  # cumulative number of copies
            counts = before[self.first + counts] - before[self.first]
        ends = np.cumsum(counts[order])
        return order, np.concatenate([[0], ends[self.window - 1 :: self.window], ends[-1:]])

    def _window_ids(self, epoch: int, number: int) -> np.ndarray:
        ids = np.concatenate([self.first[s] + np.arange(self.counts[s]) for s in self.shards(epoch, number)])
        if self.weights is not None:
            ids = np.repeat(ids, self._copies(epoch)[ids])
        return np.random.default_rng([self.seed, WINDOWS, epoch, number]).permutation(ids)

    def windows(self, epoch: int, start: int, stop: int) -> range:
        """Windows that contain positions start to stop (exclusive, greater than start) of an epoch."""
        first, last = np.searchsorted(self._shard_order(epoch)[1], [start, stop - 1], "right") - 1
        return range(first, last + 1)

    def shards(self, epoch: int, number: int) -> list[int]:
        """Shards in a window of an epoch."""
        return self._shard_order(epoch)[0][number * self.window : (number + 1) * self.window].tolist()

    def ids(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Samples at positions start to stop (exclusive) of an epoch."""
        starts = self._shard_order(epoch)[1]
        parts = [np.empty(0, np.int64)]
        for number in self.windows(epoch, start, stop):
            parts.append(self._window_ids(epoch, number)[max(0, start - starts[number]) : stop - starts[number]])
        return np.concatenate(parts)


class TrainBatches:
    """Micro batches of one rank, from any optimizer step to the end of training.

    A global batch is `batch_size` consecutive positions; rank r takes its r-th part. An epoch's tail that does not fill
    a global batch is left out, so ranks always agree on the number of steps.

    With `repeats` r, a global batch is `batch_size` / r positions: all views of the first, then of the second, ...,
    so that an image need not be decoded for each view. The number of steps in an epoch stays the same, so an epoch ends
    after 1 / r of the samples.
    """

    def __init__(
        self, order: EpochOrder, batch_size: int, micro: int, rank: int, ranks: int, epochs: int, repeats: int = 1
    ):
        self.order, self.micro, self.rank, self.epochs = order, micro, rank, epochs
        self.repeats = repeats
        self.share, self.positions = batch_size // ranks, batch_size // repeats  # of a rank; of a global batch
        self.steps_per_epoch = len(order) // batch_size

    def iterate(self, first_step: int = 0, prefetch: Callable[[list[int]], None] | None = None) -> Iterator[Batch]:
        """The micro batches from optimizer step `first_step` (over all epochs) on.

        `prefetch` is called when a new window begins, with the shards that are read next, in order.
        """
        previous = None
        places, views = np.divmod(np.arange(self.rank * self.share, (self.rank + 1) * self.share), self.repeats)
        first, last = places.min(), places.max() + 1
        for step in range(first_step, self.epochs * self.steps_per_epoch):
            epoch, batch = divmod(step, self.steps_per_epoch)
            start = batch * self.positions
            current = epoch, self.order.windows(epoch, start, start + self.positions)
            if prefetch and current != previous:
                prefetch(self._upcoming_shards(*current))
                previous = current
            ids = self.order.ids(epoch, start + first, start + last)[places - first].tolist()
            for i in range(0, self.share, self.micro):
                part = slice(i, i + self.micro)
                yield [(epoch, sample, view) for sample, view in zip(ids[part], views[part].tolist(), strict=True)]

    def _upcoming_shards(self, epoch: int, windows: range) -> list[int]:
        """Shards of `windows`, then those of the window after them."""
        last = self.order.windows(epoch, 0, self.steps_per_epoch * self.positions)[-1]  # the tail is not read
        shards = [shard for number in windows for shard in self.order.shards(epoch, number)]
        if windows[-1] < last:
            return shards + self.order.shards(epoch, windows[-1] + 1)
        return shards + (self.order.shards(epoch + 1, 0) if epoch + 1 < self.epochs else [])


class EvalBatches:
    """Batches of one rank over the given samples, in order; epoch and view are 0.

    All ranks get the same number of batches; sample -1 pads the last one.
    """

    def __init__(self, samples: Sequence[int], batch: int, rank: int, ranks: int):
        padded = np.full(-(-len(samples) // ranks) * ranks, -1)
        padded[: len(samples)] = samples
        self.ids, self.batch = padded[rank::ranks].tolist(), batch

    def __len__(self) -> int:
        return -(-len(self.ids) // self.batch)

    def __iter__(self) -> Iterator[Batch]:
        for i in range(0, len(self.ids), self.batch):
            yield [(0, sample, 0) for sample in self.ids[i : i + self.batch]]


def class_weights(labels: np.ndarray, power: float) -> np.ndarray:
    """Weight of each sample for `EpochOrder`: n ** -power, where n samples have its label."""
    return np.bincount(labels).astype(np.float64)[labels] ** -power


def labelled_share(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Bools [samples]: a random share of the samples of each class, at least one.

    With the same seed, a smaller share is a subset of a larger one.
    """
    used = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        samples = np.random.default_rng([seed, SHARE, label]).permutation(np.flatnonzero(labels == label))
        used[samples[: max(1, round(len(samples) * share))]] = True
    return used
