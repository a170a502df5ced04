"""What fine-tuning can predict. A task is a module of this folder and a line of this list."""

from finetune.tasks import classification

TASKS = {"classification": classification}  # by the value of --task.name
