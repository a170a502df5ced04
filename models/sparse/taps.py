"""The order of kernel taps in MinkowskiEngine (0.5.4); see the figure in docs/weights.md.

A dense kernel is [out, in, ky, kx], MinkowskiEngine's [ky * kx, in, out], with y running fastest:
tap = kx * (rows of the kernel) + ky.
"""

import math

from torch import Tensor


def to_taps(weight: Tensor) -> Tensor:
    """Dense kernel [out, in, ky, kx] to MinkowskiEngine's [ky * kx, in, out]; a depthwise one has in = 1."""
    return weight.permute(3, 2, 1, 0).flatten(0, 1)


def from_taps(kernel: Tensor) -> Tensor:
    """Inverse of `to_taps`, for square kernels."""
    side = math.isqrt(len(kernel))
    return kernel.unflatten(0, (side, side)).permute(3, 2, 1, 0)
