"""The C++ kernels: accuracy, tiles of every side, threads, and what happens without a compiler."""

import subprocess
import sys

import pytest
import torch
from torch.nn.functional import gelu

from models import kernels
from models.convnext import GRN
from models.kernels import cpu
from models.sparse.layouts import Dense, Layout, Packed
from tests.conftest import ROOT
from tests.models.helpers import masks, random_weights
from tests.models.kernels.test_depthwise import DEVICE, layers

pytestmark = pytest.mark.skipif(DEVICE != "cpu" or not kernels.compiled(), reason="needs a C++ compiler, and no GPU")


def packed(s: int, channels: int) -> tuple[Layout, torch.Tensor]:
    visible = masks(2, (3, 4), 0.6)
    n = int(visible[0].sum())
    return Packed(visible, n), torch.randn(2, n, s, s, channels)


def dense(height: int, width: int, channels: int) -> tuple[Layout, torch.Tensor]:
    return Dense(), torch.randn(2, height, width, channels)


CASES = {
    "packed 8": lambda: packed(8, 40),
    "packed 4": lambda: packed(4, 24),
    "packed 2": lambda: packed(2, 9),
    "packed 1": lambda: packed(1, 130),
    "tiles of 7": lambda: dense(14, 7, 33),
    "tiles of 8": lambda: dense(16, 9, 16),
    "tiles of 4": lambda: dense(4, 3, 5),
    "one token": lambda: dense(1, 1, 7),
    "three channels": lambda: dense(3, 20, 3),
}


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def results(run, x, parameters, grad) -> list[torch.Tensor]:
    out = run(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *parameters], grad.to(out.dtype))]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("operation", ["depthwise_norm", "gelu_grn"])
def test_error_is_at_most_twice_that_of_torch(operation, name):
    """Output and all gradients against float64, in fp32."""
    layout, x = CASES[name]()
    conv, norm = layers(x.shape[-1])
    grn = GRN(x.shape[-1])
    random_weights(grn)
    grad, x = torch.randn_like(x), x.requires_grad_()
    if operation == "gelu_grn":
        modules, run, exact_run = [grn], lambda x: layout.gelu_grn(x, grn), lambda x: exact_grn(x, grn)
    else:
        modules, run = [conv, norm], lambda x: layout.depthwise_norm(x, conv, norm)
        exact_run = run

    def of(run, x):
        return results(run, x, [p for module in modules for p in module.parameters()], grad)

    found = of(run, x)
    with kernels.plain():
        theirs = of(run, x)
        for module in modules:
            module.double()
        exact = of(exact_run, x.detach().double().requires_grad_())
    for a, b, c in zip(found, theirs, exact, strict=True):
        assert error(a, c) < 2 * error(b, c) + 2e-7


def exact_grn(x: torch.Tensor, grn: GRN) -> torch.Tensor:
    """GELU and GRN in float64; `Layout.image_norm` is fp32."""
    a = gelu(x)
    norm = a.flatten(1, -2).norm(dim=1).unflatten(0, (-1, *[1] * (x.ndim - 2)))
    return a * (1 + grn.weight * norm / (norm.mean(-1, keepdim=True) + grn.eps)) + grn.bias


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-9), (torch.bfloat16, 1e-4)])
def test_gelu_far_from_zero(dtype, tolerance):
    h = torch.tensor([-200.0, -40, -13, -6, -3, -1e-3, 0, 1e-3, 3, 6, 13, 200]).to(dtype).view(1, 1, -1)
    zeros = torch.zeros(h.numel())  # of GRN: none
    out, *_ = cpu.forward(h, zeros, zeros, 1e-6, False)
    relative = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(out.double(), gelu(h.double()), rtol=relative, atol=tolerance)
    assert cpu.forward(h * float("nan"), zeros, zeros, 1e-6, False)[0].isnan().all()


@pytest.mark.parametrize("name", ["packed 8", "packed 1", "tiles of 7"])
def test_threads_change_nothing(name):
    layout, x = CASES[name]()
    conv, norm = layers(x.shape[-1])
    grad, x, before, runs = torch.randn_like(x), x.requires_grad_(), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            parameters = [*conv.parameters(), *norm.parameters()]
            runs.append(results(lambda x: layout.depthwise_norm(x, conv, norm), x, parameters, grad)[:3])
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_torch_is_used_and_it_is_said(compiler, tmp_path):
    program = (
        "import torch; from models import kernels; x = torch.ones(1); assert not kernels.fused(x); kernels.fused(x)"
    )
    env = {"CXX": compiler, "XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.count(compiler) == 1 and "g++" in done.stdout
    assert not list(tmp_path.rglob("*.so"))
