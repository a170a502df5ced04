"""Batches for training and evaluation: shards -> sampler -> transforms -> torch DataLoader."""

import copy
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from configs.errors import LostLoader, UserError
from configs.schema import Data, Optim
from data.cache import RemoteUserError
from data.decode import Shrink, decode
from data.prefetch import Prefetcher
from data.reading import MAX_PIXELS, ImageError
from data.remote import Remote
from data.sampler import SUBSTITUTES, EpochOrder, EvalBatches, TrainBatches
from data.shards import Split
from data.transforms import RowTransform, crop_shrink, is_small, sample_rng, to_float

MAX_WORKERS = 8
MAX_REPLACEMENTS = 20  # images tried in place of a damaged one
WORKER_GRACE = 25  # seconds until a loader process ends after SIGTERM
DEATH_SECONDS = 1  # until the end of a killed process shows, after its connection is lost

OBJECT = "object_"  # first letters of entries with one row per object, as many as the image has objects

# (decoded image [C, H, W], its target, the sample's generator) -> entries of the batch by name; the target is the
# label, or what a `ReadTarget` returns, or None if the sample does not count
Transform = Callable[[Tensor, Any, np.random.Generator], dict[str, Tensor | int]]
ReadTarget = Callable[[bytes], Any]  # from `Split.read_target`; raises `UserError` for a damaged one


def collate(samples: list[dict]) -> dict[str, Tensor]:
    """Stack samples to a batch. If only some images have more than 8 bits per channel, all become float32.

    Images of different sizes are padded with zeros at the bottom and on the right.

    Entries named `OBJECT`... have one row per object: they are concatenated, and `objects` [B] has the numbers of rows.
    """
    if len({sample["image"].dtype for sample in samples}) > 1:
        samples = [{**sample, "image": to_float(sample["image"])} for sample in samples]
    if len({sample["image"].shape for sample in samples}) > 1:
        height, width = (max(sample["image"].shape[axis] for sample in samples) for axis in (1, 2))
        samples = [{**sample, "image": _padded(sample["image"], height, width)} for sample in samples]
    ragged = [key for key in samples[0] if key.startswith(OBJECT)]
    batch = default_collate([{key: x for key, x in sample.items() if key not in ragged} for sample in samples])
    batch |= {key: torch.cat([sample[key] for sample in samples]) for key in ragged}
    return batch | ({"objects": torch.tensor([len(sample[ragged[0]]) for sample in samples])} if ragged else {})


def _padded(image: Tensor, height: int, width: int) -> Tensor:
    return F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1]))


