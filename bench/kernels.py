"""Time the GPU kernels alone, forward and backward, against plain code and the bandwidth bound.

python bench/kernels.py --batch 256 --precision bf16          every stage of tiny and base, packed and dense

Outputs and gradients are first compared with plain code in fp32; a wrong result is not timed. Needs a GPU; on a CPU,
`bash launch/test.sh tests/models/kernels` runs the kernels in Triton's interpreter.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from pydantic import PositiveInt

from bench.options import Device, Options, Precision, report
from configs.command import parse_options
from configs.errors import UserError, run_main
from configs.keys import option

SIDE, VISIBLE = 7, 19  # patches
PASSES = {"depthwise": (3, 5), "gelu_grn": (3, 5)}  # fewest tensors read or written, forward and backward


@dataclass(frozen=True)
class KernelOptions(Options):
    """The command line."""

    models: tuple[str, ...] = option(("convnextv2_tiny", "convnextv2_base"), "models that set the widths")
    batch: PositiveInt = option(256, "images")
    precision: Precision = option("bf16", "of the tokens")
    device: Device = option("cuda", "where to run")

    def __post_init__(self):
        if self.device == "cpu":
            raise UserError("the kernels are for GPUs: `bash launch/test.sh tests/models/kernels` checks them on a CPU")


parse = partial(parse_options, KernelOptions, __doc__)
if __name__ == "__main__":
    run_main(parse)  # answers --help and mistakes before the imports below, which take seconds

import torch
from torch import Tensor, nn

from bench import timing
from bench.roofline import peaks
from models import kernels
from models.convnext import GRN
from models.sizes import SIZES
from models.sparse.layouts import Dense, Packed


def case(
    operation: str, where: str, stage: int, width: int, batch: int
) -> tuple[Tensor, Callable[[Tensor], Tensor], list[nn.Parameter]]:
    """(tokens, operation on them, its parameters)."""
    s = 8 >> stage
    layout, shape = Dense(), (batch, SIDE * s, SIDE * s)
    if where == "packed":
        layout, shape = Packed(timing.random_masks(batch, SIDE, VISIBLE, "cuda"), VISIBLE), (batch, VISIBLE, s, s)
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
    dtype = timing.DTYPES[options.precision]
    x, run, parameters = case(operation, where, stage, width, options.batch)
    grad = torch.randn_like(x)

    def gradients(x: Tensor, precision: str = options.precision) -> dict[int, Tensor]:
        with timing.autocast("cuda", precision):
            out = run(x)
        return dict(enumerate(torch.autograd.grad(out, [x, *parameters], grad.to(out.dtype))))

    def plain() -> None:
        with kernels.plain():
            gradients(low)

    low = x.to(dtype, copy=True).requires_grad_()
    with kernels.plain():
        reference = gradients(x.requires_grad_(), "fp32")
    allowed = dict.fromkeys(reference, timing.TOLERANCE if options.precision == "fp32" else 0.02)
    error = timing.check(f"{operation} {where}", gradients(low), reference, allowed)
    times = timing.measure({"kernel": lambda: gradients(low), "plain": plain}, options.rounds, "cuda")
    bound = 1e3 * sum(PASSES[operation]) * x.numel() * dtype.itemsize / bandwidth
    result = {"operation": operation, "where": where, "stage": stage + 1, "width": width, "relative_error": error}
    return result | times | {"bandwidth_share": round(bound / times["milliseconds"]["kernel"], 3)}


def main() -> None:
    """Entry point."""
    options = parse()
    timing.prepare(options.device)
    torch.manual_seed(0)
    _, bandwidth = peaks("cuda", torch.bfloat16)
    results = [
        {"model": model} | compare(operation, where, stage, SIZES[model][1] << stage, options, bandwidth)
        for model, operation, where, stage in product(options.models, PASSES, ("packed", "dense"), range(4))
    ]
    lines = [f"forward + backward, batch {options.batch}, {options.precision}, {torch.cuda.get_device_name()}"]
    for r in results:
        where = f"{r['model']:18}{r['operation']:10} {r['where']:7} stage {r['stage']}"
        times = f"{r['milliseconds']['kernel']:8.3f} ms, {r['speedup']['plain']:5.2f}x plain"
        lines.append(f"{where}: {times}, {r['bandwidth_share']:4.0%} of the bandwidth bound")
    result = {"bench": "kernels", "precision": options.precision, "batch": options.batch, "cases": results}
    report(result | timing.machine("cuda"), lines, options)


if __name__ == "__main__":
    run_main(main)
