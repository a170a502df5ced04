"""Show reconstructions of a masked autoencoder: input, visible patches, prediction, and both combined.

python pretrain/reconstruct.py photo.jpg --weights runs/photos/fcmae.pt --out grid.png
python pretrain/reconstruct.py photos/ --weights runs/photos/fcmae.pt --out grid.png --ratio 0.75 --seed 3
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from configs.arguments import check_parent, check_weights, parse_size
from configs.errors import Parser, UserError, run_main
from configs.schema import Data, visible_patches
from models.sizes import check_size


@dataclass(frozen=True)
class Options:
    """The command line.

    Args:
        images: picture files, .npy arrays, or folders of them
        weights: file with encoder and decoder
        out: PNG file to write
        ratio: share of the patches to hide; None = as in pretraining
        seed: of the masks
        size: image side, or height and width, pixels; None = from the file
        max_images: number of images to show
    """

    images: list[str]
    weights: str
    out: Path
    ratio: float | None
    seed: int
    size: int | tuple[int, int] | None
    max_images: int


def parse(argv: list[str] | None = None) -> Options:
    """Parse the command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="a picture or .npy array, or a folder of them")
    add("--weights", required=True, metavar="FILE", help="fcmae.pt, or an official sparse checkpoint")
    add("--out", required=True, type=Path, metavar="FILE.png", help="picture to write")
    add("--ratio", type=float, help="share of the patches to hide (default: as in pretraining)")
    add("--seed", type=int, default=0, help="of the masks (default 0)")
    size = "image side, or [height,width] (default: from the file)"
    add("--size", type=parse_size, metavar="PIXELS", help=size)
    add("--max-images", type=int, default=16, metavar="N", help="maximum number of images to show (default 16)")
    options = Options(**vars(parser.parse_args(argv)))
    if options.ratio is not None and not 0 < options.ratio < 1:
        parser.error(f"--ratio {options.ratio}: must be between 0 and 1")
    if options.max_images < 1:
        parser.error(f"--max-images {options.max_images}: must be 1 or more")
    return options


def check_paths(options: Options) -> None:
    """Raise `UserError` for a missing file or folder."""
    check_parent(options.out)
    for path in options.images:
        if not Path(path).exists():
            raise UserError(f"{path} does not exist: give a picture or a folder of pictures")
    check_weights(options.weights)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    options = parse(argv)
    check_paths(options)

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
    check_size(model.config, model.settings, grid)
    files: list[Path] = []
    for path in map(Path, options.images):
        files += [Path(item.container) for item in list_images(path)] if path.is_dir() else [path]
    images = []
    for file in files[: options.max_images]:
        try:
            image = center_crop(decode(read_image(file), channels), size, 1)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        images.append(normalize(image, trained.mean, trained.std))
    patches = grid[0] * grid[1]
    n = visible_patches(patches, model.settings.mask_ratio)
    visible = [draw_visible(np.random.default_rng([options.seed, i]), grid, n) for i in range(len(images))]
    with torch.no_grad():
        sheet = reconstruction_grid(model, torch.stack(images), torch.stack(visible), trained.mean, trained.std)
    write_png(options.out, sheet)
    print(f"wrote {options.out}: {len(images)} images, {n} of {patches} patches visible")
    if model.settings.norm_pix:
        print("the model predicts normalised pixels: predicted patches are shown with the true mean and variance")


if __name__ == "__main__":
    run_main(main)
