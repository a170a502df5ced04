"""Inference with a regression model: scores, predictions, and output files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError, few
from configs.files import write_atomic
from finetune.inference import join
from finetune.tasks.image_inference import RowInference, check_finite, write_rows
from finetune.tasks.numbers.head import NumberHead, number_names
from finetune.tasks.numbers.scores import Predictions, collector, rounded
from finetune.tasks.tables import show, table, title_of
from models.opening import Trained


@dataclass(frozen=True)
class Prediction:
    """Numbers of a picture by name, and rounded ones if all are whole."""

    path: Path
    numbers: dict[str, float]
    grades: dict[str, int]

    @property
    def lines(self) -> list[str]:
        """Text for console and annotated copies."""
        grades = {name: f" ({grade})" for name, grade in self.grades.items()}
        return [f"{name} {value:.6g}{grades.get(name, '')}" for name, value in self.numbers.items()]

    def as_plain(self) -> dict:
        """For json."""
        return {"numbers": self.numbers} | ({"rounded": self.grades} if self.grades else {})


class NumbersInference(RowInference):
    """A trained regression model; implements `finetune.inference.Inference`."""

    score = "r2"
    kind, join = "numbers", staticmethod(join)
    files = "evaluation.json, predictions.csv, scatter.png, examples.png"

    def __init__(self, trained: Trained):
        config, weights = trained.weights.task_config, trained.weights
        names, limits, std = config.get("names"), config.get("limits"), weights.head.get("head.std")
        if not names or std is None or std.shape != (len(names),):
            raise UserError(f"{trained.path} is damaged: it has no names or no scale of its numbers")
        head = NumberHead(weights.arch.dims[-1], [0.0] * len(names), [1.0] * len(names))
        super().__init__(trained, list(names), head)
        self.limits = None if limits is None else tuple(map(tuple, limits))
        self.collect = collector(self.names, std.tolist(), self.limits)

    def match(self, images: Any) -> None:
        """Match the data's numbers with the model's by name, or its classes if they are numbers."""
        by_class = number_names(images)[1]
        if by_class is None or len(self.names) > 1:
            super().match(images)
            return
        self.images, self.read_target = images, None
        self.transform = self.transform.of_classes(by_class)

    def check_names(self, images: Any, own: list[str]) -> None:
        """The data must have all numbers of the model."""
        if missing := [name for name in self.names if name not in own]:
            problem = f"{images.folder} does not have {missing[0]}, a number of {self.trained.path}"
            raise UserError(f"{problem}, but {', '.join(own[:5])}")

    def evaluation(self, predictions: Predictions) -> dict:
        """Scores, and those of each number."""
        if not len(predictions.label):
            raise UserError(f"{self.images.folder}, split {self.images.name} has no image with numbers")
        if not predictions.finite:
            raise UserError(f"{self.trained.path} gives outputs that are not finite: try --precision fp32")
        each = [{"name": name} | row for name, row in zip(self.names, predictions.of_each(), strict=True)]
        return {"scores": predictions.scores(), "numbers": each}

    def write_evaluation(self, out: Path, result: dict, predictions: Predictions, names: list[str]) -> None:
        """Write predictions.csv, two pictures and, last, evaluation.json."""
        from finetune.tasks.numbers.pictures import write_pictures  # matplotlib

        rows = [["sample", "name", *(f"{kind}{name}" for name in self.names for kind in ("", "predicted "))]]
        for i, sample in enumerate(predictions.sample.tolist()):
            pairs = zip(predictions.label[i].tolist(), predictions.number[i].tolist(), strict=True)
            cells = ["" if np.isnan(value) else value for pair in pairs for value in pair]
            rows.append([sample, names[sample], *cells])
        write_rows(out / "predictions.csv", rows)
        write_pictures(out, predictions, self.images)
        write_atomic(out / "evaluation.json", json.dumps(result, indent=1).encode())

    def show_evaluation(self, result: dict) -> None:
        """Print damaged images, and the scores of each number."""
        keys = [key for key in ("mae", "rmse", "r2", "kappa") if key in result["scores"]]
        rows = [[row["name"], f"{row['images']:,}", *(f"{row[key]:.4g}" for key in keys)] for row in result["numbers"]]
        titles = {"mae": "MAE", "rmse": "RMSE", "r2": "R2", "kappa": "quadratic kappa"}
        show(result, table(title_of(result), ["number"], ["images", *(titles[key] for key in keys)], rows))

    def predict(self, output: Tensor, batch: dict[str, Tensor], paths: list[Path], top: int) -> list[Prediction]:
        """Numbers from outputs [B, N]; `top` has no effect."""
        values, found = check_finite(output).cpu().numpy(), []
        grades = rounded(values, self.limits).astype(int).tolist() if self.limits else [[]] * len(values)
        for path, numbers, whole in zip(paths, values.tolist(), grades, strict=True):
            named = (dict(zip(self.names, row, strict=False)) for row in (numbers, whole))
            found.append(Prediction(path, *named))
        return found

    def explained(self, output: Tensor, name: str | None) -> Tensor:
        """As its base; without a name only if there is one number: units differ, so none is the highest."""
        if name is None and len(self.names) > 1:
            raise UserError(f"--cam: say which number it explains with --cam-of: {few(self.names)}")
        return super().explained(output, name)

    def average(self, outputs: list[Tensor]) -> Tensor:
        """Mean numbers."""
        return torch.stack([output.float() for output in outputs]).mean(0)

    def write_csv(self, file: Path, predictions: list[Prediction], top: int) -> None:
        head = ["path", *self.names, *(f"rounded {name}" for name in self.names if self.limits)]
        write_rows(file, [head, *([p.path, *p.numbers.values(), *p.grades.values()] for p in predictions)])

    def outputs(self) -> dict[str, str]:
        return {"numbers": f"float32 [batch, {len(self.names)}]: {', '.join(self.names)}"}
