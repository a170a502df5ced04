"""Batches for inference: images of a split with a progress bar, and picture files decoded by threads."""

import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from configs.errors import UserError
from configs.log import say
from data.decode import decode
from data.examples import example_images
from data.folder import list_images, read_image
from data.loader import OBJECT, Loader
from data.reading import HEAD_BYTES, Reading, sniff
from data.tars import READABLE
from data.transforms import EvalTransform, to_float
from finetune.inference import Inference
from finetune.options import STDIN

PREFETCHED = 2  # batches decoded in advance
UNKNOWN_TYPE = f"not of a known type ({', '.join(READABLE)})"


@dataclass(frozen=True)
class Picture:
    """A picture file: what the transform makes of it, or the reason why it is unreadable."""

    path: Path
    entries: dict[str, Tensor | int] = field(default_factory=dict)
    error: str = ""


def padded_batches(loader: Loader, size: int, damaged: dict[int, str], first: bool) -> Iterator[dict[str, Tensor]]:
    """Batches of a split, padded to `size` images with copies of the first one; their sample and label are -1.

    The last digits of outputs depend on the batch size; with a fixed one, results do not depend on the number of ranks.
    `damaged` receives the error of each damaged sample; the first rank shows a progress bar.
    """
    bar = Console(stderr=True)
    for batch in track(loader, "evaluating", len(loader.batches), console=bar, disable=not first, show_speed=False):
        for sample in batch["sample"][batch["damaged"]].tolist():
            damaged[sample] = loader.samples.describe_damage(sample)
        missing = size - len(batch["sample"])
        for key, x in batch.items():
            if not key.startswith(OBJECT):
                batch[key] = torch.cat([x, x[:1].repeat(missing, *[1] * (x.ndim - 1))])
        for key, value in {"sample": -1, "label": -1, "objects": 0}.items():
            if key in batch:
                batch[key][size - missing :] = value
        yield batch


def find_pictures(arguments: Sequence[str]) -> Iterator[Path]:
    """Paths of pictures from arguments: files, folders, or `-` for standard input, whose paths are not checked.

    Raises:
        UserError: no argument is a picture, or a folder contains none
    """
    if STDIN in arguments:
        if len(arguments) > 1:
            raise UserError(f"{STDIN} reads paths from standard input: give no other paths")
        sys.stdin.reconfigure(errors="surrogateescape")
        return (Path(line.rstrip("\n")) for line in sys.stdin if line.strip())
    if not any(Path(path).is_dir() or is_picture(Path(path)) for path in arguments):
        raise UserError(f"{arguments[0]}: {UNKNOWN_TYPE}")
    paths = []
    for path in map(Path, arguments):
        paths += list_images(path) if path.is_dir() else [path]
    return iter(paths)


def is_picture(path: Path) -> bool:
    """Whether a file has the suffix or the first bytes of a readable picture."""
    if path.suffix.lower().removeprefix(".") in READABLE:
        return True
    try:
        with path.open("rb") as file:
            return sniff(file.read(HEAD_BYTES)) != ""
    except OSError:
        return False


def picture_batches(
    paths: Iterator[Path], task: Inference, batch: int, prefetched: int, reading: Reading
) -> Iterator[list[Picture]]:
    """Batches of pictures, decoded and transformed for a task by threads `prefetched` batches in advance."""
    channels, target = task.trained.preprocessing.channels, None if task.read_target else -1

    def read_picture(path: Path) -> Picture:
        if not is_picture(path):
            return Picture(path, error=UNKNOWN_TYPE)
        try:
            image = decode(read_image(path, reading), channels, max_pixels=reading.max_pixels)
            return Picture(path, task.transform(image, target, np.random.default_rng(0)))
        except UserError as error:
            return Picture(path, error=str(error))

    pending: deque = deque()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        while chunk := list(islice(paths, batch)):
            pending.append([pool.submit(read_picture, path) for path in chunk])
            if len(pending) > prefetched:
                yield [future.result() for future in pending.popleft()]
        for chunk in pending:
            yield [future.result() for future in chunk]


def sample_images(
    path: str, split: str, count: int, transform: EvalTransform, channels: int, reading: Reading
) -> Tensor:
    """Up to `count` transformed images [N, C, H, W] from 0 to 1, as `data.examples.example_images`.

    Unreadable ones are reported and left out. Raises `UserError` if there is no readable image.
    """
    images, problems = example_images(path, split, count, channels, reading)
    for problem in problems:
        say(f"left out: {problem}")
    if not images:
        raise UserError(problems[-1])
    return torch.stack([to_float(transform(image)["image"]) for image in images])
