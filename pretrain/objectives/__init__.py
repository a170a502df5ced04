"""Pretraining objectives by name (`objective.name`).

An objective is a module with `Settings` and `Objective`; see docs/architecture.md, "Add something".
"""

from pretrain.objectives import fcmae, lejepa, teacher

OBJECTIVES = {"fcmae": fcmae, "lejepa": lejepa, "teacher": teacher}
