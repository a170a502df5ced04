"""Training of a regression model."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.errors import UserError
from configs.schema import Encoder, Finetune
from data.shards import Split
from finetune.inference import join
from finetune.tasks.image_task import RowTask, choose_metric
from finetune.tasks.numbers.head import NumberHead, number_names
from finetune.tasks.numbers.scores import METRICS, Predictions, collector
from models.convnext import ConvNeXt


class NumbersTask(RowTask):
    """A linear head on the mean token; numbers are normalised by their mean and standard deviation in training.

    Implements `finetune.finetuning.Task`.
    """

    kind, classes, join = "numbers", None, staticmethod(join)

    def __init__(self, config: Finetune, train: Split, evaluation: Split):
        super().__init__(config, train, evaluation)
        rows = self.used.astype(np.float64)
        known = np.isfinite(rows)
        if empty := [name for name, count in zip(self.names, known.sum(0), strict=True) if not count]:
            raise UserError(f"{train.folder}, split {train.name}: no image has a value of {empty[0]}")
        self.mean, std = np.nanmean(rows, 0), np.nanstd(rows, 0)
        self.std = np.where(std > 0, std, 1.0)
        values, self.limits = rows[known], None
        if (values == np.rint(values)).all():
            self.limits = tuple(zip(np.nanmin(rows, 0).tolist(), np.nanmax(rows, 0).tolist(), strict=True))
        self.metric = choose_metric(config.task.metric, [key for key in METRICS if key != "kappa" or self.limits])
        self.head_config = {
            "names": self.names,
            "limits": None if self.limits is None else list(map(list, self.limits)),
        }
        self.collect = collector(self.names, self.std.tolist(), self.limits)

    def target_names(self, train: Split) -> list[str]:
        names, self.by_class = number_names(train)
        return names

    def build(self, arch: Encoder) -> ConvNeXt:
        model = super().build(arch)
        model.head = NumberHead(model.arch.dims[-1], self.mean, self.std)
        return model

    def loss(self, model: Callable[[Tensor], Tensor], image: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Mean over all numbers that are known."""
        label = batch["label"].to(image.device, non_blocking=True)
        known, std = ~label.isnan(), torch.tensor(self.std, dtype=torch.float32, device=image.device)
        error = torch.where(known, (model(image).float() - label.nan_to_num()) / std, 0)
        kind = F.huber_loss if self.config.task.loss == "huber" else F.mse_loss
        return kind(error, torch.zeros_like(error), reduction="sum") / known.sum().clamp(min=1)

    def restore(self, state: dict) -> Predictions:
        return Predictions(**state)

    def format(self, scores: dict[str, float]) -> str:
        kappa = f", kappa {scores['kappa']:.4f}" if "kappa" in scores else ""
        return f"R2 {scores['r2']:.4f}, MAE {scores['mae']:.4g}, RMSE {scores['rmse']:.4g}{kappa}"

    def draw(self, folder: Path, predictions: Predictions) -> None:
        """Write scatter.png and examples.png."""
        from finetune.tasks.numbers.pictures import write_pictures  # matplotlib

        write_pictures(folder, predictions, self.evaluation)
