"""Semantic segmentation: a class for each pixel."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from configs.keys import Choice, Share, fixed, require
from configs.schema import Finetune

if TYPE_CHECKING:
    from data.shards import Split
    from finetune.tasks.segmentation.inference import SegmenterInference
    from finetune.tasks.segmentation.task import SegmenterTask
    from models.opening import Trained


@dataclass(frozen=True)
class Settings(Choice):
    """Keys of the `task` section: head, loss, scale, evaluation. Crops are of `data.size`."""

    head: Literal["fpn", "upernet"] = fixed("fpn", "decoder: fpn = light semantic FPN; upernet = UPerNet, as in papers")
    width: PositiveInt = fixed(128, "channels of the head; 512 in papers' UPerNet")
    auxiliary: NonNegativeFloat = fixed(0.0, "weight of the loss of an auxiliary head on the third stage; 0 = no head")
    loss: Literal["ce", "dice", "ce+dice"] = fixed("ce", "ce = cross entropy of pixels, dice = soft dice of classes")
    class_weights: tuple[NonNegativeFloat, ...] | Literal["balanced"] | None = fixed(
        None, "weight of each class in cross entropy; balanced = median frequency / frequency, from the prepared masks"
    )
    scale: tuple[PositiveFloat, PositiveFloat] = fixed((0.5, 2.0), "range of the random scale of training images")
    short_side: PositiveInt | None = fixed(
        None, "shorter side of images at scale 1 and in evaluation, pixels; null = as stored"
    )
    eval: Literal["whole", "slide"] = fixed(
        "whole", "in evaluation: whole = the image at once; slide = overlapping windows of data.size, averaged"
    )
    flips: bool = fixed(False, "in evaluation average with the mirrored image: twice the time")
    label_share: Share = fixed(1.0, "share of the images to train on, drawn with run.seed")

    def __post_init__(self):
        low, high = self.scale
        require(low <= high, "task.scale", self.scale, "two factors, min <= max")


def make_task(config: Finetune, train: "Split", evaluation: "Split") -> "SegmenterTask":
    """The task's `finetune.finetuning.Task`. Raises `UserError` if a split has no masks."""
    from finetune.tasks.segmentation.task import SegmenterTask

    return SegmenterTask(config, train, evaluation)


def make_inference(trained: "Trained") -> "SegmenterInference":
    """The task's `finetune.inference.Inference` for a trained model."""
    from finetune.tasks.segmentation.inference import SegmenterInference

    return SegmenterInference(trained)
