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


def sum_squares(h: Tensor) -> Tensor:
    """Sums of gelu(h)^2 over the tokens of each image: h [images, tokens, D] to [images, D]."""
    images, tokens, width = h.shape
    partial = torch.empty(images, _reduce_grid(h)[1], width, dtype=torch.float32, device=h.device)
    _sum_squares[_reduce_grid(h)](h, partial, tokens, width, CHUNK=CHUNK, R=ROWS, CB=COLUMNS)
    return partial.sum(1)


def apply(h: Tensor, scale: Tensor, beta: Tensor) -> Tensor:
    """gelu(h) * scale [images, D] + beta [D]."""
    out = torch.empty_like(h)
    _apply[_map_grid(h)](h, scale, beta, out, *h.shape[1:], R=ROWS, CB=COLUMNS)
    return out


def sum_products(h: Tensor, grad: Tensor) -> Tensor:
    """Sums of grad * gelu(h), and of grad, over the tokens of each image: [images, 2, D]."""
    images, tokens, width = h.shape
    partial = torch.empty(images, _reduce_grid(h)[1], 2, width, dtype=torch.float32, device=h.device)
    _sum_products[_reduce_grid(h)](h, grad, partial, tokens, width, CHUNK=CHUNK, R=ROWS, CB=COLUMNS)
    return partial.sum(1)


def gradient(h: Tensor, grad: Tensor, scale: Tensor, ratio: Tensor) -> Tensor:
    """(grad * scale + gelu(h) * ratio) * gelu'(h), scale and ratio [images, D]."""
    out = torch.empty_like(h)
    _gradient[_map_grid(h)](h, grad, scale, ratio, out, *h.shape[1:], R=ROWS, CB=COLUMNS)
    return out
