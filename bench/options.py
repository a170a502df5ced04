"""Options that the benchmarks share, and their results as files. Imports no torch: `--help` answers at once."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from configs.files import write_atomic
from configs.keys import option

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"
PATCH = 32  # pixels, the encoder's stride
Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "bf16"]
Side = Annotated[int, Field(gt=0, multiple_of=PATCH)]


@dataclass(frozen=True)
class Options:
    """Options of every benchmark."""

    device: Device = option("cpu", "where to run")
    threads: PositiveInt | None = option(None, "threads on a CPU (default: all cores)")
    rounds: PositiveInt = option(7, "timed rounds")
    json: bool = option(False, "print JSON instead of a table")
    save: str | None = option(None, "also write bench/results/SAVE.json")


@dataclass(frozen=True)
class ModelOptions(Options):
    """Options of the benchmarks of a whole model."""

    model: str = option("convnextv2_tiny", "model name")
    batch: PositiveInt = option(8, "images")
    size: Side = option(224, "image side in pixels")
    precision: Precision = option("fp32", "bf16 means autocast")


def report(result: dict, lines: list[str], options: Options) -> None:
    """Print a result as lines or JSON, and write it to bench/results if `--save` asks for it."""
    text = json.dumps(result, indent=1)
    print(text if options.json else "\n".join(lines))
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        write_atomic(RESULTS / f"{options.save}.json", f"{text}\n".encode())
