"""Targets of a detector, and the transforms of an image with its boxes.

Images keep their shape: they are resized to fit into `data.size` and padded below and on the right with the mean.
"""

import json
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from configs.errors import UserError
from configs.preprocessing import Preprocessing
from configs.schema import Augment, Data
from data.boxes import Target, cut, decode_mask, mirrored, outline_problem, resized
from data.transforms import RESIZING, jitter

FAR = 2e5  # pixels that an outline may reach from the middle of its image, which may be a tile of a scene
MIN_SIDE = 1  # pixels of an object in training


@dataclass(frozen=True)
class ReadTarget:
    """Parse a sample's boxes. Raises `UserError` if it has none, or one of an unknown class or without an outline."""

    names: tuple[str, ...]
    masks: bool = False

    def __call__(self, data: bytes) -> Target:
        try:
            target = json.loads(data)
            boxes = [[float(x) for x in entry["box"]] for entry in target["boxes"]]
            size = target["height"], target["width"]
            sound = all(len(box) == 4 and all(map(math.isfinite, box)) for box in boxes) and min(size) > 0
            reach = FAR / min(size) if sound else 0
        except (ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            raise UserError("has no boxes, or damaged ones: prepare the images with --boxes")
        for entry in target["boxes"]:
            if entry["class"] not in self.names:
                raise UserError(f"has a box of class {entry['class']}, which index.json does not list")
            if (outline := entry.get("segmentation")) and (wrong := outline_problem(outline, *size, reach)):
                raise UserError(f"has a box of {entry['class']} with an outline that {wrong}")
            if self.masks and not entry.get("crowd") and not entry.get("segmentation"):
                raise UserError(f"has a box of {entry['class']} without an outline, which task.masks needs")
        return target


class TrainTransform:
    """Large-scale jitter (2012.07177), flips, colour. Raises `UserError` for settings that would not move boxes along.

    Entries: `image` [C, H, W]; `object_box` [n, 4] (x0, y0, x1, y1), `object_label` [n] and, for masks, `object_mask`
    [n, H, W]. Crowd regions are left out.
    """

    def __init__(self, data: Data, augment: Augment, settings, mean: tuple[float, ...], names: tuple[str, ...]):
        if augment.auto_augment:
            raise UserError("augment.auto_augment would move pixels without their boxes: set it to null")
        if augment.color_jitter and len(mean) != 3:
            raise UserError(f"augment.color_jitter needs images of 3 channels, these have {len(mean)}: set it to 0")
        self.data, self.color_jitter, self.settings, self.mean = data, augment.color_jitter, settings, mean
        self.number = {name: i for i, name in enumerate(names)}

    def __call__(self, image: Tensor, target: Target, rng: np.random.Generator) -> dict[str, Tensor]:
        size, mode = self.data.height_width, self.data.interpolation
        if mode == "random":
            mode = ("bilinear", "bicubic")[rng.integers(2)]
        image = scaled(image, size, rng.uniform(*self.settings.jitter), mode)
        height, width = image.shape[1:]
        top, left = (int(rng.integers(max(0, a - b) + 1)) for a, b in zip((height, width), size, strict=True))
        target = cut(resized(target, height, width), top, left, *size)
        image = padded(image[:, top : top + size[0], left : left + size[1]], size, self.mean)
        for axis, share in (("h", self.data.hflip), ("v", self.data.vflip)):
            if share and rng.random() < share:
                image, target = image.flip(2 if axis == "h" else 1), mirrored(target, axis)
        if self.color_jitter:
            image = jitter(image, rng, self.color_jitter)
        objects = [x for x in target["boxes"] if not x.get("crowd") and min(x["box"][2:]) >= MIN_SIDE]
        if len(objects) > self.settings.max_objects:
            chosen = rng.permutation(len(objects))[: self.settings.max_objects]
            objects = [objects[i] for i in sorted(chosen)]
        box = torch.tensor([x["box"] for x in objects], dtype=torch.float32).reshape(-1, 4)
        entries = {"image": image, "object_box": torch.cat([box[:, :2], box[:, :2] + box[:, 2:]], 1)}
        entries["object_label"] = torch.tensor([self.number[x["class"]] for x in objects], dtype=torch.int64)
        if self.settings.masks:
            masks = [torch.from_numpy(decode_mask(x["segmentation"], *size)) for x in objects]
            entries["object_mask"] = torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8)
        return entries


@dataclass(frozen=True)
class EvalTransform:
    """The image as a whole. Entries: `image` [C, H, W], `content` [2] (height and width without the padding), `source`
    [2] (of the image as it was).
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    interpolation: str = "bicubic"

    @classmethod
    def of(cls, preprocessing: Preprocessing) -> "EvalTransform":
        """The transform that a weight file records."""
        return cls(preprocessing.size, preprocessing.mean, preprocessing.interpolation)

    def __call__(
        self, image: Tensor, target: Target | None = None, rng: np.random.Generator | None = None
    ) -> dict[str, Tensor]:
        small = scaled(image, self.size, 1, self.interpolation)
        shapes = {"content": torch.tensor(small.shape[1:]), "source": torch.tensor(image.shape[1:])}
        return {"image": padded(small, self.size, self.mean), **shapes}


def scaled(image: Tensor, size: tuple[int, int], scale: float, interpolation: str) -> Tensor:
    """An image [C, h, w] resized; at scale 1 it just fits into `size`."""
    fit = scale * min(size[0] / image.shape[1], size[1] / image.shape[2])
    sides = [max(1, round(side * fit)) for side in image.shape[1:]]
    return F.resize(image, sides, RESIZING[interpolation], antialias=True)


def padded(image: Tensor, size: tuple[int, int], mean: tuple[float, ...]) -> Tensor:
    """An image [C, h, w] at `size`, with the mean below and on the right."""
    fill = torch.tensor(mean)
    fill = (255 * fill).round().to(torch.uint8) if image.dtype == torch.uint8 else fill
    out = fill[:, None, None].repeat(1, *size)
    out[:, : image.shape[1], : image.shape[2]] = image
    return out
