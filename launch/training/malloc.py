"""Settings of the C library's memory allocator for training on a CPU."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # from glibc's malloc.h


def keep_memory() -> bool:
    """Make glibc reuse freed memory instead of returning it to the kernel. Returns whether that is supported.

    By default tensors above 32 MB are mapped at each allocation, and every page faults at its first write: up to half
    of a training step on a CPU.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_ARENA_MAX, 1))
