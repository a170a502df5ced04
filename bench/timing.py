"""Inputs, checks before timing, alternating timing, and the description of the machine."""

import platform
import subprocess
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from bench.options import PATCH, ROOT
from configs.errors import UserError
from configs.schema import visible_patches
from launch.training.malloc import keep_memory
from launch.training.summary import cpu_name
from models import kernels

TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}  # relative to a tensor's norm: sums over thousands of tokens are reordered
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Run = Callable[[], Tensor]


def prepare(device: str) -> None:
    """Set up torch for timing: full fp32, and freed memory is kept on a CPU. Raises `UserError` if there is no GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU")
    if device == "cpu":
        keep_memory()
    torch.backends.cudnn.allow_tf32 = False


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


def check(name: str, tensors: dict, reference: dict, precision: str) -> float:
    """Largest difference of a tensor from its reference, relative to the norm. Raises `UserError` if too large."""
    errors = []
    for key, expected in reference.items():
        difference = tensors[key].reshape(expected.shape) - expected
        errors.append(float(difference.norm() / expected.norm().clamp(min=1e-12)))
        if not errors[-1] <= TOLERANCE[precision]:  # also true for nan
            raise UserError(f"{name} differs from the fp32 reference by {errors[-1]:.1e}: not timed")
    return max(errors)


def check_models(models: dict[str, tuple[nn.Module, Run]], plain: tuple[nn.Module, Run], precision: str) -> float:
    """Check losses and all gradients of models against plain code in fp32; the largest difference, as `check`."""
    with kernels.plain():
        reference = outputs(*plain)
    return max(check(name, outputs(model, run), reference, precision) for name, (model, run) in models.items())


def seconds(run: Callable[[], object], device: str) -> float:
    """Seconds of a run, until the GPU is done."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def measure(runs: dict[str, Callable[[], object]], rounds: int, device: str, warm_up: int = 2) -> dict:
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
    git = ["git", "describe", "--always", "--dirty=+"]
    described = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "device": cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": described.stdout.strip() or "unknown",
    }
