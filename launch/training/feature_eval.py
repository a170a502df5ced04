"""What an encoder's features tell of labelled images: nearest neighbours, a linear classifier. On any number of ranks.

Each rank holds the features of its part of a split. Letters: N images of a part, Q images at a time, D width of the
features, K classes, G learning rates.
"""

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
from launch.training.watchdog import Watch
from launch.training.world import World, gather, sum_over_ranks
from models.convnext import ConvNeXt
from models.sparse.layouts import Dense

KS, TEMPERATURE = (10, 20, 100, 200), 0.07  # neighbours, and how fast their votes fall: 1805.01978, section 3.4
LRS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
TOP = 5
QUERIES, BANK = 512, 1 << 16  # images compared at a time: 256 MiB of similarities
LINEAR_BATCH, MOMENTUM = 256, 0.9
EPS = 1e-6  # added to variances, as BatchNorm does: a channel may be constant


@dataclass(frozen=True)
class Features:
    """The features of this rank's part of a split.

    Args:
        x: [N, D] fp32, on the device
        label: [N]
        sample: [N] number of the image in the split
    """

    x: Tensor
    label: Tensor
    sample: Tensor


@dataclass(frozen=True)
class Linear:
    """A linear classifier trained with one learning rate; accuracies in 0 to 1.

    Args:
        lr: the learning rate
        held_out: top-1 on training images that it was not trained on
        top1: on the evaluation split
        top5: on the evaluation split
    """

    lr: float
    held_out: float
    top1: float
    top5: float


def check_labels(split: Split) -> None:
    """Raise `UserError` unless every image of a split has a label."""
    if not split.classes or not len(split) or (split.labels() < 0).any():
        raise UserError(f"{split.folder}, split {split.name} has images without labels: a probe needs one for each")


def probe_loader(
    split: Split, images: int | None, transform: EvalTransform, channels: int, data: Data, batch: int, world: World
) -> Loader:
    """At most so many images of a split (None = all), evenly spread over it, each once; a rank's part of them."""
    taken = min(images or len(split), len(split))
    spread = np.arange(taken) * len(split) // taken
    pin = world.device.type == "cuda"
    return eval_loader(split, transform, channels, data, min(batch, taken), world.rank, world.ranks, pin, spread)


@torch.no_grad()
def features(
    encoder: ConvNeXt, loader: Loader, world: World, mean: Tensor, std: Tensor, precision: str, watch: Watch
) -> Features:
    """The mean of the last stage's tokens of each image, before any norm of a head.

    Label -1 is a batch's filling, or an image in place of a damaged one: it is left out.

    Args:
        mean: [C] of the channels
        std: [C]
        precision: fp32, bf16 or fp16
    """
    training = encoder.training
    encoder.eval()
    parts = []
    for batch in watch(loader, len(loader.batches), f"features of {loader.samples.split.name}"):
        missing = loader.batches.batch - len(batch["image"])
        image = F.pad(batch["image"], (0,) * 7 + (missing,))  # the last digits of a feature depend on the batch's size
        image = normalize(image.to(world.device, non_blocking=True), mean, std)
        with autocast(world.device, precision):
            tokens = encoder.forward_features(image, Dense())
        real = torch.nonzero(batch["label"] >= 0)[:, 0]
        x = tokens.float().mean((1, 2))[real.to(world.device)]
        parts.append((x, batch["label"][real].to(world.device), batch["sample"][real]))
    encoder.train(training)
    return Features(*(torch.cat(column) for column in zip(*parts, strict=True)))


def count(part: Features) -> int:
    """Images of all ranks' parts."""
    return sum(gather(len(part.label)))


