"""Inference with a trained detector: evaluation, boxes of pictures as COCO json, table and drawings, export."""

import json
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.files import atomic_file, write_atomic
from data.decode import decode
from data.folder import Folder, read_image
from data.reading import Reading
from data.shards import Split
from finetune.tasks.detection import scores
from finetune.tasks.detection.model import MASK_SIDE, Detector
from finetune.tasks.detection.scores import Predictions, detections
from finetune.tasks.detection.tables import show_evaluation
from finetune.tasks.detection.task import box_classes, truth_of
from finetune.tasks.detection.transforms import EvalTransform, ReadTarget
from finetune.tasks.image_inference import write_rows
from models.opening import Trained
from models.weights import load_strict

COMPARED = 0.1  # score from which an exported model must give every object: the last ones may be cut off


@dataclass(frozen=True)
class Prediction:
    """The objects of a picture in descending order of scores: (class, score, box [x, y, width, height], RLE)."""

    path: Path
    size: tuple[int, int]  # height and width
    objects: list[tuple[str, float, list[float], bytes]]
    min_score: float

    @property
    def shown(self) -> list[tuple[str, float, list[float], bytes]]:
        """The objects for console, table and annotated copies."""
        return [entry for entry in self.objects if entry[1] >= self.min_score]

    @property
    def lines(self) -> list[str]:
        """Text for the console: how many objects of each class."""
        counts = Counter(name for name, *_ in self.shown)
        return [f"{count} {name}" for name, count in counts.most_common()] or ["no object"]


