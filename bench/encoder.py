"""Time the encoder, forward and backward, on visible patches: packed against its peers, in one process.

    python bench/encoder.py --model convnextv2_tiny --batch 8 --device cpu
    python bench/encoder.py --model convnextv2_atto --batch 8 --json > result.json

Outputs and all parameter gradients are first compared with the masked reference in fp32; a wrong result is not timed.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

import torch
from torch import Tensor

from configs.errors import Parser, UserError, run_main
from configs.schema import Encoder, visible_patches
from models.convnext import ConvNeXt
from models.sparse.layouts import Masked, Packed

TOLERANCE = 1e-4  # relative; sums over thousands of tokens in another order


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="convnextv2_tiny", help="model name (default %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images (default %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="image side, pixels (default %(default)s)")
    parser.add_argument("--mask-ratio", type=float, default=0.6, help="share of hidden patches (default %(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, A/B/A/B (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    if min(args.batch, args.size, args.rounds) < 1 or not 0 <= args.mask_ratio < 1:
        raise UserError("--batch, --size and --rounds must be positive, --mask-ratio at least 0 and below 1")
    if args.size % 32:
        raise UserError(f"--size {args.size} is not a multiple of the patch, 32 pixels")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU")
    return args


def peers(encoder: ConvNeXt, image: Tensor, visible: Tensor, n: int) -> dict[str, Callable[[], Tensor]]:
    """Ways to compute the mean square of the visible outputs."""

    def packed() -> Tensor:
        return encoder.forward_features(image, Packed(visible, n)).float().square().mean()

    def masked() -> Tensor:
        return encoder.forward_features(image, Masked(visible))[visible].float().square().mean()

    return {"packed": packed, "masked": masked}


def gradients(encoder: ConvNeXt, run: Callable[[], Tensor]) -> list[Tensor]:
    """The output and the gradients of all parameters."""
    encoder.zero_grad(set_to_none=True)
    out = run()
    out.backward()
    return [out.detach(), *(p.grad.detach().clone() for p in encoder.parameters())]


def check(encoder: ConvNeXt, runs: dict[str, Callable[[], Tensor]]) -> float:
    """Largest relative difference from the masked reference. Raises `UserError` if it is too large to time."""
    reference = gradients(encoder, runs["masked"])
    worst = 0.0
    for name, run in runs.items():
        for ours, theirs in zip(gradients(encoder, run), reference, strict=True):
            error = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))
            if not error <= TOLERANCE:
                raise UserError(f"{name} differs from the masked reference by {error:.1e}: not timed")
            worst = max(worst, error)
    return worst


def measure(encoder: ConvNeXt, runs: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of forward + backward, alternating between the peers so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    device = next(encoder.parameters()).device
    for number in range(rounds + 2):  # two to warm up
        for name, run in runs.items():
            encoder.zero_grad(set_to_none=True)
            start = time.perf_counter()
            run().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def cpu_name() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    """Entry point."""
    args = parse()
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    torch.manual_seed(0)
    encoder = ConvNeXt(Encoder(args.model)).to(args.device)
    for parameter in encoder.parameters():  # no zeros: they would hide an error, and run faster
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    grid = args.size // 32, args.size // 32
    n = visible_patches(grid[0] * grid[1], args.mask_ratio)
    visible = torch.stack([torch.randperm(grid[0] * grid[1]) < n for _ in range(args.batch)]).view(-1, *grid)
    image = torch.randn(args.batch, 3, args.size, args.size).to(args.device)
    runs = peers(encoder, image, visible.to(args.device), n)
    error = check(encoder, runs)
    times = measure(encoder, runs, args.rounds)
    median = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "model": args.model, "batch": args.batch, "size": args.size, "visible": f"{n}/{grid[0] * grid[1]}",
        "device": cpu_name() if args.device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "precision": "fp32",
        "max_relative_error": error,
        "milliseconds": {name: round(value, 2) for name, value in median.items()},
        "spread": {name: [round(min(values), 2), round(max(values), 2)] for name, values in times.items()},
        "speedup": {name: round(median[name] / median["packed"], 3) for name in runs if name != "packed"},
    }  # fmt: skip
    if args.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{args.model}, batch {args.batch}, {args.size} px, {result['visible']} patches visible, {result['device']}")
    print(f"{'':10}{'ms':>10}{'images/s':>10}{'packed is':>14}")
    for name, value in median.items():
        factor = f"{value / median['packed']:.2f}x faster" if name != "packed" else ""
        print(f"{name:10}{value:10.1f}{1e3 * args.batch / value:10.1f}{factor:>14}")


if __name__ == "__main__":
    run_main(main)
