"""Distillation: predict a frozen teacher's features; see models/distilled.py and models/teacher.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat, PositiveInt

from configs.checks import check_weights
from configs.compare import own_settings, to_dict
from configs.errors import UserError
from configs.keys import Choice, fixed, free
from configs.log import say
from configs.schema import MaskedSettings, Pretrain
from pretrain.objectives import fcmae

if TYPE_CHECKING:
    from torch import Tensor

    from data.sheets import Sheet
    from launch.training.trainer import Report
    from models.distilled import Distilled
    from models.opening import Opened
    from models.weights import Tensors

__all__ = ["Objective", "Settings"]

WANTED = "set objective.teacher to a weight file, a model folder, hf://USER/REPO or timm:NAME"


@dataclass(frozen=True)
class Settings(MaskedSettings, Choice):
    """FCMAE's masks and decoder; teacher and losses."""

    teacher: str = free(
        "none",
        "frozen model whose features are predicted: a weight file that --init takes, a model folder of timm or "
        "transformers, hf://USER/REPO, or timm:NAME",
    )
    teacher_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = fixed(
        None, "side in pixels, or [height,width], to which the teacher's images are resized; null = about data.size"
    )
    loss: Literal["cosine", "smooth_l1"] = fixed("cosine", "distance of predicted and normalised true features")
    visible_weight: NonNegativeFloat = fixed(1.0, "weight of the loss of visible patches; that of hidden ones has 1")
    pooled_weight: NonNegativeFloat = fixed(1.0, "weight of the loss of the feature of the whole image")


class Objective(fcmae.Objective):
    """FCMAE's masks; decoder and linear layers predict the features that a frozen teacher has of the whole image.

    Raises:
        UserError: as FCMAE; or there is no teacher
    """

    file = "teacher.pt"

    def __init__(self, config: Pretrain):
        super().__init__(config)
        name = config.objective.teacher
        if name == "none":
            raise UserError(f"objective.name teacher needs one: {WANTED}")
        if not name.startswith("timm:"):
            check_weights(name, "a teacher: a weight file, a model folder, hf://USER/REPO or timm:NAME")

    def describe(self) -> str:
        height, width = self.teacher.size
        own = self.config.objective
        return f"{super().describe()}; {own.loss} distance to features of {own.teacher} at {height}x{width}"

    def build(self) -> Distilled:
        """Load the teacher, which is not part of the model, and build the student."""
        from models.distilled import Distilled
        from models.teacher import Teacher

        data, model, own = self.config.data, self.config.model, self.config.objective
        wanted = (own.teacher_size,) * 2 if isinstance(own.teacher_size, int) else own.teacher_size
        statistics = data.statistics(model.channels)
        self.teacher = Teacher(own.teacher, self.grid, data.height_width, statistics, wanted)
        return Distilled(model, own, self.teacher.widths, own.loss, own.visible_weight, own.pooled_weight)

    def load(self, model: Distilled, init: Opened) -> None:
        """Load the encoder, and the other parts if the file has them in the same shapes."""
        from models.start import start_parts

        if not start_parts(model, init, {"teacher": self.decoder(model)[0]}):
            say(f"{init.path} has no decoder for these targets: a new one is trained")

    def inputs(self, image: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Images, masks, and the teacher's features, which the masks of an image share."""
        from launch.training.precision import autocast, precision

        with autocast(image.device, precision(self.config.optim, image.device, True)):
            features = self.teacher.to(image.device)(image)
        return *super().inputs(image, batch), *features

    def beside(self) -> int:
        return self.teacher.bytes

    def identity(self) -> dict[str, str]:
        return {"teacher_digest": self.teacher.digest}

    def monitor(self, model: Distilled) -> Report:
        """Losses of the last micro batch, mean over ranks."""
        from launch.training.trainer import Report
        from launch.training.world import mean_over_ranks

        return Report(scores={"teacher": mean_over_ranks(model.scores)})

    def picture(self, model: Distilled, inputs: tuple[Tensor, ...], mean: Tensor, std: Tensor) -> tuple[str, Sheet]:
        from models.fcmae import normalize_features
        from pretrain.feature_pictures import feature_sheet

        image, visible, patches, _ = inputs
        image, visible = self.first_mask(image, visible)
        features = normalize_features(patches), model.feature_grid(image, visible)
        return "input, visible patches, teacher's and predicted features", feature_sheet(
            image, visible, *features, mean, std
        )

    def decoder(self, model: Distilled) -> tuple[Tensors, dict]:
        """The student's parts, and the settings with the teacher's name and digest, but nothing of its weights."""
        from models.weights import cpu_state, split_by_prefix

        _, tensors = split_by_prefix(cpu_state(model), "encoder.")
        return tensors, to_dict(self.config.model) | own_settings(self.config.objective) | self.identity()
