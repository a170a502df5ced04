"""Write a trained model in a format to deploy; the file is read back by its own runtime and compared on real images.

python finetune/export.py runs/photos-finetuned/best.pt photos.onnx --to onnx --images shards/photos
python finetune/export.py runs/photos-finetuned/best.pt photos.pt2 --to torch-export --images photos/ --fp16
python finetune/export.py runs/photos/fcmae.pt backbone.onnx --to onnx --images shards/photos --features
python finetune/export.py runs/photos-finetuned/best.pt photos.safetensors --to safetensors --images photos/

The graph normalises inside: it takes float32 images [B, C, H, W] from 0 to 1, resized and cropped, of any batch size.
What it takes and gives, class names and preprocessing stand in the file as JSON. --features leaves the classifier out
and gives the maps of the four stages, for detection and segmentation. docs/weights.md has more.
"""

import argparse
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

import numpy as np
import torch
from torch import Tensor

from configs.errors import Parser, UserError, run_main
from configs.files import sync_folder
from data.decode import decode
from data.folder import open_images, read_image
from data.transforms import to_float
from finetune.exporters import SUFFIXES, Deployed, call, compare, export, free_sides, least_side, load, run
from finetune.half import HALF_TOLERANCE, check_half, half, half_tensors
from finetune.trained import Trained, add_model, open_trained
from models.convert import describe

COMPARED = 16  # images
TOLERANCE = 1e-4  # of the largest output: runtimes add up in other orders


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    add_model(parser)
    parser.add_argument("out", metavar="OUT", help=f"file to write, named *{', *'.join(SUFFIXES.values())}")
    parser.add_argument("--to", required=True, choices=SUFFIXES, metavar="FORMAT", help=f"one of {', '.join(SUFFIXES)}")
    images = f"what to compare on: an image, a folder, or shards; {COMPARED} are taken"
    parser.add_argument("--images", required=True, metavar="PATH", help=images)
    parser.add_argument("--split", default="val", help="which one of --images (default %(default)s)")
    parser.add_argument("--features", action="store_true", help="without the classifier: the maps of the four stages")
    parser.add_argument("--fp16", action="store_true", help="weights and tokens in fp16; norms and head stay fp32")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse(argv)
    out = Path(args.out)
    check_out(out, args.to)
    trained = open_trained(args.weights, args.ema, args.size, backbone=args.features)
    weights = trained.weights
    images = read_images(args, trained)
    print(f"{args.weights}: {describe(weights)}; comparing on {len(images)} images", flush=True)
    source = deployed = Deployed(trained.model, trained.mean, trained.std)
    free = free_sides(weights)
    if args.features and not all(free):
        print(f"  its size is fixed where a side is below {least_side(weights.arch)} pixels: --size sets another")
    batches = batches_of(images, free)
    expected = [run(source)(batch) for batch in batches]
    tolerance = TOLERANCE
    if args.fp16:
        deployed, tolerance = half(source), HALF_TOLERANCE
        check_half(source, deployed, expected, batches)
        weights = replace(weights, encoder=half_tensors(weights.encoder), head=half_tensors(weights.head))
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        export(part / out.name, args.to, deployed, weights)
        found = load(part / out.name, args.to, weights)
        largest = compare(expected, found, batches, tolerance, f"{out} is not written: it")
        files = move(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    size, shapes = sum(file.stat().st_size for file in files), ["x".join(map(str, batch.shape)) for batch in batches]
    print(
        f"wrote {' and '.join(map(str, files))}, {size / 1e6:.1f} MB; read back, its outputs for images of "
        f"{', '.join(shapes)} differ by {largest:.1e} of the largest at most; load it with\n"
        f"  {call(out, args.to, weights)}"
    )


def check_out(out: Path, to: str) -> None:
    """Raise `UserError` for a file that is there, has not its format's suffix, or cannot be written."""
    if out.suffix != SUFFIXES[to]:
        raise UserError(f"{out}: the name of a file of {to} ends in {SUFFIXES[to]}")
    for path in (out, out.with_name(f"{out.name}.data")):  # the second: weights of an ONNX model of more than 2 GB
        if path.exists():
            raise UserError(f"{path} exists: choose another name, or remove it")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent} is not a folder: make it first")


def read_images(args: argparse.Namespace, trained: Trained) -> Tensor:
    """Images of --images, evenly spread over it, as the exported model takes them: [N, C, H, W] from 0 to 1.

    Raises:
        UserError: there is none, or one cannot be read
    """
    path, found = Path(args.images), []
    images = None if path.is_file() else open_images(args.images, args.split)
    count = 1 if images is None else len(images)
    if not count:
        raise UserError(f"{args.images}, split {args.split} has no images: choose another --split")
    for sample in np.linspace(0, count - 1, min(COMPARED, count)).round().astype(int).tolist():
        try:
            data = read_image(path) if images is None else images.read(sample)[0]
            image = decode(data, trained.weights.arch.channels)
        except UserError as error:
            raise UserError(f"{args.images}{'' if images is None else f', sample {sample}'}: {error}") from None
        found.append(to_float(trained.transform(image)["image"]))
    return torch.stack(found)


def batches_of(images: Tensor, free: tuple[bool, bool]) -> list[Tensor]:
    """Batches of 1, of 3 and of all images; and one image of twice the height and width, where they are free."""
    larger = [images[:1].repeat(1, 1, 1 + free[0], 1 + free[1])] if any(free) else []
    return [images[:1], images[torch.arange(3) % len(images)], images, *larger]


def move(part: Path, out: Path) -> list[Path]:
    """Bring the files of a folder to where `out` is, itself last, and safely to the disk; returns where they are."""
    files = sorted(part.iterdir(), key=lambda file: file.name == out.name)
    for file in files:
        with file.open("rb") as held:
            os.fsync(held.fileno())
        file.replace(out.with_name(file.name))
    sync_folder(out.parent)
    return [out.with_name(file.name) for file in files]


if __name__ == "__main__":
    run_main(main)
