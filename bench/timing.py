"""Checks before timing, alternating timing, and the description of the machine."""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.options import ROOT
from configs.errors import UserError
from launch.training.malloc import keep_memory
from launch.training.summary import cpu_name

TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}  # relative to a tensor's norm: sums over thousands of tokens are reordered
Run = Callable[[], Tensor]


def prepare(device: str) -> None:
    """Set up torch for timing: full fp32, and freed memory is kept on a CPU. Raises `UserError` if there is no GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU")
    if device == "cpu":
        keep_memory()
    torch.backends.cudnn.allow_tf32 = False


def randomize(model: torch.nn.Module) -> None:
    """Add noise to all parameters: initial zeros and ones hide errors, and zeros run faster."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)


def random_masks(batch: int, grid: tuple[int, int], n: int) -> Tensor:
    """Masks [B, gy, gx] with n visible patches per image."""
    return torch.stack([torch.randperm(grid[0] * grid[1]) < n for _ in range(batch)]).view(-1, *grid)


def outputs(model: torch.nn.Module, run: Run) -> list[Tensor]:
    """The output of a run, and the gradients of all parameters."""
    model.zero_grad(set_to_none=True)
    out = run()
    out.backward()
    return [out.detach().float(), *(p.grad.detach().float().clone() for p in model.parameters() if p.grad is not None)]


def check(name: str, tensors: list[Tensor], reference: list[Tensor], tolerance: float) -> float:
    """Largest difference of a tensor from its reference, relative to the norm. Raises `UserError` if too large."""
    largest = 0.0
    for tensor, expected in zip(tensors, reference, strict=True):
        error = float((tensor - expected).norm() / expected.norm().clamp(min=1e-12))
        if not error <= tolerance:  # also true for nan
            raise UserError(f"{name} differs from the fp32 reference by {error:.1e}: not timed")
        largest = max(largest, error)
    return largest


def measure(
    runs: dict[str, Callable[[], object]], rounds: int, device: str, warm_up: int = 2
) -> dict[str, list[float]]:
    """Milliseconds of each run; the runs alternate within a round, so that drift of the machine affects all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + warm_up):
        for name, run in runs.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if number >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def fastest(run: Callable[[], object], rounds: int, device: str = "cpu") -> float:
    """Seconds of the fastest of some runs: other processes can only slow one down."""
    return min(measure({"run": run}, rounds, device, warm_up=0)["run"]) / 1e3


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(run: Callable[[], object], device: str) -> float | None:
    """Peak GPU memory of a run in GiB; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def summary(times: dict[str, list[float]], first: str) -> dict:
    """Median and range of the times, and how many times faster `first` is than the others."""
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "milliseconds": {name: round(value, 3) for name, value in median.items()},
        "spread": {name: [round(min(values), 3), round(max(values), 3)] for name, values in times.items()},
        "speedup": {name: round(median[name] / median[first], 3) for name in times if name != first},
    }


def machine(device: str) -> dict:
    """The device and the versions that a measurement belongs to."""
    return {
        "device": cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit that was measured, with a + if files differ from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or "unknown"
