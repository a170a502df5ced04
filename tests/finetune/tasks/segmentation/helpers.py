"""Small images with masks, and models for them."""

import io
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from configs.preprocessing import Preprocessing
from configs.schema import Encoder
from data import prepare
from finetune.tasks.segmentation.model import HeadConfig, Segmenter
from models.weights import Weights, cpu_state, save, split_by_prefix
from tests.data.helpers import as_folder

NAMES = ["ground", "square", "stripe"]
VOID = 9  # in the source's masks
ARCH = Encoder("convnextv2_atto", 3, 1, (1, 1, 1, 1), (8, 16, 16, 16))


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def scene(seed: int, height: int = 40, width: int = 56) -> tuple[np.ndarray, np.ndarray]:
    """An image [H, W, 3] with a red square and a blue stripe on grey ground, and its mask [H, W] with VOID on top."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    mask[:, (x := rng.integers(width - 8)) : x + 8] = 2
    y, x = rng.integers(height - 16), rng.integers(width - 16)
    mask[y : y + 16, x : x + 16] = 1
    colours = np.array([[120, 120, 120], [200, 40, 40], [40, 40, 200]])
    image = (colours[mask] + rng.normal(0, 20, (height, width, 3))).clip(0, 255).astype(np.uint8)
    mask[:2] = VOID
    return image, mask


def source(folder: Path, train: int = 12, val: int = 5, sizes: tuple[tuple[int, int], ...] = ((40, 56),)) -> Path:
    """images/SPLIT/N.png and labels/SPLIT/N.png, and classes.txt."""
    files = {}
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            image, mask = scene(i + 100 * (split == "val"), *sizes[i % len(sizes)])
            files |= {f"images/{split}/{i}.png": png(image), f"labels/{split}/{i}.png": png(mask)}
    return as_folder(files | {"classes.txt": "\n".join(NAMES).encode()}, folder)


def shards(folder: Path, **more: object) -> Path:
    """The images as shards."""
    made = source(folder / "source", **more)
    words = ["--masks", "labels", "--mask-classes", made / "classes.txt", "--ignore", VOID, "--workers", "1"]
    prepare.main(list(map(str, [made, folder / "shards", *words])))
    return folder / "shards"


def config(head: str = "fpn", **more: object) -> HeadConfig:
    return HeadConfig(**{"head": head, "width": 16, "classes": len(NAMES), "auxiliary": False, "eval": "whole",
                         "flips": False, "short_side": None} | more)  # fmt: skip


def weights_file(path: Path, chosen: HeadConfig, size: tuple[int, int] = (40, 56)) -> Segmenter:
    """Write a model with random weights; returns it in evaluation mode."""
    model = Segmenter(ARCH, chosen)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(5)  # outputs that differ from pixel to pixel
    head, encoder = split_by_prefix(cpu_state(model), "head.")
    about = {"classes": NAMES, "task": "segmentation", "task_config": asdict(chosen)}
    save(path, Weights(model.arch, Preprocessing(size, 3, (0.5,) * 3, (0.2,) * 3), encoder, head=head, **about))
    return model.eval()
