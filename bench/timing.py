"""Inputs, checks before timing, alternating timing, and the description of the machine."""

import os
import platform
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from bench.options import PATCH
from configs.errors import UserError
from configs.schema import visible_patches
from launch.training.facts import commit
from launch.training.summary import cpu_name
from launch.training.world import prepare_cpu
from models import kernels

TOLERANCE = 1e-4  # relative to a tensor's norm: sums over thousands of tokens are reordered
BF16_ROUNDING = 2**-10  # in bf16: error allowed at least, half of what rounding a number makes
BF16_MARGIN = 1.5  # in bf16: largest error allowed, in units of that of plain code under torch's autocast
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Run = Callable[[], Tensor]


def prepare(device: str, threads: int | None = None) -> None:
    """Set up torch for timing as for training: full fp32, freed memory kept. Raises `UserError` if there is no GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU")
    torch.backends.cudnn.allow_tf32 = False
    if device == "cpu":
        torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
        prepare_cpu(fused=True)


def randomize(model: nn.Module) -> None:
    """Add noise to all parameters: initial zeros and ones hide errors, and zeros run faster."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)


def random_masks(batch: int, side: int, n: int, device: str) -> Tensor:
    """Masks [B, side, side] with n visible patches per image."""
    return torch.stack([torch.randperm(side**2) < n for _ in range(batch)]).view(-1, side, side).to(device)


def inputs(batch: int, size: int, mask_ratio: float, device: str) -> tuple[Tensor, Tensor, int]:
    """(images [B, 3, size, size], masks, visible patches of an image)."""
    n = visible_patches((size // PATCH) ** 2, mask_ratio)
    return torch.randn(batch, 3, size, size, device=device), random_masks(batch, size // PATCH, n, device), n


def autocast(device: str, precision: str) -> torch.autocast:
    """Autocast to bf16, or none for fp32."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def backward(model: nn.Module, run: Run) -> Tensor:
    """Forward and backward; the loss."""
    model.zero_grad(set_to_none=True)
    loss = run()
    loss.backward()
    return loss


def outputs(model: nn.Module, run: Run) -> dict[str, Tensor]:
    """The loss of a run, and the gradients of all parameters by name."""
    loss = backward(model, run).detach().float()
    grads = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss} | grads


def differences(tensors: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """Difference of each tensor from its reference, relative to the reference's norm."""
    pairs = {key: (tensors[key].reshape(expected.shape), expected) for key, expected in reference.items()}
    return {key: float((a - b).norm() / b.norm().clamp(min=1e-12)) for key, (a, b) in pairs.items()}


def check(name: str, tensors: dict[str, Tensor], reference: dict[str, Tensor], allowed: dict[str, float]) -> float:
    """The largest of the `differences`. Raises `UserError` if one is not allowed."""
    errors = differences(tensors, reference)
    for key, error in errors.items():
        if not error <= allowed[key]:  # also true for nan
            raise UserError(f"{name}: {key} differs from fp32 by {error:.1e}, {allowed[key]:.1e} is allowed: not timed")
    return max(errors.values())


def check_models(
    models: dict[str, tuple[nn.Module, Run]], plain: tuple[nn.Module, Run], precision: str, tolerance: float = TOLERANCE
) -> float:
    """Compare losses and all gradients with plain code in fp32; the largest difference of a tensor.

    Raises `UserError` if one is too large: in fp32 than `tolerance`; in bf16 than `BF16_MARGIN` times the difference
    that torch's autocast makes to plain code, or `BF16_ROUNDING`.
    """
    model, run = plain
    with kernels.plain():
        reference = outputs(model, run)
        allowed = dict.fromkeys(reference, tolerance)
        if precision == "bf16":
            device = next(model.parameters()).device.type
            rounded = differences(outputs(model, autocast(device, precision)(run)), reference)
            allowed = {key: max(BF16_ROUNDING, BF16_MARGIN * error) for key, error in rounded.items()}
    return max(check(name, outputs(model, run), reference, allowed) for name, (model, run) in models.items())


def seconds(run: Callable[[], object], device: str) -> float:
    """Seconds of a run, until the GPU is done."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def measure(runs: dict[str, Callable[[], object]], rounds: int, device: str, warm_up: int = 1) -> dict:
    """Median and range of the milliseconds, and how many times faster the first run is than the others.

    The runs alternate within a round, so that drift of the machine affects all alike.
    """
    passes = [{name: 1e3 * seconds(run, device) for name, run in runs.items()} for _ in range(warm_up + rounds)]
    times = {name: [timed[name] for timed in passes[warm_up:]] for name in runs}
    middle = {name: median(values) for name, values in times.items()}
    first, *others = runs
    return {
        "milliseconds": {name: round(value, 3) for name, value in middle.items()},
        "spread": {name: [round(min(values), 3), round(max(values), 3)] for name, values in times.items()},
        "speedup": {name: round(middle[name] / middle[first], 3) for name in others},
    }


def fastest(run: Callable[[], object], rounds: int, device: str = "cpu") -> float:
    """Seconds of the fastest of some runs: other processes can only slow one down."""
    return min(seconds(run, device) for _ in range(rounds))


def peak_memory(runs: dict[str, Callable[[], object]], device: str) -> dict:
    """{"peak_gib": peak GPU memory of each run}; {} on a CPU."""
    peaks = {}
    for name, run in runs.items() if device == "cuda" else ():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated() / 2**30
    return {"peak_gib": peaks} if peaks else {}


def machine(device: str) -> dict:
    """The device and the versions that a measurement belongs to; a + after the commit means that files differ."""
    return {
        "device": cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit().replace("-dirty", "+") or "unknown",
    }
