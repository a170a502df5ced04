"""Show reconstructions of a masked autoencoder: input, visible patches, prediction, and both combined.

python pretrain/reconstruct.py photo.jpg --weights runs/photos/fcmae.pt --out grid.png
python pretrain/reconstruct.py photos/ --weights runs/photos/fcmae.pt --out grid.png --ratio 0.75 --seed 3
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from pydantic import NonNegativeInt, PositiveInt

from configs.checks import check_exists, check_parent
from configs.command import parse_options
from configs.errors import UserError, run_main
from configs.keys import REQUIRED, Ratio, argument, option
from configs.schema import Data, visible_patches
from models.sizes import check_size


@dataclass(frozen=True)
class Options:
    """The command line."""

    images: tuple[str, ...] = argument("a picture or .npy array, or a folder of them")
    weights: str = option(REQUIRED, "fcmae.pt, or an official sparse checkpoint")
    out: Path = option(REQUIRED, "PNG picture to write")
    ratio: Ratio | None = option(None, "share of the patches to hide (default: as in pretraining)")
    seed: NonNegativeInt = option(0, "of the masks")
    size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = option(
        None, "image side in pixels, or [height,width] (default: from the file)"
    )
    max_images: PositiveInt = option(16, "maximum number of images to show")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    options = parse_options(Options, __doc__, argv)
    check_parent(options.out)
    for path in (options.weights, *options.images):
        check_exists(path, "a weight file, and pictures or folders of them")

    import numpy as np  # slow imports, after the checks
    import torch

    from data.decode import decode
    from data.folder import list_images, read_image
    from data.transforms import center_crop, draw_visible, normalize
    from models.opening import open_autoencoder
    from pretrain.pictures import reconstruction_grid, write_png

    trained = open_autoencoder(options.weights, options.ratio, options.size)
    model, channels, size = trained.model, trained.preprocessing.channels, trained.preprocessing.size
    grid = Data(size=size).grid(model.config.stem_stride)
    check_size(model.config.stem_stride, model.settings.mask_ratio, grid)
    files = []
    for path in map(Path, options.images):
        files += [Path(item.container) for item in list_images(path)] if path.is_dir() else [path]
    images, problems = [], []
    for file in files[: options.max_images]:
        try:
            image = center_crop(decode(read_image(file), channels), size, 1)
        except UserError as error:
            problems.append(f"{file}: {error}")
            continue
        images.append(normalize(image, trained.mean, trained.std))
    if not images:
        raise UserError(problems[0])
    patches = grid[0] * grid[1]
    n = visible_patches(patches, model.settings.mask_ratio)
    visible = [draw_visible(np.random.default_rng([options.seed, i]), grid, n) for i in range(len(images))]
    with torch.no_grad():
        sheet = reconstruction_grid(model, torch.stack(images), torch.stack(visible), trained.mean, trained.std)
    write_png(options.out, sheet)
    print(f"wrote {options.out}: {len(images)} images, {n} of {patches} patches visible")
    for problem in problems:
        print(f"left out: {problem}")
    if model.settings.norm_pix:
        print("the model predicts normalised pixels: predicted patches are shown with the true mean and variance")


if __name__ == "__main__":
    run_main(main)
