"""GPU kernels in Triton, each with a plain twin in PyTorch. On by default on CUDA.

Nothing here is needed on a CPU: Triton is imported when the first kernel runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_enabled = True


def fused(x: Tensor) -> bool:
    """Whether operations on x take the kernels: on a GPU, unless inside `plain()`."""
    return _enabled and x.is_cuda


@contextmanager
def plain() -> Iterator[None]:
    """Use the plain twins inside; for comparisons."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before
