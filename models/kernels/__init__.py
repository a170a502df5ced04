"""Triton kernels, each with a plain twin in PyTorch. On by default on GPUs.

Triton is imported when the first kernel runs, so CPUs do not need it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_enabled = True


def fused(x: Tensor) -> bool:
    """Whether operations on x use the kernels: on a GPU, unless switched off."""
    return _enabled and x.is_cuda


def use(on: bool) -> None:
    """Switch the kernels on, or off (plain twins)."""
    global _enabled
    _enabled = on


@contextmanager
def plain() -> Iterator[None]:
    """Use the plain twins inside of this context."""
    before = _enabled
    use(False)
    try:
        yield
    finally:
        use(before)
