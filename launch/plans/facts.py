"""What a plan has to know about a collection: splits, labels, and the sizes, channels and values of some images."""

import math
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from configs.errors import UserError
from configs.schema import Data
from data.decode import decode
from data.folder import Folder, count_labels, is_collection, open_images
from data.layouts import UNLABELED
from data.reading import ImageError, sniff
from data.remote import Remote
from data.shard_index import read_index
from data.shards import Split, open_folder
from data.transforms import to_float

LOOKED = 500  # images that are decoded
ENOUGH = 256  # pixels: JPEGs are decoded at a fraction of their size that keeps the shorter side this long
DIGITS = 4  # of mean and std
SECOND_SPLIT = "fine-tuning needs a second split to evaluate on: prepare the images with --val-fraction 0.1"
TASKS = {  # by the kind of targets: task, and recipe in configs/finetune
    "mask": ("segmentation", "streets"),
    "labels": ("labels", "photos"),
    "numbers": ("numbers", "photos"),
    "boxes": ("detection", "bccd"),
}


@dataclass(frozen=True)
class Look:
    """One decoded image."""

    height: int
    width: int
    array: bool  # .npy, whose channels are not converted
    deep: bool  # more than 8 bits per channel
    mean: np.ndarray  # of each channel, of pixels from 0 to 1, without alpha
    square: np.ndarray  # mean of the squares


@dataclass(frozen=True)
class Facts:
    """A collection, as far as a plan depends on it."""

    path: str
    splits: dict[str, Counter]  # images of each class, None = without a label
    split: str  # to pretrain on
    looked: int  # images that the following are from
    side: tuple[int, int, int]  # shorter side: lowest, median, highest
    channels: int
    deep: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    kind: str | None = None  # of the targets of tasks other than classification

    @property
    def images(self) -> int:
        """Images to pretrain on."""
        return self.splits[self.split].total()


def find_facts(path: str) -> tuple[Facts, Split | Folder]:
    """Look at a collection; also the opened split to pretrain on. Raises `UserError` if there are no usable images."""
    splits = {name: labels for name, labels in count_labels(path).items() if labels.total()}
    if not splits:
        raise UserError(f"{path} has no images: prepare some with data/prepare.py")
    names = [name for name in ("train", UNLABELED) if name in splits] or list(splits)
    split = max(names, key=lambda name: splits[name].total())
    images = open_images(path, split)
    looks = list(look_at(images))
    channels = count_channels(looks)
    means, squares = (np.stack(values) for values in zip(*(spread(look, channels) for look in looks), strict=True))
    mean = means.mean(0)
    std = np.sqrt(np.maximum(squares.mean(0) - mean**2, 0))
    shorter = np.quantile([min(look.height, look.width) for look in looks], (0, 0.5, 1))
    deep = any(look.deep for look in looks)
    statistics = (tuple(float(f"{x:.{DIGITS}g}") for x in values) for values in (mean, np.maximum(std, 1e-4)))
    sides, kind = tuple(map(int, shorter)), target_kind(path)
    return Facts(path, splits, split, len(looks), sides, channels, deep, *statistics, kind), images


def look_at(images: Split | Folder, count: int = LOOKED) -> Iterator[Look]:
    """Decode some images, always the same ones, evenly spread; of a remote split only those of the first shard.

    Raises `UserError` if no image can be decoded.
    """
    total = int(images.counts[0]) if isinstance(images.folder, Remote) else len(images)
    chosen = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int))
    cores, problem, usable = len(os.sched_getaffinity(0)), "", 0
    groups = np.array_split(chosen, -(-len(chosen) // (4 * cores)))  # not all at once: arrays may be large
    with ThreadPoolExecutor(cores) as pool:
        for group in groups:
            for look in pool.map(_look, [_read(images, sample) for sample in group.tolist()]):
                if isinstance(look, Look):
                    usable += 1
                    yield look
                problem = problem or str(look)
    if not usable:
        raise UserError(f"{images.folder}: no image can be read, the first: {problem}")


def _read(images: Split | Folder, sample: int) -> bytes | UserError:
    try:
        return images.read(sample)[0]
    except UserError as error:
        return error


def _look(data: bytes | UserError) -> Look | UserError | ImageError:
    if isinstance(data, UserError):
        return data
    sizes = []

    def shrink(height: int, width: int) -> int:
        sizes.append((height, width))
        return next(factor for factor in (8, 4, 2, 1) if factor == 1 or min(height, width) // factor >= ENOUGH)

    try:
        image, array = decode(data, shrink=shrink), sniff(data) == "npy"
        if not array and len(image) in (2, 4):  # alpha, or inks
            image = decode(data, len(image) - 1, shrink)
    except ImageError as error:
        return error
    height, width = sizes[0] if sizes else image.shape[1:]
    deep, pixels = image.dtype != torch.uint8, to_float(image).flatten(1).double()
    return Look(height, width, array, deep, pixels.mean(1).numpy(), pixels.square().mean(1).numpy())


def count_channels(looks: list[Look]) -> int:
    """Channels of a model: those of most arrays, which are not converted; 1 if all pictures are grey, else 3."""
    arrays = Counter(len(look.mean) for look in looks if look.array)
    return arrays.most_common(1)[0][0] if arrays else max(len(look.mean) for look in looks)


def spread(look: Look, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and mean square of an image in the model's channels."""
    if len(look.mean) == channels:
        return look.mean, look.square
    repeats = math.ceil(channels / len(look.mean))  # a grey picture among colours, or the reverse
    return np.tile(look.mean, repeats)[:channels], np.tile(look.square, repeats)[:channels]


def target_kind(path: str) -> str | None:
    """Kind of the targets of tasks other than classification; None without, and for images without shards."""
    if is_collection(path):
        return None
    targets = read_index(open_folder(Data(path))).targets
    return targets["kind"] if targets else None


def why_no_finetuning(splits: dict[str, Counter], eval_split: str | None, kind: str | None = None) -> str | None:
    """Why fine-tuning cannot be trained on these splits, and what helps; None if classification can.

    `kind` is that of the targets of another task, if there are any.
    """
    if kind and eval_split is None:
        return SECOND_SPLIT
    train = splits.get("train")
    if train is None or set(train) == {None}:
        return "fine-tuning needs labels: folders of classes, or a table (data/prepare.py --labels); see docs/data.md"
    if len(train) == 1:
        return "fine-tuning needs images of several classes"
    if eval_split is None:
        return SECOND_SPLIT
    for name in ("train", eval_split):
        if None in splits[name]:
            missing = f"{splits[name][None]:,} of {splits[name].total():,}"
            return f"fine-tuning needs labels: split {name} has none for {missing} images; leave these out"
    return None


def evaluated_split(splits: dict[str, Counter]) -> str | None:
    """The split that fine-tuning is evaluated on; None if there is none besides `train`."""
    return next((name for name in ("val", "test") if name in splits), None)
