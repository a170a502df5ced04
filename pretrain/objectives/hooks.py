"""What most objectives leave as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from launch.training.trainer import Report


class Hooks:
    """Base of objectives: methods of `pretrain.pretraining.Objective` that do nothing."""

    per_image, pictured = True, 8

    def check_batch(self, micro: int) -> None:
        """Any micro batch will do."""

    def beside(self) -> int:
        return 0

    def identity(self) -> dict[str, str]:
        return {}

    def monitor(self, model: nn.Module) -> Report:
        from launch.training.trainer import Report

        return Report()