@torch.no_grad()
def knn(
    bank: Features, queries: Features, classes: int, ks: Iterable[int], temperature: float, world: World, watch: Watch
) -> dict[int, dict[str, float]]:
    """Accuracy of a vote of the k nearest neighbours: {k: {"top1": 0 to 1, "top5": 0 to 1}} (1805.01978, section 3.4).

    A neighbour of cosine similarity s has exp(s / temperature) votes for its class. A k for which the bank has too few
    images is left out. Every rank calls this, and gets the same.
    """
    images = count(bank)
    ks = sorted({k for k in ks if k <= images})
    if not ks:
        return {}
    bank_x, query_x = F.normalize(bank.x), F.normalize(queries.x)
    counts = gather(len(query_x))
    turns = [(owner, start) for owner, own in enumerate(counts) for start in range(0, own, QUERIES)]
    right = torch.zeros(len(ks), 2, dtype=torch.int64, device=world.device)
    for owner, start in watch(turns, len(turns), "nearest neighbours"):
        here, size = slice(start, start + QUERIES), min(QUERIES, counts[owner] - start)
        x, label = (_from(owner, part, size, world) for part in (query_x[here], queries.label[here]))
        neighbours = _of_all_ranks(*nearest(x, bank_x, bank.label, ks[-1]), world)
        right += torch.stack([_hits(_votes(*neighbours, k, temperature, classes), label) for k in ks])
    share = (right.double() / sum(counts)).tolist()
    return {k: {"top1": top1, "top5": top5} for k, (top1, top5) in zip(ks, share, strict=True)}


