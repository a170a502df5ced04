"""Inference with a trained segmentation model: whole images or windows, scores, masks, output files."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.errors import UserError
from configs.files import atomic_file, write_atomic
from configs.log import say
from data.decode import decode
from data.folder import Folder, read_image
from data.loader import collate
from data.masks import encode_mask
from data.reading import Reading
from data.shards import Split
from finetune.tasks.image_inference import write_rows
from finetune.tasks.segmentation import scores
from finetune.tasks.segmentation.model import HeadConfig, Segmenter
from finetune.tasks.segmentation.scores import Predictions
from finetune.tasks.segmentation.tables import show_evaluation
from finetune.tasks.segmentation.transforms import EvalTransform, ReadMask
from models.opening import Trained
from models.weights import check_shapes, load_strict

OVERLAP = 1 / 3  # of neighbouring windows, as in mmsegmentation
Run = Callable[[dict[str, Tensor]], list[tuple[Tensor, bool]]]  # a batch as loaded to what `segment` returns
NOT_FINITE = "gives outputs that are not finite: try other weights or --precision fp32"


def segment(
    model: nn.Module, image: Tensor, batch: dict[str, Tensor], config: HeadConfig, window: tuple[int, int]
) -> list[tuple[Tensor | None, bool]]:
    """Predicted class [H, W] of each pixel at full size, and whether the outputs are finite, for normalised images
    [B, C, h, w]; padding of a batch (sample -1) has none.

    Images are computed one by one: sizes differ, and results do not depend on their batch.
    """
    found = []
    for i, (height, width) in enumerate(batch["size"].tolist()):
        if "sample" in batch and batch["sample"][i] < 0:
            found.append((None, True))
            continue
        x = image[i : i + 1, :, :height, :width]
        shares = class_shares(model, x, config.eval, window)
        if config.flips:
            shares = (shares + class_shares(model, x.flip(3), config.eval, window).flip(3)) / 2
        full = batch["full"][i].tolist()
        if full != [height, width]:
            shares = F.interpolate(shares, full, mode="bilinear")
        found.append((shares[0].argmax(0), bool(torch.isfinite(shares).all())))
    return found


def class_shares(model: nn.Module, x: Tensor, mode: str, window: tuple[int, int]) -> Tensor:
    """Probabilities [1, K, H, W] of the classes, for one image [1, C, H, W]: at once, or the mean of windows."""
    if mode == "whole" or (x.shape[2] <= window[0] and x.shape[3] <= window[1]):
        return model(x).float().softmax(1)
    total, count = 0.0, x.new_zeros(1, 1, *x.shape[2:])
    height, width = (min(side, part) for side, part in zip(x.shape[2:], window, strict=True))
    for top in starts(x.shape[2], height):
        for left in starts(x.shape[3], width):
            place = (..., slice(top, top + height), slice(left, left + width))
            part = model(x[place]).float().softmax(1)
            total = part.new_zeros(1, part.shape[1], *x.shape[2:]) if isinstance(total, float) else total
            total[place] += part
            count[place] += 1
    return total / count


def starts(side: int, window: int) -> list[int]:
    """First pixels of evenly spaced windows that cover a side and overlap by `OVERLAP` at least."""
    steps = -(-(side - window) // max(1, int(window * (1 - OVERLAP))))
    return [round(i * (side - window) / max(1, steps)) for i in range(steps + 1)]


@dataclass(frozen=True)
class Prediction:
    """A picture's mask as PNG, and its classes' shares of the pixels, the largest first."""

    path: Path
    mask: bytes
    shares: list[tuple[str, float]]
    top: int
    overview: Tensor | None = None  # of a scene that was segmented in tiles: a small copy [3, h, w], uint8
    small_mask: bytes = b""  # at that size, as PNG

    @property
    def lines(self) -> list[str]:
        """Text for the console."""
        return [f"{name} {100 * share:.1f} %" for name, share in self.shares[: self.top] if share]


class SegmenterInference:
    """A trained segmentation model; implements `finetune.inference.Inference`."""

    files = "evaluation.json, images.csv, confusion.png, examples.png"
    join = staticmethod(scores.join)
    show_evaluation = staticmethod(show_evaluation)

    def __init__(self, trained: Trained):
        weights, path = trained.weights, trained.path
        try:
            self.config = HeadConfig(**weights.task_config)
            with torch.device("meta"):
                expected = Segmenter(weights.arch, self.config).state_dict()
        except (TypeError, ValueError, KeyError, RuntimeError):
            raise UserError(f"{path} is damaged: it does not say which head it has") from None
        check_shapes(path, expected, weights.encoder | weights.head)
        model = Segmenter(weights.arch, self.config)
        load_strict(model, weights.encoder | weights.head, path)
        self.trained = replace(trained, model=model.eval())
        self.names = weights.classes
        self.transform = EvalTransform(self.config.short_side, trained.preprocessing.interpolation)
        self.run = partial(segment, config=self.config, window=trained.preprocessing.size)
        self.read_target = ReadMask(self.config.classes, 255)
        self.class_of = np.arange(self.config.classes)

    def match(self, images: Split | Folder) -> None:
        """Match the data's classes with the model's, by name."""
        from finetune.tasks.segmentation.task import mask_targets

        targets = mask_targets(images)
        if unknown := [name for name in targets["names"] if name not in self.names]:
            problem = f"has classes that {self.trained.path} does not have: {', '.join(unknown[:5])}"
            raise UserError(f"{images.folder} {problem} (it has {', '.join(self.names[:5])}, ...)")
        if targets["names"] != self.names:
            say(f"classes matched by name: the data has {len(targets['names'])} of the model's {len(self.names)}")
        self.class_of = np.array([self.names.index(name) for name in targets["names"]])
        self.read_target = ReadMask(len(targets["names"]), targets["ignore"])

    def collect(self, output: list, batch: dict[str, Tensor]) -> Predictions:
        table = torch.full((self.read_target.ignore + 1,), self.config.classes)  # the model's class of each value
        table[: len(self.class_of)] = torch.from_numpy(self.class_of)
        pixels = table[batch["object_mask"].long()]
        return scores.collect(output, batch | {"object_mask": pixels}, self.config.classes, self.config.classes)

    def evaluation(self, predictions: Predictions) -> dict:
        """Scores, IoU and accuracy of each class with pixels, confusions (most frequent first)."""
        if not predictions.finite.all():
            raise UserError(f"{self.trained.path} {NOT_FINITE}")
        matrix, each = predictions.confusion, predictions.iou()
        truth, guess = matrix.sum(1), matrix.sum(0)
        classes = [
            {
                "class": int(i), "name": self.names[i], "pixels": int(truth[i]), "iou": float(each[i]),
                "accuracy": float(matrix[i, i] / truth[i]) if truth[i] else None,
                "precision": float(matrix[i, i] / guess[i]) if guess[i] else None,
            }
            for i in np.flatnonzero(truth + guess)
        ]  # fmt: skip
        wrong = matrix - np.diag(np.diag(matrix))
        order = [divmod(int(i), len(matrix)) for i in np.argsort(-wrong, axis=None, kind="stable") if wrong.flat[i]]
        confusions = [
            {"label": self.names[i], "predicted": self.names[j], "pixels": int(wrong[i, j]),
             "share": float(wrong[i, j] / truth[i])}
            for i, j in order
        ]  # fmt: skip
        return {"scores": predictions.scores(), "classes": classes, "confusions": confusions}

    def write_evaluation(self, out: Path, result: dict, predictions: Predictions, names: list[str]) -> None:
        """Write images.csv, the worst first, two pictures and, last, evaluation.json."""
        from finetune.tasks.segmentation.pictures import draw_confusion, draw_examples  # matplotlib

        each, pixels = predictions.image_scores(), predictions.truth.sum(1)
        accuracy = predictions.hits.sum(1) / np.maximum(pixels, 1)
        rows = [["sample", "name", "miou", "pixel_accuracy", "pixels"]]
        for i in np.argsort(each, kind="stable"):
            sample = int(predictions.sample[i])
            rows.append([sample, names[sample], float(each[i]), float(accuracy[i]), int(pixels[i])])
        write_rows(out / "images.csv", rows)
        draw_confusion(out / "confusion.png", predictions, self.names)
        files = [names[example.sample] for example in predictions.examples]
        draw_examples(out / "examples.png", predictions.examples, self.names, files)
        write_atomic(out / "evaluation.json", json.dumps(result, indent=1).encode())

    def name_outputs(self, file: str | None) -> None:
        if file is not None:
            raise UserError(f"--classes {file}: {self.trained.path} has class names: leave it out")

    def predict(self, output: list, batch: dict[str, Tensor], paths: list[Path], top: int) -> list[Prediction]:
        """Masks of pictures. Raises `UserError` for outputs that are not finite."""
        masks = self._finite(output)
        kind = np.uint8 if len(self.names) <= 256 else np.uint16
        return [self._prediction(p, m.cpu().numpy().astype(kind), top) for p, m in zip(paths, masks, strict=True)]

    def predict_scene(
        self, path: Path, tile: int, overlap: int, batch: int, reading: Reading, top: int, run: Run
    ) -> tuple[Prediction | None, list[str]]:
        """The mask of a picture that is segmented in tiles, None if no tile is readable; and what could not be read.

        `run` returns the task's output for a batch as loaded. Raises `UserError` for outputs that are not finite.
        """
        from finetune.tasks.segmentation.scenes import segment_scene

        def masks(images: list[Tensor]) -> list[Tensor]:
            return self._finite(run(collate([self.transform(image) for image in images])))

        channels, classes = self.trained.preprocessing.channels, len(self.names)
        mosaic, problems = segment_scene(path, tile, overlap, batch, reading, channels, classes, masks)
        if mosaic is None:
            return None, problems
        prediction = self._prediction(path, mosaic.mask, top)
        return replace(prediction, overview=mosaic.overview, small_mask=encode_mask(mosaic.small_mask())), problems

    def _finite(self, output: list[tuple[Tensor, bool]]) -> list[Tensor]:
        if not all(finite for _, finite in output):
            raise UserError(f"{self.trained.path} {NOT_FINITE}")
        return [mask for mask, _ in output]

    def _prediction(self, path: Path, mask: np.ndarray, top: int) -> Prediction:
        blocks = np.array_split(mask, -(-len(mask) // 1024))  # counting converts to int64
        count = sum(np.bincount(block.ravel(), minlength=len(self.names))[: len(self.names)] for block in blocks)
        shares = (count / max(1, count.sum())).tolist()
        ordered = sorted(zip(self.names, shares, strict=True), key=lambda pair: -pair[1])
        return Prediction(path, encode_mask(mask), ordered, top)

    def annotate(self, folder: Path, number: int, prediction: Prediction, reading: Reading) -> None:
        """Write the mask, NUMBER-NAME.png, and the picture in its colours, NUMBER-NAME-overlay.png."""
        from finetune.tasks.segmentation.pictures import draw_overlay  # matplotlib

        path, image, mask = prediction.path, prediction.overview, prediction.small_mask
        if image is None:
            channels, mask = self.trained.preprocessing.channels, prediction.mask
            image = decode(read_image(path, reading), channels, max_pixels=reading.max_pixels)
        name = f"{number:05}-{path.stem}"
        write_atomic(folder / f"{name}.png", prediction.mask)
        with atomic_file(folder / f"{name}-overlay.png") as file:
            draw_overlay(image, mask, self.names).save(file, "png")

    def write_csv(self, file: Path, predictions: list[Prediction], top: int) -> None:
        rows = [[p.path, *(dict(p.shares)[name] for name in self.names)] for p in predictions]
        write_rows(file, [["path", *self.names], *rows])

    def write_json(self, file: Path, predictions: list[Prediction]) -> None:
        objects = []
        for prediction in predictions:
            classes = [{"name": name, "share": share} for name, share in prediction.shares if share]
            objects.append(json.dumps({"path": str(prediction.path), "classes": classes}))
        write_atomic(file, "[\n{}\n]\n".format(",\n".join(objects)).encode())

    def outputs(self) -> dict[str, str]:
        return {"logits": f"float32 [batch, {self.config.classes}, height, width]"}
