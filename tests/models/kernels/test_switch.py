"""When the kernels are used."""

from types import SimpleNamespace

import pytest
import torch

from models import kernels

ON_GPU = SimpleNamespace(is_cuda=True)
HALF = torch.zeros(1, dtype=torch.float16)


@pytest.fixture(autouse=True)
def _as_before():
    yield
    kernels.use(True)


def test_by_default_where_there_are_kernels():
    assert kernels.fused(ON_GPU) and kernels.fused(torch.zeros(1)) == kernels.compiled()
    assert not kernels.fused(HALF) and not kernels.fused(HALF.double())
    with torch.autocast("cpu", torch.float16):
        assert not kernels.fused(torch.zeros(1))


def test_switched_off():
    with kernels.plain():
        assert not kernels.fused(ON_GPU) and not kernels.fused(torch.zeros(1))
    assert kernels.fused(ON_GPU)
    kernels.use(False)
    with kernels.plain():
        pass
    assert not kernels.fused(ON_GPU)
