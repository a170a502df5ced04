"""Time the GPU kernels alone, forward and backward, against plain code and the bandwidth bound.

python bench/kernels.py --batch 256 --precision bf16                   every stage of tiny and base, packed and dense

Outputs and gradients are first compared with plain code in fp32; a wrong result is not timed. Needs a GPU; on a CPU,
`bash launch/test.sh tests/models/kernels` runs the kernels in Triton's interpreter.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from pydantic import PositiveInt

from bench.options import Device, Options, Precision, report
from configs.command import parse_options
from configs.errors import UserError, run_main
from configs.keys import option

GRID, VISIBLE = (7, 7), 19
PASSES = {"depthwise": (3, 5), "gelu_grn": (3, 5)}  # fewest tensors read or written, forward and backward


@dataclass(frozen=True)
class KernelOptions(Options):
    """The command line."""

    models: tuple[str, ...] = option(("convnextv2_tiny", "convnextv2_base"), "models that set the widths")
    batch: PositiveInt = option(256, "images")
    precision: Precision = option("bf16", "of the tokens")
    device: Device = option("cuda", "where to run")


def parse() -> KernelOptions:
    """The command line."""
    options = parse_options(KernelOptions, __doc__)
    if options.device == "cpu":
        raise UserError("the kernels are for GPUs: `bash launch/test.sh tests/models/kernels` checks them on a CPU")
    return options


if __name__ == "__main__":
    run_main(parse)  # answers --help and mistakes before the imports below, which take seconds

import torch
from torch import Tensor, nn

from bench.roofline import peaks
from bench.timing import TOLERANCE, check, machine, measure, prepare, random_masks, summary
from models import kernels
from models.convnext import GRN
from models.sizes import SIZES
from models.sparse.layouts import Dense, Packed


def case(
    operation: str, where: str, stage: int, width: int, batch: int
) -> tuple[Tensor, Callable[[Tensor], Tensor], list[nn.Parameter]]:
    """(tokens, operation on them, its parameters)."""
    s = 8 >> stage
    if where == "packed":
        visible = random_masks(batch, GRID, VISIBLE).cuda()
        layout, shape = Packed(visible, VISIBLE), (batch, VISIBLE, s, s)
    else:
        layout, shape = Dense(), (batch, GRID[0] * s, GRID[1] * s)
    if operation == "depthwise":
        conv = nn.Conv2d(width, width, 7, padding=3, groups=width).cuda()
        norm = nn.LayerNorm(width, 1e-6).cuda()
        x = torch.randn(*shape, width, device="cuda")
        return x, lambda x: layout.depthwise_norm(x, conv, norm), [*conv.parameters(), *norm.parameters()]
    grn = GRN(4 * width).cuda()
    nn.init.normal_(grn.weight)
    return torch.randn(*shape, 4 * width, device="cuda"), lambda x: layout.gelu_grn(x, grn), list(grn.parameters())


def compare(operation: str, where: str, stage: int, width: int, options: KernelOptions, bandwidth: float) -> dict:
    """Check, then time, one operation at one stage."""
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    x, run, parameters = case(operation, where, stage, width, options.batch)
    grad = torch.randn_like(x)

    def forward_backward(x: Tensor) -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=options.precision == "bf16"):
            out = run(x)
        return [out, *torch.autograd.grad(out, [x, *parameters], grad.to(out.dtype))]

    with kernels.plain(), torch.autocast("cuda", enabled=False):
        reference = [t.detach() for t in torch.autograd.grad(run(x.requires_grad_()), [x, *parameters], grad)]
    low = x.detach().to(dtype).requires_grad_()
    gradients = [t.float() for t in forward_backward(low)[1:]]
    error = check(f"{operation} {where}", gradients, reference, TOLERANCE[options.precision])

    def plain() -> None:
        with kernels.plain():
            forward_backward(low)

    times = measure({"kernel": lambda: forward_backward(low), "plain": plain}, options.rounds, "cuda")
    bound = 1e3 * sum(PASSES[operation]) * x.numel() * dtype.itemsize / bandwidth
    result = {"operation": operation, "where": where, "stage": stage + 1, "width": width, "relative_error": error}
    result |= summary(times, "kernel")
    return result | {"bandwidth_share": round(bound / result["milliseconds"]["kernel"], 3)}


def main() -> None:
    """Entry point."""
    options = parse()
    prepare(options.device)
    torch.manual_seed(0)
    _, bandwidth = peaks("cuda", torch.bfloat16)
    results = [
        {"model": model} | compare(operation, where, stage, SIZES[model][1] << stage, options, bandwidth)
        for model in options.models
        for operation in PASSES
        for where in ("packed", "dense")
        for stage in range(4)
    ]
    lines = [f"forward + backward, batch {options.batch}, {options.precision}, {torch.cuda.get_device_name()}"]
    for r in results:
        ms = r["milliseconds"]
        lines.append(
            f"{r['model']:18}{r['operation']:10} {r['where']:7} stage {r['stage']}: {ms['kernel']:8.3f} ms, "
            f"{r['speedup']['plain']:5.2f}x plain, {r['bandwidth_share']:4.0%} of the bandwidth bound"
        )
    result = {"bench": "kernels", "precision": options.precision, "batch": options.batch, "cases": results}
    report(result | machine("cuda"), lines, options)


if __name__ == "__main__":
    run_main(main)
