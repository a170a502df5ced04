"""Latent targets: predict the features that a moving average of the encoder gives hidden patches.

The teacher, an exponential moving average (EMA) of the encoder, sees the whole image. Its features at hidden patches,
normalised, are the target of the masked encoder and the decoder of FCMAE, instead of pixels or beside them. This is
data2vec (arXiv 2202.03555, section 3) with a ConvNeXt's last stage in place of a transformer's blocks; CNN-JEPA (arXiv
2408.07514) does the same with ResNets. Letters as in models/fcmae.py.
"""

import copy

import torch
from torch import Tensor

from configs.schema import FCMAESettings, PretrainModel
from models.fcmae import MaskedPrediction, normalize_features, patch_values
from models.sizes import resolve
from models.sparse.layouts import Dense, take_patches


class Latent(MaskedPrediction):
    """Student, light decoder, teacher. One layer predicts the features and, with a pixel weight, the pixels.

    Args:
        target_stages: last stages of the teacher whose features are the target
        latent_weight: of the mean squared error of the features
        pixel_weight: of FCMAE's loss; 0 = no pixels are predicted
    Attributes:
        scores: of the last forward pass, scalars on the device, see `forward`
    """

    def __init__(
        self, config: PretrainModel, settings: FCMAESettings, target_stages: int, latent_weight: float,
        pixel_weight: float,
    ):  # fmt: skip
        dims = resolve(config).dims[-target_stages:]
        super().__init__(config, settings, sum(dims) + (patch_values(config) if pixel_weight else 0))
        self.dims = dims  # channels of the target, by stage
        self.latent_weight, self.pixel_weight = latent_weight, pixel_weight
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False).eval()
        self.scores: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> "Latent":
        """The mode of all but the teacher, which is always evaluated."""
        super().train(mode)
        self.teacher.eval()
        return self

    def reset_teacher(self) -> None:
        """Make the teacher equal to the encoder, whose weights were loaded."""
        self.teacher.load_state_dict(self.encoder.state_dict())

    @torch.no_grad()
    def update_teacher(self, decay: float) -> None:
        """teacher = decay x teacher + (1 - decay) x encoder (2202.03555, section 3)."""
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.encoder.parameters()), 1 - decay)

    @torch.no_grad()
    def features(self, image: Tensor) -> list[Tensor]:
        """The teacher's features of whole images [B, C, H, W] by stage, [B, gy, gx, C] fp32: the mean of each patch."""
        grid = image.shape[2] // self.patch, image.shape[3] // self.patch
        stages = list(self.teacher.forward_stages(image, Dense()))[-len(self.dims) :]
        return [x.float().unflatten(2, (grid[1], -1)).unflatten(1, (grid[0], -1)).mean((2, 4)) for x in stages]

    def split(self, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted features [B * M, m, D] and pixels [B * M, m, P * P * C, or 0], fp32."""
        prediction = prediction.float()
        return prediction[..., : sum(self.dims)], prediction[..., sum(self.dims) :]

    def forward(self, image: Tensor, visible: Tensor) -> Tensor:
        """Loss [], fp32, of normalised images [B, C, H, W]; masks `visible`, bool, are [B, gy, gx] or [B, M, gy, gx].

        The masks of an image share the teacher's pass. Sets `scores`: the losses, `target_spread` (see `spread`), and
        `predicted_std`, the standard deviation of predicted features over all hidden patches; targets have about 1.
        """
        stages = self.features(image)
        output = self.predict(image, visible)
        features, pixels = self.split(output.prediction)
        latent = (features - take_patches(normalize_stages(stages), output.hidden)).square().mean()
        loss = self.latent_weight * latent
        with torch.no_grad():
            self.scores = {
                "latent_loss": latent.detach(),
                "predicted_std": features.flatten(0, 1).std(0, correction=0).mean(),
            }
            if len(image) > 1:
                self.scores["target_spread"] = torch.stack([spread(x) for x in stages]).min()
        if self.pixel_weight:
            pixel = (pixels - self.target(image, output.hidden)).square().mean()
            self.scores["pixel_loss"] = pixel.detach()
            loss = loss + self.pixel_weight * pixel
        return loss


def normalize_stages(stages: list[Tensor]) -> Tensor:
    """Features [B, gy, gx, D] of stages, each normalised over its channels."""
    return torch.cat([normalize_features(x) for x in stages], -1)


def spread(features: Tensor) -> Tensor:
    """Standard deviation of features [B, gy, gx, C] over the images, in root mean squares of the features.

    0 = all images have the same features: the targets have collapsed. It is relative because a ConvNeXt's features have
    no scale of their own, and over images because features that only depend on the position have collapsed as well.
    """
    scale = features.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return features.var(0).mean().sqrt() / scale
