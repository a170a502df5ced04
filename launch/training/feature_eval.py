"""kNN and linear evaluation of frozen features, on any number of ranks.

A rank has the features of its part of a split. Letters: N images of a part, Q images at a time, D width of the
features, K classes, G learning rates.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.errors import UserError
from configs.schema import Data
from data.loader import Loader, eval_loader
from data.shards import Split
from data.transforms import EvalTransform, normalize
from launch.training.precision import autocast
from launch.training.watchdog import Progress
from launch.training.world import World, gather, sum_over_ranks
from models.convnext import ConvNeXt
from models.sparse.layouts import Dense

TOP = 5
QUERIES, BANK = 512, 1 << 16  # images compared at a time: 256 MiB of similarities
LINEAR_BATCH, MOMENTUM = 256, 0.9
POWER_STEPS = 30
EPS = 1e-6  # added to variances, as in BatchNorm


@dataclass(frozen=True)
class Features:
    """The features of this rank's part of a split."""

    x: Tensor  # [N, D] fp32, on the device
    label: Tensor  # [N], on the device
    sample: Tensor  # [N] index of the image in the split


@dataclass(frozen=True)
class Linear:
    """Accuracies (0 to 1) of a linear classifier trained with one learning rate."""

    lr: float
    used: float  # learning rate of the training: `lr`, or the largest stable one if that is smaller
    held_out: float  # top-1 on the training images held out for validation
    top1: float  # on the evaluation split
    top5: float


def check_labels(split: Split) -> None:
    """Raise `UserError` unless all images of a split have labels."""
    if not split.classes or not len(split) or (split.labels() < 0).any():
        raise UserError(f"{split.folder}, split {split.name}: a probe needs labels, but some images have none")


def probe_loader(
    split: Split, images: int | None, transform: EvalTransform, channels: int, data: Data, batch: int, world: World
) -> Loader:
    """This rank's part of `images` images, evenly spread over the split (None = all), for one epoch."""
    images = min(images or len(split), len(split))
    samples = np.arange(images) * len(split) // images
    pin = world.device.type == "cuda"
    return eval_loader(split, transform, channels, data, min(batch, images), world.rank, world.ranks, pin, samples)


@torch.no_grad()
def mean_tokens(encoder: ConvNeXt, image: Tensor, batch: int, mean: Tensor, std: Tensor, precision: str) -> Tensor:
    """Features of images [B, C, H, W] as loaded: the mean over the tokens of the last stage, before any norm of a head.

    The batch is padded to `batch` images, because features depend slightly on its size. `mean` and `std` are those of
    the channels, `precision` is fp32, bf16 or fp16. Returns fp32 [batch, D] on the device of `mean`.
    """
    image = F.pad(image, (0,) * 7 + (batch - len(image),))
    image = normalize(image.to(mean.device, non_blocking=True), mean, std)
    with autocast(mean.device, precision):
        tokens = encoder.forward_features(image, Dense())
    return tokens.float().mean((1, 2))


def features(
    encoder: ConvNeXt, loader: Loader, world: World, mean: Tensor, std: Tensor, precision: str, progress: Progress
) -> Features:
    """Features of this rank's images, as `mean_tokens`.

    Padding of a batch and replacements of damaged images are excluded.
    """
    training = encoder.training
    encoder.eval()
    parts = []
    for batch in progress(loader, len(loader.batches), f"features of {loader.samples.split.name}"):
        x = mean_tokens(encoder, batch["image"], loader.batches.batch, mean, std, precision)
        real = torch.nonzero((batch["sample"] >= 0) & ~batch["damaged"])[:, 0]
        parts.append((x[real.to(world.device)], batch["label"][real].to(world.device), batch["sample"][real]))
    encoder.train(training)
    return Features(*(torch.cat(column) for column in zip(*parts, strict=True)))


def count(part: Features) -> int:
    """Number of images in all ranks' parts."""
    return sum(gather(len(part.label)))


