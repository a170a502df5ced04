"""Inference with a model of several labels: scores, predictions, and output files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from configs.files import write_atomic
from configs.log import say
from finetune.inference import join
from finetune.tasks.image_inference import RowInference, check_finite, write_rows
from finetune.tasks.labels import scores
from finetune.tasks.labels.scores import Predictions
from finetune.tasks.tables import percent, show, table, title_of
from models.convnext import Head
from models.opening import Trained

MAX_SHOWN, WORST = 20, 10  # labels for a complete table, worst labels otherwise


@dataclass(frozen=True)
class Prediction:
    """Labels of a picture in descending order of their probability, and the probabilities of all labels."""

    path: Path
    labels: list[tuple[str, float]]
    probability: list[float]

    @property
    def lines(self) -> list[str]:
        """Text for console and annotated copies."""
        return [f"{name} {100 * share:.1f} %" for name, share in self.labels] or ["none"]

    def as_plain(self) -> dict:
        """For json."""
        return {"labels": [{"name": name, "probability": share} for name, share in self.labels]}


class LabelsInference(RowInference):
    """A trained model of several labels; implements `finetune.inference.Inference`."""

    score = "map"
    kind, join = "labels", staticmethod(join)
    files = "evaluation.json, predictions.csv, examples.png"

    def __init__(self, trained: Trained):
        names, config = trained.weights.classes, trained.weights.task_config
        thresholds = config.get("thresholds")
        if not names or not isinstance(thresholds, list) or len(thresholds) != len(names):
            raise UserError(f"{trained.path} is damaged: it has no names or thresholds of labels")
        super().__init__(trained, names, Head(trained.weights.arch.dims[-1], len(names)))
        self.thresholds = tuple(map(float, thresholds))

    def check_names(self, images: Any, own: list[str]) -> None:
        """All labels of the data must be the model's."""
        if unknown := [name for name in own if name not in self.names]:
            known = ", ".join(self.names[:5])
            raise UserError(f"{images.folder} has labels that {self.trained.path} lacks: {unknown[0]} (it has {known})")
        if absent := len(self.names) - len(own):
            say(f"{images.folder} lacks {absent} of the model's {len(self.names)} labels: they count as not applying")

    def collect(self, output: Tensor, batch: dict[str, Tensor]) -> Predictions:
        return scores.collect(output, batch, self.thresholds)

    def evaluation(self, predictions: Predictions) -> dict:
        """Scores, and average precision, F1 and threshold of each label."""
        if not len(predictions.label):
            raise UserError(f"{self.images.folder}, split {self.images.name} has no image with labels")
        if not predictions.finite:
            raise UserError(f"{self.trained.path} gives outputs that are not finite: try --precision fp32")
        precision, predicted = predictions.average_precision(), predictions.predicted()
        columns = zip(precision, predictions.f1(), predictions.label.sum(0), predicted.sum(0), strict=True)
        labels = [
            {"name": name, "images": int(images), "predicted": int(found), "threshold": threshold}
            | {"average_precision": None if np.isnan(ap) else float(ap), "f1": float(f1)}
            for name, threshold, (ap, f1, images, found) in zip(self.names, self.thresholds, columns, strict=True)
        ]
        return {"scores": predictions.scores(), "labels": labels}

    def write_evaluation(self, out: Path, result: dict, predictions: Predictions, names: list[str]) -> None:
        """Write predictions.csv, examples.png and, last, evaluation.json."""
        from finetune.tasks.labels.pictures import examples_picture  # matplotlib

        rows, predicted = [["sample", "name", "labels", "predicted", "loss", *self.names]], predictions.predicted()
        for i, sample in enumerate(predictions.sample.tolist()):
            lists = (self._joined(flags) for flags in (predictions.label[i], predicted[i]))
            rows.append([sample, names[sample], *lists, predictions.loss[i], *predictions.probability[i]])
        write_rows(out / "predictions.csv", rows)
        examples_picture(out / "examples.png", predictions, self.names, self.images)
        write_atomic(out / "evaluation.json", json.dumps(result, indent=1).encode())

    def _joined(self, flags: Any) -> str:
        return "|".join(name for name, flag in zip(self.names, flags, strict=True) if flag)

    def show_evaluation(self, result: dict) -> None:
        """Print damaged images, scores, and all or the worst labels."""
        found, shown = result["scores"], sorted(result["labels"], key=lambda row: row["f1"])
        shown = shown if len(shown) <= MAX_SHOWN else shown[:WORST]
        shares = [percent(found[key]) for key in ("map", "f1_micro", "f1_macro")]
        columns, row = (
            ["images", "loss", "mAP", "micro F1", "macro F1"],
            [f"{found['images']:,}", f"{found['loss']:.4f}"],
        )
        means = table(title_of(result), [], columns, [row + shares])
        rows = [
            [row["name"], f"{row['images']:,}", f"{row['predicted']:,}", f"{row['threshold']:.3f}"]
            + ["-" if x is None else percent(x) for x in (row["average_precision"], row["f1"])]
            for row in shown
        ]
        title = "labels" if len(rows) == len(self.names) else f"worst of {len(self.names)} labels"
        columns = ["images", "predicted", "threshold", "average precision", "F1"]
        show(result, means, table(title, ["label"], columns, rows))

    def predict(self, output: Tensor, batch: dict[str, Tensor], paths: list[Path], top: int) -> list[Prediction]:
        """Labels above their thresholds, from logits [B, L]; `top` has no effect."""
        found = []
        for path, row in zip(paths, check_finite(output).sigmoid().tolist(), strict=True):
            every = zip(self.names, row, self.thresholds, strict=True)
            labels = [(name, share) for name, share, threshold in every if share >= threshold]
            found.append(Prediction(path, sorted(labels, key=lambda label: -label[1]), row))
        return found

    def average(self, outputs: list[Tensor]) -> Tensor:
        """Logits of the mean probabilities."""
        return torch.stack([output.float().sigmoid() for output in outputs]).mean(0).logit(eps=1e-7)

    def write_csv(self, file: Path, predictions: list[Prediction], top: int) -> None:
        rows = [[p.path, "|".join(name for name, _ in p.labels), *p.probability] for p in predictions]
        write_rows(file, [["path", "labels", *self.names], *rows])

    def outputs(self) -> dict[str, str]:
        return {"logits": f"float32 [batch, {len(self.names)}]; their sigmoid is the probability of each label"}
