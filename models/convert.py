"""Convert ConvNeXt weights between formats; the format of the source is detected.

python models/convert.py checkpoint-799.pth fcmae.pt --to ours            official sparse pretraining -> this project
python models/convert.py runs/photos-finetuned/best.pt hf --to transformers          a folder for from_pretrained
python models/convert.py convnextv2_tiny.pth tiny.safetensors --to timm              a file for create_model
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from configs.arguments import check_parent, check_weights
from configs.errors import Parser, UserError, run_main
from models.formats import FORMATS


@dataclass(frozen=True)
class Options:
    """The command line.

    Args:
        source: file or folder to convert
        destination: file, or for transformers folder, to write
        to: one of `FORMATS`
        ema: write the averaged weights
    """

    source: str
    destination: Path
    to: str
    ema: bool


def parse(argv: list[str] | None = None) -> Options:
    """Parse the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("source", metavar="SRC", help="weight file of any format, or folder with config.json")
    parser.add_argument("destination", type=Path, metavar="DST", help="file to write; for transformers a folder")
    parser.add_argument("--to", required=True, choices=FORMATS, metavar="FORMAT", help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("--ema", action="store_true", help="write the averaged weights instead of the raw ones")
    return Options(**vars(parser.parse_args(argv)))


def main() -> None:
    """Entry point."""
    options = parse()
    if options.destination.exists():
        raise UserError(f"{options.destination} exists: choose another name, or remove it")
    check_parent(options.destination)
    check_weights(options.source)

    from models.formats.write import how_to_load, how_to_load_backbone, write_weights  # torch: takes seconds
    from models.opening import open_weights
    from models.weights import use_ema

    destination, opened = options.destination, open_weights(options.source)
    weights = opened.weights
    print(f"{options.source} is {opened.format}: {weights.describe()}")
    if options.ema:
        weights = use_ema(weights, options.source)
    for remark in [*opened.remarks, *write_weights(destination, weights, options.to)]:
        print(f"  {remark}")
    print(f"wrote {destination}; load it with\n  {how_to_load(destination, weights, options.to)}")
    if backbone := how_to_load_backbone(destination, weights, options.to):
        print(f"or, for the feature maps of the four stages, with\n  {backbone}")


if __name__ == "__main__":
    run_main(main)
