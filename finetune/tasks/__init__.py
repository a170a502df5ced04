"""The tasks of fine-tuning, by their name in the configuration (`task.name`).

A task is a module with `Settings`, the dataclass of its configuration section, and `Task`, a class with the methods of
`finetune.finetuning.Task`. The modules import torch inside of functions, so that `--help` is quick.
"""

from finetune.tasks import classification

TASKS = {"classification": classification}
