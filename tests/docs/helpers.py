"""Code blocks of a guide, the project folder that it assumes, and a bash that runs the blocks there."""

import os
import re
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from configs.preprocessing import Preprocessing
from launch.training.world import free_port
from models.formats.write import write_weights
from tests.conftest import ROOT, run
from tests.docs.stand_in import PROGRAMS
from tests.finetune.tasks.detection.helpers import write_scenes
from tests.finetune.tasks.segmentation.helpers import VOID, source
from tests.models.formats.helpers import autoencoder, classifier

CODE = ("configs", "data", "pretrain", "finetune", "models", "launch")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECONDS = 600  # that a block may take


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    place: str  # page and line
    kind: str  # bash, python, or text: what the block before it prints
    text: str


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    text = page.read_text()
    return [
        Block(f"{page.name}:{text.count(chr(10), 0, match.start()) + 1}", match[1], match[2])
        for match in BLOCK.finditer(text)
    ]


class Reader:
    """Someone in a project folder who types what a page says.

    Args:
        folder: a new project: its code is a link to this one's, `runs` and `shards` are its own
        do: run the commands; else bash only tells what they are
    """

    def __init__(self, folder: Path, do: bool):
        self.folder, self.commands = folder, folder / ".commands"
        tools = folder / ".venv/bin"
        tools.mkdir(parents=True)
        for name in PROGRAMS:
            tool = tools / name
            tool.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/docs/stand_in.py {name} "$@"\n')
            tool.chmod(0o755)
        for name in CODE:
            (folder / name).symlink_to(ROOT / name)
        self.env = {
            **os.environ, "PATH": f"{tools}:/usr/bin:/bin", "COMMANDS": str(self.commands), "RUN": str(int(do)),
            "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip

    def type(self, block: Block) -> str:
        """What a block prints. The block must be bash or Python, and succeed."""
        programs = {"bash": ["bash", "-euo", "pipefail"], "python": [sys.executable, "-"]}
        assert block.kind in programs, f"{block.place}: nobody knows how to run {block.kind or 'this'}"
        done = subprocess.run(
            programs[block.kind], input=block.text, cwd=self.folder, env=self.env | {"PORT": str(free_port())},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, f"{block.place}: exit code {done.returncode}\n{done.stdout[-3000:]}"
        return done.stdout


def check_output(block: Block, output: str) -> None:
    """Each line of the block must be in the output; `...` stands for anything within a line."""
    for line in block.text.splitlines():
        pattern = ".*".join(map(re.escape, line.split("...")))
        assert re.search(pattern, output), f"{block.place}: {line!r} is not in\n{output[-3000:]}"


def give(name: str, folder: Path) -> None:
    """Put what a page calls the reader's own into a folder, small: digits in place of photographs."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == "shards/photos":
        give("photos", folder)
        run(
            "python",
            ROOT / "data/prepare.py",
            "--no-plan",
            "photos",
            "shards/photos",
            "--val-fraction",
            "0.1",
            cwd=folder,
        )
    elif name == "cifar10.tar.xz":
        give("cifar10", folder)
        with tarfile.open(path, "w:xz") as tar:
            tar.add(folder / "cifar10", "cifar10")
    elif path.suffix in (".pt", ".pth"):
        weights = WEIGHTS[name][0]()
        weights.classes = sorted(CLASSES) if weights.outputs == len(CLASSES) else None
        mean, std, channels = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), weights.arch.channels
        weights.preprocessing = Preprocessing((224, 224), channels, mean, std)
        write_weights(path, weights, WEIGHTS[name][1])
    else:
        IMAGES[name](path)


def photos(folder: Path, count: int) -> None:
    """JPEGs of tinted digits, in a folder for each class."""
    random = np.random.default_rng(0)
    for i, (pixels, label) in enumerate(digits(count)):
        picture = Image.fromarray((pixels[..., None] * random.uniform(100, 255, 3)).astype(np.uint8))
        save(picture.resize((40, 32)), folder / CLASSES[label], f"{i:04}.jpg")


def table(path: Path) -> None:
    """Labels, numbers and a grade of each photograph; some are missing."""
    lines = ["file,tags,age,weight,grade"]
    for i, (pixels, label) in enumerate(digits(1200)):
        tags = "|".join(name for name, applies in (("outdoor", label > 4), ("night", label % 2)) if applies) or "|"
        lines.append(f"{i:04}.jpg,{tags},{label + 0.5 if i % 7 else ''},{pixels.mean():.3f},{label // 2}")
    path.write_text("\n".join(lines))


def scans(folder: Path) -> None:
    """Grey pictures of 12 bits in files of 16."""
    for i, (pixels, label) in enumerate(digits(60)):
        picture = Image.fromarray((pixels * 4095).astype(np.uint16))
        save(picture, folder / ("ill", "healthy")[label % 2], f"{i:04}.{('tif', 'png')[i % 2]}")


def fields(folder: Path) -> None:
    """Arrays of five channels."""
    for i, (pixels, label) in enumerate(digits(60)):
        place = folder / ("wheat", "maize")[label % 2]
        place.mkdir(parents=True, exist_ok=True)
        np.save(place / f"{i:04}.npy", np.stack([pixels * 800 * k for k in range(1, 6)], -1).astype(np.uint16))


def streets(folder: Path) -> None:
    """Pictures of a square and a stripe with their masks, and the names of the classes."""
    source(folder, train=12, val=4)
    (folder / "labels").rename(folder / "masks")
    for file in (folder / "masks").rglob("*.png"):
        mask = np.asarray(Image.open(file)).copy()
        mask[mask == VOID] = 255
        Image.fromarray(mask).save(file)


def cifar10(folder: Path) -> None:
    """Pictures of 32x32 pixels in train/CLASS and test/CLASS."""
    for split, count in (("train", 120), ("test", 30)):
        photos(folder / split, count)
        for file in (folder / split).rglob("*.jpg"):
            Image.open(file).resize((32, 32)).save(file.with_suffix(".png"))
            file.unlink()


def digits(count: int) -> list[tuple[np.ndarray, int]]:
    """(pixels from 0 to 1 [8, 8], class) of handwritten digits."""
    found = load_digits()
    return [(pixels / 16, label) for pixels, label in zip(found.images[:count], found.target.tolist(), strict=False)]


def save(picture: Image.Image, folder: Path, name: str) -> None:
    """Write a picture; its folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / name)


CLASSES = ("cat", "dog", "horse", "cow", "sheep", "bird", "bear", "deer", "frog", "fox")
IMAGES = {
    "photos": lambda path: photos(path, 1200),  # more than the largest batch
    "labelled": lambda path: photos(path, 120),
    "labels.csv": table,
    "new-photos": lambda path: photos(path, 6),
    "scans": scans,
    "fields": fields,
    "streets": streets,
    "cifar10": cifar10,
    "bccd": lambda path: write_scenes(path, {"train": 40, "val": 7}),
}
WEIGHTS = {
    "rgb.pt": (autoencoder, "ours"),
    "runs/photos/fcmae.pt": (autoencoder, "ours"),
    "checkpoint-799.pth": (autoencoder, "official-sparse"),
    "runs/photos-finetuned/best.pt": (lambda: classifier(classes=len(CLASSES)), "ours"),
    "convnextv2_atto_1k_224_ema.pt": (lambda: classifier(classes=1000), "official"),
}
