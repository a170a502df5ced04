"""Depthwise convolution + LayerNorm kernels against their plain twin: C++, and Triton's, interpreted without a GPU."""

import pytest
import torch

from models import kernels
from models.kernels import triton_depthwise
from models.sparse.layouts import Dense, Packed
from tests.models.helpers import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["triton", "cpu"])
def fused(request, monkeypatch):
    """Use the kernels of this kind, whatever the machine."""
    if request.param == "triton":
        monkeypatch.setattr(kernels, "on_gpu", lambda x: True)
    elif DEVICE != "cpu" or not kernels.compiled():
        pytest.skip("needs a CPU, without a GPU, and a C++ compiler")
    return request.param


def layers(channels: int) -> tuple[torch.nn.Conv2d, torch.nn.LayerNorm]:
    conv = torch.nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
    norm = torch.nn.LayerNorm(channels, 1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return conv.to(DEVICE), norm.to(DEVICE)


def compare(layout, x, conv, norm, tolerance: float) -> None:
    """Output and all gradients, kernel against plain code in fp32; then the kernel again, bit for bit."""
    parameters = [x, *conv.parameters(), *norm.parameters()]
    with kernels.plain():
        expected = layout.depthwise_norm(x.float(), conv, norm)
    grad = torch.randn_like(expected)
    references = torch.autograd.grad(expected, parameters, grad)
    runs = []
    for _ in range(2):
        found = layout.depthwise_norm(x, conv, norm)
        runs.append([found.detach(), *torch.autograd.grad(found, parameters, grad.to(found.dtype))])
    names = ("output", "x", "weight", "bias", "norm weight", "norm bias")
    for name, first, again, reference in zip(names, *runs, (expected, *references), strict=True):
        assert_close(first.float(), reference.float(), name, tolerance)
        assert torch.equal(first, again), f"{name} differs from run to run"


@pytest.mark.parametrize(
    ("s", "channels", "dtype", "tolerance"),
    [
        pytest.param(8, 12, torch.float32, 1e-5, marks=pytest.mark.slow),
        pytest.param(8, 12, torch.bfloat16, 2e-2, marks=pytest.mark.slow),
        pytest.param(4, 5, torch.float32, 1e-5, marks=pytest.mark.slow),
        pytest.param(4, 5, torch.bfloat16, 2e-2, marks=pytest.mark.slow),
        (2, 9, torch.float32, 1e-5),
        pytest.param(2, 9, torch.bfloat16, 2e-2, marks=pytest.mark.slow),
        (1, 130, torch.float32, 1e-5),
        (1, 130, torch.bfloat16, 2e-2),
    ],
)
def test_packed(s, channels, dtype, tolerance, fused, monkeypatch):
    """Patches in all relative positions, in every stage; one image with a hidden border."""
    monkeypatch.setattr(triton_depthwise, "PROGRAMS", 21)  # three partial sums
    visible = torch.zeros(1 if s == 8 else 2, 2, 3, dtype=torch.bool, device=DEVICE)
    visible[0, 0, 1:] = True
    if s < 8:
        visible[1, 0, 0] = visible[1, 1, 2] = True
    x = torch.randn(len(visible), 2, s, s, channels, device=DEVICE).to(dtype).requires_grad_()
    compare(Packed(visible, 2), x, *layers(channels), tolerance)


@pytest.mark.parametrize(("height", "width"), [(2, 11), (4, 3)])
def test_dense(height, width, fused):
    """Grids that are not a multiple of a strip."""
    x = torch.randn(1, height, width, 6, device=DEVICE, requires_grad=True)
    compare(Dense(), x, *layers(6), 1e-5)


def test_under_autocast_the_output_is_bf16(fused):
    conv, norm = layers(4)
    x = torch.randn(1, 2, 3, 4, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = Dense().depthwise_norm(x, conv, norm)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad.dtype == conv.weight.grad.dtype == norm.weight.grad.dtype == torch.float32


def test_hidden_rows_are_not_read(fused):
    """Memory beyond the visible tokens may contain anything."""
    conv, norm = layers(4)
    visible = torch.tensor([[[True, False], [False, True]]], device=DEVICE)
    memory = torch.full((3, 2, 2, 2, 4), float("nan"), device=DEVICE)
    memory[1] = torch.randn(2, 2, 2, 4)
    assert torch.isfinite(Packed(visible, 2).depthwise_norm(memory[1:2], conv, norm)).all()