class DetectionInference:
    """A trained detector; implements `finetune.inference.Inference`."""

    files = "evaluation.json, predictions.json (COCO), examples.png"
    batch = 1  # of an exported graph
    min_score = 0.5  # of an object that is shown
    join = staticmethod(scores.join)
    show_evaluation = staticmethod(show_evaluation)

    def __init__(self, trained: Trained):
        weights = trained.weights
        self.names: list[str] = weights.classes
        head = weights.task_config["head"]
        self.ids: list[int] = weights.task_config["ids"] or list(range(1, 1 + len(self.names)))
        model = Detector(weights.arch, head)
        load_strict(model, weights.encoder | weights.head, trained.path)
        self.trained, self.masks = replace(trained, model=model.eval()), head["masks"]
        self.transform = EvalTransform.of(trained.preprocessing)
        self.read_target = ReadTarget(tuple(self.names), self.masks)
        self.images: Split | None = None

    def match(self, images: Split | Folder) -> None:
        """Check that the data's classes are the model's."""
        if unknown := [name for name in box_classes(images) if name not in self.names]:
            problem = f"{images.folder} has boxes of {unknown[0]}, which {self.trained.path} does not know"
            raise UserError(f"{problem} ({', '.join(self.names[:10])})")
        self.images = images

    def run(self, model: nn.Module, image: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return model(image)

    def collect(self, output: tuple[Tensor, ...], batch: dict[str, Tensor]) -> Predictions:
        number = {name: i for i, name in enumerate(self.names)}
        return scores.collect(output, batch, partial(truth_of, self.images), number)

    def evaluation(self, predictions: Predictions) -> dict:
        """COCO's scores, and those of each class."""
        if not np.isfinite(predictions.found_score).all() or not np.isfinite(predictions.found_box).all():
            raise UserError(f"{self.trained.path} gives outputs that are not finite: try --precision fp32")
        classes = [{"name": self.names[row["class"]], **row} for row in predictions.per_class()]
        return {"scores": predictions.scores(), "classes": classes}

    def write_evaluation(self, out: Path, result: dict, predictions: Predictions, names: list[str]) -> None:
        """Write detections in COCO's format, examples.png and, last, evaluation.json."""
        from finetune.tasks.detection.pictures import examples

        sizes = dict(zip(predictions.image_sample.tolist(), predictions.image_size.tolist(), strict=True))
        objects: dict[int, list] = {i: [] for i in sizes}
        columns = (
            getattr(predictions, f"found_{part}").tolist() for part in ("sample", "label", "score", "box", "mask")
        )
        for sample, label, *entry in zip(*columns, strict=True):
            objects[sample].append((self.names[label], *entry))
        pictures = [(names[i], tuple(sizes[i]), objects[i]) for i in sizes]
        write_atomic(out / "predictions.json", self._coco(pictures))
        examples(out / "examples.png", predictions, self.images, self.names)
        write_atomic(out / "evaluation.json", json.dumps(result, indent=1).encode())

    def name_outputs(self, file: str | None) -> None:
        if file is not None:
            raise UserError(f"--classes does not apply: {self.trained.path} has the names of its classes: leave it out")

    def predict(
        self, output: tuple[Tensor, ...], batch: dict[str, Tensor], paths: list[Path], top: int
    ) -> list[Prediction]:
        """Objects of pictures; `top` is not used. Raises `UserError` for NaN or infinity."""
        if not all(bool(torch.isfinite(part).all()) for part in output):
            raise UserError("the weights give outputs that are not finite: try --precision fp32")
        found = []
        for i, path in enumerate(paths):
            boxes, labels, sure, packed = detections(output, batch, i)
            names = [self.names[label] for label in labels.tolist()]
            objects = list(zip(names, sure.tolist(), boxes.tolist(), packed, strict=True))
            found.append(Prediction(path, tuple(batch["source"][i].tolist()), objects, self.min_score))
        return found

    def annotate(self, folder: Path, number: int, prediction: Prediction, reading: Reading) -> None:
        from finetune.tasks.detection.pictures import draw_objects, to_picture

        path = prediction.path
        kind = "jpeg" if path.suffix.lower() in (".jpg", ".jpeg") else "png"
        image = decode(read_image(path, reading), self.trained.preprocessing.channels, max_pixels=reading.max_pixels)
        copy = draw_objects(to_picture(image), prediction.shown)
        with atomic_file(folder / f"{number:05}-{path.stem}.{kind}") as file:
            copy.save(file, kind, quality=95)

    def write_csv(self, file: Path, predictions: list[Prediction], top: int) -> None:
        """Write a row for each shown object."""
        rows = [["path", "class", "score", "x", "y", "width", "height"]]
        rows += [[p.path, name, score, *box] for p in predictions for name, score, box, _ in p.shown]
        write_rows(file, rows)

    def write_json(self, file: Path, predictions: list[Prediction]) -> None:
        """Write all objects as a COCO file; `annotations` are COCO's results, with scores."""
        write_atomic(file, self._coco([(str(p.path), p.size, p.objects) for p in predictions]))

    def _coco(self, pictures: list[tuple[str, tuple[int, int], list]]) -> bytes:
        number = dict(zip(self.names, self.ids, strict=True))
        images, annotations = [], []
        for i, (name, (height, width), objects) in enumerate(pictures, 1):
            images.append({"id": i, "file_name": name, "height": height, "width": width})
            for label, score, box, packed in objects:
                about = {"id": len(annotations) + 1, "image_id": i, "category_id": number[label], "bbox": box}
                about |= {"score": score, "area": box[2] * box[3], "iscrowd": 0}
                if packed:
                    about["segmentation"] = {"size": [height, width], "counts": packed.decode("ascii")}
                annotations.append(about)
        categories = [{"id": i, "name": name} for name, i in number.items()]
        return json.dumps({"images": images, "annotations": annotations, "categories": categories}).encode()

    def difference(self, outputs: list[Tensor], references: list[Tensor]) -> list[float]:
        """For each object of either model, how far the nearest one of its class is in the other model's: the largest
        difference of box (relative to the image's side) and score together, and of the mask.

        Almost equal scores may change places, so positions do not count.
        """
        one, other = ([part[0].float() for part in parts] for parts in (references, outputs))
        pairs = [(i, *self._nearest(i, one, other)) for i in range(int((one[1] >= COMPARED).sum()))]
        found, matched = [share for *_, share in pairs], {match for _, match, _ in pairs}
        alone = [i for i in range(int((other[1] >= COMPARED).sum())) if i not in matched]
        return found + [self._nearest(i, other, one)[1] for i in alone]

    def _nearest(self, i: int, one: list[Tensor], other: list[Tensor]) -> tuple[int, float]:
        """Position in `other` (boxes, scores, labels, masks) of the object nearest to i of `one`, and how far."""
        box, score, label, *mask = other
        share = (box - one[0][i]).abs().amax(1) / max(self.trained.preprocessing.size)
        near = torch.where(label == one[2][i], share + (score - one[1][i]).abs(), torch.inf)
        match = int(near.argmin())
        far = float(near[match])
        return match, max(far, float((mask[0][match] - one[3][i]).abs().max())) if mask else far

    def outputs(self) -> dict[str, str]:
        count = self.trained.weights.task_config["head"]["detections"]
        found = {
            "boxes": f"float32 [1, {count}, 4], x0 y0 x1 y1 in pixels of the padded image, best first",
            "scores": f"float32 [1, {count}], 0 = no object",
            "labels": f"int64 [1, {count}], position in classes",
        }
        side = MASK_SIDE
        text = f"float32 [1, {count}, {side}, {side}], probabilities, stretched over the box"
        return found | ({"masks": text} if self.masks else {})