@torch.no_grad()
def knn(
    bank: Features, queries: Features, classes: int, ks: Iterable[int], temperature: float, world: World,
    progress: Progress,
) -> dict[int, dict[str, float]]:  # fmt: skip
    """Accuracy of k-nearest-neighbour votes: {k: {"top1": 0 to 1, "top5": 0 to 1}} (1805.01978, section 3.4).

    A neighbour of cosine similarity s has exp(s / temperature) votes for its class. Values of k above the size of the
    bank are omitted. All ranks call this and get the same.
    """
    images = count(bank)
    ks = sorted({k for k in ks if k <= images})
    if not ks:
        return {}
    bank_x, query_x = F.normalize(bank.x), F.normalize(queries.x)
    counts = gather(len(query_x))
    chunks = [(owner, start) for owner, own in enumerate(counts) for start in range(0, own, QUERIES)]
    correct = torch.zeros(len(ks), 2, dtype=torch.int64, device=world.device)
    for owner, start in progress(chunks, len(chunks), "nearest neighbours"):
        rows, size = slice(start, start + QUERIES), min(QUERIES, counts[owner] - start)
        x, label = (_broadcast(owner, part, size, world) for part in (query_x[rows], queries.label[rows]))
        neighbours = _gather_nearest(*nearest(x, bank_x, bank.label, ks[-1]), world)
        correct += torch.stack([_count_correct(_votes(*neighbours, k, temperature, classes), label) for k in ks])
    accuracy = (correct.double() / sum(counts)).tolist()
    return {k: {"top1": top1, "top5": top5} for k, (top1, top5) in zip(ks, accuracy, strict=True)}


