"""Distillation of a frozen teacher's features into a masked student.

The encoder sees the visible patches. The decoder predicts the teacher's features of the hidden ones, as EVA does
(arXiv 2211.07636). A linear layer maps the encoder's visible tokens to the teacher's features of their patches, as in
Unmasked Teacher (arXiv 2303.16058); another one the mean visible token to the teacher's feature of the whole image, as
in AM-RADIO (arXiv 2312.06709). Letters as in models/fcmae.py; D and E are the widths of the teacher's features of a
patch and of an image.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import MaskedSettings, PretrainModel
from models.convnext import init_weights
from models.fcmae import MaskedPrediction, normalize_features
from models.sparse.layouts import take_patches


class Predicted(NamedTuple):
    """Predictions of the teacher's features; None without their layer."""

    features: Tensor  # [B * M, m, D], of hidden patches
    hidden: Tensor  # [B * M, m], their indices in the image's grid
    visible: Tensor | None  # [B * M, n, D], of visible patches
    shown: Tensor  # [B * M, n], their indices
    pooled: Tensor | None  # [B * M, E], of the image


class Distilled(MaskedPrediction):
    """Student: encoder, light decoder, and linear layers for visible patches and for the whole image.

    Args:
        widths: D and E
        loss: cosine = 1 - cosine similarity; smooth_l1 = Huber loss with a threshold of 1, mean over the width
        visible_weight, pooled_weight: of these losses, that of hidden patches has 1; 0 = without the layer
    Attributes:
        scores: the losses of the last forward pass, scalars on the device
    """

    def __init__(
        self, config: PretrainModel, settings: MaskedSettings, widths: tuple[int, int], loss: str,
        visible_weight: float, pooled_weight: float,
    ):  # fmt: skip
        super().__init__(config, settings, widths[0])
        self.loss, self.visible_weight, self.pooled_weight = loss, visible_weight, pooled_weight
        dim = self.encoder.arch.dims[-1]
        self.visible_head = nn.Linear(dim, widths[0]) if visible_weight else None
        self.pooled_head = nn.Linear(dim, widths[1]) if pooled_weight else None
        for head in filter(None, (self.visible_head, self.pooled_head)):
            head.apply(init_weights)
        self.scores: dict[str, Tensor] = {}

    def predict_features(self, image: Tensor, visible: Tensor) -> Predicted:
        """Predict the teacher's features of images [B, C, H, W] from visible patches.

        Masks, bool, are [B, gy, gx] or [B, M, gy, gx].
        """
        tokens, layout, shown, hidden = self.encode(image, visible)
        features, _ = self.decode(tokens, layout, hidden)
        tokens = take_patches(layout.to_grid(tokens, tokens.new_zeros(tokens.shape[-1])), shown)  # [B * M, n, C]
        patches = self.visible_head(tokens) if self.visible_head else None
        pooled = self.pooled_head(tokens.mean(1)) if self.pooled_head else None
        return Predicted(features, hidden, patches, shown, pooled)

    def forward(self, image: Tensor, visible: Tensor, patches: Tensor, pooled: Tensor) -> Tensor:
        """Loss [], fp32, of normalised images [B, C, H, W] with masks, bool, [B, gy, gx] or [B, M, gy, gx].

        `patches` [B, gy, gx, D] and `pooled` [B, E] are the teacher's features, which the masks of an image share.
        Sets `scores`.
        """
        output, patches = self.predict_features(image, visible), normalize_features(patches)
        losses = {"hidden_loss": self.distance(output.features, take_patches(patches, output.hidden))}
        loss = losses["hidden_loss"]
        if output.visible is not None:
            losses["visible_loss"] = self.distance(output.visible, take_patches(patches, output.shown))
            loss = loss + self.visible_weight * losses["visible_loss"]
        if output.pooled is not None:
            target = normalize_features(pooled).repeat_interleave(len(output.pooled) // len(pooled), 0)
            losses["pooled_loss"] = self.distance(output.pooled, target)
            loss = loss + self.pooled_weight * losses["pooled_loss"]
        self.scores = {name: value.detach() for name, value in losses.items()}
        return loss

    def distance(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Mean distance [] of features [..., D], fp32."""
        predicted = predicted.float()
        if self.loss == "cosine":
            return (1 - F.cosine_similarity(predicted, target, dim=-1)).mean()
        return F.smooth_l1_loss(predicted, target)

    @torch.no_grad()
    def feature_grid(self, image: Tensor, visible: Tensor) -> Tensor:
        """Predictions [B, gy, gx, D] for masks [B, gy, gx], normalised; NaN at visible patches without their layer."""
        output = self.predict_features(image, visible)
        features = normalize_features(output.features)
        grid = features.new_full((*visible.shape, features.shape[-1]), float("nan")).flatten(1, 2)
        grid.scatter_(1, output.hidden[..., None].expand_as(features), features)
        if output.visible is not None:
            features = normalize_features(output.visible)
            grid.scatter_(1, output.shown[..., None].expand_as(features), features)
        return grid.unflatten(1, tuple(visible.shape[1:]))
