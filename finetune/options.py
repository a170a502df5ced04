"""Options that the commands for trained models share; free of torch, so that parsing is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from configs.keys import RAY_HELP, argument, option, require
from data.reading import FileOptions

TTA = ("hflip", "vflip", "crops")  # views in test-time augmentation
STDIN = "-"  # in place of paths: read them from standard input
Size = PositiveInt | tuple[PositiveInt, PositiveInt]


@dataclass(frozen=True)
class ModelOptions:
    """Which model to use."""

    weights: str = argument("best.pt, a file or folder of any other format, or hf://USER/REPO[/FILE][@REVISION]")
    ema: bool = option(False, "use the averaged weights instead of the raw ones")
    size: Size | None = option(None, "image side in pixels, or [height,width] (default: from the file)")


@dataclass(frozen=True)
class DeviceOptions(ModelOptions):
    """Which model to use, and where it runs."""

    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto = a GPU if available")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option("auto", "auto = bf16 on a GPU that has it, else fp32")


@dataclass(frozen=True)
class ImageOptions(FileOptions, DeviceOptions):
    """Which model to use, where it runs, and how files of images are read."""


@dataclass(frozen=True)
class PredictionOptions(ImageOptions):
    """Those of commands that use the outputs of the model's task."""

    tta: tuple[str, ...] = option((), f"average the outputs for several views of each image: {', '.join(TTA)}")

    def __post_init__(self):
        super().__post_init__()
        for name in self.tta:
            require(name in TTA, "--tta", name, f"one or several of {', '.join(TTA)}")


@dataclass(frozen=True)
class EmbedOptions(FileOptions, DeviceOptions):
    """The command line of finetune/embed.py."""

    source: str = argument("images: a folder, a zip, a tar, a table of files, or shards or their URL")
    out: Path = argument("Parquet file to write")
    split: tuple[str, ...] = option(("train",), "splits to embed, in this order; a folder without splits is one")
    dtype: Literal["float32", "float16"] = option("float32", "type of the features in the file")
    batch: PositiveInt = option(64, "images per batch and rank")
    workers: NonNegativeInt | None = option(None, "loader processes per rank (default: its cores, at most 8)")
    ray: str | None = option(None, RAY_HELP, alone="auto")

    def __post_init__(self):
        super().__post_init__()
        require(len(set(self.split)) == len(self.split), "--split", " ".join(self.split), "different splits")
