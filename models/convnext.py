"""ConvNeXt V1 (arXiv 2201.03545) and V2 (arXiv 2301.00808): every size, dense or on visible patches only.

Parameter names are timm's. A layout (models/sparse/layouts.py) defines how x is stored; channels are always last.
"""

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.schema import Encoder
from models.sizes import resolve
from models.sparse.layouts import Dense, Layout

EPS = 1e-6  # of LayerNorm and GRN
LAYER_SCALE = 1e-6  # V1's initial layer scale


class GRN(nn.Module):
    """Global response normalisation (2301.00808, section 3.3), over the tokens of each image."""

    def __init__(self, dim: int):
        super().__init__()
        self.eps = EPS
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        norm = layout.image_norm(x)  # fp32: fp16 overflows here
        norm = norm / (norm.mean(-1, keepdim=True) + self.eps)
        return x * (1 + self.weight * norm).to(x.dtype) + self.bias.to(x.dtype)


class Mlp(nn.Module):
    """Pointwise layer to 4 C, GELU, GRN (V2 only), pointwise layer back."""

    def __init__(self, dim: int, grn: bool):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.grn = GRN(4 * dim) if grn else None
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        x = self.fc1(x)
        x = nn.functional.gelu(x) if self.grn is None else layout.gelu_grn(x, self.grn)
        return self.fc2(x)


class Block(nn.Module):
    """Depthwise 7x7, LayerNorm, MLP with GRN (V2) or layer scale (V1), residual with drop path."""

    def __init__(self, dim: int, v2: bool, drop_path: float = 0.0):
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, EPS)
        self.mlp = Mlp(dim, grn=v2)
        self.gamma = None if v2 else nn.Parameter(torch.full((dim,), LAYER_SCALE))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, layout: Layout, recompute: str = "none") -> Tensor:
        if recompute == "block":
            return checkpoint(self, x, layout, use_reentrant=False)
        y = layout.depthwise_norm(x, self.conv_dw, self.norm)
        y = checkpoint(self.mlp, y, layout, use_reentrant=False) if recompute == "mlp" else self.mlp(y, layout)
        if self.gamma is not None:
            y = y * self.gamma
        return x + self.drop_path(y)


class Stage(nn.Module):
    """Downsampling (LayerNorm, 2x2 convolution; not in the first stage), then blocks."""

    def __init__(self, dim_in: int, dim: int, v2: bool, drop_paths: list[float]):
        super().__init__()
        first = dim_in == 0
        self.downsample = None if first else nn.Sequential(nn.LayerNorm(dim_in, EPS), nn.Conv2d(dim_in, dim, 2, 2))
        self.blocks = nn.ModuleList(Block(dim, v2, rate) for rate in drop_paths)

    def forward(self, x: Tensor, layout: Layout, recompute: str) -> Tensor:
        if self.downsample is not None:
            norm, conv = self.downsample
            x = layout.downsample(norm(x), conv)
        for block in self.blocks:
            x = block(x, layout, recompute)
        return x


class Head(nn.Module):
    """LayerNorm and linear classifier on the image's mean token."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, EPS)
        self.fc = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x.mean((1, 2))))


class ConvNeXt(nn.Module):
    """The encoder and, with `classes`, a classifier.

    Args:
        arch: name, channels and, if they differ from the name's, stem stride, depths and widths
        classes: outputs of the classifier; 0 = no head (for the masked autoencoder)
        drop_path: stochastic depth of the last block, growing linearly from 0
        recompute: activation checkpointing: none, mlp or block
    Raises:
        UserError: unknown model name
    """

    def __init__(self, arch: Encoder, classes: int = 0, drop_path: float = 0.0, recompute: str = "none"):
        super().__init__()
        self.arch = arch = resolve(arch)
        self.recompute = recompute
        v2 = arch.name.startswith("convnextv2")
        self.stem = nn.Sequential(
            nn.Conv2d(arch.channels, arch.dims[0], arch.stem_stride, arch.stem_stride),
            nn.LayerNorm(arch.dims[0], EPS),
        )
        rates = np.split(np.linspace(0, drop_path, sum(arch.depths)), np.cumsum(arch.depths[:-1]))
        self.stages = nn.ModuleList(
            Stage(dim_in, dim, v2, stage_rates.tolist())
            for dim_in, dim, stage_rates in zip((0, *arch.dims), arch.dims, rates, strict=False)
        )
        self.head = Head(arch.dims[-1], classes) if classes else None
        self.apply(init_weights)

    def forward_stages(self, image: Tensor, layout: Layout) -> Iterator[Tensor]:
        """Images [B, C, H, W] to the tokens of each of the four stages, in the layout's shape."""
        conv, norm = self.stem
        x = norm(layout.embed(image, conv))
        for stage in self.stages:
            x = stage(x, layout, self.recompute if self.training else "none")
            yield x

    def forward_features(self, image: Tensor, layout: Layout) -> Tensor:
        """Images [B, C, H, W] to the last stage's tokens, in the layout's shape."""
        return deque(self.forward_stages(image, layout), maxlen=1).pop()  # keeps no other

    def forward(self, image: Tensor) -> Tensor:
        """Images [B, C, H, W] to logits [B, classes]."""
        return self.head(self.forward_features(image, Dense()))


def init_weights(module: nn.Module) -> None:
    """Initialise a layer: weights from a normal of std .02 truncated at +-2, zero biases (2201.03545, A.1).

    LayerNorm, GRN and layer scale keep the values of their constructors: identity, 0 and 1e-6.
    """
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
