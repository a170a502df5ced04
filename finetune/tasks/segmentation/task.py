"""Training of a segmentation model: transforms, head, loss, scores."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError, counted
from configs.log import say
from configs.schema import Encoder, Finetune
from data.folder import Folder, names_of
from data.loader import Transform
from data.sampler import labelled_share
from data.shards import Split
from finetune.tasks.building import any_target, build_model
from finetune.tasks.segmentation import scores
from finetune.tasks.segmentation.inference import segment
from finetune.tasks.segmentation.model import VOID, HeadConfig, Loss, Segmenter
from finetune.tasks.segmentation.scores import Predictions
from finetune.tasks.segmentation.transforms import EvalTransform, ReadMask, TrainTransform
from models.opening import Opened
from models.start import start_encoder

MAX_WEIGHT = 10.0  # of a rare class with class_weights balanced


def mask_targets(images: Split | Folder) -> dict:
    """What the shards say about their masks. Raises `UserError` if they have none."""
    targets = getattr(images, "targets", None) or {}
    if targets.get("kind") != "mask" or not len(images) or not images.read_target(0):
        where = f"{images.folder}, split {images.name}"
        way_out = "prepare them with `python data/prepare.py SOURCE OUT --masks MASKS --mask-classes FILE`"
        raise UserError(f"{where} has no masks, which segmentation needs: {way_out}")
    return targets


def check_any_class(images: Split | Folder, read_mask: ReadMask) -> None:
    """Raise `UserError` if no mask has a pixel of a class; damaged ones are passed over."""
    if not any_target(images, read_mask, lambda mask: bool((mask != read_mask.ignore).any())):
        way_out = "check --mask-classes and --ignore of data/prepare.py"
        raise UserError(f"{images.folder}, split {images.name}: no mask has a pixel of a class: {way_out}")


class SegmenterTask:
    """A `Segmenter`, its loss and mean IoU. Implements `finetune.finetuning.Task`.

    Raises:
        UserError: a split has no masks, or the class weights do not fit
    """

    metric = "miou"
    join, restore = staticmethod(scores.join), staticmethod(scores.restore)

    def __init__(self, config: Finetune, train: Split, evaluation: Split):
        self.config, self.train, self.evaluation = config, train, evaluation
        targets, others = mask_targets(train), mask_targets(evaluation)
        self.classes, self.ignore = targets["names"], targets["ignore"]
        if (others["names"], others["ignore"]) != (self.classes, self.ignore):
            raise UserError(f"{config.data.path}: splits {train.name} and {evaluation.name} have other classes")
        self.weights = class_weights(config.task.class_weights, targets)
        self.read_target = ReadMask(len(self.classes), self.ignore)
        for split in (train, evaluation):
            check_any_class(split, self.read_target)
        settings, data = config.task, config.data
        about = {key: getattr(settings, key) for key in ("head", "width", "eval", "flips", "short_side")}
        self.head = HeadConfig(classes=len(self.classes), auxiliary=settings.auxiliary > 0, **about)
        self.head_config = asdict(self.head)
        self.collect = partial(scores.collect, classes=len(self.classes), ignore=self.ignore)
        self.run = partial(segment, config=self.head, window=data.height_width)

    def describe(self) -> str:
        return f"{counted(len(self.classes), 'class', 'classes')}, head {self.head.head}"

    def check_batch(self, micro: int) -> None:
        """Any micro batch will do."""

    def train_transform(self, mean: tuple[float, ...]) -> Transform:
        return TrainTransform(self.config.data, self.config.augment, self.config.task, self.ignore, mean)

    def eval_transform(self) -> Transform:
        return EvalTransform(self.config.task.short_side, self.config.data.eval_interpolation)

    def sample_weights(self) -> np.ndarray | None:
        share = self.config.task.label_share
        if share == 1:
            return None
        return labelled_share(np.zeros(len(self.train), int), share, self.config.run.seed).astype(float)

    def build(self, arch: Encoder) -> Segmenter:
        """The model with its loss."""
        loss, auxiliary = Loss(self.config.task.loss, self.weights), self.config.task.auxiliary
        return build_model(self.config.model, lambda *options: Segmenter(arch, self.head, *options, loss, auxiliary))

    def load(self, model: Segmenter, init: Opened | None) -> None:
        """Load the encoder of --init, and its head if it is of the same classes and shape."""
        if init is None:
            return
        start_encoder(model, init)
        if init.weights.task != self.config.task.name:
            return
        own, head = {f"head.{name}": x.shape for name, x in model.head.state_dict().items()}, init.weights.head
        keep = init.weights.classes == self.classes and own == {name: x.shape for name, x in head.items()}
        if keep:
            model.load_state_dict(head, strict=False)
        say(f"{init.path}: its head is {'kept' if keep else 'replaced by a new one'}")

    def inputs(self, image: Tensor) -> tuple[Tensor, ...]:
        return image, torch.zeros(len(image), *image.shape[2:], dtype=torch.long)

    def loss(self, model: Callable[..., Tensor], image: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Loss of the pixels that have a class."""
        mask = batch["mask"].to(image.device, non_blocking=True).long()
        return model(image, torch.where(mask == self.ignore, VOID, mask))

    def format(self, scores: dict[str, float]) -> str:
        return f"mIoU {scores['miou']:.2%}, pixel accuracy {scores['pixel_accuracy']:.2%}"

    def draw(self, folder: Path, predictions: Predictions) -> None:
        """Write confusion.png and examples.png."""
        from finetune.tasks.segmentation.pictures import draw_confusion, draw_examples  # matplotlib

        draw_confusion(folder / "confusion.png", predictions, self.classes)
        files = names_of(self.evaluation, [example.sample for example in predictions.examples])
        draw_examples(folder / "examples.png", predictions.examples, self.classes, files)


def class_weights(chosen: tuple | str | None, targets: dict) -> Tensor | None:
    """Weights [K] of the classes in cross entropy. Raises `UserError` if their number or the shards do not fit."""
    count = len(targets["names"])
    if chosen is None:
        return None
    if chosen == "balanced":
        pixels = torch.tensor(targets.get("pixels", [])[:count], dtype=torch.float64)
        if len(pixels) != count or not pixels.sum():
            raise UserError(
                "task.class_weights balanced needs counts of pixels in index.json: prepare the shards again"
            )
        median = pixels[pixels > 0].median()
        return (median / pixels.clamp(min=1)).clamp(max=MAX_WEIGHT).float()
    if len(chosen) != count:
        raise UserError(f"task.class_weights has {len(chosen)} numbers, there are {count} classes: give one for each")
    return torch.tensor(chosen)
