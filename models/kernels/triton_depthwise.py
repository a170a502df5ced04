"""Passes of models/kernels/depthwise.py on a GPU.

A *strip* is S adjacent tokens in a row of the image: of one patch (packed, S = s), or up to 8 of a grid's row (dense).
For each of the 7 rows around it, a strip of S outputs loads S + 6 inputs once and uses each for up to 7 taps (a sliding
window), with fp32 sums. Loads from hidden patches and beyond the image are masked, so they count as zero. Gradients of
weights are summed in partial sums of fixed programs, without atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.depthwise import Geometry

DENSE_STRIP = 8  # maximum tokens of a strip on a dense grid
PROGRAMS = 4096  # of the weight gradient: enough to fill a GPU


def strips_of(g: Geometry, channels: int) -> tuple[int, int]:
    """(tokens per strip, strips in the batch); dense strips of many channels are shorter, to fit into registers."""
    if g.s:
        return g.s, g.batch * g.n * g.s
    strip = max(1, min(DENSE_STRIP, 8192 // triton.next_power_of_2(channels)))
    return strip, g.batch * g.height * -(-g.width // strip)


@triton.jit
def _strip_place(q, patch, n, H, W, GX, S: tl.constexpr, DENSE: tl.constexpr):
    """(image, row and column of the first token in it, its row in x, tokens of the strip inside the image)."""
    if DENSE:
        across = tl.cdiv(W, S)
        column = (q % across) * S
        line = q // across
        return line // H, line % H, column, line * W + column, tl.minimum(W - column, S)
    else:
        k = q // S  # index of the patch among all visible ones of the batch
        position = tl.load(patch + k)
        return k // n, (position // GX) * S + q % S, (position % GX) * S, q * S, S


@triton.jit
def _row_start(image, y, column, slot, n, H, W, GX, S: tl.constexpr, DENSE: tl.constexpr):
    """(row in x of the token at (y, column), column a multiple of S; whether it exists)."""
    inside = (y >= 0) & (y < H) & (column >= 0) & (column < W)
    if DENSE:
        return (image * H + y) * W + column, inside
    else:
        k = tl.load(slot + (image * (H // S) + y // S) * GX + column // S, mask=inside, other=-1)
        return ((image * n + k) * S + y % S) * S, inside & (k >= 0)


@triton.jit
def _window(x, image, y, column, slot, n, C, H, W, GX, c, S: tl.constexpr, DENSE: tl.constexpr):
    """The S + 6 inputs [C] of a strip's row y, from 3 left of `column` to 3 right of its last token."""
    values = ()
    for j in tl.static_range(S + 6):
        # offset of the token's patch from the strip's: (j - 3) // S, rounded down
        offset = (j - 3 + 4 * S) // S - 4
        first, there = _row_start(image, y, column + offset * S, slot, n, H, W, GX, S, DENSE)
        within = j - 3 - offset * S
        if DENSE:
            there = there & (column + offset * S + within < W)
        place = (first + within).to(tl.int64) * C + c
        values = values + (tl.load(x + place, mask=c < tl.where(there, C, 0), other=0.0).to(tl.float32),)
    return values


