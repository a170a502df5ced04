"""What the benchmarks share: checks before timing, alternating timing, the machine's description, results."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from configs.errors import UserError
from configs.files import write_whole
from launch.training.summary import cpu_name

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}  # of the norm of a tensor; sums over thousands of tokens, in another order
Run = Callable[[], Tensor]


def add_common(parser, rounds: int = 7) -> None:
    """The arguments of every benchmark."""
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds, A/B/A/B (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--save", metavar="NAME", help="also write bench/results/NAME.json, which docs/performance.md shows"
    )


def check_arguments(args) -> None:
    """Raise `UserError` for numbers below one, or a GPU that is not there."""
    for name in ("batch", "size", "rounds"):
        if getattr(args, name, 1) < 1:
            raise UserError(f"--{name} must be positive")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU")


def fill(model: torch.nn.Module) -> None:
    """Move all parameters off their initial zeros and ones: those hide errors, and zeros run faster."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)


def random_masks(batch: int, grid: tuple[int, int], n: int) -> Tensor:
    """Masks [B, gy, gx] with n visible patches in each image."""
    return torch.stack([torch.randperm(grid[0] * grid[1]) < n for _ in range(batch)]).view(-1, *grid)


def outputs(model: torch.nn.Module, run: Run) -> list[Tensor]:
    """The output of a run, and the gradients of all parameters."""
    model.zero_grad(set_to_none=True)
    out = run()
    out.backward()
    return [out.detach().float(), *(p.grad.detach().float().clone() for p in model.parameters() if p.grad is not None)]


def check(name: str, found: list[Tensor], reference: list[Tensor], tolerance: float) -> float:
    """Greatest difference of a tensor, as share of its norm. Raises `UserError` if too large: not to be timed."""
    worst = 0.0
    for ours, theirs in zip(found, reference, strict=True):
        error = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))
        if not error <= tolerance:
            raise UserError(f"{name} differs from the fp32 reference by {error:.1e}: not timed")
        worst = max(worst, error)
    return worst


def measure(
    runs: dict[str, Callable[[], object]], rounds: int, device: str, warm_up: int = 2
) -> dict[str, list[float]]:
    """Milliseconds of each run, in turn within each round, so that drift hits all alike."""
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


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(run: Callable[[], object], device: str) -> float | None:
    """Peak GPU memory of a run, GiB."""
    if device != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def summary(times: dict[str, list[float]], first: str) -> dict:
    """Median and spread of each, and how many times faster `first` is."""
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "milliseconds": {name: round(value, 3) for name, value in median.items()},
        "spread": {name: [round(min(values), 3), round(max(values), 3)] for name, values in times.items()},
        "speedup": {name: round(median[name] / median[first], 3) for name in times if name != first},
    }


def machine(device: str) -> dict:
    """The device and the versions that a figure belongs to."""
    return {
        "device": cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit that was measured, with a + where files differ from it."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def show(result: dict, lines: list[str], args) -> None:
    """Print a table or JSON, and write the result if asked."""
    print(json.dumps(result, indent=1) if args.json else "\n".join(lines))
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        write_whole(RESULTS / f"{args.save}.json", (json.dumps(result, indent=1) + "\n").encode())


def load() -> list[dict]:
    """All results, by file name."""
    files = sorted(RESULTS.glob("*.json"))
    if not files:
        raise UserError(f"{RESULTS} holds no results: run a benchmark with --save NAME first")
    return [json.loads(file.read_text()) for file in files]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def where(result: dict) -> str:
    """The machine of a result, in a line."""
    machine = (
        f"{result['device']}, {result['threads']} threads" if result["threads"] > 1 else f"{result['device']}, 1 thread"
    )
    return f"{machine}, torch {result['torch']}, commit {result['commit']}"
