"""Heads of semantic segmentation on the feature maps of four stages.

Letters: B images, H W rows and columns of the first stage, C channels of a stage, D width of the head, K classes. Maps
are [B, C, H, W] views of channels-last tokens. Norms are GroupNorm, because micro batches are small.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.convnext import EPS

GROUPS = 32  # of GroupNorm, at most
POOLS = (1, 2, 3, 6)  # sides of UPerNet's pooled maps
DROPOUT = 0.1  # of channels before the classifier, as in mmsegmentation
AUXILIARY_STAGE = 2


def conv(dim_in: int, dim: int, kernel: int, groups: int | None = None) -> nn.Sequential:
    """Convolution, GroupNorm of groups of at least 8 channels, ReLU."""
    norm = nn.GroupNorm(groups or math.gcd(GROUPS, dim, max(1, dim // 8)), dim)
    return nn.Sequential(nn.Conv2d(dim_in, dim, kernel, padding=kernel // 2, bias=False), norm, nn.ReLU())


def pooling(side: int, count: int, device: torch.device) -> Tensor:
    """Matrix [count, side] of adaptive average pooling.

    Row i averages places from floor(i side / count) up to ceil((i + 1) side / count). The product can be exported with
    a dynamic `side`, adaptive pooling cannot.
    """
    i, place = torch.arange(count, device=device)[:, None], torch.arange(side, device=device)
    inside = (place >= i * side // count) & (place < ((i + 1) * side + count - 1) // count)
    return inside / inside.sum(1, keepdim=True)


def interpolation(side: int, count: int, device: torch.device) -> Tensor:
    """Matrix [count, side] of linear interpolation from `side` to `count` pixels; borders are aligned, not corners."""
    place = (2 * torch.arange(count, device=device) + 1) * side / (2 * count) - 0.5
    distance = place.clamp(0, side - 1)[:, None] - torch.arange(side, device=device)
    return (1 - distance.abs()).clamp(min=0)


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear interpolation of maps [B, C, H, W].

    In training by products with matrices: the backward pass of `F.interpolate` is not repeatable on a GPU.
    """
    if not torch.is_grad_enabled():
        return F.interpolate(x, (height, width), mode="bilinear")
    rows, columns = (interpolation(n, m, x.device).to(x.dtype) for n, m in ((x.shape[2], height), (x.shape[3], width)))
    return rows @ (x @ columns.T)


class UPerNet(nn.Module):
    """UPerNet (arXiv 1807.10221): pyramid pooling (PPM) on the last stage, FPN, fusion of all levels."""

    def __init__(self, dims: tuple[int, ...], width: int):
        super().__init__()
        self.pools = nn.ModuleList(conv(dims[-1], width, 1, groups=1) for _ in POOLS)  # 1 pixel has no spread
        self.bottleneck = conv(dims[-1] + len(POOLS) * width, width, 3)
        self.laterals = nn.ModuleList(conv(dim, width, 1) for dim in dims[:-1])
        self.smooth = nn.ModuleList(conv(width, width, 3) for _ in dims[:-1])
        self.fusion = conv(len(dims) * width, width, 3)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps of the stages to one map [B, D, H, W]."""
        levels = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=False)] + [self.pyramid(maps[-1])]
        for i in range(len(levels) - 2, -1, -1):
            levels[i] = levels[i] + resize(levels[i + 1], *levels[i].shape[2:])
        levels = [smooth(x) for smooth, x in zip(self.smooth, levels, strict=False)] + levels[-1:]
        resized = (resize(x, *levels[0].shape[2:]) for x in levels[1:])
        return self.fusion(torch.cat([levels[0], *resized], 1))

    def pyramid(self, x: Tensor) -> Tensor:
        """Context of the whole image for each token of the last stage."""
        height, width = x.shape[2:]
        pooled = []
        for count, reduce in zip(POOLS, self.pools, strict=True):
            rows, columns = (pooling(side, count, x.device).to(x.dtype) for side in (height, width))
            pooled.append(resize(reduce(rows @ (x @ columns.T)), height, width))
        return self.bottleneck(torch.cat([x, *pooled], 1))


class SemanticFPN(nn.Module):
    """The semantic branch of a panoptic FPN (arXiv 1901.02446): each level is upsampled in steps of 2, then summed."""

    def __init__(self, dims: tuple[int, ...], width: int):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(dim, width, 1) for dim in dims)
        self.steps = nn.ModuleList(
            nn.ModuleList(conv(width, width, 3) for _ in range(max(1, level))) for level in range(len(dims))
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps of the stages to one map [B, D, H, W]."""
        levels = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        for i in range(len(levels) - 2, -1, -1):
            levels[i] = levels[i] + resize(levels[i + 1], *levels[i].shape[2:])
        total = 0
        for number, (x, steps) in enumerate(zip(levels, self.steps, strict=True)):
            for level, step in zip(range(number - 1, -1, -1) if number else [0], steps, strict=True):
                x = step(x)
                x = resize(x, *levels[level].shape[2:]) if number else x
            total = total + x
        return total


HEADS = {"upernet": UPerNet, "fpn": SemanticFPN}


class Head(nn.Module):
    """LayerNorm of each stage, a decoder, a classifier of its pixels; with `auxiliary` also one on the third stage."""

    def __init__(self, kind: str, dims: tuple[int, ...], width: int, classes: int, auxiliary: bool):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim, EPS) for dim in dims)
        self.decoder = HEADS[kind](dims, width)
        self.classifier = nn.Conv2d(width, classes, 1)
        self.auxiliary = None
        if auxiliary:
            between = max(1, width // 2)
            self.auxiliary = nn.Sequential(conv(dims[AUXILIARY_STAGE], between, 3), nn.Conv2d(between, classes, 1))

    def maps(self, tokens: list[Tensor]) -> list[Tensor]:
        """Normalised tokens [B, H, W, C] as maps."""
        return [norm(x).permute(0, 3, 1, 2) for norm, x in zip(self.norms, tokens, strict=True)]

    def forward(self, tokens: list[Tensor]) -> Tensor:
        """Tokens of the stages [B, Hi, Wi, Ci] to logits [B, K, H, W]."""
        return self.classify(self.maps(tokens))

    def classify(self, maps: list[Tensor]) -> Tensor:
        """Logits [B, K, H, W] of maps."""
        return self.classifier(F.dropout2d(self.decoder(maps), DROPOUT, self.training))
