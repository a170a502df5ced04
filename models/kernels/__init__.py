"""Kernels of a ConvNeXt block, in Triton for GPUs and in C++ for CPUs, each with a plain twin in PyTorch.

Triton is imported, and the C++ compiled, when the first kernel runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

CPU_TYPES = {torch.float32, torch.bfloat16}
_enabled = True


def fused(x: Tensor) -> bool:
    """Whether operations on x use the kernels: on a GPU, or on a CPU with a compiler; unless switched off."""
    return _enabled and (on_gpu(x) or (on_cpu(x) and {x.dtype, output_dtype(x)} <= CPU_TYPES and compiled()))


def on_gpu(x: Tensor) -> bool:
    """Whether operations on x use Triton's kernels."""
    return x.is_cuda


def on_cpu(x: Tensor) -> bool:
    """Whether x is on a CPU, and its operations need not be torch's, as for export and torch.compile."""
    return x.device.type == "cpu" and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def passes(x: Tensor, name: str) -> ModuleType:
    """The passes over tokens x of the kernel `name`: Triton's or C++."""
    return import_module(f"models.kernels.{f'triton_{name}' if on_gpu(x) else 'cpu'}")


def output_dtype(x: Tensor) -> torch.dtype:
    """The type of a kernel's output: autocast's, or x's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


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


def compiled() -> bool:
    """Whether the kernels for CPUs can be used; compiles them at the first call."""
    from models.kernels import cpu

    return cpu.library() is not None
