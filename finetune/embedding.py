"""Features of every image of a split, in order, on any number of ranks."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import Data
from data.folder import Folder
from data.loader import Loader, Samples
from data.sampler import Batch
from data.shards import Split
from data.transforms import EvalTransform
from launch.training.feature_eval import mean_tokens
from launch.training.watchdog import Progress
from launch.training.world import World
from models.opening import Trained


@dataclass(frozen=True)
class Embedded:
    """Consecutive images of a split, N readable ones among them."""

    start: int  # the first sample of these
    stop: int  # the sample after the last one
    sample: Tensor  # [N]
    label: Tensor  # [N], -1 = none
    x: Tensor  # [N, D] fp32, on the CPU


class RunsOfSamples:
    """Batches of one rank: every `ranks`-th run of `batch` consecutive samples.

    A batch has the same images on any number of ranks, so that features are equal to the last bit. All ranks get the
    same number of batches: sample -1 stands for one that does not exist.
    """

    def __init__(self, samples: int, batch: int, rank: int, ranks: int):
        self.samples, self.batch, self.rank, self.ranks = samples, batch, rank, ranks

    def __len__(self) -> int:
        return -(-self.samples // (self.batch * self.ranks))

    def __iter__(self) -> Iterator[Batch]:
        for step in range(len(self)):
            start = (step * self.ranks + self.rank) * self.batch
            samples = range(start, min(start + self.batch, self.samples))
            yield [(0, sample, 0) for sample in samples] or [(0, -1, 0)]


class ReadableSamples(Samples):
    """Samples whose damaged images are marked and black, instead of replaced."""

    def _replacement(self, epoch: int, sample: int) -> tuple[Tensor, int]:
        return torch.zeros(self.channels, 1, 1, dtype=torch.uint8), -1


def embedding_loader(
    images: Split | Folder, transform: EvalTransform, channels: int, data: Data, batch: int, world: World
) -> Loader:
    """This rank's batches of all images of a split."""
    samples = ReadableSamples(images, channels, 0, transform, score=True, max_pixels=data.max_pixels)
    batches = RunsOfSamples(len(images), min(batch, len(images)), world.rank, world.ranks)
    return Loader(samples, batches, data.workers, world.device.type == "cuda")


def embed(
    trained: Trained, loader: Loader, world: World, precision: str, damaged: dict[int, str], progress: Progress
) -> Iterator[Embedded]:
    """Features of a split, `ranks` batches at a time, on all ranks alike.

    `damaged` receives the errors of this rank's damaged images. Raises `UserError` if features are not finite, or no
    image of the first batches is readable.
    """
    batch, readable = loader.batches.batch, 0
    encoder, mean, std = (x.to(world.device) for x in (trained.model, trained.mean, trained.std))
    steps = progress(loader, len(loader.batches), f"features of {loader.samples.split.name}")
    for step, entries in enumerate(steps):
        for sample in entries["sample"][entries["damaged"]].tolist():
            damaged[sample] = loader.samples.describe_damage(sample)
        x = mean_tokens(encoder, entries["image"], batch, mean, std, precision)
        about = torch.full((batch, 2), -1)  # sample, or -1 for padding and damage; label
        about[: len(entries["sample"])] = torch.stack([entries["sample"], entries["label"]], 1)
        about[: len(entries["sample"])][entries["damaged"]] = -1
        x, about = _gather(x, world).cpu(), _gather(about.to(world.device), world).cpu()
        real = about[:, 0] >= 0
        x, about = x[real], about[real]
        if not bool(torch.isfinite(x).all()):
            problem = f"{trained.path} gives features that are not finite"
            raise UserError(f"{problem}: try --precision fp32, or other weights")
        readable += len(x)
        stop = min((step + 1) * batch * world.ranks, loader.batches.samples)
        if not readable:
            first = next(iter(damaged.values()), "see rank 0")
            raise UserError(f"none of the first {stop:,} images is readable, the first: {first}")
        yield Embedded(step * batch * world.ranks, stop, about[:, 0], about[:, 1], x)


def _gather(part: Tensor, world: World) -> Tensor:
    """The rows of all ranks, in rank order."""
    parts = [torch.empty_like(part) for _ in range(world.ranks)]
    torch.distributed.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def label_names(label: Tensor, classes: list[str] | None) -> list[str | None]:
    """Class names of labels, their numbers if there are no names, None without a label."""
    known = classes or []
    return [None if i < 0 else known[i] if i < len(known) else str(i) for i in label.tolist()]
