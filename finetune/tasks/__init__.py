"""Fine-tuning tasks by name (`task.name`).

A task is a module with `Settings`, a dataclass of its configuration section; `Task`, a class with the methods of
`finetune.finetuning.Task`; and `make_inference`, a function from a trained model to an object with the methods of
`finetune.inference.Inference`. Modules import torch inside of functions, so that `--help` is quick.
"""

from types import ModuleType

from configs.errors import UserError, nearest
from finetune.tasks import classification

TASKS = {"classification": classification}


def task_of(path: str, name: str | None) -> ModuleType:
    """The module of a weight file's task; None, as in other projects' files, is classification.

    Raises:
        UserError: there is no such task
    """
    name = name or "classification"
    if name not in TASKS:
        raise UserError(f"{path} is for task {name}, which is unknown here {nearest(name, TASKS)}")
    return TASKS[name]
