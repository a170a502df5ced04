"""FCMAE, the default objective: predict the pixels of hidden patches (arXiv 2301.00808, section 3.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs.schema import FCMAEChoice as Settings  # in configs, because weight files store its settings
from configs.schema import Pretrain, visible_patches
from models.sizes import check_size
from pretrain.objectives.hooks import Hooks

__all__ = ["Objective", "Settings"]

if TYPE_CHECKING:
    from torch import Tensor

    from data.sheets import Sheet
    from data.transforms import PretrainTransform
    from models.fcmae import FCMAE
    from models.opening import Opened
    from models.weights import Tensors


class Objective(Hooks):
    """The encoder sees a random subset of patches; a decoder predicts the pixels of the others.

    Implements `pretrain.pretraining.Objective`.

    Raises:
        UserError: the image size is not a multiple of the patch, or the mask ratio hides no patch
    """

    file = "fcmae.pt"

    def __init__(self, config: Pretrain):
        self.config = config
        self.grid = config.data.grid(config.model.stem_stride)
        self.patches = self.grid[0] * self.grid[1]
        self.visible = visible_patches(self.patches, config.objective.mask_ratio)
        self.masks = config.objective.masks
        check_size(config.model.stem_stride, config.objective.mask_ratio, self.grid)

    def describe(self) -> str:
        share = 1 - self.visible / self.patches
        masks = f", {self.masks} masks per image" if self.masks > 1 else ""
        return f"{self.visible} of {self.patches} patches visible ({share:.1%} hidden){masks}"

    def transform(self) -> PretrainTransform:
        """Adds the mask `visible` [gy, gx], bool, to a random crop; [M, gy, gx] with several masks."""
        from data.transforms import PretrainTransform

        return PretrainTransform(self.config.data, self.grid, self.visible, self.masks)

    def build(self) -> FCMAE:
        from models.fcmae import FCMAE

        return FCMAE(self.config.model, self.config.objective)

    def load(self, model: FCMAE, init: Opened) -> None:
        from models.start import start_autoencoder

        start_autoencoder(model, init)

    def inputs(self, image: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return image, batch["visible"].to(image.device, non_blocking=True)

    def example(self, count: int) -> dict[str, Tensor]:
        import torch

        visible = torch.arange(self.patches).view(self.grid) < self.visible
        return {"visible": visible.expand(count, *([self.masks] if self.masks > 1 else []), -1, -1)}

    def picture(self, model: FCMAE, inputs: tuple[Tensor, ...], mean: Tensor, std: Tensor) -> tuple[str, Sheet]:
        from pretrain.pictures import reconstruction_grid

        grid = reconstruction_grid(model, *self.first_mask(*inputs), mean, std)
        return "input, visible patches, reconstruction", grid

    def first_mask(self, image: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs with one mask [B, gy, gx] for each image."""
        return image, visible if self.masks == 1 else visible[:, 0]

    def decoder(self, model: FCMAE) -> tuple[Tensors, dict]:
        from models.fcmae import flat_config
        from models.weights import cpu_state, split_by_prefix

        _, tensors = split_by_prefix(cpu_state(model), "encoder.")
        return tensors, flat_config(self.config.model, self.config.objective)