@triton.jit
def _forward(
    x, weight, bias, norm_weight, norm_bias, slot, patch, out, normed, rstd, strips, n, C, H, W, GX, eps,
    S: tl.constexpr, DENSE: tl.constexpr, NORM: tl.constexpr, PER: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """PER strips, all channels: out = LayerNorm(conv + bias), and `normed`, `rstd` for backward. NORM off: out = conv.

    A tap is loaded once for PER strips.
    """
    c = tl.arange(0, CB)
    in_c = c < C
    sums = ()
    for _ in tl.static_range(PER * S):
        sums = sums + (tl.zeros([CB], tl.float32),)
    for dy in tl.static_range(7):
        taps = ()
        for t in tl.static_range(7):
            taps = taps + (tl.load(weight + (dy * 7 + t) * C + c, mask=in_c, other=0.0).to(tl.float32),)
        new = ()
        for u in tl.static_range(PER):
            q = tl.minimum(tl.program_id(0) * PER + u, strips - 1)  # the last program may repeat its last strip
            image, y, column, row, inside = _strip_place(q, patch, n, H, W, GX, S, DENSE)
            values = _window(x, image, y + dy - 3, column, slot, n, C, H, W, GX, c, S, DENSE)
            for o in tl.static_range(S):
                total = sums[u * S + o]
                for t in tl.static_range(7):
                    total += values[o + t] * taps[t]
                new = new + (total,)
        sums = new
    if NORM:
        b = tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32)
        nw = tl.load(norm_weight + c, mask=in_c, other=0.0).to(tl.float32)
        nb = tl.load(norm_bias + c, mask=in_c, other=0.0).to(tl.float32)
    for u in tl.static_range(PER):
        q = tl.minimum(tl.program_id(0) * PER + u, strips - 1)
        image, y, column, row, inside = _strip_place(q, patch, n, H, W, GX, S, DENSE)
        for o in tl.static_range(S):
            place = (row + o).to(tl.int64) * C + c
            keep = c < tl.where(o < inside, C, 0)
            value = sums[u * S + o]
            if NORM:
                value = tl.where(in_c, value + b, 0.0)
                centred = tl.where(in_c, value - tl.sum(value, 0) / C, 0.0)
                scale = tl.rsqrt(tl.sum(centred * centred, 0) / C + eps)
                value = centred * scale
                tl.store(normed + place, value.to(normed.dtype.element_ty), mask=keep)
                tl.store(rstd + row + o, scale, mask=o < inside)
                value = value * nw + nb
            tl.store(out + place, value.to(out.dtype.element_ty), mask=keep)


