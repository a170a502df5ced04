"""How a CPU process keeps memory."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # numbers of glibc's malloc.h


def keep_memory() -> bool:
    """Let glibc keep freed memory for the next tensor instead of giving it back to the kernel; True if it does.

    By default a tensor of over 32 MB is mapped anew each time it is allocated, and each of its pages faults when it is
    first written: up to half of a training step on a CPU. Other C libraries are left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_ARENA_MAX, 1))
