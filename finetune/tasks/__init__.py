"""Fine-tuning tasks by name (`task.name`).

A task is a module with `Settings`, `make_task` and `make_inference`; see docs/architecture.md, "Add something".
"""

from typing import TYPE_CHECKING

from configs.errors import UserError, nearest
from finetune.tasks import classification, detection, labels, numbers, segmentation

if TYPE_CHECKING:
    from finetune.inference import Inference
    from models.opening import Trained

TASKS = {
    "classification": classification,
    "labels": labels,
    "numbers": numbers,
    "segmentation": segmentation,
    "detection": detection,
}


def make_inference(trained: "Trained") -> "Inference":
    """Inference for the task of a weight file: classification if it names none, as in other projects' files.

    Raises:
        UserError: there is no such task
    """
    name = trained.weights.task or "classification"
    if name not in TASKS:
        raise UserError(f"{trained.path} is for task {name}, which is unknown here {nearest(name, TASKS)}")
    return TASKS[name].make_inference(trained)
