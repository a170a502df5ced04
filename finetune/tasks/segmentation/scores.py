"""Predicted masks of a split and their scores, from exact counts of pixels."""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from data.transforms import RESIZING, to_rgb

EXAMPLES, SIDE = 4, 320  # pictures of the worst and of the best images that are kept; their longer side in pixels


@dataclass(frozen=True)
class Example:
    """A small copy of an image [H, W, 3], its mask and the prediction [H, W]."""

    sample: int
    score: float
    image: np.ndarray
    truth: np.ndarray
    guess: np.ndarray


@dataclass(frozen=True)
class Predictions:
    """Counts of pixels that have a class, for N images of a split, in its order, and for K classes."""

    sample: np.ndarray  # [N] index in the split
    finite: np.ndarray  # [N] whether all outputs are
    truth: np.ndarray  # [N, K] pixels of each class
    guess: np.ndarray  # [N, K] pixels predicted to be of each class
    hits: np.ndarray  # [N, K] pixels that are both
    confusion: np.ndarray  # [K, K] pixels of all images, by class and predicted class
    examples: list[Example]  # the worst and the best

    def scores(self) -> dict[str, float]:
        """Mean IoU over the classes that occur in masks or predictions, pixel accuracy, mean accuracy of classes."""
        truth, hits = self.confusion.sum(1), np.diag(self.confusion)
        present = truth > 0
        accuracy = hits[present] / truth[present]
        total = int(truth.sum())
        return {
            "miou": _mean(self.iou()),
            "pixel_accuracy": float(hits.sum() / total) if total else 0.0,
            "mean_accuracy": _mean(accuracy),
            "images": len(self.sample),
        }

    def iou(self) -> np.ndarray:
        """Intersection over union of each class [K], NaN for classes that do not occur."""
        return iou(np.diag(self.confusion), self.confusion.sum(1), self.confusion.sum(0))

    def image_scores(self) -> np.ndarray:
        """Mean IoU of each image [N] over the classes that occur in it; 0 without any pixel that counts."""
        with np.errstate(invalid="ignore"):
            each = iou(self.hits, self.truth, self.guess)
        counts = (~np.isnan(each)).sum(1)
        return np.nansum(each, 1) / np.maximum(counts, 1)


def iou(hits: np.ndarray, truth: np.ndarray, guess: np.ndarray) -> np.ndarray:
    """Intersection over union; NaN where the union is empty."""
    union = truth + guess - hits
    return np.where(union > 0, hits / np.maximum(union, 1), np.nan)


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else 0.0


def collect(output: list[tuple[Tensor, bool]], batch: dict[str, Tensor], classes: int, ignore: int) -> Predictions:
    """Predictions from predicted masks [H, W] and whether they are finite, for targets 0 to K - 1 and `ignore`.

    Samples without pixels in `object_mask` (padding, replacements of damaged ones) are left out.
    """
    rows, examples, ends = [], [], batch["objects"].cumsum(0).tolist()
    confusion = np.zeros((classes, classes), np.int64)
    for i, (guess, finite) in enumerate(output):
        pixels = batch["object_mask"][ends[i] - int(batch["objects"][i]) : ends[i]]
        sample = int(batch["sample"][i])
        if not len(pixels) or sample < 0:
            continue
        truth = pixels.to(guess.device).long().view(guess.shape)
        counts = truth != ignore
        pairs = torch.bincount(truth[counts] * classes + guess[counts], minlength=classes**2)
        matrix = pairs.view(classes, classes).cpu().numpy()
        confusion += matrix
        rows.append((sample, finite, matrix.sum(1), matrix.sum(0), np.diag(matrix)))
        height, width = batch["size"][i].tolist()
        image = batch["image"][i, :, :height, :width]
        examples.append((sample, image, truth.cpu(), guess.cpu()))
    sample, finite, *counts = zip(*rows, strict=True) if rows else ((), (), (), (), ())
    counts = [np.array(part, np.int64).reshape(-1, classes) for part in counts]
    found = Predictions(np.array(sample, np.int64), np.array(finite, bool), *counts, confusion, [])
    copies = [_example(*e, score) for e, score in zip(examples, found.image_scores().tolist(), strict=True)]
    return Predictions(**{**vars(found), "examples": _extremes(copies)})


def join(parts: list[Predictions]) -> Predictions:
    """Concatenate predictions of batches or ranks, in the order of the samples."""
    names = [field.name for field in fields(Predictions)][:5]
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    order = np.argsort(columns["sample"], kind="stable")
    columns = {name: column[order] for name, column in columns.items()}
    examples = _extremes([example for part in parts for example in part.examples])
    return Predictions(**columns, confusion=sum(part.confusion for part in parts), examples=examples)


def restore(state: dict) -> Predictions:
    """Predictions from a checkpoint."""
    return Predictions(**state)


def _extremes(examples: list[Example]) -> list[Example]:
    """The worst and the best, the worst first."""
    examples = sorted(examples, key=lambda example: (example.score, example.sample))
    return examples if len(examples) <= 2 * EXAMPLES else examples[:EXAMPLES] + examples[-EXAMPLES:]


def _example(sample: int, image: Tensor, truth: Tensor, guess: Tensor, score: float) -> Example:
    factor = min(1.0, SIDE / max(truth.shape))
    size = [max(1, round(side * factor)) for side in truth.shape]
    small = F.resize(to_rgb(image), size, antialias=True).permute(1, 2, 0).numpy()
    masks = [F.resize(x[None].int(), size, RESIZING["nearest"])[0].numpy() for x in (truth, guess)]
    return Example(sample, score, small, *(mask.astype(np.uint16) for mask in masks))
