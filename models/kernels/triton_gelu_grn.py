"""Passes of models/kernels/gelu_grn.py on a GPU. Sums are partial sums of fixed programs, without atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 32, 128  # of a program's tile
CHUNK = 256  # tokens of an image that a program reduces

INV_SQRT_2 = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _gelu(h):
    return 0.5 * h * (1.0 + tl.erf(h * INV_SQRT_2))


@triton.jit
def _tile(tokens, D, first, R: tl.constexpr, CB: tl.constexpr):
    """(offsets of R tokens of an image from `first` on, their mask, this program's channels)."""
    c = tl.program_id(2) * CB + tl.arange(0, CB)
    t = first + tl.arange(0, R)
    row = (tl.program_id(0) * tokens + t).to(tl.int64)
    return row[:, None] * D + c, (t < tokens)[:, None] & (c < D), c


@triton.jit
def _sum_squares(h, partial, tokens, D, CHUNK: tl.constexpr, R: tl.constexpr, CB: tl.constexpr):
    """Sum of gelu(h)^2 over CHUNK tokens of an image: partial [image, chunk, D]."""
    total = tl.zeros([CB], tl.float32)
    for first in range(0, CHUNK, R):
        place, keep, _ = _tile(tokens, D, tl.program_id(1) * CHUNK + first, R, CB)
        a = _gelu(tl.load(h + place, mask=keep, other=0.0).to(tl.float32))
        total += tl.sum(a * a, 0)
    c = tl.program_id(2) * CB + tl.arange(0, CB)
    tl.store(partial + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * D + c, total, mask=c < D)


@triton.jit
def _apply(h, scale, beta, out, tokens, D, R: tl.constexpr, CB: tl.constexpr):
    """out = gelu(h) * scale[image] + beta."""
    place, keep, c = _tile(tokens, D, tl.program_id(1) * R, R, CB)
    s = tl.load(scale + tl.program_id(0) * D + c, mask=c < D, other=0.0)
    b = tl.load(beta + c, mask=c < D, other=0.0).to(tl.float32)
    a = _gelu(tl.load(h + place, mask=keep, other=0.0).to(tl.float32))
    tl.store(out + place, (a * s + b).to(out.dtype.element_ty), mask=keep)


@triton.jit
def _sum_products(h, grad, partial, tokens, D, CHUNK: tl.constexpr, R: tl.constexpr, CB: tl.constexpr):
    """P and Q over CHUNK tokens of an image: partial [image, chunk, 2, D]."""
    products = tl.zeros([CB], tl.float32)
    plain = tl.zeros([CB], tl.float32)
    for first in range(0, CHUNK, R):
        place, keep, _ = _tile(tokens, D, tl.program_id(1) * CHUNK + first, R, CB)
        a = _gelu(tl.load(h + place, mask=keep, other=0.0).to(tl.float32))
        g = tl.load(grad + place, mask=keep, other=0.0).to(tl.float32)
        products += tl.sum(g * a, 0)
        plain += tl.sum(g, 0)
    c = tl.program_id(2) * CB + tl.arange(0, CB)
    base = partial + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * 2 * D + c
    tl.store(base, products, mask=c < D)
    tl.store(base + D, plain, mask=c < D)


@triton.jit
def _gradient(h, grad, scale, ratio, out, tokens, D, R: tl.constexpr, CB: tl.constexpr):
    """out = (grad * scale + gelu(h) * ratio) * gelu'(h), with ratio = dG / G."""
    place, keep, c = _tile(tokens, D, tl.program_id(1) * R, R, CB)
    s = tl.load(scale + tl.program_id(0) * D + c, mask=c < D, other=0.0)
    r = tl.load(ratio + tl.program_id(0) * D + c, mask=c < D, other=0.0)
    x = tl.load(h + place, mask=keep, other=0.0).to(tl.float32)
    g = tl.load(grad + place, mask=keep, other=0.0).to(tl.float32)
    cdf = 0.5 * (1.0 + tl.erf(x * INV_SQRT_2))
    slope = cdf + x * INV_SQRT_2PI * tl.exp(-0.5 * x * x)
    tl.store(out + place, ((g * s + x * cdf * r) * slope).to(out.dtype.element_ty), mask=keep)


def _reduce_grid(h: Tensor) -> tuple[int, int, int]:
    images, tokens, width = h.shape
    return images, triton.cdiv(tokens, CHUNK), triton.cdiv(width, COLUMNS)


def _map_grid(h: Tensor) -> tuple[int, int, int]:
    images, tokens, width = h.shape
    return images, triton.cdiv(tokens, ROWS), triton.cdiv(width, COLUMNS)


def forward(h: Tensor, gamma: Tensor, beta: Tensor, eps: float, over_batch: bool) -> tuple[Tensor, Tensor, Tensor]:
    """GRN(gelu(h)) of h [images, tokens, D]; norm G [images, D] and its mean M [images, 1], for backward."""
    images, tokens, width = h.shape
    partial = torch.empty(images, _reduce_grid(h)[1], width, dtype=torch.float32, device=h.device)
    _sum_squares[_reduce_grid(h)](h, partial, tokens, width, CHUNK=CHUNK, R=ROWS, CB=COLUMNS)
    squares = partial.sum(1)
    if over_batch:
        squares = squares.sum(0, keepdim=True).expand(images, -1)
    norm = squares.sqrt()
    mean = norm.mean(1, keepdim=True) + eps
    out = torch.empty_like(h)
    scale = 1 + gamma * norm / mean
    _apply[_map_grid(h)](h, scale, beta, out, tokens, width, R=ROWS, CB=COLUMNS)
    return out, norm, mean


def backward(
    grad: Tensor, h: Tensor, gamma: Tensor, norm: Tensor, mean: Tensor, over_batch: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h, gamma and beta."""
    images, tokens, width = h.shape
    partial = torch.empty(images, _reduce_grid(h)[1], 2, width, dtype=torch.float32, device=h.device)
    _sum_products[_reduce_grid(h)](h, grad, partial, tokens, width, CHUNK=CHUNK, R=ROWS, CB=COLUMNS)
    products, plain = partial.sum(1).unbind(1)
    normed = norm / mean
    grad_gamma, grad_beta = (normed * products).sum(0), plain.sum(0)
    if over_batch:  # all images share one norm
        products = products.sum(0, keepdim=True)
    d_normed = gamma * products
    d_norm = d_normed / mean - (d_normed * norm).mean(1, keepdim=True) / mean.square()
    ratio = torch.where(norm > 0, d_norm / norm, 0.0).contiguous()
    out = torch.empty_like(h)
    _gradient[_map_grid(h)](h, grad, 1 + gamma * normed, ratio, out, tokens, width, R=ROWS, CB=COLUMNS)
    return out, grad_gamma, grad_beta
