"""Options that the benchmarks share, and their results as files. Imports no torch: `--help` answers at once."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from configs.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"
PATCH = 32  # pixels, the encoder's stride


@dataclass(frozen=True)
class Options:
    """Options of every benchmark.

    Args:
        rounds: timed rounds
        json: print JSON instead of a table
        save: also write bench/results/SAVE.json
    """

    device: str
    rounds: int
    json: bool
    save: str | None


def add_options(parser: argparse.ArgumentParser, rounds: int = 7, device: str = "cpu") -> None:
    """Add the fields of `Options` to a parser."""
    parser.add_argument("--device", default=device, choices=["cpu", "cuda"], help="(default %(default)s)")
    parser.add_argument("--rounds", type=positive, default=rounds, help="timed rounds (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--save", metavar="NAME", help="also write bench/results/NAME.json")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what the benchmarks of a whole model share: its name, the batch, the image size, the precision."""
    parser.add_argument("--model", default="convnextv2_tiny", help="model name (default %(default)s)")
    parser.add_argument("--batch", type=positive, default=8, help="images (default %(default)s)")
    parser.add_argument("--size", type=image_size, default=224, help="image side in pixels (default %(default)s)")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="bf16 means autocast")


def positive(text: str) -> int:
    """An argument that is a positive whole number."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def image_size(text: str) -> int:
    """An argument that is an image side in pixels."""
    if positive(text) % PATCH:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of the patch, {PATCH} pixels")
    return int(text)


def report(result: dict, lines: list[str], options: Options) -> None:
    """Print a result as lines or JSON, and write it to bench/results if `--save` asks for it."""
    text = json.dumps(result, indent=1)
    print(text if options.json else "\n".join(lines))
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        write_whole(RESULTS / f"{options.save}.json", f"{text}\n".encode())
