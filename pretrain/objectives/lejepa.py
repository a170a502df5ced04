"""LeJEPA beside FCMAE: crops of an image get alike embeddings. For frozen use; see models/lejepa.py."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import PositiveFloat, PositiveInt

from configs.compare import own_settings, to_dict
from configs.errors import UserError
from configs.keys import Choice, Probability, Ratio, fixed
from configs.log import say
from configs.schema import FCMAESettings, Pretrain
from pretrain.objectives import fcmae

if TYPE_CHECKING:
    from torch import Tensor

    from data.sheets import Sheet
    from data.transforms import ViewTransform
    from launch.training.trainer import Report
    from models.lejepa import LeJEPA
    from models.opening import Opened
    from models.weights import Tensors

__all__ = ["Objective", "Settings"]

COLOURS = ("color_jitter", "hue", "grayscale")  # keys of changes of colours


@dataclass(frozen=True)
class Settings(FCMAESettings, Choice):
    """FCMAE's masks and decoder; embeddings, losses, colours of crops. `data.repeats` is the crops of an image."""

    sigreg_weight: Ratio = fixed(0.05, "weight of SIGReg in LeJEPA's loss; the rest is that of agreement between crops")
    pixel_weight: PositiveFloat = fixed(1.0, "weight of FCMAE's loss of pixels, which is added")
    directions: PositiveInt = fixed(256, "random directions in which SIGReg compares embeddings with a Gaussian")
    width: PositiveInt = fixed(512, "hidden width of the projector from features to embeddings")
    dim: PositiveInt = fixed(64, "features of an embedding")
    color_jitter: Probability = fixed(0.4, "max. relative change of brightness, contrast, saturation; 3 channels")
    hue: Probability = fixed(0.1, "max. change of the hue, in turns; 3 channels")
    grayscale: Probability = fixed(0.2, "probability of a grey crop; 3 channels")


class Objective(fcmae.Objective):
    """FCMAE on crops of an image, whose embeddings agree, while all embeddings are Gaussian.

    Raises:
        UserError: as FCMAE; one crop of an image, or changes of colours without three channels
    """

    per_image = False  # it compares crops, and images with each other

    def __init__(self, config: Pretrain):
        super().__init__(config)
        self.crops, channels = config.data.repeats, config.model.channels
        self.pictured = super().pictured * self.crops
        if self.crops < 2:
            raise UserError(
                f"objective.name lejepa compares crops of an image: set data.repeats to 2, not {self.crops}"
            )
        for key in COLOURS:
            if getattr(config.objective, key) and channels != 3:
                raise UserError(f"objective.{key} needs images of 3 channels, these have {channels}: set it to 0")

    def describe(self) -> str:
        return f"{self.crops} crops of each image, {super().describe()}"

    def check_batch(self, micro: int) -> None:
        """Raise `UserError` unless a micro batch has all crops of its images."""
        if micro % self.crops:
            raise UserError(f"optim.micro_batch {micro} is not a multiple of data.repeats {self.crops}: choose one")

    def transform(self) -> ViewTransform:
        from data.transforms import ViewTransform

        own = self.config.objective
        return ViewTransform(super().transform(), own.color_jitter, own.hue, own.grayscale)

    def build(self) -> LeJEPA:
        from models.lejepa import LeJEPA

        own, views = self.config.objective, self.crops * self.masks
        return LeJEPA(self.config.model, own, views, own.width, own.dim, own.sigreg_weight, own.pixel_weight)

    def load(self, model: LeJEPA, init: Opened) -> None:
        """Load the encoder, and decoder and projector of the same shape; a file of FCMAE has the former."""
        from models.start import start_parts
        from models.weights import split_by_prefix

        parts, _ = self.decoder(model)
        _, decoder = split_by_prefix(parts, "projector.")
        if not start_parts(model, init, {"lejepa": parts, "fcmae": decoder}):
            say(f"{init.path} has no decoder of this shape: a new one is trained")

    def inputs(self, image: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Crops, masks, and directions drawn from the numbers of the batch's samples."""
        from models.lejepa import draw_directions

        own, seed = self.config.objective, zlib.crc32(batch["sample"].numpy().tobytes())
        directions = draw_directions(own.dim, own.directions, seed)
        return *super().inputs(image, batch), directions.to(image.device, non_blocking=True)

    def example(self, count: int) -> dict[str, Tensor]:
        import torch

        return super().example(count) | {"sample": torch.arange(count)}

    def monitor(self, model: LeJEPA) -> Report:
        """The parts of the loss of the last micro batch, mean over ranks."""
        from launch.training.trainer import Report
        from launch.training.world import mean_over_ranks

        return Report(scores={"lejepa": mean_over_ranks(model.scores)})

    def picture(self, model: LeJEPA, inputs: tuple[Tensor, ...], mean: Tensor, std: Tensor) -> tuple[str, Sheet]:
        from pretrain.view_pictures import view_sheet

        sheet = view_sheet(model, *self.first_mask(*inputs[:2]), self.crops, mean, std)
        return "visible patches of crops, and how alike their embeddings are", sheet

    def decoder(self, model: LeJEPA) -> tuple[Tensors, dict]:
        tensors, _ = super().decoder(model)
        return tensors, to_dict(self.config.model) | own_settings(self.config.objective) | {"crops": self.crops}
