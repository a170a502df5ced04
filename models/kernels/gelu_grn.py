"""GELU and GRN fused: two passes forward, two backward, without storing GELU's output.

With a = gelu(h), G the norm of each channel over an image's tokens, M = mean(G) + eps, N = G / M (2301.00808, 3.3):

    forward     y = a s + beta,  s = 1 + gamma N
    backward    P = sum over tokens of dy a,  Q = sum of dy           (one reduction per image)
                dN = gamma P,  dG = dN / M - mean(dN G) / M^2,  da = dy s + a dG / G
                dgamma = sum over images of N P,  dbeta = sum of Q

Passes over tokens are Triton's on a GPU (triton_gelu_grn.py), C++ on a CPU (cpu.py); values per image and channel are
computed in PyTorch. Results are bitwise repeatable. GELU is exact (erf). The plain twin is in `Layout.gelu_grn`,
models/sparse/layouts.py.
"""

import torch
from torch import Tensor

from models import kernels


class GeluGRN(torch.autograd.Function):
    """GRN(gelu(h)) of h [images, tokens, D]."""

    @staticmethod
    def forward(ctx, h: Tensor, gamma: Tensor, beta: Tensor, eps: float, over_batch: bool):
        h, passes = h.contiguous(), kernels.passes(h, "gelu_grn")
        squares = passes.sum_squares(h)
        if over_batch:
            squares = squares.sum(0, keepdim=True).expand(len(h), -1)
        norm = squares.sqrt()
        mean = norm.mean(1, keepdim=True) + eps
        scale = 1 + gamma.float() * norm / mean
        ctx.save_for_backward(h, gamma, norm, mean, scale)
        ctx.over_batch = over_batch
        return passes.apply(h, scale, beta.float())

    @staticmethod
    def backward(ctx, grad: Tensor):
        h, gamma, norm, mean, scale = ctx.saved_tensors
        grad, passes = grad.contiguous(), kernels.passes(h, "gelu_grn")
        products, plain = passes.sum_products(h, grad).unbind(1)
        grad_gamma, grad_beta = (norm / mean * products).sum(0), plain.sum(0)
        if ctx.over_batch:  # all images share one norm
            products = products.sum(0, keepdim=True)
        d_normed = gamma.float() * products
        d_norm = d_normed / mean - (d_normed * norm).mean(1, keepdim=True) / mean.square()
        ratio = torch.where(norm > 0, d_norm / norm, 0.0).contiguous()
        out = passes.gradient(h, grad, scale, ratio)
        return out, grad_gamma.to(gamma.dtype), grad_beta.to(gamma.dtype), None, None


def gelu_grn(h: Tensor, gamma: Tensor, beta: Tensor, eps: float, over_batch: bool = False) -> Tensor:
    """GRN(gelu(h)) of h [images, ..., D]; the norm is over each image's tokens or, with `over_batch`, the batch's."""
    return GeluGRN.apply(h.flatten(1, -2), gamma, beta, eps, over_batch).view_as(h)
