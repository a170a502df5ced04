"""The depthwise convolution's backward against torch's, on a grid and in windows."""

import pytest
import torch
from torch import nn

from models.sparse import depthwise
from models.sparse.layouts import Packed, unpatchify
from tests.models.helpers import assert_close, masks


def trained(convolve, size, dtype=torch.float32, autocast=False):
    """Output and gradients (x, weight, bias) of a convolution with fixed random numbers."""
    torch.manual_seed(0)
    conv = nn.Conv2d(size[-1], size[-1], 7, padding=3, groups=size[-1]).to(dtype)
    x, grad = (torch.randn(size, dtype=dtype) for _ in range(2))
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = convolve(x, conv)
    y.backward(grad.to(y.dtype))
    return y, x.grad, conv.weight.grad, conv.bias.grad


@pytest.mark.parametrize("size", [(3, 16, 16, 5), (2, 9, 4, 8), (4, 2, 2, 3), (2, 1, 1, 4), (1, 33, 20, 2)], ids=str)
def test_dense_equals_torch(size):
    ours, torchs = (trained(convolve, size, torch.float64) for convolve in (depthwise.dense, depthwise.plain))
    for name, found, expected in zip(("y", "x", "weight", "bias"), ours, torchs, strict=True):
        assert_close(found, expected, name, tolerance=1e-12)


def test_under_autocast_it_convolves_in_bf16():
    """As accurate as torch's gradients, and of the same types."""
    size = (16, 8, 8, 6)
    ours, torchs = (trained(convolve, size, autocast=True) for convolve in (depthwise.dense, depthwise.plain))
    for found, theirs, exact in zip(ours, torchs, trained(depthwise.plain, size), strict=True):
        assert found.dtype == theirs.dtype
        assert (found - exact).norm() <= 1.2 * (theirs - exact).norm() + 1e-6 * exact.norm()


def test_frozen_weights_get_no_gradient():
    conv = nn.Conv2d(4, 4, 7, padding=3, groups=4).requires_grad_(False)
    x = torch.randn(2, 6, 6, 4, requires_grad=True)
    (found,) = torch.autograd.grad(depthwise.dense(x, conv).square().sum(), x)
    (expected,) = torch.autograd.grad(depthwise.plain(x, conv).square().sum(), x)
    assert_close(found, expected)


def test_traced_graph_has_an_ordinary_convolution():
    conv = nn.Conv2d(4, 4, 7, padding=3, groups=4).requires_grad_(False)
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: depthwise.dense(x, conv), torch.randn(2, 6, 6, 4))
    assert "aten::_convolution" in str(traced.graph)


@pytest.mark.parametrize("s", [1, 2, 4, 8])
def test_the_two_weight_gradients_are_equal(s):
    """GPU version, CPU version, and an ordinary convolution on the grid."""
    visible = masks(2, (3, 4), 0.5)
    x, grad = torch.randn(12, s, s, 5), torch.randn(12, s, s, 5)
    index = Packed(visible, 6).windows(s)
    found = depthwise.weight_gradient(x, grad, index)
    assert_close(depthwise.weight_gradient_cpu(x, grad, index), found)
    grids = torch.zeros(2, 2, 12, s, s, 5)
    grids[0][visible.flatten(1)], grids[1][visible.flatten(1)] = x, grad
    image, out = (unpatchify(grid.unflatten(1, (3, 4))) for grid in grids)
    assert_close(torch.nn.grad.conv2d_weight(image, (5, 1, 7, 7), out, padding=3, groups=5), found)
