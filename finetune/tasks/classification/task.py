"""Training of a classifier: head, mixup, loss, scores."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor

from configs.errors import UserError
from configs.schema import Encoder, Finetune
from data.loader import Transform
from data.sampler import class_weights, labelled_share
from data.shards import Split
from data.transforms import EvalTransform, TrainTransform
from finetune.tasks.classification import scores
from finetune.tasks.classification.scores import Predictions
from models.convnext import ConvNeXt
from models.opening import Opened
from models.start import start_classifier


class ClassifierTask:
    """A linear head on the mean token, cross entropy, accuracy. Implements `finetune.finetuning.Task`.

    Raises:
        UserError: an image of either split has no label
    """

    metric, read_target = "top1", None
    head_config: dict = {}  # noqa: RUF012  # nothing
    collect, join = staticmethod(scores.collect), staticmethod(scores.join)

    def __init__(self, config: Finetune, train: Split, evaluation: Split):
        self.config, self.train = config, train
        for split in (train, evaluation):
            if not train.classes or (split.labels() < 0).any():
                where = f"{config.data.path}, split {split.name}"
                raise UserError(f"{where} has images without labels, which classification needs")
        self.classes = train.classes
        settings, self.mixup = config.task, None
        self.criterion = LabelSmoothingCrossEntropy(settings.smoothing)
        if settings.mixup or settings.cutmix:
            self.criterion = SoftTargetCrossEntropy()
            self.mixup = Mixup(
                settings.mixup, settings.cutmix, prob=settings.mix_prob, switch_prob=settings.mix_switch,
                mode=settings.mix_mode, label_smoothing=settings.smoothing, num_classes=len(self.classes),
            )  # fmt: skip

    def describe(self) -> str:
        return f"{len(self.classes)} classes"

    def check_batch(self, micro: int) -> None:
        if micro % 2 and self.mixup:
            raise UserError(f"task.mixup and cutmix pair images: optim.micro_batch {micro} must be even")

    def train_transform(self, mean: tuple[float, ...]) -> Transform:
        return TrainTransform(self.config.data, self.config.augment, mean)

    def eval_transform(self) -> Transform:
        data = self.config.data
        return EvalTransform(data.height_width, self.config.augment.eval_crop, data.eval_interpolation)

    def sample_weights(self) -> np.ndarray | None:
        settings = self.config.task
        if settings.label_share == 1 and not settings.balance:
            return None
        labels = self.train.labels()
        used = labelled_share(labels, settings.label_share, self.config.run.seed)
        return np.where(used, class_weights(labels, settings.balance), 0)

    def build(self, arch: Encoder) -> ConvNeXt:
        """The classifier. A frozen encoder has neither drop path nor activation checkpointing."""
        settings = self.config.model
        if not settings.freeze_encoder:
            return ConvNeXt(arch, len(self.classes), settings.drop_path, settings.recompute)
        model = ConvNeXt(arch, len(self.classes))
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        return model

    def inputs(self, image: Tensor) -> tuple[Tensor, ...]:
        return (image,)

    def load(self, model: ConvNeXt, init: Opened | None) -> None:
        """Load --init; a new head is scaled by `head_init`."""
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

    def restore(self, state: dict) -> Predictions:
        return Predictions(**state)

    def format(self, scores: dict[str, float]) -> str:
        return f"top-1 {scores['top1']:.2%}, top-5 {scores['top5']:.2%}"

    def draw(self, folder: Path, predictions: Predictions) -> None:
        """Write confusion.png and calibration.png."""
        from finetune.tasks.classification.pictures import calibration_picture, confusion_picture  # matplotlib, sklearn

        confusion_picture(folder / "confusion.png", predictions, self.classes)
        calibration_picture(folder / "calibration.png", predictions.calibration())
