"""Depthwise 7x7 convolution, bias and LayerNorm in one kernel, on packed visible tokens or on a dense grid.

Tokens are rows x [T, C]; `slot` [B, gy, gx] locates neighbours: the index of a patch among its image's visible ones;
-1 = hidden. The passes over tokens are Triton's on a GPU (triton_depthwise.py), C++ on a CPU (cpu.py). Sums are fp32,
and results bitwise repeatable. The plain twin is in `Layout.depthwise_norm`, models/sparse/layouts.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models import kernels


class Geometry(NamedTuple):
    """Where the tokens of rows x [T, C] are in the images. Dense: `slot` and `patch` are None."""

    batch: int
    height: int  # of the image, in tokens
    width: int
    s: int  # tokens along a patch's side; 0 = dense
    n: int  # visible patches per image
    slot: Tensor | None  # [B, gy, gx] int32
    patch: Tensor | None  # [B, n] int32: grid index of each visible patch


class DepthwiseNorm(torch.autograd.Function):
    """LayerNorm(depthwise 7x7(x) + bias): rows [T, C] to rows [T, C]."""

    @staticmethod
    def forward(ctx, x, weight, bias, norm_weight, norm_bias, eps: float, geometry: Geometry, dtype: torch.dtype):
        passes = kernels.passes(x, "depthwise")
        x = x.contiguous()
        taps = weight.flatten(1).t().float().contiguous()
        bias, norm_weight, norm_bias = bias.float(), norm_weight.float(), norm_bias.float()
        out, normed = (torch.empty_like(x, dtype=dtype) for _ in range(2))
        rstd = torch.empty(len(x), dtype=torch.float32, device=x.device)
        saved = {"normed": normed, "rstd": rstd, "eps": eps}
        norm = {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias} | saved
        passes.convolve(x, taps, geometry, out, norm)
        ctx.save_for_backward(x, taps, norm_weight, normed, rstd)
        ctx.geometry = geometry
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, taps, norm_weight, normed, rstd = ctx.saved_tensors
        passes = kernels.passes(x, "depthwise")
        grad_conv, grads = passes.grad_norm(grad.contiguous(), normed, rstd, norm_weight)
        grad_x = torch.empty_like(x)
        passes.convolve(grad_conv, taps.flip(0), ctx.geometry, grad_x)  # flipped taps
        grad_weight = passes.grad_taps(x, grad_conv, ctx.geometry).t().reshape(-1, 1, 7, 7)
        return grad_x, grad_weight, *grads, None, None, None


def depthwise_norm(x: Tensor, conv: torch.nn.Conv2d, norm: torch.nn.LayerNorm, geometry: Geometry) -> Tensor:
    """`norm(conv(x))` of rows x [T, C] that `geometry` places in images; in autocast's type, or x's."""
    dtype = kernels.output_dtype(x)
    return DepthwiseNorm.apply(x, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps, geometry, dtype)
