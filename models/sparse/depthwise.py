"""The block's 7x7 depthwise convolution on tokens with channels last, in PyTorch's own operations.

`plain` is what torch computes, derivatives too. `dense` and `windows` compute the same with derivatives of their own:
the input's gradient is the same convolution with the kernel turned round, and the weight's, on a CPU, a convolution of
each image with its output's gradient as kernel. On two CPU cores (100 images of 16x16 to 4x4 tokens, fp32 and bf16)
torch's backward of this convolution takes 14 to 44 times as long as its forward; that of these 3 to 9 times.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MARGIN = 3  # tokens that a 7x7 kernel sees to each side


def plain(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """On a dense grid [B, H, W, C]; outside counts as zero."""
    y = F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=MARGIN, groups=x.shape[-1])
    return y.permute(0, 2, 3, 1)


def dense(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The same as `plain`, and faster to train on a CPU."""
    if x.device.type != "cpu" or not torch.is_grad_enabled():  # export: a graph of torch's operations
        return plain(x, conv)
    return Depthwise.apply(*_cast(x, conv), None)


def windows(x: Tensor, conv: nn.Conv2d, index: Tensor) -> Tensor:
    """On patches [P, s, s, C], each in a window with a margin of 3 tokens.

    `index` [P, s + 6, s + 6] has the row of every token of a window in x [P * s * s, C], or P * s * s where there is
    none. Only outputs that exist are computed, and no gradient is added up in place.
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
        wanted_x, wanted_weight, wanted_bias, _ = ctx.needs_input_grad  # frozen weights want none
        taps = weight_gradient if grad.is_cuda else weight_gradient_cpu
        grad_x = _convolve(grad, weight.flip(2, 3), None, index) if wanted_x else None
        grad_weight = taps(x, grad, index) if wanted_weight else None
        return grad_x, grad_weight, grad.sum((0, 1, 2)) if wanted_bias else None, None


def weight_gradient(x: Tensor, grad: Tensor, index: Tensor) -> Tensor:
    """Gradient of the weight [C, 1, 7, 7] of `windows`, for the output's gradient `grad`, shaped like x."""
    seen, channels = _rows(x, index).permute(0, 3, 1, 2), x.shape[-1]
    return torch.nn.grad.conv2d_weight(seen, (channels, 1, 7, 7), grad.permute(0, 3, 1, 2), groups=channels)


def weight_gradient_cpu(x: Tensor, grad: Tensor, index: Tensor | None) -> Tensor:
    """The same, and that of `dense` (index None), several times faster on a CPU.

    Each image, or window, is convolved with its gradient as kernel; images and channels together are the
    channels of one image, [1, B * C, H, W] by [B * C, 1, H, W].
    """
    images, _, _, channels = x.shape
    if index is None:
        seen, padding = x.permute(1, 2, 0, 3), MARGIN
    else:
        seen, padding = _rows(x, index.permute(1, 2, 0)), 0
    image = seen.flatten(2)[None].permute(0, 3, 1, 2)
    kernel = grad.permute(1, 2, 0, 3).flatten(2)[None].permute(3, 0, 1, 2)
    taps = F.conv2d(image, kernel, padding=padding, groups=images * channels).permute(0, 2, 3, 1)
    return taps.view(7, 7, images, channels).sum(2).permute(2, 0, 1)[:, None]


def _cast(x: Tensor, conv: nn.Conv2d) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast would make of the arguments of a convolution: it does not look into a Function."""
    dtype, device = x.dtype, x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), conv.weight.to(dtype), conv.bias.to(dtype)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None) -> Tensor:
    seen, padding = (x, MARGIN) if index is None else (_rows(x, index), 0)
    y = F.conv2d(seen.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=x.shape[-1])
    return y.permute(0, 2, 3, 1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [P, s, s, C] that `index` names: [*index.shape, C]; zeros where it names none."""
    rows = F.pad(x.flatten(0, 2), (0, 0, 0, 1))
    return rows.index_select(0, index.flatten()).view(*index.shape, -1)
