"""fp32 products on a CPU: exact, and by the faster of the two libraries."""

import time

import pytest
import torch

from launch.training import precision


@pytest.fixture(autouse=True)
def _as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(threads)


def products(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """A linear layer's output and both gradients."""
    return [torch.nn.functional.linear(x, weight), grad @ weight, grad.t() @ x]


def tensors(rows: int = 2432) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=generator) for size in ((rows, 192), (768, 192), (rows, 768))]


@pytest.mark.parametrize("maker", ["GenuineIntel", "AuthenticAMD", ""])
def test_fp32_stays_fp32_whatever_the_cpu(maker, monkeypatch):
    """Also where the route for AMD would compute in bf16, as on a CPU with AMX."""
    exact = products(*(tensor.double() for tensor in tensors()))

    def errors() -> list[float]:
        found = products(*tensors())
        return [float((y - z).norm() / z.norm()) for y, z in zip(found, exact, strict=True)]

    torch.set_float32_matmul_precision("highest")
    theirs = errors()
    monkeypatch.setattr(precision, "cpu_maker", lambda: maker)
    precision.exact_products()
    assert all(ours <= 2 * error for ours, error in zip(errors(), theirs, strict=True))


def test_the_faster_exact_route_is_taken():
    """Both routes in turn and with one thread, so that a busy neighbour slows both."""
    torch.set_num_threads(1)
    precision.exact_products()
    chosen, inputs = torch.get_float32_matmul_precision(), tensors()
    seconds: dict[str, list[float]] = {route: [] for route in ("highest", chosen)}
    for _ in range(40):
        for route in seconds:
            torch.set_float32_matmul_precision(route)
            start = time.perf_counter()
            products(*inputs)
            seconds[route].append(time.perf_counter() - start)
    assert min(seconds[chosen]) < 1.3 * min(seconds["highest"])


def test_the_generator_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    precision.exact_products()
    assert torch.equal(torch.rand(2), expected)
