"""GELU and GRN fused: two passes forward, two backward, without storing GELU's output.

With a = gelu(h), G the norm of each channel over an image's tokens, M = mean(G) + eps, N = G / M (2301.00808, 3.3):

    forward     y = a s + beta,  s = 1 + gamma N
    backward    P = sum over tokens of dy a,  Q = sum of dy           (one reduction per image)
                dN = gamma P,  dG = dN / M - mean(dN G) / M^2,  da = dy s + a dG / G
                dgamma = sum over images of N P,  dbeta = sum of Q

The kernels are Triton's on a GPU (triton_gelu_grn.py), C++ on a CPU (cpu.py). Results are bitwise repeatable. GELU is
exact (erf), in bf16 on a CPU to 1e-5. The plain twin is in `Layout.gelu_grn`, models/sparse/layouts.py.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models import kernels


class GeluGRN(torch.autograd.Function):
    """GRN(gelu(h)) of h [images, tokens, D]."""

    @staticmethod
    def forward(ctx, h: Tensor, gamma: Tensor, beta: Tensor, eps: float, over_batch: bool):
        h, gamma32 = h.contiguous(), gamma.float().contiguous()
        out, norm, mean = kernels.passes(h, "gelu_grn").forward(h, gamma32, beta.float().contiguous(), eps, over_batch)
        ctx.save_for_backward(h, gamma32, norm, mean)
        ctx.over_batch, ctx.dtype = over_batch, gamma.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        passes = kernels.passes(grad, "gelu_grn")
        out, grad_gamma, grad_beta = passes.backward(grad.contiguous(), *ctx.saved_tensors, ctx.over_batch)
        return out, grad_gamma.to(ctx.dtype), grad_beta.to(ctx.dtype), None, None


def gelu_grn(h: Tensor, gamma: Tensor, beta: Tensor, eps: float, over_batch: bool = False) -> Tensor:
    """GRN(gelu(h)) of h [images, ..., D]; the norm is over each image's tokens or, with `over_batch`, the batch's."""
    return GeluGRN.apply(h.flatten(1, -2), gamma, beta, eps, over_batch).view_as(h)
