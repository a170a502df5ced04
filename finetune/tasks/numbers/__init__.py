"""Numbers: regression, also of ordinal grades such as 0 to 4."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from configs.keys import Choice, Share, fixed
from configs.schema import Finetune

if TYPE_CHECKING:
    from data.shards import Split
    from finetune.tasks.numbers.inference import NumbersInference
    from finetune.tasks.numbers.task import NumbersTask
    from models.opening import Trained


@dataclass(frozen=True)
class Settings(Choice):
    """Keys of the `task` section: loss, head."""

    metric: str = fixed(
        "r2", "score of the best weights and of run.patience: r2, mae, rmse, loss, kappa (if all numbers are whole)"
    )
    loss: Literal["huber", "mse"] = fixed(
        "huber", "of normalised numbers: huber = linear beyond one standard deviation; mse = squared error"
    )
    head_init: float | None = fixed(None, "scale of a new head's initial weights; null = .001 with --init, else 1")
    label_share: Share = fixed(1.0, "share of the images to train on, drawn with run.seed")


def make_task(config: Finetune, train: "Split", evaluation: "Split") -> "NumbersTask":
    """The task's `finetune.finetuning.Task`. Raises `UserError` if the data has no numbers."""
    from finetune.tasks.numbers.task import NumbersTask

    return NumbersTask(config, train, evaluation)


def make_inference(trained: "Trained") -> "NumbersInference":
    """The task's `finetune.inference.Inference` for a trained model."""
    from finetune.tasks.numbers.inference import NumbersInference

    return NumbersInference(trained)
