"""Pretraining objectives by name (`objective.name`).

An objective is a module with `Settings`, a dataclass of its configuration section, and `Objective`, a class with the
methods of `pretrain.pretraining.Objective`. Modules import torch inside of functions, so that `--help` is quick.
"""

from pretrain.objectives import fcmae

OBJECTIVES = {"fcmae": fcmae}
