"""Detections of a split next to its true boxes, and COCO's average precision.

Boxes are [x, y, width, height] in pixels of the image as it is in the shard. The numbers are pycocotools'.
"""

import io
import math
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from data.boxes import Target, decode_mask

PASTED = 16  # masks at a time
SURE = 0.5  # score from which a detection counts in the choice of examples
TABLES = ("image", "found", "true")  # prefixes of the columns of `Predictions`
TABLE_PARTS = ("sample", "label", "box", "mask")  # what the last two have in common


@dataclass(frozen=True)
class Predictions:
    """I images of a split in its order, their D detections and T true boxes; outlines are COCO's RLE, b"" without."""

    classes: int
    masks: bool
    image_sample: np.ndarray  # [I] index in the split
    image_size: np.ndarray  # [I, 2] height and width
    found_sample: np.ndarray  # [D]
    found_label: np.ndarray  # [D]
    found_score: np.ndarray  # [D]
    found_box: np.ndarray  # [D, 4]
    found_mask: np.ndarray  # [D] bytes
    true_sample: np.ndarray  # [T]
    true_label: np.ndarray  # [T]
    true_box: np.ndarray  # [T, 4]
    true_mask: np.ndarray  # [T] bytes
    true_crowd: np.ndarray  # [T] bool

    def scores(self) -> dict[str, float]:
        """COCO's AP, AP50 and AP75 from 0 to 1, of boxes and with `masks` of outlines; numbers of images and boxes.

        NaN if no image has a box.
        """
        found = {}
        for prefix, kind in (("", "bbox"), ("mask_", "segm")) if self.masks else (("", "bbox"),):
            stats = self.evaluated(kind).stats
            stats = np.where(stats < 0, math.nan, stats)
            found |= {f"{prefix}{name}": float(stats[i]) for i, name in enumerate(("ap", "ap50", "ap75"))}
        return found | {"images": len(self.image_sample), "boxes": len(self.true_sample)}

    def evaluated(self, kind: str) -> COCOeval:
        """pycocotools' evaluation of `bbox` or `segm`, accumulated."""
        truth, found = COCO(), COCO()
        sizes = dict(zip(self.image_sample.tolist(), self.image_size.tolist(), strict=True))
        images = [{"id": i, "height": h, "width": w} for i, (h, w) in sizes.items()]
        base = {"images": images, "categories": [{"id": i} for i in range(self.classes)]}
        crowd = self.true_crowd.astype(int).tolist()
        truth.dataset = {**base, "annotations": self._entries("true", sizes, {"iscrowd": crowd}, kind)}
        found.dataset = {**base, "annotations": self._entries("found", sizes, {"score": self.found_score}, kind)}
        with redirect_stdout(io.StringIO()):
            truth.createIndex()
            found.createIndex()
            evaluation = COCOeval(truth, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation

    def _entries(self, table: str, sizes: dict, more: dict, kind: str) -> list[dict]:
        sample, label, box, outline = (getattr(self, f"{table}_{part}").tolist() for part in TABLE_PARTS)
        entries = []
        for i, number in enumerate(sample):
            entry = {"id": i + 1, "image_id": number, "category_id": label[i], "bbox": box[i], "iscrowd": 0}
            entry |= {"area": box[i][2] * box[i][3]} | {key: values[i] for key, values in more.items()}
            if outline[i]:
                entry["segmentation"] = {"size": sizes[number], "counts": outline[i]}
                if table == "true" or kind == "segm":
                    entry["area"] = float(rle.area(entry["segmentation"]))
            entries.append(entry)
        return entries

    def per_class(self) -> list[dict]:
        """Of each class: number of true boxes, AP and AP50, and with masks those of outlines; None without boxes."""
        boxes = np.bincount(self.true_label[~self.true_crowd], minlength=self.classes)
        rows = [{"class": i, "boxes": int(count)} for i, count in enumerate(boxes)]
        for prefix, kind in (("", "bbox"), ("mask_", "segm")) if self.masks else (("", "bbox"),):
            precision = self.evaluated(kind).eval["precision"][..., 0, -1]  # [IoU, recall, class]; all areas, 100
            for i, row in enumerate(rows):
                for name, part in (("ap", precision[..., i]), ("ap50", precision[0, :, i])):
                    counted = part[part > -1]
                    row[prefix + name] = float(counted.mean()) if counted.size else None
        return rows

    def quality(self) -> list[dict]:
        """Of each image: sample, true positives, false positives and missed boxes at IoU 0.5 and score 0.5, and the
        score of its most confident mistake.
        """
        evaluation = self.evaluated("bbox")
        rows = {
            i: {"sample": i, "right": 0, "wrong": 0, "missed": 0, "mistake": 0.0} for i in self.image_sample.tolist()
        }
        for entry in evaluation.evalImgs:
            if entry is None or entry["aRng"] != evaluation.params.areaRng[0]:
                continue
            row = rows[entry["image_id"]]
            score = np.array(entry["dtScores"])
            counts = (score >= SURE) & ~entry["dtIgnore"][0].astype(bool)
            matched = entry["dtMatches"][0] > 0
            real = int((np.array(entry["gtIgnore"]) == 0).sum())
            row["right"] += (right := int((counts & matched).sum()))
            row["wrong"] += int((counts & ~matched).sum())
            row["missed"] += real - right
            row["mistake"] = max(row["mistake"], float(score[counts & ~matched].max(initial=0)))
        return list(rows.values())


def to_source(boxes: Tensor, content: Tensor, source: Tensor) -> Tensor:
    """Boxes (x0, y0, x1, y1) in the padded image [D, 4] to those in the image as it was, clipped."""
    scale = (source / content).flip(0).repeat(2)
    return torch.minimum((boxes.cpu().double() * scale).clamp(min=0), source.flip(0).repeat(2).double())


def outlines(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[bytes]:
    """RLE of predicted masks [D, 28, 28] in boxes (x0, y0, x1, y1) of an image."""
    found = []
    for part, box in zip(masks.split(PASTED), boxes.float().split(PASTED), strict=True):
        pasted = paste_masks_in_image(part[:, None], box, size)[:, 0] > 0.5
        found += [rle.encode(np.asfortranarray(x.numpy().astype(np.uint8)))["counts"] for x in pasted]
    return found


def detections(output: tuple[Tensor, ...], batch: dict[str, Tensor], i: int) -> tuple[Tensor, Tensor, Tensor, list]:
    """Boxes [D, 4] (x, y, width, height) in image i as it was, labels, scores, and outlines if there are masks."""
    boxes, scores, labels, *masks = (x[i].cpu() for x in output)
    boxes, found = to_source(boxes, batch["content"][i], batch["source"][i]), scores > 0
    found &= (boxes[:, 2:] > boxes[:, :2]).all(1)  # not within the padding
    boxes = boxes[found]
    packed = outlines(masks[0][found], boxes, tuple(batch["source"][i].tolist())) if masks else [b""] * len(boxes)
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1), labels[found], scores[found], packed


def collect(
    output: tuple[Tensor, ...], batch: dict[str, Tensor], truth: Callable[[int], Target], number: dict[str, int]
) -> Predictions:
    """Predictions from a detector's output, without padding and damaged images.

    `truth` returns a sample's target, `number` maps its class names to the model's numbers.
    """
    masks = len(output) == 4
    rows: dict[str, list] = {name: [] for name in Predictions.__dataclass_fields__}
    for i in torch.nonzero((batch["sample"] >= 0) & ~batch["damaged"]).flatten().tolist():
        sample, target = int(batch["sample"][i]), truth(int(batch["sample"][i]))
        size = target["height"], target["width"]
        box, label, score, packed = detections(output, batch, i)
        rows["image_sample"].append(sample)
        rows["image_size"].append(size)
        entries = target["boxes"]
        for prefix, columns in {
            "found": {"label": label.tolist(), "box": box.tolist(), "mask": packed, "score": score.tolist()},
            "true": {
                "label": [number[x["class"]] for x in entries], "box": [x["box"] for x in entries],
                "mask": [_true_outline(x, *size) if masks else b"" for x in entries],
                "crowd": [bool(x.get("crowd")) for x in entries],
            },
        }.items():  # fmt: skip
            rows[f"{prefix}_sample"] += [sample] * len(columns["label"])
            for name, values in columns.items():
                rows[f"{prefix}_{name}"] += values
    return Predictions(len(number), masks, **{k: _column(k, values) for k, values in rows.items() if "_" in k})


def _true_outline(entry: dict, height: int, width: int) -> bytes:
    outline = entry.get("segmentation")
    if outline is None:  # a crowd region with a box alone
        x, y, w, h = entry["box"]
        outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return rle.encode(np.asfortranarray(decode_mask(outline, height, width)))["counts"]


def _column(name: str, values: list) -> np.ndarray:
    if name.endswith("mask"):
        column = np.empty(len(values), object)
        column[:] = values
        return column
    kind = {"score": np.float64, "box": np.float64, "crowd": bool}.get(name.partition("_")[2], np.int64)
    width = {"box": (-1, 4), "size": (-1, 2)}.get(name.partition("_")[2], (-1,))
    return np.array(values, kind).reshape(width)


def join(parts: list[Predictions]) -> Predictions:
    """Concatenate predictions of batches or ranks, in the order of the samples."""
    columns = {}
    for table in TABLES:
        names = [name for name in Predictions.__dataclass_fields__ if name.startswith(table)]
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        order = np.argsort(joined[f"{table}_sample"], kind="stable")
        columns |= {name: column[order] for name, column in joined.items()}
    return Predictions(parts[0].classes, parts[0].masks, **columns)