class Samples(Dataset):
    """The samples of a split, decoded and transformed, by (epoch, sample, view).

    The target is the label or, with `read_target`, what it makes of `Split.read_target`. Sample -1 pads a batch; its
    label is -1, another target None. Views number the random crops of a sample in an epoch (data.repeats).

    A damaged image is replaced by another one and marked in "damaged". The replacement depends on seed, epoch and
    sample only, so it is the same on every machine and in resumed runs. With `score`, for evaluation, it gets the
    target of padding, so that it is not counted. If all replacements are damaged as well, `UserError` is raised.

    With `crops`, for transforms that begin with `random_crop`, a JPEG is decoded at the fraction of its size at which
    the crop still has all its pixels. For several `views`, all crops do, and the views of a sample that are asked for
    one after another share the decoded image.
    """

    def __init__(
        self, split: Split, channels: int, seed: int, transform: Transform, score: bool = False,
        crops: Data | None = None, max_pixels: int = MAX_PIXELS, read_target: ReadTarget | None = None, views: int = 1,
    ):  # fmt: skip
        self.split, self.channels, self.seed, self.transform, self.score = split, channels, seed, transform, score
        self.crops, self.max_pixels, self.read_target, self.views = crops, max_pixels, read_target, views
        self._last: tuple[tuple[int, int], tuple] | None = None  # epoch and sample; what `_decoded` returned

    def __getitem__(self, index: tuple[int, int, int]) -> dict[str, Tensor | int | bool]:
        epoch, sample, view = index
        loaded = max(0, sample)
        if self.views > 1:
            if not self._last or self._last[0] != (epoch, loaded):
                self._last = (epoch, loaded), self._decoded(epoch, loaded)
            image, target, damaged = self._last[1]
            image, target = image.clone(), copy.deepcopy(target)  # transforms may change them in place
        else:
            image, target, damaged = self._decoded(epoch, loaded)
        if sample < 0 or (damaged and self.score):
            target = None if self.read_target else -1
        entries = self.transform(image, target, sample_rng(self.seed, epoch, loaded, view))
        return {**entries, "sample": sample, "damaged": damaged and sample >= 0}  # padding is not a sample

    def _decoded(self, epoch: int, sample: int) -> tuple[Tensor, Any, bool]:
        """Image and target of a sample or, if it is damaged, of its replacement, and whether it is."""
        image, target = self.load(sample, partial(self._shrink, epoch, sample) if self.crops else None)
        return (image, target, False) if image is not None else (*self._replacement(epoch, sample), True)

    def _shrink(self, epoch: int, sample: int, height: int, width: int) -> int:
        """The factor by which an image may be smaller for the crops of all views, also of those on other ranks."""
        if is_small(self.crops, height, width):
            return 1
        rngs = (sample_rng(self.seed, epoch, sample, view) for view in range(self.views))
        return min(crop_shrink(self.crops, rng, height, width) for rng in rngs)

    def load(self, sample: int, shrink: Shrink | None = None) -> tuple[Tensor | None, Any]:
        """Image and target of a sample, or None and the reason why it cannot be used."""
        try:
            data, target = self.split.read(sample)
            if self.read_target:
                target = self.read_target(self.split.read_target(sample))
            return decode(data, self.channels, shrink, self.max_pixels), target
        except RemoteUserError:  # the image is not damaged, but cannot be fetched
            raise
        except ImageError as error:
            return None, f"{self.split.place(sample)}: {error.kind}: {error}"
        except UserError as error:  # the shard is damaged, or a file of a folder
            return None, f"{self.split.place(sample)}: {error}"

    def _replacement(self, epoch: int, sample: int) -> tuple[Tensor, Any]:
        rng = np.random.default_rng([self.seed, SUBSTITUTES, epoch, sample])
        for other in rng.integers(len(self.split), size=MAX_REPLACEMENTS).tolist():
            image, found = self.load(other)
            if image is not None:
                return image, found
        raise UserError(f"{found}; {MAX_REPLACEMENTS} replacements of sample {sample} cannot be used either")

    def describe_damage(self, sample: int) -> str:
        """What is wrong with a damaged sample; it is read again."""
        image, damage = self.load(sample)
        return damage if image is None else f"{self.split.place(sample)}: damaged at first, now readable"


class Loader:
    """Batches as dicts of tensors: "sample" and "damaged" [B], and those of the transform: "image" [B, C, H, W].

    `workers` are loader processes: 0 = load in this process, None = this rank's share of the cores, at most 8. `part`
    are the consecutive samples that the batches of an evaluation are from, None = all; only their shards are fetched.
    Iterating raises `UserError` for damaged data, also for errors in a loader process, and `LostLoader` if one died.
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
        except (EOFError, OSError) as error:
            # a process that was killed while it sent a batch; torch has asked too early whether it still runs
            if self.workers and wait([worker.sentinel for worker in batches._workers], DEATH_SECONDS):
                raise LostLoader(error) from error
            raise
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
    read_target: ReadTarget | None = None,
) -> Loader:
    """All micro batches of a rank, over all epochs. For `weights` of the samples see `EpochOrder`.

    JPEGs are decoded for the crop of `random_crop`, unless targets are read that belong to places of the image.

    Raises `UserError` if the split is smaller than one global batch.
    """
    micro, _ = optim.accumulation(ranks)
    order = EpochOrder(split.counts, seed, weights)
    batches = TrainBatches(order, optim.batch_size, micro, rank, ranks, optim.epochs, data.repeats)
    if batches.steps_per_epoch == 0:
        problem = f"{split.folder} has {len(order)} samples in split {split.name}, fewer than one batch"
        raise UserError(f"{problem}: lower optim.batch_size (now {optim.batch_size})")
    crops = data if data.shrink_jpeg and (not read_target or isinstance(transform, RowTransform)) else None
    samples = Samples(split, channels, seed, transform, False, crops, data.max_pixels, read_target, data.repeats)
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
    read_target: ReadTarget | None = None,
) -> Loader:
    """The given samples of a split, once each, in batches of `batch` per rank; None = all samples."""
    batches = EvalBatches(range(len(split)) if samples is None else samples, batch, rank, ranks)
    scored = Samples(split, channels, 0, transform, True, None, data.max_pixels, read_target)
    return Loader(scored, batches, data.workers, pin)
