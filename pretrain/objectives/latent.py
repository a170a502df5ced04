"""Latent targets: predict features of a moving average of the encoder at hidden patches; see models/latent.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from configs.compare import own_settings, to_dict
from configs.errors import UserError
from configs.keys import BelowOne, Choice, fixed
from configs.log import say
from configs.schema import FCMAESettings, Pretrain
from pretrain.objectives import fcmae

if TYPE_CHECKING:
    from torch import Tensor

    from data.sheets import Sheet
    from launch.training.trainer import Report
    from models.latent import Latent
    from models.opening import Opened
    from models.weights import Tensors

__all__ = ["Objective", "Settings"]

COLLAPSED = 0.02  # spread of the targets below which a run warns


@dataclass(frozen=True)
class Settings(FCMAESettings, Choice):
    """FCMAE's masks and decoder; target, losses and teacher."""

    target_stages: Literal[1, 2, 3, 4] = fixed(
        1, "the last stages of the teacher whose features are predicted; earlier ones are averaged over each patch"
    )
    latent_weight: PositiveFloat = fixed(1.0, "weight of the loss of features")
    pixel_weight: NonNegativeFloat = fixed(0.0, "weight of the loss of pixels, as in FCMAE; 0 = features only")
    ema: tuple[BelowOne, BelowOne] = fixed(
        (0.99, 0.9999), "decay of the teacher, a moving average of the encoder, at the first step and after ema_steps"
    )
    ema_steps: PositiveInt = fixed(10_000, "steps in which the decay rises linearly")


class Objective(fcmae.Objective):
    """FCMAE's masks; the decoder predicts features that the moving average of the encoder has of the whole image.

    Raises:
        UserError: as FCMAE; or ZeRO 3
    """

    file = "latent.pt"

    def __init__(self, config: Pretrain):
        super().__init__(config)
        self.collapsed = False  # at the last check
        if config.optim.zero_stage == 3:
            raise UserError(
                "objective.name is latent with optim.zero_stage 3, where no rank has all weights to average: use "
                "optim.zero_stage 0, 1 or 2"
            )

    def describe(self) -> str:
        own = self.config.objective
        stages = "last stage" if own.target_stages == 1 else f"last {own.target_stages} stages"
        pixels = f" and, with weight {own.pixel_weight:g}, pixels" if own.pixel_weight else ""
        return f"{super().describe()}; predicts the teacher's {stages}{pixels}"

    def build(self) -> Latent:
        from models.latent import Latent

        own = self.config.objective
        return Latent(self.config.model, own, own.target_stages, own.latent_weight, own.pixel_weight)

    def load(self, model: Latent, init: Opened) -> None:
        """Load the encoder, also into the teacher, and the decoder if the file has one of the same shape."""
        from models.start import start_parts

        if not start_parts(model, init, {"latent": self.decoder(model)[0]}):
            say(f"{init.path} has no decoder for these targets: a new one is trained")
        model.reset_teacher()

    def decay(self, step: int) -> float:
        """Decay of the teacher after a step, counted from 0 (2202.03555, section 3)."""
        (first, last), steps = self.config.objective.ema, self.config.objective.ema_steps
        return first + (last - first) * min(1.0, step / steps)

    def after_update(self, model: Latent, step: int) -> None:
        model.update_teacher(self.decay(step))

    def monitor(self, model: Latent) -> Report:
        """Losses and spreads of the last micro batch, mean over ranks; a line when the targets collapse."""
        from launch.training.trainer import Report
        from launch.training.world import mean_over_ranks

        scores = {name: x for name, x in mean_over_ranks(model.scores).items() if math.isfinite(x)}
        before, self.collapsed = self.collapsed, scores.get("target_spread", 1) < COLLAPSED
        lines = [collapse_warning(scores["target_spread"])] if self.collapsed and not before else []
        scores["collapsed"] = float(self.collapsed)
        return Report(scores={"latent": scores}, lines=lines)

    def picture(self, model: Latent, inputs: tuple[Tensor, ...], mean: Tensor, std: Tensor) -> tuple[str, Sheet]:
        from pretrain.latent_pictures import feature_grid

        title = "input, visible patches, target and predicted features"
        return title, feature_grid(model, *self.first_mask(*inputs), mean, std)

    def decoder(self, model: Latent) -> tuple[Tensors, dict]:
        from models.weights import cpu_state, split_by_prefix

        _, tensors = split_by_prefix(cpu_state(model), ("encoder.", "teacher."))
        return tensors, to_dict(self.config.model) | own_settings(self.config.objective)


def collapse_warning(spread: float) -> str:
    """The line for targets that are nearly the same for all images."""
    return (
        f"warning: the targets have collapsed: over images they vary by {spread:.2g} of their size, less than "
        f"{COLLAPSED:g}; start again with objective.pixel_weight 1, a higher objective.ema or a lower optim.lr"
    )
