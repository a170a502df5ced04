"""Convert ConvNeXt weights between formats; the source's format is recognised.

python models/convert.py checkpoint-799.pth fcmae.pt --to ours            official sparse pretraining -> this project
python models/convert.py runs/photos-finetuned/best.pt hf --to transformers          a folder for from_pretrained
python models/convert.py convnextv2_tiny.pth tiny.safetensors --to timm              a file for create_model
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from configs.errors import Parser, UserError, run_main
from models.formats.read import read_weights
from models.formats.write import FORMATS, how_to_load, how_to_load_backbone, write_weights
from models.weights import Weights, averaged


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("source", metavar="SRC", help="weight file of any of the formats, or folder with config.json")
    parser.add_argument("destination", metavar="DST", help="file to write; for transformers a folder")
    parser.add_argument("--to", required=True, choices=FORMATS, metavar="FORMAT", help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("--ema", action="store_true", help="write the averaged weights in place of the raw ones")
    return parser.parse_args(argv)


def describe(weights: Weights) -> str:
    """The model and the parts that are there, as one line."""
    arch = weights.arch
    parts = {"encoder": weights.encoder, "decoder": weights.decoder, "head": weights.head, "EMA": weights.ema}
    held = ", ".join(name for name, tensors in parts.items() if tensors)
    millions = sum(tensor.numel() for tensor in weights.encoder.values()) / 1e6
    return f"{arch.name} ({millions:.1f}M, input channels {arch.channels}, stem stride {arch.stem_stride}): {held}"


def main() -> None:
    """Entry point."""
    args = parse()
    destination = Path(args.destination)
    if destination.exists():
        raise UserError(f"{destination} exists: choose another name, or remove it")
    if not destination.parent.is_dir():
        raise UserError(f"{destination.parent} is not a folder: make it first")
    weights, form, remarks = read_weights(args.source)
    print(f"{args.source} is {form}: {describe(weights)}")
    if args.ema:
        weights = averaged(weights, args.source)
    for remark in remarks + write_weights(destination, weights, args.to):
        print(f"  {remark}")
    print(f"wrote {destination}; load it with\n  {how_to_load(destination, weights, args.to)}")
    if backbone := how_to_load_backbone(destination, weights, args.to):
        print(f"or, for the maps of the four stages, with\n  {backbone}")


if __name__ == "__main__":
    run_main(main)
