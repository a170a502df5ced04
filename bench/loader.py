"""Time one core of the loader, from JPEG bytes to a normalised crop, against torchvision's ImageFolder with PIL.

python data/prepare.py photos/ shards/photos
python bench/loader.py shards/photos --split train

Both do a random resized crop (bicubic, antialiased), a random flip and the normalisation. First the same crops of the
same images are compared, pixel by pixel.
"""

import io
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from pydantic import PositiveInt

from bench.options import PATCH, Options, Side, report
from configs.command import parse_options
from configs.errors import UserError, run_main
from configs.keys import argument, option
from configs.schema import IMAGENET_MEAN, IMAGENET_STD, Data

SCALE = (0.2, 1.0)
TOLERANCE = 2.0  # mean over an image, of 255 grey levels: decoding at a smaller size is another low-pass filter


@dataclass(frozen=True)
class LoaderOptions(Options):
    """The command line."""

    shards: Path = argument("folder that data/prepare.py wrote")
    split: str = option("train", "split to read")
    size: Side = option(224, "side of the crop in pixels")
    images: PositiveInt = option(256, "images per round")
    rounds: PositiveInt = option(5, "timed rounds")

    def __post_init__(self):
        if not (self.shards / "index.json").exists():
            raise UserError(f"{self.shards} has no index.json: write shards with data/prepare.py")


parse = partial(parse_options, LoaderOptions, __doc__)
if __name__ == "__main__":
    run_main(parse)  # answers --help and mistakes before the imports below, which take seconds

import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from bench import timing
from data.decode import decode
from data.loader import Samples, collate
from data.shards import Split
from data.transforms import PretrainTransform, crop_shrink, normalize, random_box, sample_rng


def compare_pixels(split: Split, crops: Data, images: int) -> float:
    """Largest mean difference, in grey levels, of the same crop by our decoder and resize and by PIL's."""
    largest = 0.0
    for sample in range(min(images, 32)):
        data, _ = split.read(sample)
        ours = decode(data, 3, partial(crop_shrink, crops, sample_rng(0, 0, sample)))
        theirs = Image.open(io.BytesIO(data)).convert("RGB")
        factor = round(theirs.height / ours.shape[1])
        box = random_box(sample_rng(0, 0, sample), *ours.shape[1:], crops.crop_scale, crops.crop_ratio)
        options = {"size": crops.height_width, "interpolation": v2.InterpolationMode.BICUBIC, "antialias": True}
        a = F.resized_crop(ours, *box, **options).float()
        b = F.pil_to_tensor(F.resized_crop(theirs, *(factor * value for value in box), **options)).float()
        largest = max(largest, float((a - b).abs().mean()))
    if largest > TOLERANCE:
        raise UserError(f"our crops differ from PIL's by {largest:.1f} grey levels: not timed")
    return largest


def main() -> None:
    """Entry point."""
    options = parse()
    timing.prepare("cpu")
    torch.set_num_threads(1)
    split, size = Split(options.shards, options.split), options.size
    images = min(options.images, len(split))
    transform = PretrainTransform(Data(size=size, crop_scale=SCALE), (size // PATCH, size // PATCH), 19)
    difference = compare_pixels(split, transform.data, images)
    samples, epochs = Samples(split, 3, 0, transform, crops=transform.data), count()
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)

    def ours_uint8() -> torch.Tensor:
        epoch = next(epochs)
        return collate([samples[epoch, i, 0] for i in range(images)])["image"]

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "class").mkdir()
        for i in range(images):
            (Path(folder) / f"class/{i:06}.jpg").write_bytes(split.read(i)[0])
        crop = v2.RandomResizedCrop(size, SCALE, interpolation=v2.InterpolationMode.BICUBIC)
        to_tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        peer = ImageFolder(folder, v2.Compose([crop, v2.RandomHorizontalFlip(), *to_tensor]))
        runs = {
            "ours": lambda: normalize(ours_uint8(), mean, std),
            "ours, uint8": ours_uint8,
            "ImageFolder + PIL": lambda: torch.stack([peer[i][0] for i in range(images)]),
        }
        times = timing.measure(runs, options.rounds, "cpu", warm_up=1)
    result = {"bench": "loader", "images": images, "size": size, "grey_levels": round(difference, 2)}
    result |= timing.machine("cpu") | times
    lines = [f"one core, {images} images, crops of {size} px; equal crops differ by {difference:.2f} grey levels"]
    lines += [f"{name:20}{1e3 * images / ms:8.1f} images/s" for name, ms in times["milliseconds"].items()]
    speedup = times["speedup"]["ImageFolder + PIL"]
    lines.append(f"ours is {speedup:.2f}x as fast as ImageFolder + PIL, for the same output")
    report(result, lines, options)


if __name__ == "__main__":
    run_main(main)
