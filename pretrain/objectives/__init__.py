"""The objectives of pretraining, by their name in the configuration (`objective.name`).

An objective is a module with `Settings`, the dataclass of its configuration section, and `Objective`, a class with the
methods of `pretrain.pretraining.Objective`. The modules import torch inside of functions, so that `--help` is quick.
"""

from pretrain.objectives import fcmae

OBJECTIVES = {"fcmae": fcmae}
