"""Arguments that the commands for trained models share; free of torch, so that parsing is quick."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from configs.arguments import parse_size
from configs.errors import UserError

STDIN = "-"  # in place of paths: read them from standard input
Options = TypeVar("Options")


@dataclass(frozen=True)
class ModelOptions:
    """Which model to use.

    Args:
        weights: file or folder of any format
        ema: use the averaged weights
        size: image side, or height and width, pixels; None = as stored in the file
    """

    weights: str
    ema: bool
    size: int | tuple[int, int] | None


@dataclass(frozen=True)
class DeviceOptions(ModelOptions):
    """Which model to use, and where it runs.

    Args:
        device: auto, cpu or cuda
        precision: auto, fp32, bf16 or fp16
    """

    device: str
    precision: str


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ModelOptions`."""
    parser.add_argument("weights", metavar="WEIGHTS", help="best.pt, or a file or folder of any other format")
    parser.add_argument("--ema", action="store_true", help="use the averaged weights instead of the raw ones")
    parser.add_argument(
        "--size", type=parse_size, metavar="PIXELS", help="image side, or [height,width] (default: from the file)"
    )


def add_model_and_device(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `DeviceOptions`."""
    add_model(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if available")
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="default: bf16 on a GPU that supports it, else fp32",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # set by DeepSpeed's launcher; RANK is read instead


def parse_options(parser: argparse.ArgumentParser, kind: type[Options], argv: list[str] | None) -> Options:
    """Parse the command line into a dataclass whose fields are the arguments."""
    values = vars(parser.parse_args(argv))
    values.pop("local_rank", None)
    return kind(**values)


def check_positive(parser: argparse.ArgumentParser, **values: float | list[float] | None) -> None:
    """Raise `UserError` for the first argument that is not positive; None is skipped."""
    for name, value in values.items():
        numbers = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if numbers and min(numbers) <= 0:
            parser.error(f"--{name} {' '.join(f'{number:g}' for number in numbers)}: must be positive")


def check_dataset(path: str) -> None:
    """Raise `UserError` unless `path` is a folder, or looks like a URL, which `data.remote` checks later."""
    if ":" not in path and not Path(path).is_dir():
        problem = "is a file" if Path(path).exists() else "does not exist"
        raise UserError(f"{path} {problem}: give a folder of shards or of images, or the URL of a folder of shards")
