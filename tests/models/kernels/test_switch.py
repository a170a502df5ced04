"""When the kernels are used."""

from types import SimpleNamespace

import pytest
import torch

from models import kernels

ON_GPU = SimpleNamespace(is_cuda=True)


@pytest.fixture(autouse=True)
def _as_before():
    yield
    kernels.use(True)


def test_on_a_gpu_by_default_and_never_on_a_cpu():
    assert kernels.fused(ON_GPU) and not kernels.fused(torch.zeros(1))


def test_switched_off():
    with kernels.plain():
        assert not kernels.fused(ON_GPU)
    assert kernels.fused(ON_GPU)
    kernels.use(False)
    with kernels.plain():
        pass
    assert not kernels.fused(ON_GPU)
