"""Classification, the default task: one class per image."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat

from configs.keys import BelowOne, Choice, Probability, Share, fixed
from configs.schema import Finetune

if TYPE_CHECKING:
    from data.shards import Split
    from finetune.tasks.classification.inference import ClassifierInference
    from finetune.tasks.classification.task import ClassifierTask
    from models.opening import Trained


@dataclass(frozen=True)
class Settings(Choice):
    """Keys of the `task` section: labels, head and loss."""

    metric: str = fixed(
        "top1", "score of the best weights and of run.patience: top1, top5, balanced_accuracy, macro_f1, loss"
    )
    loss: Literal["softmax", "bce", "focal"] = fixed(
        "softmax",
        "softmax = cross entropy; bce = binary cross entropy per class; focal = focal loss of the softmax",
    )
    class_weights: Probability = fixed(
        0.0, "weight of a class in the loss, n ** -class_weights for n images: 0 = none, 1 = all classes alike"
    )
    smoothing: BelowOne = fixed(0.1, "label smoothing")
    mixup: NonNegativeFloat = fixed(0.0, "alpha of mixup; 0 = off")
    cutmix: NonNegativeFloat = fixed(0.0, "alpha of cutmix; 0 = off")
    mix_prob: Probability = fixed(1.0, "probability of mixup or cutmix")
    mix_switch: Probability = fixed(0.5, "probability of cutmix rather than mixup if both are on")
    mix_mode: Literal["batch", "pair", "elem"] = fixed("batch", "granularity of mixup sampling: batch, pair or element")
    head_init: float | None = fixed(None, "scale of a new head's initial weights; null = .001 with --init, else 1")
    balance: Probability = fixed(
        0.0, "oversampling of rare classes, from 0 = none to 1 = all classes alike: weight n ** -balance for n images"
    )
    label_share: Share = fixed(1.0, "share of each class's images to train on, drawn with run.seed")


def make_task(config: Finetune, train: "Split", evaluation: "Split") -> "ClassifierTask":
    """The task's `finetune.finetuning.Task`. Raises `UserError` if an image of either split has no label."""
    from finetune.tasks.classification.task import ClassifierTask

    return ClassifierTask(config, train, evaluation)


def make_inference(trained: "Trained") -> "ClassifierInference":
    """The task's `finetune.inference.Inference` for a trained classifier."""
    from finetune.tasks.classification.inference import ClassifierInference

    return ClassifierInference(trained)
