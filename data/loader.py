"""Batches for training and evaluation: shards -> sampler -> transforms -> torch DataLoader."""

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from configs.errors import UserError, reason
from configs.log import say
from configs.schema import Data, Optim
from data.cache import Cache, RemoteUserError
from data.place import is_url
from data.remote import FETCHES, Remote
from data.sampler import SUBSTITUTES, WINDOW, EpochOrder, EvalBatches, TrainBatches
from data.shards import Split, index_bytes
from data.transforms import decode, sample_rng, to_float

MOST_WORKERS = 8
MOST_REPLACEMENTS = 20  # images tried in place of a damaged one
WORKER_GRACE = 25  # seconds that a loader process lives on after SIGTERM

# (image [C, H, W] as decoded, the sample's generator) -> what goes into the batch, by name
Transform = Callable[[Tensor, np.random.Generator], dict[str, Tensor]]


def collate(samples: list[dict]) -> dict[str, Tensor]:
    """A batch of samples. Where images of 8 bits meet such of more, all become float32."""
    if len({sample["image"].dtype for sample in samples}) > 1:
        samples = [{**sample, "image": to_float(sample["image"])} for sample in samples]
    return default_collate(samples)


class Samples(Dataset):
    """The samples of a split, decoded and transformed, by (epoch, sample, view).

    Sample -1 fills a batch; its label is -1. Views are the several random crops of a sample in an epoch (data.repeats).

    A damaged image is replaced by another one, the same on every machine and in every resumed run, and marked.

    Args:
        score: the samples are for an evaluation: a replaced one gets label -1, so that it does not count
    Raises:
        UserError: the replacements are damaged too: it is not the images
    """

    def __init__(self, split: Split, channels: int, seed: int, transform: Transform, score: bool = False):
        self.split, self.channels, self.seed, self.transform, self.score = split, channels, seed, transform, score

    def __getitem__(self, index: tuple[int, int, int]) -> dict[str, Tensor | int | bool]:
        epoch, sample, view = index
        wanted = max(0, sample)
        image, label = self._load(wanted)
        damaged = image is None
        if damaged:
            image, label = self._replacement(epoch, wanted)
        return {
            **self.transform(image, sample_rng(self.seed, epoch, wanted, view)),
            "label": -1 if sample < 0 or (damaged and self.score) else label,
            "sample": sample,
            "damaged": damaged and sample >= 0,  # a filling is not a sample
        }

    def _load(self, sample: int) -> tuple[Tensor | None, int | str]:
        """Image and label, or None and what is wrong with it."""
        try:
            data, label = self.split.read(sample)
            return decode(data, self.channels), label
        except RemoteUserError:  # not this image's fault
            raise
        except UserError as error:
            return None, f"{self.split.folder}, split {self.split.name}, sample {sample}: {error}"

    def _replacement(self, epoch: int, sample: int) -> tuple[Tensor, int]:
        rng = np.random.default_rng([self.seed, SUBSTITUTES, epoch, sample])
        for other in rng.integers(len(self.split), size=MOST_REPLACEMENTS).tolist():
            image, label = self._load(other)
            if image is not None:
                return image, label
        raise UserError(f"{label}; so are {MOST_REPLACEMENTS} others drawn in place of sample {sample}")

    def complaint(self, sample: int) -> str:
        """What is wrong with a damaged sample."""
        image, complaint = self._load(sample)
        return (
            complaint if image is None else f"{self.split.folder}, split {self.split.name}, sample {sample}: read now"
        )


class Loader:
    """Batches as dicts of tensors: "image" [B, C, H, W], "label" [B], "sample" [B], and what the transform adds.

    Iterating raises `UserError` for damaged data, also when a loader process met it.
    """

    def __init__(self, samples: Samples, batches: TrainBatches | EvalBatches, workers: int | None, pin: bool):
        self.samples, self.batches = samples, batches
        if workers is None:
            cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            workers = min(MOST_WORKERS, max(1, cores))
        self.workers, self.pin = workers, pin
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        self.prefetcher = Prefetcher(samples.split) if first and isinstance(samples.split.folder, Remote) else None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.iterate()

    def iterate(self, first_step: int = 0) -> Iterator[dict[str, Tensor]]:
        """The batches; those of training from optimizer step `first_step` (over all epochs) on.

        Each iteration draws one number from torch's global generator, in DataLoader.
        """
        prefetch = self.prefetcher.request if self.prefetcher else None
        training = isinstance(self.batches, TrainBatches)
        loader = DataLoader(
            self.samples,
            batch_sampler=self.batches.iterate(first_step, prefetch) if training else self.batches,
            num_workers=self.workers,
            pin_memory=self.pin,
            collate_fn=collate,
            worker_init_fn=_quiet_worker,
        )
        batches = iter(loader)  # starts the loader processes: fork before the prefetching threads exist
        try:
            if prefetch and not training:
                prefetch(range(len(self.samples.split.shards)))
            yield from batches
        except UserError as error:  # torch wraps a worker's message into its traceback
            raise UserError(str(error).rstrip().rsplit("UserError: ", 1)[-1]) from None
        finally:
            if self.workers:
                # torch shuts them down when the iterator is collected: late if a traceback refers to it, and then it
                # waits 10 s for each process, because their queues are gone
                batches._shutdown_workers()
            if prefetch:
                prefetch([])


