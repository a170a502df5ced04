"""Batches for training and evaluation: shards -> sampler -> transforms -> torch DataLoader."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from configs.errors import UserError
from configs.schema import Data, Optim
from data.cache import RemoteUserError
from data.decode import Shrink, decode
from data.prefetch import Prefetcher
from data.reading import MAX_PIXELS, ImageError
from data.remote import Remote
from data.sampler import SUBSTITUTES, EpochOrder, EvalBatches, TrainBatches
from data.shards import Split
from data.transforms import crop_shrink, sample_rng, to_float

MAX_WORKERS = 8
MAX_REPLACEMENTS = 20  # images tried in place of a damaged one
WORKER_GRACE = 25  # seconds until a loader process ends after SIGTERM

# (decoded image [C, H, W], its target, the sample's generator) -> entries of the batch by name
Transform = Callable[[Tensor, int, np.random.Generator], dict[str, Tensor | int]]


def collate(samples: list[dict]) -> dict[str, Tensor]:
    """Stack samples to a batch. If only some images have more than 8 bits per channel, all become float32."""
    if len({sample["image"].dtype for sample in samples}) > 1:
        samples = [{**sample, "image": to_float(sample["image"])} for sample in samples]
    return default_collate(samples)


class Samples(Dataset):
    """The samples of a split, decoded and transformed, by (epoch, sample, view).

    Sample -1 pads a batch; its target is -1. Views number the random crops of a sample in an epoch (data.repeats).

    A damaged image is replaced by another one and marked in "damaged". The replacement depends on seed, epoch and
    sample only, so it is the same on every machine and in resumed runs. With `score`, for evaluation, it gets target
    -1, so that it is not counted. If all replacements are damaged as well, `UserError` is raised.

    With `crops`, for transforms that begin with `random_crop`, a JPEG is decoded at the fraction of its size at which
    the crop still has all its pixels.
    """

    def __init__(
        self, split: Split, channels: int, seed: int, transform: Transform, score: bool = False,
        crops: Data | None = None, max_pixels: int = MAX_PIXELS,
    ):  # fmt: skip
        self.split, self.channels, self.seed, self.transform, self.score = split, channels, seed, transform, score
        self.crops, self.max_pixels = crops, max_pixels

    def __getitem__(self, index: tuple[int, int, int]) -> dict[str, Tensor | int | bool]:
        epoch, sample, view = index
        loaded = max(0, sample)
        draw = partial(sample_rng, self.seed, epoch, loaded, view)
        shrink = partial(crop_shrink, self.crops, draw()) if self.crops else None
        image, label = self.load(loaded, shrink)
        damaged = image is None
        if damaged:
            image, label = self._replacement(epoch, loaded)
        target = -1 if sample < 0 or (damaged and self.score) else label
        entries = self.transform(image, target, draw())
        return {**entries, "sample": sample, "damaged": damaged and sample >= 0}  # padding is not a sample

    def load(self, sample: int, shrink: Shrink | None = None) -> tuple[Tensor | None, int | str]:
        """Image and label of a sample, or None and the reason why it cannot be used."""
        try:
            data, label = self.split.read(sample)
            return decode(data, self.channels, shrink, self.max_pixels), label
        except RemoteUserError:  # the image is not damaged, but cannot be fetched
            raise
        except ImageError as error:
            return None, f"{self._place(sample)}: {error.kind}: {error}"
        except UserError as error:  # the shard is damaged, or a file of a folder
            return None, f"{self._place(sample)}: {error}"

    def _replacement(self, epoch: int, sample: int) -> tuple[Tensor, int]:
        rng = np.random.default_rng([self.seed, SUBSTITUTES, epoch, sample])
        for other in rng.integers(len(self.split), size=MAX_REPLACEMENTS).tolist():
            image, label = self.load(other)
            if image is not None:
                return image, label
        raise UserError(f"{label}; {MAX_REPLACEMENTS} replacements of sample {sample} are damaged as well")

    def describe_damage(self, sample: int) -> str:
        """What is wrong with a damaged sample; it is read again."""
        image, damage = self.load(sample)
        return damage if image is None else f"{self._place(sample)}: damaged at first, now readable"

    def _place(self, sample: int) -> str:
        return f"{self.split.folder}, split {self.split.name}, sample {sample}"


class Loader:
    """Batches as dicts of tensors: "sample" and "damaged" [B], and those of the transform: "image" [B, C, H, W].

    `workers` are loader processes: 0 = load in this process, None = this rank's share of the cores, at most 8. `part`
    are the consecutive samples that the batches of an evaluation are from, None = all; only their shards are fetched.
    Iterating raises `UserError` for damaged data, also for errors in a loader process.
    """

    def __init__(
        self, samples: Samples, batches: TrainBatches | EvalBatches, workers: int | None, pin: bool,
        part: range | None = None,
    ):  # fmt: skip
        self.samples, self.batches, self.part = samples, batches, part
        if workers is None:
            cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            workers = min(MAX_WORKERS, max(1, cores))
        self.workers, self.pin = workers, pin
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        self.prefetcher = Prefetcher(samples.split) if first and isinstance(samples.split.folder, Remote) else None

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
                prefetch(self._shards())
            yield from batches
        except UserError as error:  # torch adds the worker's traceback to the message
            raise UserError(str(error).rstrip().rsplit("UserError: ", 1)[-1]) from None
        finally:
            if self.workers:
                # torch shuts them down when the iterator is collected: late if a traceback refers to it, and then it
                # waits 10 s for each process, because their queues are gone
                batches._shutdown_workers()
            if prefetch:
                prefetch([])

    __iter__ = iterate

    def _shards(self) -> range:
        """Numbers of the shards that evaluation reads."""
        split = self.samples.split
        if not self.part:
            return range(len(split.shards))
        first, last = np.searchsorted(split.first, (self.part[0], self.part[-1]), "right").tolist()
        return range(first - 1, last)


def _quiet_worker(_: int) -> None:
    """Loader processes ignore signals: the training process saves its state and then stops them.

    A launcher that stops a run sends SIGTERM to them as well: they end after `WORKER_GRACE` at the latest.
    """
    signal.set_wakeup_fd(-1)  # inherited from the training process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))
    torch.set_num_threads(1)


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
    """All micro batches of a rank, over all epochs. For `weights` of the samples see `EpochOrder`.

    Raises `UserError` if the split is smaller than one global batch.
    """
    micro, _ = optim.accumulation(ranks)
    order = EpochOrder(split.counts, seed, weights)
    batches = TrainBatches(order, optim.batch_size, micro, rank, ranks, optim.epochs, data.repeats)
    if batches.steps_per_epoch == 0:
        problem = f"{split.folder} has {len(order)} samples in split {split.name}, fewer than one batch"
        raise UserError(f"{problem}: lower optim.batch_size (now {optim.batch_size})")
    crops = data if data.shrink_jpeg else None
    samples = Samples(split, channels, seed, transform, crops=crops, max_pixels=data.max_pixels)
    return Loader(samples, batches, data.workers, pin)


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
    scored = Samples(split, channels, 0, transform, score=True, max_pixels=data.max_pixels)
    return Loader(scored, batches, data.workers, pin)
