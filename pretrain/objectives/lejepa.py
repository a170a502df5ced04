"""LeJEPA: crops of an image get alike embeddings. Refines weights for frozen use; see models/lejepa.py."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from configs.compare import own_settings
from configs.errors import UserError
from configs.keys import Choice, Probability, Ratio, fixed
from configs.schema import Pretrain
from pretrain.objectives.hooks import Hooks

if TYPE_CHECKING:
    from torch import Tensor, nn

    from data.sheets import Sheet
    from data.transforms import ViewTransform
    from launch.training.trainer import Report
    from models.lejepa import LeJEPA
    from models.opening import Opened
    from models.weights import Tensors

__all__ = ["Objective", "Settings"]


@dataclass(frozen=True)
class Settings(Choice):
    """Embeddings, their regularisation, and colours of crops. `data.repeats` is the number of crops of an image."""

    sigreg_weight: Ratio = fixed(0.05, "weight of SIGReg in the loss; the rest is that of agreement between crops")
    directions: PositiveInt = fixed(256, "random directions in which SIGReg compares embeddings with a Gaussian")
    width: PositiveInt = fixed(512, "hidden width of the projector from features to embeddings")
    dim: PositiveInt = fixed(64, "features of an embedding")
    color_jitter: Probability = fixed(0.4, "max. relative change of brightness, contrast, saturation; 3 channels")
    grayscale: Probability = fixed(0.2, "probability of a grey crop; 3 channels")


class Objective(Hooks):
    """Embeddings of the crops of an image agree, and all embeddings are Gaussian.

    Implements `pretrain.pretraining.Objective`.

    Raises:
        UserError: one crop of an image, or changes of colours without three channels
    """

    per_image = False  # it compares crops, and images with each other

    def __init__(self, config: Pretrain):
        self.config, own = config, config.objective
        self.views = config.data.repeats
        if self.views < 2:
            raise UserError(
                f"objective.name lejepa compares crops of an image: set data.repeats to 2, not {self.views}"
            )
        for key in ("color_jitter", "grayscale"):
            if getattr(own, key) and config.model.channels != 3:
                channels = config.model.channels
                raise UserError(f"objective.{key} needs images of 3 channels, these have {channels}: set it to 0")

    def describe(self) -> str:
        return f"{self.views} crops of each image"

    def check_batch(self, micro: int) -> None:
        """Raise `UserError` unless a micro batch has all crops of its images."""
        if micro % self.views:
            raise UserError(f"optim.micro_batch {micro} is not a multiple of data.repeats {self.views}: choose one")

    def transform(self) -> ViewTransform:
        from data.transforms import ViewTransform

        own = self.config.objective
        return ViewTransform(self.config.data, own.color_jitter, own.grayscale)

    def build(self) -> LeJEPA:
        from models.lejepa import LeJEPA

        own = self.config.objective
        return LeJEPA(self.config.model, self.views, own.width, own.dim, own.sigreg_weight)

    def load(self, model: LeJEPA, init: Opened) -> None:
        """Load the encoder, and the projector if the file has one of the same shape."""
        from models.start import start_parts

        start_parts(model, init, "lejepa", self.decoder(model)[0])

    def inputs(self, image: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Crops, and directions drawn from the numbers of the batch's samples."""
        from models.lejepa import draw_directions

        own, seed = self.config.objective, zlib.crc32(batch["sample"].numpy().tobytes())
        return image, draw_directions(own.dim, own.directions, seed).to(image.device, non_blocking=True)

    def example(self, count: int) -> dict[str, Tensor]:
        import torch

        return {"sample": torch.arange(count)}

    def monitor(self, model: LeJEPA) -> Report:
        """Both parts of the loss of the last micro batch, mean over ranks."""
        from launch.training.trainer import Report
        from launch.training.world import mean_over_ranks

        return Report(scores={"lejepa": mean_over_ranks(model.scores)})

    def picture(self, model: LeJEPA, inputs: tuple[Tensor, ...], mean: Tensor, std: Tensor) -> tuple[str, Sheet]:
        from pretrain.view_pictures import view_sheet

        return "crops of an image, and how alike their embeddings are", view_sheet(model, inputs[0], mean, std)

    def decoder(self, model: nn.Module) -> tuple[Tensors, dict]:
        from models.weights import cpu_state, split_by_prefix

        _, tensors = split_by_prefix(cpu_state(model), "encoder.")
        return tensors, own_settings(self.config.objective) | {"views": self.views}
