"""The block's 7x7 depthwise convolution, channels last, in PyTorch operations.

`plain` is torch's convolution. `dense` and `windows` compute the same with their own backward: the input's gradient is
the convolution with the flipped kernel; the weight's is, on a CPU, a convolution of each image with its output's
gradient. On two CPU cores (100 images of 16x16 to 4x4 tokens, fp32 and bf16) torch's backward takes 14 to 44 times as
long as its forward, this one 3 to 9 times.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models import kernels

MARGIN = 3  # tokens to each side that a 7x7 kernel covers


def plain(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """On a dense grid [B, H, W, C] with zero padding."""
    y = F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=MARGIN, groups=x.shape[-1])
    return y.permute(0, 2, 3, 1)


def dense(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The same as `plain`, with a faster backward on a CPU."""
    if not kernels.on_cpu(x):
        return plain(x, conv)
    return Depthwise.apply(*_cast(x, conv), None)


def windows(x: Tensor, conv: nn.Conv2d, index: Tensor) -> Tensor:
    """On patches [P, s, s, C], each gathered into a window with a margin of 3 tokens.

    `index` [P, s + 6, s + 6] is the row in x [P * s * s, C] of each token of a window; P * s * s where there is none.
    """
    return Depthwise.apply(*_cast(x, conv), index)


class Depthwise(torch.autograd.Function):
    """The convolution of `dense` (index None) and of `windows`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, index: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, index)
        return _convolve(x, weight, bias, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, index = ctx.saved_tensors
        wanted_x, wanted_weight, wanted_bias, _ = ctx.needs_input_grad  # frozen weights need none
        gradient = weight_gradient if grad.is_cuda else weight_gradient_cpu
        grad_x = _convolve(grad, weight.flip(2, 3), None, index) if wanted_x else None
        grad_weight = gradient(x, grad, index) if wanted_weight else None
        return grad_x, grad_weight, grad.sum((0, 1, 2)) if wanted_bias else None, None


def weight_gradient(x: Tensor, grad: Tensor, index: Tensor) -> Tensor:
    """Gradient of the weight [C, 1, 7, 7] of `windows`, from the output's gradient, shaped like x."""
    seen, channels = _rows(x, index).permute(0, 3, 1, 2), x.shape[-1]
    return torch.nn.grad.conv2d_weight(seen, (channels, 1, 7, 7), grad.permute(0, 3, 1, 2), groups=channels)


def weight_gradient_cpu(x: Tensor, grad: Tensor, index: Tensor | None) -> Tensor:
    """The same, several times faster on a CPU; index None: of `dense`.

    One convolution with B * C channels: images, or windows, [1, B * C, H, W] by gradients [B * C, 1, H, W].
    """
    images, side, _, channels = x.shape
    if index is not None and side == 1:  # a convolution with 1x1 kernels, in one thread, is a call for each channel
        return (_rows(x, index) * grad).sum(0).permute(2, 0, 1)[:, None]
    if index is None:
        seen, padding = x.permute(1, 2, 0, 3), MARGIN
    else:
        seen, padding = _rows(x, index.permute(1, 2, 0)), 0
    image = seen.flatten(2)[None].permute(0, 3, 1, 2)
    kernel = grad.permute(1, 2, 0, 3).flatten(2)[None].permute(3, 0, 1, 2)
    taps = F.conv2d(image, kernel, padding=padding, groups=images * channels).permute(0, 2, 3, 1)
    return taps.view(7, 7, images, channels).sum(2).permute(2, 0, 1)[:, None]


def _cast(x: Tensor, conv: nn.Conv2d) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments in autocast's type: autocast does not apply inside of a Function."""
    dtype = kernels.output_dtype(x)
    return x.to(dtype), conv.weight.to(dtype), conv.bias.to(dtype)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None) -> Tensor:
    seen, padding = (x, MARGIN) if index is None else (_rows(x, index), 0)
    y = F.conv2d(seen.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=x.shape[-1])
    return y.permute(0, 2, 3, 1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [P, s, s, C] at `index`: [*index.shape, C]; zeros at index P * s * s."""
    rows = F.pad(x.flatten(0, 2), (0, 0, 0, 1))
    return rows.index_select(0, index.flatten()).view(*index.shape, -1)
