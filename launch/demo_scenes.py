"""Write scenes of digits on textured ground, with their masks, for the demo's segmentation.

python launch/demo_scenes.py FOLDER

FOLDER/images/SPLIT/N.png are grey, 32x32 pixels; FOLDER/masks/SPLIT/N.png have 0 for the ground and 1 for
digits; FOLDER/classes.txt names the classes and is written last. No digit of scikit-learn's is in both splits. The
scenes are always the same.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SCENES = {"train": 320, "val": 80}
SIDE, SMALLEST, LARGEST = 32, 12, 18  # pixels of a scene and of a digit
DIGITS = 2  # in a scene; they may overlap
INK = 0.45  # brightness from which a pixel is the digit's


def main(folder: Path) -> None:
    """Write all scenes."""
    rng = np.random.default_rng(0)
    digits = load_digits()
    order = rng.permutation(len(digits.images))
    held_out = len(order) // 5
    for split, chosen in (("val", order[:held_out]), ("train", order[held_out:])):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for number in range(SCENES[split]):
            image, mask = scene(digits.images[rng.choice(chosen, DIGITS, replace=False)], rng)
            Image.fromarray(image).save(folder / f"images/{split}/{number:03}.png")
            Image.fromarray(mask).save(folder / f"masks/{split}/{number:03}.png")
    (folder / "classes.txt").write_text("ground\ndigit\n")


def scene(digits: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Image and mask [32, 32] uint8 of digits [n, 8, 8] on a texture that is in places as bright as they are."""
    image = resized(rng.uniform(0, 0.7, (8, 8)), SIDE) + rng.uniform(0, 0.15, (SIDE, SIDE))
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for digit in digits:
        side = int(rng.integers(SMALLEST, LARGEST + 1))
        top, left = rng.integers(SIDE - side + 1, size=2)
        place = slice(top, top + side), slice(left, left + side)
        digit = resized(digit / 16, side)
        image[place] = np.maximum(image[place], digit)
        mask[place][digit > INK] = 1
    return (255 * image.clip(0, 1)).astype(np.uint8), mask


def resized(values: np.ndarray, side: int) -> np.ndarray:
    """Values [H, W], bicubic, as [side, side]."""
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
