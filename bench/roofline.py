"""A lower bound of a training step's time: matrix products and memory traffic at the device's measured peaks.

Counted are matrix products (16 C^2 multiply-adds per token and block, three times for forward and backward) and, for
fully fused code, 52 C elements read or written per token and block. Depthwise convolutions and the optimizer are left
out, which lowers the bound and so understates the share of it that is reached.
"""

import torch

from bench.timing import fastest
from configs.schema import PATCH_PER_STEM_STRIDE, Encoder
from models.sizes import resolve

ELEMENTS = 52  # read or written per token, block and channel, forward and backward


def peaks(device: str, dtype: torch.dtype) -> tuple[float, float, str]:
    """(FLOP/s of a large matrix product, bytes/s of a copy that reads and writes, who made the product), measured now.

    On a CPU the faster one of torch's default and oneDNN, both exact in fp32.
    """
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(1 << (30 if device == "cuda" else 26), device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    routes = {"torch": lambda: a @ b}
    if device == "cpu":
        routes["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    times = {name: fastest(run, 8, device) for name, run in routes.items()}
    best = min(times, key=times.get)
    return 2 * side**3 / times[best], 2 * source.nbytes / fastest(lambda: target.copy_(source), 8, device), best


def count(arch: Encoder, visible: int, patches: int = 0, decoder: tuple[int, int] | None = None) -> tuple[float, float]:
    """(FLOP, elements of memory traffic) of forward + backward of one image.

    Args:
        visible: patches that the encoder sees; all for a dense model
        patches: of the image, in pretraining
        decoder: width and depth, in pretraining
    """
    arch = resolve(arch)
    products, elements, below = 0, 0, arch.channels * arch.stem_stride**2 / 4  # the stem counts as a downsampling
    for i, (depth, width) in enumerate(zip(arch.depths, arch.dims, strict=True)):
        tokens = visible * (PATCH_PER_STEM_STRIDE >> i) ** 2
        products += tokens * (4 * below * width + depth * 8 * width**2)
        elements += tokens * depth * ELEMENTS * width
        below = width
    if decoder:
        width, depth = decoder
        pixels = (PATCH_PER_STEM_STRIDE * arch.stem_stride) ** 2  # of a patch
        products += visible * below * width + patches * depth * 8 * width**2
        products += (patches - visible) * width * pixels * arch.channels
        elements += patches * depth * ELEMENTS * width
    return 2 * 3 * products, elements


def floor_seconds(work: tuple[float, float], peak: tuple[float, float, str], dtype: torch.dtype) -> float:
    """Lower bound of the seconds that this work takes at these peaks."""
    return max(work[0] / peak[0], work[1] * dtype.itemsize / peak[1])