@triton.jit
def _norm_backward(
    grad, normed, rstd, norm_weight, grad_conv, partial, rows, C,
    CHUNK: tl.constexpr, R: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """CHUNK rows, R at a time: gradient of the convolution's output; partial sums of bias, norm weight, norm bias."""
    c = tl.arange(0, CB)
    in_c = c < C
    nw = tl.load(norm_weight + c, mask=in_c, other=0.0).to(tl.float32)
    for_bias = tl.zeros([CB], tl.float32)
    for_weight = tl.zeros([CB], tl.float32)
    for_norm_bias = tl.zeros([CB], tl.float32)
    for first in range(0, CHUNK, R):
        row = tl.program_id(0) * CHUNK + first + tl.arange(0, R)
        place = row.to(tl.int64)[:, None] * C + c
        keep = (row < rows)[:, None] & in_c
        g = tl.load(grad + place, mask=keep, other=0.0).to(tl.float32)
        z = tl.load(normed + place, mask=keep, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)
        for_norm_bias += tl.sum(g, 0)
        for_weight += tl.sum(g * z, 0)
        g = g * nw
        value = (g - (tl.sum(g, 1) / C)[:, None] - z * (tl.sum(g * z, 1) / C)[:, None]) * scale[:, None]
        value = tl.where(keep, value, 0.0)
        for_bias += tl.sum(value, 0)
        tl.store(grad_conv + place, value.to(grad_conv.dtype.element_ty), mask=keep)
    base = partial + tl.program_id(0) * 3 * C + c
    tl.store(base, for_bias, mask=in_c)
    tl.store(base + C, for_weight, mask=in_c)
    tl.store(base + 2 * C, for_norm_bias, mask=in_c)


@triton.jit
def _weight_backward(
    x, grad_conv, slot, patch, partial, strips, chunk, n, C, H, W, GX,
    S: tl.constexpr, DENSE: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """Gradient of one row of the kernel (7 taps) for CB channels, summed over the strips of a chunk."""
    dy = tl.program_id(0)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    in_c = c < C
    sums = ()
    for _ in tl.static_range(7):
        sums = sums + (tl.zeros([CB], tl.float32),)
    first = tl.program_id(2) * chunk
    for i in range(tl.minimum(chunk, strips - first)):
        image, y, column, row, inside = _strip_place(first + i, patch, n, H, W, GX, S, DENSE)
        values = _window(x, image, y + dy - 3, column, slot, n, C, H, W, GX, c, S, DENSE)
        for o in tl.static_range(S):
            place = (row + o).to(tl.int64) * C + c
            g = tl.load(grad_conv + place, mask=c < tl.where(o < inside, C, 0), other=0.0).to(tl.float32)
            new = ()
            for t in tl.static_range(7):
                new = new + (sums[t] + g * values[o + t],)
            sums = new
    base = partial + (tl.program_id(2) * 49 + dy * 7) * C + c
    for t in tl.static_range(7):
        tl.store(base + t * C, sums[t], mask=in_c)


def _block(channels: int) -> tuple[int, int]:
    """(channels of a program, rounded up to a power of 2; warps): 4 channels a thread, 8 above 2048 channels."""
    width = triton.next_power_of_2(channels)
    return width, min(16, max(1, width // 128))


def _place(g: Geometry, x: Tensor) -> tuple[dict, dict]:
    """Kernel arguments that describe the geometry. Dense kernels never read `slot` and `patch`."""
    grid = {"slot": g.slot, "patch": g.patch, "GX": g.width // g.s} if g.s else {"slot": x, "patch": x, "GX": 0}
    strip, strips = strips_of(g, x.shape[1])
    return grid | {"n": g.n, "H": g.height, "W": g.width, "strips": strips}, {"S": strip, "DENSE": not g.s}


def convolve(x: Tensor, taps: Tensor, geometry: Geometry, out: Tensor, norm: dict | None = None) -> None:
    """Convolve rows x with taps [49, C] into `out`; with `norm` also bias, LayerNorm and the values for backward."""
    width, warps = _block(x.shape[1])
    strip, strips = strips_of(geometry, x.shape[1])
    per = max(1, min(DENSE_STRIP // strip, 2048 // width))  # more do not fit into registers
    place, constants = _place(geometry, x)
    unused = {"bias": x, "norm_weight": x, "norm_bias": x, "normed": x, "rstd": x, "eps": 0.0}
    _forward[(triton.cdiv(strips, per),)](
        x=x, weight=taps, out=out, C=x.shape[1], **(norm or unused), **place, **constants,
        NORM=norm is not None, PER=per, CB=width, num_warps=warps,
    )  # fmt: skip


def grad_norm(grad: Tensor, normed: Tensor, rstd: Tensor, norm_weight: Tensor) -> tuple[Tensor, Tensor]:
    """LayerNorm's backward: gradients of the convolution's output, and of bias, norm weight and norm bias [3, C]."""
    rows, channels = normed.shape
    width, warps = _block(channels)
    tile = max(1, 1024 // width)  # rows at a time
    chunk = 16 * tile
    grad_conv = torch.empty_like(normed)
    partial = torch.empty(triton.cdiv(rows, chunk), 3, channels, dtype=torch.float32, device=grad.device)
    _norm_backward[(len(partial),)](
        grad, normed, rstd, norm_weight, grad_conv, partial, rows, channels,
        CHUNK=chunk, R=tile, CB=width, num_warps=max(warps, 4),
    )  # fmt: skip
    return grad_conv, partial.sum(0)


def grad_taps(x: Tensor, grad_conv: Tensor, geometry: Geometry) -> Tensor:
    """Gradient of the taps [49, C]."""
    channels = x.shape[1]
    block = min(128, triton.next_power_of_2(channels))
    blocks = triton.cdiv(channels, block)
    _, strips = strips_of(geometry, channels)
    chunk = triton.cdiv(strips, min(strips, max(1, PROGRAMS // (7 * blocks))))
    partial = torch.empty(triton.cdiv(strips, chunk), 49, channels, dtype=torch.float32, device=x.device)
    place, constants = _place(geometry, x)
    _weight_backward[(7, blocks, len(partial))](
        x=x, grad_conv=grad_conv, partial=partial, chunk=chunk, C=channels, **place, **constants,
        CB=block, num_warps=max(1, block // 64),
    )  # fmt: skip
    return partial.sum(0)
