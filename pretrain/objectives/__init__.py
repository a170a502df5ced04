"""What pretraining can learn. An objective is a module of this folder and a line of this list."""

from pretrain.objectives import fcmae

OBJECTIVES = {"fcmae": fcmae}  # by the value of --objective.name
