"""Inference with a trained classifier: class names, scores, predictions, and output files."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from configs.files import write_atomic
from configs.log import say
from data.folder import Folder
from data.shards import Split
from finetune.inference import join
from finetune.tasks.classification import scores
from finetune.tasks.classification.scores import Predictions, calibration_error
from finetune.tasks.classification.tables import show_evaluation
from finetune.tasks.image_inference import ImageInference, check_finite, write_rows
from models.opening import Trained

TINY = torch.finfo(torch.float32).tiny
MAX_NAMES = 5  # in an error message


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of a picture, (name, probability), in descending order."""

    path: Path
    classes: list[tuple[str, float]]

    @property
    def lines(self) -> list[str]:
        """Text for console and annotated copies."""
        return [f"{name} {100 * share:.1f} %" for name, share in self.classes]

    def as_plain(self) -> dict:
        """For json."""
        return {"classes": [{"name": name, "probability": share} for name, share in self.classes]}


class ClassifierInference(ImageInference):
    """A trained classifier; implements `finetune.inference.Inference`."""

    score = "top1"
    files = "evaluation.json, predictions.csv, confusion.png, calibration.png, examples.png"
    join = staticmethod(join)
    show_evaluation = staticmethod(show_evaluation)

    def __init__(self, trained: Trained):
        super().__init__(trained)
        self.names, self.images = trained.weights.classes, None
        self.class_of: Tensor | None = None  # the model's class for each label of the data

    def match(self, images: Split | Folder) -> None:
        """Match the data's classes with the model's: by name, or by number if either has no names."""
        self.images = images
        path, outputs, names = self.trained.path, self.trained.weights.outputs, self.trained.weights.classes
        where, labels, given = f"{images.folder}, split {images.name}", images.labels(), images.classes
        if not len(labels):
            raise UserError(f"{where} has no images")
        if (labels < 0).any():
            raise UserError(f"{where} has images without labels: use finetune/predict.py for them")
        if given and labels.max() >= len(given):
            raise UserError(f"{where} has label {labels.max()}, but {len(given)} class names: prepare it again")
        self.names, self.class_of = names or given or [str(i) for i in range(outputs)], torch.arange(outputs)
        if names and given and names != given:
            copies = Counter(names)
            if unknown := [name for name in given if copies[name] != 1]:
                more = f" and {len(unknown) - MAX_NAMES} more" if unknown[MAX_NAMES:] else ""
                known = ", ".join(names[:MAX_NAMES]) + (", ..." if names[MAX_NAMES:] else "")
                problem = f"has classes that {path} does not have: {', '.join(unknown[:MAX_NAMES])}{more}"
                raise UserError(f"{images.folder} {problem} (it has {outputs}: {known})")
            say(f"classes matched by name: the data has {len(given)} of the model's {outputs}")
            number = {name: i for i, name in enumerate(names)}
            self.class_of = torch.tensor([number[name] for name in given])
            return
        if not (names and given):
            say(f"{images.folder if names else path} has no class names: labels are matched by number")
        count = len(given) if given else labels.max() + 1
        if labels.max() >= outputs or (given and count != outputs):
            raise UserError(f"{where} has {count} classes, {path} {outputs}: without names they cannot be matched")

    def collect(self, output: Tensor, batch: dict[str, Tensor]) -> Predictions:
        label = batch["label"]
        return scores.collect(output, batch | {"label": torch.where(label < 0, label, self.class_of[label])})

    def evaluation(self, predictions: Predictions) -> dict:
        """Scores, accuracy of each class with images, confusions (most frequent first), and calibration."""
        names, path = self.names, self.trained.path
        if not np.isfinite(predictions.loss).all():
            raise UserError(f"{path} gives outputs that are not finite: try other weights or --precision fp32")
        label, first, bins = predictions.label, predictions.best[:, 0], predictions.calibration()
        images = dict(zip(*(x.tolist() for x in np.unique(label, return_counts=True)), strict=True))
        right = np.bincount(label, first == label)
        classes = [
            {"class": i, "name": names[i], "images": count, "accuracy": float(right[i] / count)}
            for i, count in images.items()
        ]
        confusions = [
            {"label": names[i], "predicted": names[j], "images": count, "share": count / images[i]}
            for (i, j), count in zip(*(x.tolist() for x in predictions.confusions()), strict=True)
        ]
        result = {"scores": predictions.scores() | {"calibration_error": calibration_error(bins)}, "classes": classes}
        result["without_images"] = [name for i, name in enumerate(names) if i not in images]
        return result | {"confusions": confusions, "calibration": [asdict(bin) for bin in bins]}

    def write_evaluation(self, out: Path, result: dict, predictions: Predictions, names: list[str]) -> None:
        """Write predictions.csv, pictures and, last, evaluation.json."""
        from finetune.tasks.classification.pictures import write_pictures  # matplotlib, sklearn

        top = (f"top{i + 1}" for i in range(predictions.best.shape[1]))
        rows = [["sample", "name", "label", *top, "confidence", "loss"]]
        columns = (getattr(predictions, name) for name in ("sample", "label", "best", "confidence", "loss"))
        for sample, label, best, confidence, loss in zip(*columns, strict=True):
            classes = [self.names[i] for i in (label, *best)]
            rows.append([int(sample), names[sample], *classes, confidence, loss])
        write_rows(out / "predictions.csv", rows)
        write_pictures(out, predictions, self.names, self.images)
        write_atomic(out / "evaluation.json", json.dumps(result, indent=1).encode())

    def name_outputs(self, file: str | None) -> None:
        path, outputs = self.trained.path, self.trained.weights.outputs
        if file is None and self.names is None:
            raise UserError(f"{path} has no class names: give them with --classes names.txt, one a line")
        try:
            self.names = self.names if file is None else Path(file).read_text("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"{file} is not text in UTF-8") from None
        if len(self.names) != outputs:
            raise UserError(f"{file or path} has {len(self.names)} names, {path} {outputs} classes")

    def predict(self, output: Tensor, batch: dict[str, Tensor], paths: list[Path], top: int) -> list[Prediction]:
        """The `top` likeliest classes of pictures, from logits [B, classes]. Raises `UserError` for NaN or infinity."""
        output = check_finite(output)
        classes = output.topk(min(top, output.shape[1])).indices  # by logits: small shares may be equal
        shares = output.softmax(1).gather(1, classes)
        names = ([self.names[i] for i in row] for row in classes.tolist())
        columns = zip(paths, names, shares.tolist(), strict=True)
        return [Prediction(path, list(zip(row, share, strict=True))) for path, row, share in columns]

    def average(self, outputs: list[Tensor]) -> Tensor:
        """Logits of the mean probabilities."""
        return torch.stack([output.float().softmax(1) for output in outputs]).mean(0).clamp_min(TINY).log()

    def write_csv(self, file: Path, predictions: list[Prediction], top: int) -> None:
        columns = range(min(top, len(self.names)))  # also if no picture could be read
        head = ["path", *(f"{column}{i + 1}" for i in columns for column in ("class", "probability"))]
        write_rows(file, [head, *([p.path, *chain.from_iterable(p.classes)] for p in predictions)])

    def outputs(self) -> dict[str, str]:
        return {"logits": f"float32 [batch, {self.trained.weights.outputs}]"}
