"""Batches for training and evaluation: shards -> sampler -> transforms -> torch DataLoader."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from configs.errors import UserError
from configs.schema import Data, Optim
from data.sampler import EpochOrder, EvalBatches, TrainBatches
from data.shards import Split
from data.transforms import decode, sample_rng, to_float

MOST_WORKERS = 8

# (image [C, H, W] as decoded, the sample's generator) -> what goes into the batch, by name
Transform = Callable[[Tensor, np.random.Generator], dict[str, Tensor]]


def collate(samples: list[dict]) -> dict[str, Tensor]:
    """A batch of samples. Where images of 8 bits meet such of more, all become float32."""
    if len({sample["image"].dtype for sample in samples}) > 1:
        samples = [{**sample, "image": to_float(sample["image"])} for sample in samples]
    return default_collate(samples)


class Samples(Dataset):
    """The samples of a split, decoded and transformed, by (epoch, sample). Sample -1 fills a batch; its label is -1."""

    def __init__(self, split: Split, channels: int, seed: int, transform: Transform):
        self.split, self.channels, self.seed, self.transform = split, channels, seed, transform

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Tensor | int]:
        epoch, sample = index
        data, label = self.split.read(max(0, sample))
        try:
            image = decode(data, self.channels)
        except UserError as error:
            raise UserError(f"{self.split.folder}, split {self.split.name}, sample {sample}: {error}") from None
        return {
            **self.transform(image, sample_rng(self.seed, epoch, max(0, sample))),
            "label": -1 if sample < 0 else label,
            "sample": sample,
        }


class Loader:
    """Batches as dicts of tensors: "image" [B, C, H, W], "label" [B], "sample" [B], and what the transform adds.

    Iterating raises `UserError` for damaged data, also when a loader process met it.
    """

    def __init__(self, samples: Samples, batches: TrainBatches | EvalBatches, workers: int | None, pin: bool):
        self.samples, self.batches = samples, batches
        if workers is None:
            cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            workers = min(MOST_WORKERS, max(1, cores))
        self.torch_loader = DataLoader(
            samples,
            batch_sampler=batches,
            num_workers=workers,
            pin_memory=pin,
            collate_fn=collate,
            worker_init_fn=_quiet_worker,
        )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        try:
            yield from self.torch_loader
        except UserError as error:  # torch wraps a worker's message into its traceback
            raise UserError(str(error).rstrip().rsplit("UserError: ", 1)[-1]) from None


def _quiet_worker(_: int) -> None:
    """Loader processes leave Ctrl-C to the training process, which ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def open_split(data: Data, name: str | None = None) -> Split:
    """A split of the configured shards, `data.split` if no other is named."""
    return Split(Path(data.path), name or data.split)


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
) -> Loader:
    """All micro batches of a rank, over all epochs. Raises `UserError` if there is not one global batch of samples."""
    micro, _ = optim.accumulation(ranks)
    batches = TrainBatches(EpochOrder(split.counts, seed), optim.batch_size, micro, rank, ranks, optim.epochs)
    if batches.steps_per_epoch == 0:
        raise UserError(
            f"{split.folder} has {len(split)} samples in split {split.name}, fewer than one batch: "
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
) -> Loader:
    """Every sample of a split once, in batches of `batch` for each rank."""
    batches = EvalBatches(len(split), batch, rank, ranks)
    return Loader(Samples(split, channels, 0, transform), batches, data.workers, pin)
