"""Show what a masked autoencoder makes of images: input, visible patches, prediction, and both pasted together.

python pretrain/reconstruct.py photo.jpg --weights runs/photos/fcmae.pt --out grid.png
python pretrain/reconstruct.py photos/ --weights runs/photos/fcmae.pt --out grid.png --ratio 0.75 --seed 3
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

import numpy as np
import torch

from configs.arguments import parse_size
from configs.errors import Parser, UserError, run_main
from configs.schema import Data, visible_patches
from data.decode import decode
from data.folder import list_images, read_image
from data.transforms import center_crop, draw_visible, normalize
from models.fcmae import FCMAE, from_flat
from models.formats.read import read_weights
from models.sizes import check_size
from models.weights import load_strict
from pretrain.pictures import reconstruction_grid, write_png


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a picture or .npy array, or a folder of them")
    parser.add_argument("--weights", required=True, metavar="FILE", help="fcmae.pt, or an official sparse checkpoint")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.png", help="picture to write")
    parser.add_argument("--ratio", type=float, help="share of the patches to hide (default: as in pretraining)")
    parser.add_argument("--seed", type=int, default=0, help="of the masks (default 0)")
    size = "side of the images, or [height,width] (default: the file's)"
    parser.add_argument("--size", type=parse_size, metavar="PIXELS", help=size)
    parser.add_argument("--most", type=int, default=16, metavar="N", help="images to show of those given (default 16)")
    return parser.parse_args(argv)


def open_autoencoder(path: str, ratio: float | None) -> tuple[FCMAE, dict]:
    """(masked autoencoder of a file, the file's preprocessing); `ratio` replaces the mask ratio it was trained with.

    Raises:
        UserError: the file cannot be read or has no decoder
    """
    weights, _, _ = read_weights(path)
    if not weights.decoder:
        raise UserError(f"{path} has no decoder: give the fcmae.pt of a pretraining run")
    if weights.image["mean"] is None:
        raise UserError(
            f"{path} does not tell how its channels were normalised: give the fcmae.pt of a pretraining run"
        )
    config, settings = from_flat(weights.decoder_config | {"backend": "packed", "recompute": "none"})
    model = FCMAE(config, replace(settings, mask_ratio=ratio or settings.mask_ratio))
    encoder = {f"encoder.{name}": tensor for name, tensor in weights.encoder.items()}
    load_strict(model, encoder | weights.decoder, path)
    return model.eval(), weights.image


def collect(paths: list[str], most: int) -> list[Path]:
    """Image files among the paths and in their folders, `most` at most. Raises `UserError` for a missing path."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path} does not exist: give a picture or a folder of pictures")
        files += [Path(item.container) for item in list_images(path)] if path.is_dir() else [path]
    return files[:most]


def load_image(file: Path, channels: int, size: tuple[int, int]) -> torch.Tensor:
    """A whole image, squashed to [C, *size], as loaded. Raises `UserError`, naming it, if it cannot be read."""
    try:
        return center_crop(decode(read_image(file), channels), size, 1)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


@torch.no_grad()
def main() -> None:
    """Entry point."""
    args = parse()
    if not args.out.absolute().parent.is_dir():
        raise UserError(f"{args.out.parent} is not a folder: make it first")
    model, about = open_autoencoder(args.weights, args.ratio)
    mean, std = torch.tensor(about["mean"]), torch.tensor(about["std"])
    data = Data(size=args.size or tuple(about["size"]))
    grid = data.grid(model.config.stem_stride)
    check_size(model.config, model.settings, grid)
    files = collect(args.images, args.most)
    images = [normalize(load_image(file, model.config.channels, data.height_width), mean, std) for file in files]
    n = visible_patches(grid[0] * grid[1], model.settings.mask_ratio)
    visible = [draw_visible(np.random.default_rng([args.seed, i]), grid, n) for i in range(len(images))]
    write_png(args.out, reconstruction_grid(model, torch.stack(images), torch.stack(visible), mean, std))
    print(f"wrote {args.out}: {len(images)} images, {n} of {grid[0] * grid[1]} patches visible")
    if model.settings.norm_pix:
        print("predicted patches have the mean and variance of the true ones: the model predicts normalised pixels")


if __name__ == "__main__":
    run_main(main)
