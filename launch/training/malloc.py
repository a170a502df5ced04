"""Settings of the C library's memory allocator for training on a CPU."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # from glibc's malloc.h


def keep_memory() -> None:
    """Make glibc reuse freed memory instead of returning it to the kernel; no-op for other C libraries.

    By default tensors above 32 MB are mapped at each allocation, and every page faults at its first write: up to half
    of a training step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt:
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
            mallopt(option, value)
