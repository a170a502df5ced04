"""Classification, the default task: one class per image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import NonNegativeFloat

from configs.errors import UserError
from configs.keys import BelowOne, Choice, Probability, Share, fixed
from configs.schema import Encoder, Finetune

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from data.loader import Transform
    from data.shards import Split
    from finetune.tasks.classification.inference import ClassifierInference
    from finetune.tasks.classification.scores import Predictions
    from models.convnext import ConvNeXt
    from models.opening import Opened, Trained


@dataclass(frozen=True)
class Settings(Choice):
    """Keys of the `task` section: labels, head and loss."""

    smoothing: BelowOne = fixed(0.1, "label smoothing")
    mixup: NonNegativeFloat = fixed(0.0, "alpha of mixup; 0 = off")
    cutmix: NonNegativeFloat = fixed(0.0, "alpha of cutmix; 0 = off")
    mix_prob: Probability = fixed(1.0, "probability of mixup or cutmix")
    mix_switch: Probability = fixed(0.5, "probability of cutmix rather than mixup if both are on")
    mix_mode: Literal["batch", "pair", "elem"] = fixed("batch", "granularity of mixup sampling: batch, pair or element")
    head_init: float | None = fixed(
        None, "scale of a new head's initial weights; null = .001 with --init, 1 from scratch"
    )
    balance: Probability = fixed(
        0.0, "oversampling of rare classes, from 0 = none to 1 = all classes alike: weight n ** -balance for n images"
    )
    label_share: Share = fixed(1.0, "share of each class's images to train on, drawn with run.seed")


class Task:
    """A linear head on the mean token, cross entropy, accuracy. Implements `finetune.finetuning.Task`.

    Args:
        config: of the run
        train: training split
        evaluation: evaluation split
    Raises:
        UserError: an image of either split has no label
    """

    metric = "top1"

    def __init__(self, config: Finetune, train: Split, evaluation: Split):
        self.config, self.train = config, train
        for split in (train, evaluation):
            if not train.classes or (split.labels() < 0).any():
                raise UserError(
                    f"{config.data.path}, split {split.name} has images without labels, which classification needs"
                )
        self.classes = train.classes
        self.mixup, self.criterion = self._build_loss()

    def describe(self) -> str:
        return f"{len(self.classes)} classes"

    def check_batch(self, micro: int) -> None:
        if micro % 2 and (self.config.task.mixup or self.config.task.cutmix):
            raise UserError(f"task.mixup and cutmix pair images: optim.micro_batch {micro} must be even")

    def train_transform(self, mean: tuple[float, ...]) -> Transform:
        from data.transforms import TrainTransform

        return TrainTransform(self.config.data, self.config.augment, mean)

    def eval_transform(self) -> Transform:
        from data.transforms import EvalTransform

        data = self.config.data
        return EvalTransform(data.height_width, self.config.augment.eval_crop, data.eval_interpolation)

    def sample_weights(self) -> np.ndarray | None:
        from data.sampler import class_weights, labelled_share

        settings = self.config.task
        if settings.label_share == 1 and not settings.balance:
            return None
        labels = self.train.labels()
        used = labelled_share(labels, settings.label_share, self.config.run.seed)
        return np.where(used, class_weights(labels, settings.balance), 0)

    def build(self, arch: Encoder) -> ConvNeXt:
        """The classifier. A frozen encoder has neither drop path nor activation checkpointing."""
        from models.convnext import ConvNeXt

        settings = self.config.model
        if not settings.freeze_encoder:
            return ConvNeXt(arch, len(self.classes), settings.drop_path, settings.recompute)
        model = ConvNeXt(arch, len(self.classes))
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        return model

    def load(self, model: ConvNeXt, init: Opened | None) -> None:
        """Load --init; a new head is scaled by `head_init`."""
        from models.start import start_classifier

        if init is None or not start_classifier(model, init, self.classes):
            scale = self.config.task.head_init
            for parameter in model.head.fc.parameters():
                parameter.data.mul_((1.0 if init is None else 0.001) if scale is None else scale)

    def loss(self, model: Callable[[Tensor], Tensor], image: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Cross entropy after mixup or cutmix."""
        label = batch["label"].to(image.device, non_blocking=True)
        if self.mixup:
            image, label = self.mixup(image, label)
        return self.criterion(model(image).float(), label)

    def collect(self, output: Tensor, batch: dict[str, Tensor]) -> Predictions:
        from finetune.tasks.classification.scores import collect

        return collect(output, batch)

    def join(self, parts: list[Predictions]) -> Predictions:
        from finetune.tasks.classification.scores import join

        return join(parts)

    def restore(self, state: dict) -> Predictions:
        from finetune.tasks.classification.scores import Predictions

        return Predictions(**state)

    def format(self, scores: dict[str, float]) -> str:
        return f"top-1 {scores['top1']:.2%}, top-5 {scores['top5']:.2%}"

    def draw(self, folder: Path, predictions: Predictions) -> None:
        """Write confusion.png and calibration.png."""
        from finetune.tasks.classification.pictures import calibration_picture, confusion_picture

        confusion_picture(folder / "confusion.png", predictions, self.classes)
        calibration_picture(folder / "calibration.png", predictions.calibration())

    def _build_loss(self) -> tuple[Callable | None, Callable]:
        from timm.data import Mixup
        from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

        settings = self.config.task
        if not (settings.mixup or settings.cutmix):
            return None, LabelSmoothingCrossEntropy(settings.smoothing)
        mixup = Mixup(
            settings.mixup, settings.cutmix, prob=settings.mix_prob, switch_prob=settings.mix_switch,
            mode=settings.mix_mode, label_smoothing=settings.smoothing, num_classes=len(self.classes),
        )  # fmt: skip
        return mixup, SoftTargetCrossEntropy()


def make_inference(trained: Trained) -> ClassifierInference:
    """The task's `finetune.inference.Inference` for a trained classifier."""
    from finetune.tasks.classification.inference import ClassifierInference

    return ClassifierInference(trained)
