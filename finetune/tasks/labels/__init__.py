"""Several labels per image, each of which applies or not."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from configs.keys import BelowOne, Choice, Probability, Share, fixed
from configs.schema import Finetune

if TYPE_CHECKING:
    from data.shards import Split
    from finetune.tasks.labels.inference import LabelsInference
    from finetune.tasks.labels.task import LabelsTask
    from models.opening import Trained


@dataclass(frozen=True)
class Settings(Choice):
    """Keys of the `task` section: loss, threshold, head."""

    metric: str = fixed("map", "score of the best weights and of run.patience: map, f1_micro, f1_macro, loss")
    loss: Literal["bce", "focal"] = fixed("bce", "bce = binary cross entropy of each label; focal = focal loss")
    class_weights: Probability = fixed(
        0.0, "weight of a label in the loss where it applies: (images without / with it) ** class_weights; 0 = none"
    )
    threshold: Probability | Literal["best"] = fixed(
        0.5, "probability from which a label is predicted; best = for each label, that of the best F1 on eval_split"
    )
    smoothing: BelowOne = fixed(0.0, "label smoothing")
    head_init: float | None = fixed(None, "scale of a new head's initial weights; null = .001 with --init, else 1")
    label_share: Share = fixed(1.0, "share of the images to train on, drawn with run.seed")


def make_task(config: Finetune, train: "Split", evaluation: "Split") -> "LabelsTask":
    """The task's `finetune.finetuning.Task`. Raises `UserError` if the data has no several labels."""
    from finetune.tasks.labels.task import LabelsTask

    return LabelsTask(config, train, evaluation)


def make_inference(trained: "Trained") -> "LabelsInference":
    """The task's `finetune.inference.Inference` for a trained model."""
    from finetune.tasks.labels.inference import LabelsInference

    return LabelsInference(trained)
