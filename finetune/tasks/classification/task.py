"""Training of a classifier: head, mixup, loss, scores."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from timm.data import Mixup
from torch import Tensor

from configs.errors import UserError, counted
from configs.schema import Finetune
from data.sampler import class_weights, labelled_share
from data.shards import Split
from finetune.inference import join
from finetune.tasks.classification import scores
from finetune.tasks.classification.scores import METRICS, Predictions
from finetune.tasks.image_task import ImageTask, choose_metric
from finetune.tasks.losses import ClassLoss, balanced_weights
from models.convnext import ConvNeXt
from models.opening import Opened
from models.start import start_classifier


class ClassifierTask(ImageTask):
    """A linear head on the mean token, one class per image. Implements `finetune.finetuning.Task`.

    Raises:
        UserError: an image of either split has no label
    """

    collect, join = staticmethod(scores.collect), staticmethod(join)

    def __init__(self, config: Finetune, train: Split, evaluation: Split):
        for split in (train, evaluation):
            if not train.classes or (split.labels() < 0).any():
                where = f"{config.data.path}, split {split.name}"
                kind = (getattr(train, "targets", None) or {}).get("kind")
                way_out = f": its targets are {kind}, for another --task.name" if kind else ""
                raise UserError(f"{where} has images without labels, which classification needs{way_out}")
        super().__init__(config, train, evaluation, len(train.classes))
        self.classes, settings, self.mixup = train.classes, config.task, None
        self.metric = choose_metric(settings.metric, METRICS)
        images = np.bincount(evaluation.labels(), minlength=self.outputs)
        self.unseen = [name for name, count in zip(self.classes, images, strict=False) if not count]
        weights = balanced_weights(np.bincount(train.labels(), minlength=self.outputs), settings.class_weights)
        self.criterion = ClassLoss(settings.loss, settings.smoothing, weights)
        if settings.mixup or settings.cutmix:
            self.mixup = Mixup(
                settings.mixup, settings.cutmix, prob=settings.mix_prob, switch_prob=settings.mix_switch,
                mode=settings.mix_mode, label_smoothing=settings.smoothing, num_classes=len(self.classes),
            )  # fmt: skip

    def describe(self) -> str:
        return counted(len(self.classes), "class", "classes")

    def check_batch(self, micro: int) -> None:
        if micro % 2 and self.mixup:
            raise UserError(f"task.mixup and cutmix pair images: optim.micro_batch {micro} must be even")

    def sample_weights(self) -> np.ndarray | None:
        settings = self.config.task
        if settings.label_share == 1 and not settings.balance:
            return None
        labels = self.train.labels()
        used = labelled_share(labels, settings.label_share, self.config.run.seed)
        return np.where(used, class_weights(labels, settings.balance), 0)

    def load(self, model: ConvNeXt, init: Opened | None) -> None:
        """Load --init; a new head is scaled by `head_init`."""
        if init is None or not start_classifier(model, init, self.classes):
            self.scale_head(model, init)

    def loss(self, model: Callable[[Tensor], Tensor], image: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The loss after mixup or cutmix."""
        label = batch["label"].to(image.device, non_blocking=True)
        if self.mixup:
            image, label = self.mixup(image, label)
        return self.criterion(model(image).float(), label)

    def restore(self, state: dict) -> Predictions:
        return Predictions(**state)

    def format(self, scores: dict[str, float]) -> str:
        extra = {} if self.metric in ("top1", "top5") else {METRICS[self.metric]: scores[self.metric]}
        shares = {"top-1": scores["top1"], "top-5": scores["top5"]} | extra
        return ", ".join(f"{name} {x:.4f}" if name == "loss" else f"{name} {x:.2%}" for name, x in shares.items())

    def draw(self, folder: Path, predictions: Predictions) -> None:
        """Write confusion.png, calibration.png and examples.png."""
        from finetune.tasks.classification.pictures import write_pictures  # matplotlib, sklearn

        write_pictures(folder, predictions, self.classes, self.evaluation)
