"""Show reconstructions of a masked autoencoder: input, visible patches, prediction, and both combined.

python pretrain/reconstruct.py photo.jpg --weights runs/photos/fcmae.pt --out grid.png
python pretrain/reconstruct.py photos/ --weights runs/photos/fcmae.pt --out grid.png --ratio 0.75 --seed 3
python pretrain/reconstruct.py shards/photos --weights runs/photos/fcmae.pt --out grid.png --split train
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from pydantic import NonNegativeInt, PositiveInt

from configs.checks import check_png, check_weights
from configs.command import parse_options
from configs.errors import UserError, run_main
from configs.keys import REQUIRED, Ratio, argument, option
from configs.log import say
from configs.schema import Data, visible_patches
from data.folder import check_images
from data.reading import FileOptions
from models.sizes import check_size


@dataclass(frozen=True)
class Options(FileOptions):
    """The command line."""

    images: tuple[str, ...] = argument("pictures or .npy arrays; folders, zips, tars or tables of them; shards")
    split: str = option("val", "split of shards and collections")
    weights: str = option(REQUIRED, "fcmae.pt, or an official sparse checkpoint")
    out: Path = option(REQUIRED, "PNG picture to write")
    ratio: Ratio | None = option(None, "share of the patches to hide (default: as in pretraining)")
    seed: NonNegativeInt = option(0, "random seed of the masks")
    size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = option(
        None, "image side in pixels, or [height,width] (default: from the file)"
    )
    max_images: PositiveInt = option(16, "maximum number of images to show")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    options = parse_options(Options, __doc__, argv)
    check_png(options.out)
    check_weights(options.weights)
    for path in options.images:
        if not Path(path).is_file():
            check_images(path)

    import numpy as np  # slow imports, after the checks
    import torch

    from data.examples import example_images
    from data.sheets import write_sheet
    from data.transforms import center_crop, draw_visible, normalize
    from models.opening import open_autoencoder
    from pretrain.pictures import reconstruction_grid

    trained = open_autoencoder(options.weights, options.ratio, options.size)
    model, channels, size = trained.model, trained.preprocessing.channels, trained.preprocessing.size
    grid = Data(size=size).grid(model.config.stem_stride)
    check_size(model.config.stem_stride, model.settings.mask_ratio, grid)
    images, problems = [], []
    for path in options.images:
        found, unreadable = example_images(path, options.split, options.max_images - len(images), channels, options)
        images += [normalize(center_crop(image, size, 1), trained.mean, trained.std) for image in found]
        problems += unreadable
    if not images:
        raise UserError(problems[0])
    patches = grid[0] * grid[1]
    n = visible_patches(patches, model.settings.mask_ratio)
    visible = [draw_visible(np.random.default_rng([options.seed, i]), grid, n) for i in range(len(images))]
    with torch.no_grad():
        sheet = reconstruction_grid(model, torch.stack(images), torch.stack(visible), trained.mean, trained.std)
    write_sheet(options.out, sheet)
    say(f"wrote {options.out}: {len(images)} images, {n} of {patches} patches visible")
    for problem in problems:
        say(f"left out: {problem}")
    if model.settings.norm_pix:
        say("the model predicts normalised pixels: predicted patches are shown with the true mean and variance")


if __name__ == "__main__":
    run_main(main)
