"""Fully convolutional masked autoencoder (arXiv 2301.00808, section 3.1).

The encoder sees the visible patches. The decoder gets mask tokens for the hidden ones and predicts their pixels; the
loss is the mean squared error over hidden patches. Letters as in models/sparse/layouts.py, and m hidden patches of an
image.

An image may have M masks in a step (as in data2vec 2.0, arXiv 2212.07525): the encoder gets B * M rows of
visible patches, the target is computed once for each image, and the loss is the mean over all masks.
"""

from dataclasses import fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.compare import to_dict
from configs.schema import PATCH_PER_STEM_STRIDE, FCMAESettings, MaskedSettings, PretrainModel, visible_patches
from models.convnext import Block, ConvNeXt, init_weights
from models.sparse.layouts import Dense, Layout, layout_of, patchify, split_patches, take_patches

SETTINGS, MODEL = ([field.name for field in fields(section)] for section in (FCMAESettings, PretrainModel))
VARIANCE_EPS = 1e-6  # of the per-patch pixel normalisation


class Output(NamedTuple):
    """Predictions for the m = gy * gx - n hidden patches of each mask."""

    prediction: (
        Tensor  # [B * M, m, outputs]; of FCMAE P * P * C, ordered (row, column, channel); normalised if norm_pix
    )
    hidden: Tensor  # [B * M, m] index of each hidden patch in its image's grid


class MaskedPrediction(nn.Module):
    """Encoder of visible patches, projection, mask token, ConvNeXt V2 decoder, prediction for each hidden patch.

    `outputs` is the number of values that are predicted for a patch. Raises `UserError` for an unknown model name, or
    backend minkowski without MinkowskiEngine.
    """

    def __init__(self, config: PretrainModel, settings: MaskedSettings, outputs: int):
        super().__init__()
        self.config, self.settings = config, settings
        if config.backend == "minkowski":
            import models.sparse.minkowski  # noqa: F401  # fail now if it is not installed
        self.encoder = ConvNeXt(config, recompute=config.recompute)
        arch = self.encoder.arch
        self.patch = PATCH_PER_STEM_STRIDE * arch.stem_stride
        self.proj = nn.Linear(arch.dims[-1], settings.decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(settings.decoder_dim))
        self.decoder = nn.ModuleList(Block(settings.decoder_dim, v2=True) for _ in range(settings.decoder_depth))
        self.pred = nn.Linear(settings.decoder_dim, outputs)
        for part in (self.proj, self.decoder, self.pred):
            part.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def layout(self, visible: Tensor, n: int) -> Layout:
        """The backend's layout for masks [B, gy, gx] with n visible patches."""
        return layout_of(self.config.backend, visible, n, self.config.grn_scope)

    def predict(self, image: Tensor, visible: Tensor) -> Output:
        """Encode the visible patches of images [B, C, H, W] and predict for the hidden ones.

        Masks, bool, are [B, gy, gx] or [B, M, gy, gx].
        """
        tokens, layout, _, hidden = self.encode(image, visible)
        return self.decode(tokens, layout, hidden)

    def encode(self, image: Tensor, visible: Tensor) -> tuple[Tensor, Layout, Tensor, Tensor]:
        """Tokens of the visible patches, their layout, and the indices of visible and of hidden patches.

        Indices are [B * M, n] and [B * M, m], masks as in `predict`.
        """
        visible = visible.flatten(0, -3)
        n = visible_patches(visible[0].numel(), self.settings.mask_ratio)
        layout = self.layout(visible, n)
        return self.encoder.forward_features(image, layout), layout, *split_patches(visible, n)

    def decode(self, tokens: Tensor, layout: Layout, hidden: Tensor) -> Output:
        """Predict for the hidden patches [B * M, m] from the encoder's tokens, in the layout's shape."""
        x = layout.to_grid(self.proj(tokens), self.mask_token)
        for block in self.decoder:
            x = block(x, Dense())
        return Output(self.pred(take_patches(x, hidden)), hidden)

    def patches(self, image: Tensor) -> Tensor:
        """View images [B, C, H, W] as patches [B, gy, gx, P, P, C]."""
        return patchify(image, (image.shape[2] // self.patch, image.shape[3] // self.patch))

    def true_pixels(self, image: Tensor, hidden: Tensor) -> Tensor:
        """Pixels of hidden patches, [B * M, m, P * P * C] fp32."""
        return take_patches(self.patches(image), hidden).flatten(2).float()

    def target(self, image: Tensor, hidden: Tensor) -> Tensor:
        """Pixel targets [B * M, m, P * P * C], fp32, with norm_pix normalised per patch."""
        if not self.settings.norm_pix:
            return self.true_pixels(image, hidden)
        if len(hidden) == len(image):
            return normalize_patches(self.true_pixels(image, hidden))
        return take_patches(normalize_patches(self.patches(image).flatten(3).float()), hidden)  # each patch once


class FCMAE(MaskedPrediction):
    """Masked autoencoder: predicts the pixels of hidden patches."""

    def __init__(self, config: PretrainModel, settings: FCMAESettings):
        super().__init__(config, settings, patch_values(config))

    def forward(self, image: Tensor, visible: Tensor) -> Tensor:
        """Loss [], fp32, of normalised images [B, C, H, W] with masks [B, gy, gx] or [B, M, gy, gx]."""
        return self.pixel_loss(image, self.predict(image, visible))

    def pixel_loss(self, image: Tensor, output: Output) -> Tensor:
        """Mean squared error [], fp32, of the pixels predicted for hidden patches of images [B, C, H, W]."""
        return (output.prediction.float() - self.target(image, output.hidden)).square().mean()


def patch_statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation [..., 1] of patches [..., P * P * C], for the targets' normalisation."""
    var, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    return mean, (var + VARIANCE_EPS).sqrt()


def normalize_patches(pixels: Tensor) -> Tensor:
    """Patches [..., P * P * C] with mean 0 and variance 1 (2301.00808, section 3.1)."""
    mean, std = patch_statistics(pixels)
    return (pixels - mean) / std


def normalize_features(x: Tensor) -> Tensor:
    """Features [..., D] with mean 0 and variance 1 over D, fp32: layer norm, as of data2vec's targets (2202.03555)."""
    return F.layer_norm(x.float(), x.shape[-1:])


def patch_values(config: PretrainModel) -> int:
    """Numbers in a patch, P * P * C."""
    return (PATCH_PER_STEM_STRIDE * config.stem_stride) ** 2 * config.channels


def flat_config(config: PretrainModel, settings: FCMAESettings) -> dict:
    """Both sections as one dict of plain values: the `decoder_config` of a weight file."""
    return to_dict(config) | {key: getattr(settings, key) for key in SETTINGS}


def from_flat(flat: dict) -> tuple[PretrainModel, FCMAESettings]:
    """The inverse of `flat_config`; missing keys take their defaults, keys of other objectives are ignored."""
    config, settings = ({key: flat[key] for key in keys if key in flat} for keys in (MODEL, SETTINGS))
    return PretrainModel(**config), FCMAESettings(**settings)
