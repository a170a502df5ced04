"""Convert ConvNeXt weights between formats; the format of the source is detected.

python models/convert.py checkpoint-799.pth fcmae.pt --to ours            official sparse pretraining -> this project
python models/convert.py runs/photos-finetuned/best.pt hf --to transformers          a folder for from_pretrained
python models/convert.py convnextv2_tiny.pth tiny.safetensors --to timm              a file for create_model
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from configs.checks import check_exists, check_new
from configs.command import parse_options
from configs.errors import run_main
from configs.keys import REQUIRED, argument, option
from models.formats import FORMATS


@dataclass(frozen=True)
class Options:
    """The command line."""

    source: str = argument("weight file of any format, or folder with config.json")
    destination: Path = argument("file to write; for transformers a folder")
    to: Literal[FORMATS] = option(REQUIRED, "format")
    ema: bool = option(False, "write the averaged weights instead of the raw ones")


def main() -> None:
    """Entry point."""
    options = parse_options(Options, __doc__)
    check_new(options.destination)
    check_exists(options.source)

    from models.formats.write import how_to_load, how_to_load_backbone, write_weights  # torch: takes seconds
    from models.opening import open_weights
    from models.weights import use_ema

    destination, opened = options.destination, open_weights(options.source)
    print(f"{options.source} is {opened.format}: {opened.weights.describe()}")
    weights = use_ema(opened.weights, options.source) if options.ema else opened.weights
    for remark in [*opened.remarks, *write_weights(destination, weights, options.to)]:
        print(f"  {remark}")
    print(f"wrote {destination}; load it with\n  {how_to_load(destination, weights, options.to)}")
    if backbone := how_to_load_backbone(destination, weights, options.to):
        print(f"or, for the feature maps of the four stages, with\n  {backbone}")


if __name__ == "__main__":
    run_main(main)
