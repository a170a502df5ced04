"""Training of several labels per image."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs.log import say
from configs.schema import Finetune
from data.shards import Split
from finetune.inference import join
from finetune.tasks.image_task import RowTask, choose_metric
from finetune.tasks.labels import scores
from finetune.tasks.labels.scores import METRICS, Predictions
from finetune.tasks.losses import label_loss
from models.convnext import ConvNeXt
from models.opening import Opened
from models.weights import load_strict


class LabelsTask(RowTask):
    """A linear head on the mean token, a sigmoid for each label. Implements `finetune.finetuning.Task`."""

    kind, join = "labels", staticmethod(join)

    def __init__(self, config: Finetune, train: Split, evaluation: Split):
        super().__init__(config, train, evaluation)
        settings = config.task
        self.classes, self.metric = self.names, choose_metric(settings.metric, METRICS)
        best = settings.threshold == "best"
        self.threshold = None if best else (float(settings.threshold),) * self.outputs
        images, self.weights = self.used.sum(0), None
        if settings.class_weights:
            odds = (len(self.used) - images) / np.maximum(images, 1)
            self.weights = torch.from_numpy(np.maximum(odds, 1 / len(self.used)) ** settings.class_weights).float()
        if unseen := [name for name, count in zip(self.names, images, strict=True) if not count]:
            say(f"warning: no image of split {train.name} has {', '.join(unseen[:5])}: never predicted")
        applies = (self.others > 0.5).any(0)
        self.unseen = [name for name, seen in zip(self.names, applies, strict=True) if not seen]

    def load_head(self, model: ConvNeXt, init: Opened) -> bool:
        weights = init.weights
        if weights.task != self.kind or weights.classes != self.classes:
            return False
        say(f"{init.path}: its head of {self.outputs} labels is kept")
        load_strict(model.head, {name.removeprefix("head."): x for name, x in weights.head.items()}, init.path)
        return True

    def loss(self, model: Callable[[Tensor], Tensor], image: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Mean over images and labels."""
        label = batch["label"].to(image.device, non_blocking=True)
        known, settings = ~label.isnan(), self.config.task
        weights = None if self.weights is None else self.weights.to(image.device)
        loss = label_loss(settings.loss, settings.smoothing, model(image).float(), label.nan_to_num(), weights)
        return (loss * known).sum() / known.sum().clamp(min=1)

    def collect(self, output: Tensor, batch: dict[str, Tensor]) -> Predictions:
        return scores.collect(output, batch, self.threshold)

    def restore(self, state: dict) -> Predictions:
        return Predictions(**state)

    def fitted(self, predictions: Predictions) -> dict:
        """The thresholds, for the weight file."""
        return {"thresholds": list(predictions.thresholds() if predictions.finite else [0.5] * self.outputs)}

    def format(self, scores: dict[str, float]) -> str:
        return f"mAP {scores['map']:.2%}, F1 {scores['f1_micro']:.2%} micro, {scores['f1_macro']:.2%} macro"

    def draw(self, folder: Path, predictions: Predictions) -> None:
        """Write examples.png."""
        from finetune.tasks.labels.pictures import examples_picture  # matplotlib

        examples_picture(folder / "examples.png", predictions, self.names, self.evaluation)