def nearest(x: Tensor, bank: Tensor, label: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Similarity [Q, k] and label [Q, k] of the k nearest to queries [Q, D] in a bank [N, D], nearest first.

    Rows have length 1. If the bank has fewer than k, the rest has similarity -inf.
    """
    x = x.double()  # in fp32, rounding would order close neighbours differently on another number of ranks
    candidates = [(x.new_full((len(x), k), -torch.inf), label.new_zeros(len(x), k))]
    for start in range(0, len(bank), BANK):
        part = slice(start, start + BANK)
        similarity, row = (x @ bank[part].double().T).topk(min(k, len(bank[part])), dim=1)
        candidates.append((similarity, label[part][row]))
    return _merge(candidates, k)


def _merge(candidates: Iterable[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of the (similarity, label) of several parts of a bank."""
    similarity, label = (torch.cat(column, dim=1) for column in zip(*candidates, strict=True))
    similarity, index = similarity.topk(k, dim=1)
    return similarity, label.gather(1, index)


def _broadcast(owner: int, part: Tensor, size: int, world: World) -> Tensor:
    """A tensor [size, ...] of one rank, on all ranks."""
    rows = part.contiguous() if world.rank == owner else part.new_empty(size, *part.shape[1:])
    torch.distributed.broadcast(rows, owner)
    return rows


def _gather_nearest(similarity: Tensor, label: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """The nearest in all ranks' banks, given the nearest in this rank's."""
    columns = [[torch.empty_like(own) for _ in range(world.ranks)] for own in (similarity, label)]
    torch.distributed.all_gather(columns[0], similarity)
    torch.distributed.all_gather(columns[1], label)
    return _merge(zip(*columns, strict=True), similarity.shape[1])


def _votes(similarity: Tensor, label: Tensor, k: int, temperature: float, classes: int) -> Tensor:
    """Logarithm of the votes [Q, K] of the k nearest, up to a constant per query; -inf for classes without votes."""
    weight = ((similarity[:, :k] - similarity[:, :1]) / temperature).exp()  # relative to the nearest: no overflow
    return weight.new_zeros(len(weight), classes).scatter_add_(1, label[:, :k], weight).log()


def _count_correct(scores: Tensor, label: Tensor) -> Tensor:
    """Number of correct top-1 and top-5 predictions of scores [..., Q, K]: [..., 2]. A score of -inf is wrong."""
    score, predicted = scores.topk(min(TOP, scores.shape[-1]), dim=-1)
    correct = (predicted == label[:, None]) & (score > -torch.inf)
    return torch.stack([correct[..., 0].sum(-1), correct.sum((-1, -2))], dim=-1)


def linear(
    train: Features, evaluation: Features, classes: int, lrs: Iterable[float], epochs: int, seed: int,
    progress: Progress,
) -> list[Linear]:  # fmt: skip
    """Softmax regression on frozen features, once per learning rate, in ascending order.

    Features are standardised with mean and variance of the training features: BatchNorm without parameters, as in the
    probe of 2111.06377, section A.1. A random tenth of the training images is held out to select the learning rate.
    Rates above `max_stable_lr` are replaced by it: beyond, the loss oscillates, and accuracy depends on the seed.
    All ranks call this and get the same; batches do not depend on the number of ranks.
    """
    samples = np.sort(np.concatenate(gather(train.sample.numpy())))
    rng = np.random.default_rng(seed)
    held_out, kept = np.split(rng.permutation(samples), [max(1, len(samples) // 10)])
    row = np.full(samples[-1] + 1, -1)  # row of an image in this rank's part; -1 = on another rank
    row[train.sample.numpy()] = np.arange(len(train.sample))
    mean, std = _moments(train.x, len(samples))
    x, lrs = (train.x - mean).div_(std), sorted(lrs)
    orders = (row[rng.permutation(kept)] for _ in progress(range(epochs), epochs, "linear classifier"))
    limit = max_stable_lr(x, len(samples))
    used = [min(lr, limit) for lr in lrs]
    weights = _fit(x, train.label, orders, epochs * -(-len(kept) // LINEAR_BATCH), classes, used)
    rows = _own_rows(row[held_out], x.device)
    validated = _accuracy(x[rows], train.label[rows], *weights)
    tested = _accuracy((evaluation.x - mean).div_(std), evaluation.label, *weights)
    rows = zip(lrs, used, validated, tested, strict=True)
    return [Linear(lr, rate, validation[0], *test) for lr, rate, validation, test in rows]


@torch.no_grad()
def max_stable_lr(x: Tensor, images: int) -> float:
    """Largest learning rate at which SGD with momentum cannot oscillate, on standardised features [N, D] of all ranks.

    It is 2 (1 + momentum) / L. The curvature L of softmax regression is at most half of the largest eigenvalue of the
    features' correlation (Boehning, 1992), found by power iteration.
    """
    vector = torch.randn(x.shape[1], generator=torch.Generator().manual_seed(0)).to(x)
    eigenvalue = 0.0
    for _ in range(POWER_STEPS):
        vector = sum_over_ranks(x.T @ (x @ (vector / vector.norm()))) / images
        eigenvalue = float(vector.norm())
    return 2 * (1 + MOMENTUM) / (0.5 * eigenvalue) if eigenvalue > 0 else math.inf


def best_of(grid: list[Linear]) -> Linear:
    """The classifier with the highest accuracy on the held-out training images."""
    return max(grid, key=lambda classifier: classifier.held_out)


def _fit(
    x: Tensor, label: Tensor, orders: Iterable[np.ndarray], steps: int, classes: int, lrs: list[float]
) -> tuple[Tensor, Tensor]:
    """Weight [G, D, K] and bias [G, 1, K] of the softmax regression on standardised features [N, D].

    `orders` has for each epoch the rows in `x` of all ranks' images, -1 for other ranks'; `steps` counts all epochs.
    """
    weight = x.new_zeros(len(lrs), x.shape[1], classes, requires_grad=True)
    bias = x.new_zeros(len(lrs), 1, classes, requires_grad=True)
    # SGD is linear in the gradient, so scaling the losses by the learning rates needs only one optimizer
    rates, optimizer = x.new_tensor(lrs), torch.optim.SGD([weight, bias], 1.0, MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for order in orders:
        for start in range(0, len(order), LINEAR_BATCH):
            batch = order[start : start + LINEAR_BATCH]
            rows = _own_rows(batch, x.device)
            logits = (x[rows] @ weight + bias).flatten(0, 1)  # [G * Q, K]
            losses = F.cross_entropy(logits, label[rows].repeat(len(lrs)), reduction="none").view(len(lrs), -1).sum(1)
            optimizer.zero_grad()
            (losses @ rates / len(batch)).backward()
            for parameter in (weight, bias):
                sum_over_ranks(parameter.grad)
            optimizer.step()
            schedule.step()
    return weight.detach(), bias.detach()


def _own_rows(rows: np.ndarray, device: torch.device) -> Tensor:
    """The rows that are on this rank: not -1."""
    return torch.from_numpy(rows[rows >= 0]).to(device)


def _accuracy(x: Tensor, label: Tensor, weight: Tensor, bias: Tensor) -> list[list[float]]:
    """Top-1 and top-5 accuracy over all ranks' images, for each learning rate."""
    parts = zip(x.split(LINEAR_BATCH), label.split(LINEAR_BATCH), strict=True)
    correct = sum(_count_correct(x @ weight + bias, label) for x, label in parts)
    return (sum_over_ranks(correct).double() / sum(gather(len(label)))).tolist()


def _moments(x: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Mean [D] and standard deviation [D] of all ranks' features."""
    mean = (sum_over_ranks(x.sum(0, dtype=torch.float64)) / images).float()
    variance = sum_over_ranks((x - mean).square_().sum(0, dtype=torch.float64)) / images
    return mean, (variance + EPS).sqrt().float()
