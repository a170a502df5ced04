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


def use(on: bool) -> None:
    """Take the kernels on a GPU from now on, or the plain twins."""
    global _enabled
    _enabled = on


@contextmanager
def plain() -> Iterator[None]:
    """Use the plain twins inside; for comparisons."""
    before = _enabled
    use(False)
    try:
        yield
    finally:
        use(before)
