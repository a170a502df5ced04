"""Pretraining objectives by name (`objective.name`).

An objective is a module with `Settings` and `Objective`; see docs/architecture.md, "Add something".
"""

from pretrain.objectives import contrastive, fcmae, latent, teacher

OBJECTIVES = {"fcmae": fcmae, "contrastive": contrastive, "latent": latent, "teacher": teacher}