def nearest(x: Tensor, bank: Tensor, label: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Similarity [Q, k] and label [Q, k] of the k nearest to queries [Q, D] in a bank [N, D], the nearest first.

    Rows have length 1. Where the bank has fewer than k, similarity -inf fills up.
    """
    x = x.double()  # in fp32, rounding would decide between neighbours, otherwise for another number of ranks
    found = [(x.new_full((len(x), k), -torch.inf), label.new_zeros(len(x), k))]
    for start in range(0, len(bank), BANK):
        part = slice(start, start + BANK)
        similarity, row = (x @ bank[part].double().T).topk(min(k, len(bank[part])), dim=1)
        found.append((similarity, label[part][row]))
    return _merge(found, k)


def _merge(found: list[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The k nearest among the nearest of several parts of a bank."""
    similarity, label = (torch.cat(column, dim=1) for column in zip(*found, strict=True))
    similarity, place = similarity.topk(k, dim=1)
    return similarity, label.gather(1, place)


def _from(owner: int, part: Tensor, size: int, world: World) -> Tensor:
    """One rank's part [size, ...], on all ranks."""
    rows = part.contiguous() if world.rank == owner else part.new_empty(size, *part.shape[1:])
    torch.distributed.broadcast(rows, owner)
    return rows


def _of_all_ranks(similarity: Tensor, label: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """The nearest of all ranks' banks, from those of each."""
    columns = []
    for mine in (similarity, label):
        columns.append([torch.empty_like(mine) for _ in range(world.ranks)])
        torch.distributed.all_gather(columns[-1], mine)
    return _merge(list(zip(*columns, strict=True)), similarity.shape[1])


def _votes(similarity: Tensor, label: Tensor, k: int, temperature: float, classes: int) -> Tensor:
    """Logarithm of the votes [Q, K] of the k nearest, up to a constant of each query; -inf for a class without any."""
    weight = ((similarity[:, :k] - similarity[:, :1]) / temperature).exp()  # relative to the nearest: no overflow
    return weight.new_zeros(len(weight), classes).scatter_add_(1, label[:, :k], weight).log()


def _hits(scores: Tensor, label: Tensor) -> Tensor:
    """How many scores [..., Q, K] are right at first, and among the first five: [..., 2]. One of -inf never is."""
    score, best = scores.topk(min(TOP, scores.shape[-1]), dim=-1)
    hits = (best == label[:, None]) & (score > -torch.inf)
    return torch.stack([hits[..., 0].sum(-1), hits.sum((-1, -2))], dim=-1)


def linear(
    train: Features, evaluation: Features, classes: int, lrs: Iterable[float], epochs: int, seed: int, watch: Watch
) -> list[Linear]:
    """Softmax regression on the features as they are, once for each learning rate, in ascending order.

    Features are standardised with the training features' mean and variance: a BatchNorm without parameters, as in the
    probe of 2111.06377, section A.1. A tenth of the training images, drawn from the seed, is not trained on: accuracy
    there is what a learning rate is to be chosen by. Every rank calls this, and gets the same; the number of ranks does
    not change the batches.
    """
    samples = np.sort(np.concatenate(gather(train.sample.numpy())))
    rng = np.random.default_rng(seed)
    held, kept = np.split(rng.permutation(samples), [max(1, len(samples) // 10)])
    row = np.full(samples[-1] + 1, -1)  # of each image in this rank's part; -1: it is in another's
    row[train.sample.numpy()] = np.arange(len(train.sample))
    mean, std = _moments(train.x, len(samples))
    x, lrs = (train.x - mean).div_(std), sorted(lrs)
    orders = (row[rng.permutation(kept)] for _ in watch(range(epochs), epochs, "linear classifier"))
    weights = _fit(x, train.label, orders, epochs * -(-len(kept) // LINEAR_BATCH), classes, lrs)
    mine = torch.from_numpy(_present(row[held])).to(x.device)
    held_out = _accuracy(x[mine], train.label[mine], *weights)
    tested = _accuracy((evaluation.x - mean).div_(std), evaluation.label, *weights)
    return [Linear(lr, held[0], *test) for lr, held, test in zip(lrs, held_out, tested, strict=True)]


def best_of(grid: list[Linear]) -> Linear:
    """The classifier of the learning rate that is best on the training images held out."""
    return max(grid, key=lambda one: one.held_out)


def _fit(
    x: Tensor, label: Tensor, orders: Iterable[np.ndarray], steps: int, classes: int, lrs: list[float]
) -> tuple[Tensor, Tensor]:
    """Weight [G, D, K] and bias [G, 1, K] of the softmax regression.

    Args:
        x: [N, D] standardised
        label: [N]
        orders: of all ranks' images in each epoch; of each, its row in `x`, or -1
        steps: of all epochs
    """
    weight = x.new_zeros(len(lrs), x.shape[1], classes, requires_grad=True)
    bias = x.new_zeros(len(lrs), 1, classes, requires_grad=True)
    # a factor of the loss is one of all that SGD does, so one optimizer serves all the learning rates
    rates, optimizer = x.new_tensor(lrs), torch.optim.SGD([weight, bias], 1.0, MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for order in orders:
        for start in range(0, len(order), LINEAR_BATCH):
            batch = order[start : start + LINEAR_BATCH]
            rows = torch.from_numpy(_present(batch)).to(x.device)
            losses = _losses(x[rows] @ weight + bias, label[rows])
            optimizer.zero_grad()
            (losses @ rates / len(batch)).backward()
            for parameter in (weight, bias):
                sum_over_ranks(parameter.grad)
            optimizer.step()
            schedule.step()
    return weight.detach(), bias.detach()


def _present(rows: np.ndarray) -> np.ndarray:
    return rows[rows >= 0]


def _losses(logits: Tensor, label: Tensor) -> Tensor:
    """Cross entropy [G] of logits [G, Q, K], summed over the images."""
    label = label.expand(len(logits), -1)
    return F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="none").view(len(logits), -1).sum(1)


def _accuracy(x: Tensor, label: Tensor, weight: Tensor, bias: Tensor) -> list[list[float]]:
    """Top-1 and top-5 over all ranks' images, for each learning rate."""
    parts = zip(x.split(LINEAR_BATCH), label.split(LINEAR_BATCH), strict=True)
    right = sum(_hits(x @ weight + bias, label) for x, label in parts)
    return (sum_over_ranks(right).double() / sum(gather(len(label)))).tolist()


def _moments(x: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Mean [D] and standard deviation [D] of all ranks' features."""
    mean = (sum_over_ranks(x.sum(0, dtype=torch.float64)) / images).float()
    variance = sum_over_ranks((x - mean).square_().sum(0, dtype=torch.float64)) / images
    return mean, (variance + EPS).sqrt().float()
