"""Time one core of the loader, from JPEG bytes to a normalised crop, against torchvision's ImageFolder with PIL.

python data/prepare.py photos/ shards/photos
python bench/loader.py shards/photos --split train

Both do a random resized crop (bicubic, antialiased), a random flip and the normalisation. First the same crops of the
same pictures are compared, pixel by pixel.
"""

import argparse
import io
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from bench.common import add_common, check_arguments, machine, measure, show, summary
from configs.errors import Parser, UserError, run_main
from configs.schema import IMAGENET_MEAN, IMAGENET_STD, Data
from data.decode import decode
from data.loader import Samples, collate
from data.shards import Split
from data.transforms import PretrainTransform, normalize
from launch.training.malloc import keep_memory

SCALE = (0.2, 1.0)
TOLERANCE = 1.0  # grey levels, mean over a picture


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("shards", type=Path, help="folder that data/prepare.py wrote")
    parser.add_argument("--split", default="train", help="(default %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="side of the crop, pixels (default %(default)s)")
    parser.add_argument("--images", type=int, default=256, help="images in a round (default %(default)s)")
    add_common(parser, rounds=5)
    args = parser.parse_args()
    check_arguments(args)
    return args


def compare_pixels(split: Split, size: int, images: int) -> float:
    """Largest mean difference, in grey levels, of the same crop by our decoder and resize and by PIL's."""
    rng, worst = np.random.default_rng(0), 0.0
    for sample in range(min(images, 32)):
        data, _ = split.read(sample)
        ours = decode(data, 3)
        theirs = Image.open(io.BytesIO(data)).convert("RGB")
        height, width = ours.shape[1:]
        box = height // 5, width // 7, int(height * rng.uniform(0.4, 0.7)), int(width * rng.uniform(0.4, 0.7))
        options = {"size": [size, size], "interpolation": v2.InterpolationMode.BICUBIC, "antialias": True}
        a = F.resized_crop(ours, *box, **options).float()
        b = F.pil_to_tensor(F.resized_crop(theirs, *box, **options)).float()
        worst = max(worst, float((a - b).abs().mean()))
    if worst > TOLERANCE:
        raise UserError(f"our crops differ from PIL's by {worst:.1f} grey levels: not timed")
    return worst


def main() -> None:
    """Entry point."""
    args = parse()
    torch.set_num_threads(1)
    keep_memory()
    split = Split(args.shards, args.split)
    images = min(args.images, len(split))
    difference = compare_pixels(split, args.size, images)
    grid = args.size // 32, args.size // 32
    samples = Samples(split, 3, 0, PretrainTransform(Data(size=args.size, crop_scale=SCALE), grid, 19))
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    epoch = iter(range(1 << 30))

    def ours_uint8() -> torch.Tensor:
        number = next(epoch)
        return collate([samples[number, i, 0] for i in range(images)])["image"]

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "class").mkdir()
        for i in range(images):
            (Path(folder) / f"class/{i:06}.jpg").write_bytes(split.read(i)[0])
        crop = v2.RandomResizedCrop(args.size, SCALE, interpolation=v2.InterpolationMode.BICUBIC)
        to_tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        peer = ImageFolder(folder, v2.Compose([crop, v2.RandomHorizontalFlip(), *to_tensor]))
        runs = {
            "ours": lambda: normalize(ours_uint8(), mean, std),
            "ours, uint8": ours_uint8,
            "ImageFolder + PIL": lambda: torch.stack([peer[i][0] for i in range(images)]),
        }
        times = measure(runs, args.rounds, "cpu", warm_up=1)
    result = {"bench": "loader", "images": images, "size": args.size, "grey_levels": round(difference, 2)}
    result |= machine("cpu") | summary(times, "ours")
    lines = [f"one core, {images} pictures to {args.size} px; the same crops differ by {difference:.2f} grey levels"]
    for name, value in result["milliseconds"].items():
        lines.append(f"{name:20}{1e3 * images / value:8.1f} images/s")
    lines.append(
        f"ours is {result['speedup']['ImageFolder + PIL']:.2f}x as fast as ImageFolder + PIL, for the same output"
    )
    show(result, lines, args)


if __name__ == "__main__":
    run_main(main)