class Prefetcher:
    """Fetches shards of a remote split in background threads, for all processes of a host, before they are read.

    Errors are only logged: reading the shard runs into them again, and raises.
    """

    def __init__(self, split: Split):
        self.split = split
        self._wanted: deque[int] = deque()
        self._threads, self._lock, self._said = 0, threading.Lock(), False

    def request(self, shards: Iterable[int]) -> None:
        """Fetch these shards, in this order, as far as the cache has room for them; replaces earlier requests."""
        cache, wanted, missing = self.split.folder.cache, deque(), []
        room = cache.limit
        for number in shards:
            shard = self.split.shards[number]
            room -= shard.bytes + index_bytes(shard)
            if room < 0:
                break
            wanted.append(number)
            cache.touch(shard.index_sha256)  # else files that are there could go to make room for others
            if not cache.touch(shard.sha256):
                missing.append(shard.bytes)
        if missing and not self._said:
            say(f"fetching {len(missing)} shards, {sum(missing) / 1e9:.3g} GB, to {cache.folder}; later ones in time")
            self._said = True
        with self._lock:
            self._wanted = wanted
            new = min(FETCHES, len(wanted)) - self._threads
            self._threads += max(0, new)
        for _ in range(new):
            threading.Thread(target=self._fetch, daemon=True).start()

    def _fetch(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._threads -= 1
                    return
                number = self._wanted.popleft()
            try:
                self.split.fetch(number)
            except Exception as error:
                print(f"not fetched ahead: {reason(error)}", file=sys.stderr, flush=True)


def _quiet_worker(_: int) -> None:
    """Loader processes leave signals to the training process, which ends them when it has saved its state.

    A launcher that stops a run sends SIGTERM to them as well: it only bounds the time they have left.
    """
    signal.set_wakeup_fd(-1)  # the training process's
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))
    torch.set_num_threads(1)


def open_split(data: Data, name: str | None = None) -> Split:
    """A split of the configured shards, `data.split` if no other is named.

    Raises:
        UserError: there is none, or data.cache_gb has no room for what the order of an epoch takes at a time
    """
    if not is_url(data.path):
        return Split(Path(data.path), name or data.split)
    split = Split(Remote(data.path, Cache(Path(data.cache), int(data.cache_gb * 1e9))), name or data.split)
    largest = sorted((shard.bytes + index_bytes(shard) for shard in split.shards), reverse=True)
    need = sum(largest[: 2 * WINDOW])
    if need > split.folder.cache.limit:
        raise UserError(
            f"data.cache_gb is {data.cache_gb:g}, but {2 * WINDOW} shards of {data.path}, split {split.name}, have "
            f"{need / 1e9:.3g}: so many are read or fetched at a time; raise it, or prepare smaller shards"
        )
    return split


def train_loader(
    split: Split,
    transform: Transform,
    channels: int,
    seed: int,
    data: Data,
    optim: Optim,
    rank: int = 0,
    ranks: int = 1,
    pin: bool = False,
    weights: np.ndarray | None = None,
) -> Loader:
    """All micro batches of a rank, over all epochs; `weights` as `EpochOrder` takes them.

    Raises:
        UserError: there is not one global batch of samples
    """
    micro, _ = optim.accumulation(ranks)
    order = EpochOrder(split.counts, seed, weights)
    batches = TrainBatches(order, optim.batch_size, micro, rank, ranks, optim.epochs, data.repeats)
    if batches.steps_per_epoch == 0:
        raise UserError(
            f"{split.folder} has {len(order)} samples in split {split.name}, fewer than one batch: "
            f"lower optim.batch_size (now {optim.batch_size})"
        )
    return Loader(Samples(split, channels, seed, transform), batches, data.workers, pin)


def eval_loader(
    split: Split,
    transform: Transform,
    channels: int,
    data: Data,
    batch: int,
    rank: int = 0,
    ranks: int = 1,
    pin: bool = False,
    samples: Sequence[int] | None = None,
) -> Loader:
    """The given samples of a split, once each, in batches of `batch` per rank; None = all samples."""
    batches = EvalBatches(range(len(split)) if samples is None else samples, batch, rank, ranks)
    return Loader(Samples(split, channels, 0, transform, score=True), batches, data.workers, pin)
