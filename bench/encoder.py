"""Time the encoder, forward and backward, on visible patches: packed against its peers, in one process.

python bench/encoder.py --model convnextv2_tiny --batch 8
python bench/encoder.py --model convnextv2_atto --batch 8 --peers masked minkowski compiled --json
python bench/encoder.py --model convnextv2_tiny --sweep                 how cost grows with mask ratio, size, batch

Peers: masked = dense convolutions and a mask; compiled = the same under torch.compile; minkowski = MinkowskiEngine's
sparse convolutions. Outputs and all parameter gradients are first compared with the masked reference in fp32; a wrong
result is not timed.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

import torch
from torch import Tensor

from bench.common import (
    TOLERANCE,
    Run,
    add_common,
    check,
    check_arguments,
    fill,
    machine,
    measure,
    outputs,
    peak_memory,
    random_masks,
    show,
    summary,
)  # fmt: skip
from configs.errors import Parser, UserError, run_main
from configs.schema import Encoder, visible_patches
from launch.training.malloc import keep_memory
from models import kernels
from models.convnext import ConvNeXt
from models.sparse.layouts import Masked, Packed

PATCH = 32  # pixels
SWEEP = {
    "mask_ratio": (0.0, 0.3, 0.5, 0.6, 0.75, 0.9),
    "size": (96, 160, 224, 320, 384, 512),
    "batch": (1, 2, 4, 8, 16),
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="convnextv2_tiny", help="model name (default %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images (default %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="image side, pixels (default %(default)s)")
    parser.add_argument("--mask-ratio", type=float, default=0.6, help="share of hidden patches (default %(default)s)")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="bf16 = autocast")
    parser.add_argument("--peers", nargs="*", default=["masked"], choices=["masked", "compiled", "minkowski"])
    parser.add_argument("--sweep", action="store_true", help="packed and masked over mask ratios, sizes and batches")
    add_common(parser)
    args = parser.parse_args()
    check_arguments(args)
    if not 0 <= args.mask_ratio < 1:
        raise UserError("--mask-ratio must be at least 0 and below 1")
    if args.size % PATCH:
        raise UserError(f"--size {args.size} is not a multiple of the patch, {PATCH} pixels")
    return args


def inputs(batch: int, size: int, mask_ratio: float, device: str) -> tuple[Tensor, Tensor, int]:
    """(images, masks, visible patches of an image)."""
    grid = size // PATCH, size // PATCH
    n = visible_patches(grid[0] * grid[1], mask_ratio)
    visible = random_masks(batch, grid, n)
    return torch.randn(batch, 3, size, size).to(device), visible.to(device), n


def peers(encoder: ConvNeXt, image: Tensor, visible: Tensor, n: int, names: list[str], precision: str = "fp32"):
    """Ways to compute the mean square of the visible outputs: {name: run}."""

    def packed() -> Tensor:
        return encoder.forward_features(image, Packed(visible, n)).float().square().mean()

    def masked() -> Tensor:
        return encoder.forward_features(image, Masked(visible))[visible].float().square().mean()

    def minkowski() -> Tensor:
        from models.sparse.minkowski import Minkowski

        return encoder.forward_features(image, Minkowski(visible)).float().square().mean()

    compiled = torch.compile(masked) if "compiled" in names else masked
    ways = {"packed": packed, "masked": masked, "compiled": compiled, "minkowski": minkowski}
    return {name: _in_precision(ways[name], image.device.type, precision) for name in ("packed", *names)}


def _in_precision(run: Run, device: str, precision: str) -> Run:
    def cast() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            return run()

    return cast


def compare(args: argparse.Namespace, encoder: ConvNeXt, batch: int, size: int, mask_ratio: float) -> dict:
    """Check, then time, one setting."""
    image, visible, n = inputs(batch, size, mask_ratio, args.device)
    with kernels.plain():
        reference = outputs(encoder, peers(encoder, image, visible, n, ["masked"])["masked"])
    runs = peers(encoder, image, visible, n, args.peers, args.precision)
    errors = [check(name, outputs(encoder, run), reference, TOLERANCE[args.precision]) for name, run in runs.items()]

    def step(run: Run):
        def forward_backward() -> None:
            encoder.zero_grad(set_to_none=True)
            run().backward()

        return forward_backward

    steps = {name: step(run) for name, run in runs.items()}
    memory = {name: peak_memory(run, args.device) for name, run in steps.items()}
    times = measure(steps, args.rounds, args.device)
    setting = {"batch": batch, "size": size, "mask_ratio": mask_ratio, "visible": f"{n}/{(size // PATCH) ** 2}"}
    result = setting | {"relative_error": max(errors)} | summary(times, "packed")
    return result | ({"peak_gib": memory} if args.device == "cuda" else {})


def main() -> None:
    """Entry point."""
    args = parse()
    if args.device == "cpu":
        keep_memory()
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    encoder = ConvNeXt(Encoder(args.model)).to(args.device)
    fill(encoder)
    result = {"bench": "encoder", "model": args.model, "precision": args.precision} | machine(args.device)
    settings = [(args.batch, args.size, args.mask_ratio)]
    if args.sweep:
        settings = [(args.batch, args.size, ratio) for ratio in SWEEP["mask_ratio"]]
        settings += [(max(1, args.batch * args.size**2 // size**2), size, args.mask_ratio) for size in SWEEP["size"]]
        settings += [(batch, args.size, args.mask_ratio) for batch in SWEEP["batch"]]
    results = [compare(args, encoder, *setting) for setting in settings]
    lines = []
    for each in results:
        lines.append(
            f"{args.model}, {args.precision}, batch {each['batch']}, {each['size']} px, {each['visible']} patches "
            f"visible, {result['device']}"
        )
        lines.append(f"{'':10}{'ms':>10}{'images/s':>10}{'packed is':>14}")
        for name, value in each["milliseconds"].items():
            factor = f"{each['speedup'][name]:.2f}x faster" if name != "packed" else ""
            lines.append(f"{name:10}{value:10.1f}{1e3 * each['batch'] / value:10.1f}{factor:>14}")
    show(result | ({"sweep": results} if args.sweep else results[0]), lines, args)


if __name__ == "__main__":
    run_main(main)
