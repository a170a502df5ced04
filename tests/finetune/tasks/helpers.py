"""Shards of the digits with several labels, with numbers, or with grades."""

import csv
import json
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

from tests.conftest import QUICK, run

COUNT = 360
SHAPE = ["--init", "none", "--model.name", "convnextv2_atto", "--model.channels", "1", "--model.stem_stride", "1",
         "--model.depths", "[1,1,1,1]", "--model.dims", "[8,16,16,16]", "--data.size", "8", "--optim.lr", "5e-3",
         "--data.hflip", "0", "--optim.batch_size", "96", "--run.eval_every", "1"]  # fmt: skip
LABELS = {"even": lambda digit: digit % 2 == 0, "large": lambda digit: digit > 4, "nine": lambda digit: digit == 9}


def pictures(folder: Path) -> None:
    """PNGs of digits, and a table with columns tags, value (some missing), ink and grade; every fifth is in val."""
    digits = load_digits()
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(COUNT):
        digit = int(digits.target[i])
        Image.fromarray((digits.images[i] * 15).astype("uint8")).save(folder / f"images/{i}.png")
        tags = "|".join(name for name, applies in LABELS.items() if applies(digit))
        value = "" if i % 7 == 3 else 100 + 0.5 * digit
        ink, grade = round(float(digits.images[i].mean()), 3), min(4, digit // 2)
        rows.append({"file": f"{i}.png", "tags": tags or "|", "value": value, "ink": ink, "grade": grade,
                     "split": "val" if i % 5 == 0 else "train"})  # fmt: skip
    rows[1]["tags"] = ""  # an image without labels, in train
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def shards(folder: Path, out: Path, *columns: str) -> Path:
    """Shards of `pictures` with the labels of some columns."""
    words = ["--labels", folder / "table.csv", "--path-column", "file", "--workers", 1, "--label-column", *columns]
    run("python", "data/prepare.py", folder / "images", out, *words)
    return out


def words(data: Path, runs: Path, name: str, task: str, *more: object, epochs: int = 2) -> list:
    """Arguments of finetune/main.py."""
    where = ["--data.path", data, "--run.folder", runs, "--run.name", name, "--task.name", task]
    return [*where, *QUICK, *SHAPE, "--optim.epochs", epochs, "--optim.warmup_epochs", 0, *more]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())
