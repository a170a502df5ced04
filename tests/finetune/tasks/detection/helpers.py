"""Pictures of rectangles of two classes, as shards with boxes and outlines, and a quick recipe."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.conftest import run

NAMES = ["red", "green"]
QUICK = [
    "--task.name", "detection", "--data.size", "[64,96]", "--task.width", "16", "--task.hidden", "32",
    "--task.samples", "32", "--task.detections", "30", "--task.jitter", "[0.6,1.5]", "--model.name", "convnextv2_atto",
    "--model.depths", "[1,1,1,1]", "--model.dims", "[8,16,16,16]", "--optim.batch_size", "4", "--optim.lr", "0.1",
    "--data.workers", "0", "--run.log_every", "1", "--run.device", "cpu", "--optim.precision", "fp32",
    "--optim.warmup_epochs", "0",
]  # fmt: skip


def scene(rng: np.random.Generator, count: int, size: tuple[int, int] = (60, 80)) -> tuple[np.ndarray, list[dict]]:
    """Pixels [H, W, 3] and COCO annotations of rectangles; the last of three or more is a crowd region."""
    pixels, found = rng.integers(0, 60, (*size, 3), np.uint8), []
    for k in range(count):
        w, h = rng.integers(8, 30, 2).tolist()
        x, y = int(rng.integers(size[1] - w)), int(rng.integers(size[0] - h))
        label = int(rng.integers(2))
        pixels[y : y + h, x : x + w, label] = 250
        outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        entry = {"category_id": label + 1, "bbox": [x, y, w, h], "area": w * h, "segmentation": outline}
        found.append({**entry, "iscrowd": int(k >= 3)})
    return pixels, found


def write_scenes(folder: Path, counts: dict[str, int], boxes: int = 5) -> Path:
    """Images in splits, with a COCO json for each; some have no box. Returns the folder."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        (folder / split).mkdir(parents=True)
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(NAMES)]
        content = {"images": [], "annotations": [], "categories": categories}
        for i in range(count):
            pixels, found = scene(rng, i % boxes)
            Image.fromarray(pixels).save(folder / split / f"{split}{i:02}.png")
            content["images"].append({"id": i, "file_name": f"{split}{i:02}.png", "height": 60, "width": 80})
            content["annotations"] += [
                {"id": len(content["annotations"]) + k, "image_id": i, **e} for k, e in enumerate(found)
            ]
        (folder / f"{split}.json").write_text(json.dumps(content))
    return folder


def make_shards(folder: Path, **counts: int) -> Path:
    """Shards of scenes in splits train and val."""
    source = write_scenes(folder / "scenes", counts or {"train": 12, "val": 7})
    more = ["--boxes", source / "train.json", "--val-boxes", source / "val.json", "--workers", "1"]
    run("python", "data/prepare.py", source, folder / "shards", "--no-plan", *more)
    return folder / "shards"
