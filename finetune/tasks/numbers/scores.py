"""Predicted numbers for a split, and their scores."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from finetune.tasks.image_task import scored

METRICS = {"r2": "R2", "mae": "MAE", "rmse": "RMSE", "kappa": "kappa", "loss": "loss"}


@dataclass(frozen=True)
class Predictions:
    """Predictions for M samples of a split, in its order, of N numbers."""

    sample: np.ndarray  # [M] index in the split
    label: np.ndarray  # [M, N]; NaN = missing
    number: np.ndarray  # [M, N]
    names: tuple[str, ...]
    std: tuple[float, ...]  # of each number in training
    limits: tuple[tuple[float, float], ...] | None  # lowest and highest of each number, if all are whole

    @property
    def finite(self) -> bool:
        """Whether all outputs are finite, so that there are scores."""
        return bool(np.isfinite(self.number).all())

    def error(self) -> np.ndarray:
        """Absolute errors [M, N] in standard deviations; NaN where a number is missing."""
        return np.abs(self.number.astype(np.float64) - self.label) / self.std

    def grades(self) -> np.ndarray:
        """Numbers [M, N] rounded to whole ones within the limits."""
        return rounded(self.number, self.limits)

    def of_each(self) -> list[dict[str, float]]:
        """MAE, RMSE, R2 and, of whole numbers, quadratic weighted kappa of each number, over images that have it.

        Scores that are undefined, such as R2 of a single image, are 0.
        """
        from sklearn.metrics import cohen_kappa_score, mean_absolute_error, r2_score, root_mean_squared_error  # slow

        found = []
        for i in range(len(self.names)):
            known = np.isfinite(self.label[:, i])
            truth, number = (x[known, i].astype(np.float64) for x in (self.label, self.number))
            values = {"images": len(truth)}
            values["r2"] = r2_score(truth, number) if len(truth) > 1 else 0.0
            for key, score in (("mae", mean_absolute_error), ("rmse", root_mean_squared_error)):
                values[key] = score(truth, number) if len(truth) else 0.0
            if self.limits:
                pair = np.rint(truth).astype(int), self.grades()[known, i].astype(int)
                several = len(np.union1d(*pair)) > 1
                values["kappa"] = cohen_kappa_score(*pair, weights="quadratic") if several else 0.0
            found.append({key: value if key == "images" else float(value) for key, value in values.items()})
        return found

    def scores(self) -> dict[str, float]:
        """Means over the numbers, and those of each of several; loss: mean squared error of normalised numbers."""
        keys = [key for key in METRICS if key != "loss" and (key != "kappa" or self.limits)]
        if not self.finite:
            return dict.fromkeys([*keys, "loss"], math.nan) | {"images": len(self.label)}
        each = self.of_each()
        scores: dict[str, float] = {key: float(np.mean([values[key] for values in each])) for key in keys}
        scores |= {"loss": float(np.nanmean(self.error() ** 2)), "images": len(self.label)}
        if len(each) > 1:
            scores |= {f"{key}_{name}": row[key] for name, row in zip(self.names, each, strict=True) for key in keys}
        return scores


def rounded(number: np.ndarray, limits: tuple[tuple[float, float], ...]) -> np.ndarray:
    """Numbers [M, N] rounded to whole ones from the lowest to the highest of each."""
    return np.clip(np.rint(number), *np.array(limits).T)


def collector(
    names: list[str], std: list[float], limits: tuple[tuple[float, float], ...] | None
) -> Callable[[Tensor, dict[str, Tensor]], Predictions]:
    """A function from numbers [B, N] and a batch to predictions, without images that do not count."""

    def collect(output: Tensor, batch: dict[str, Tensor]) -> Predictions:
        counted = scored(batch)
        arrays = (batch["sample"][counted], batch["label"][counted], output[counted.to(output.device)].float())
        return Predictions(*(x.cpu().numpy() for x in arrays), tuple(names), tuple(std), limits)

    return collect
