"""The tasks of fine-tuning, by their name in the configuration (`task.name`).

A task is a module with three names: `Settings`, the dataclass of its configuration section; `Task`, a class with the
methods of `finetune.finetuning.Task`; and `make_inference`, a function from a trained model to an object with the
methods of `finetune.inference.Inference`. The modules import torch inside of functions, so that `--help` is quick.
"""

from types import ModuleType

from configs.errors import UserError, nearest
from finetune.tasks import classification

TASKS = {"classification": classification}


def task_of(path: str, name: str | None) -> ModuleType:
    """The task of a weight file that names it; files of other projects, which do not, are classifiers.

    Raises:
        UserError: there is no such task
    """
    name = name or "classification"
    if name not in TASKS:
        raise UserError(f"{path} is for the task {name}, which does not exist here {nearest(name, TASKS)}")
    return TASKS[name]
