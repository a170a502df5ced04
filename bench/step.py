"""Time a training step: forward, forward + backward, and with the optimizer; ours against its peers, in one process.

python bench/step.py pretrain --model convnextv2_tiny --batch 8
python bench/step.py finetune --model convnextv2_tiny --batch 8 --device cuda --precision bf16

Peers in pretraining: the masked autoencoder on dense convolutions and a mask (masked), the same under torch.compile
(compiled). In fine-tuning: timm's model with the same weights (timm), and under torch.compile, channels-last
(timm-compiled). Losses and all gradients are first compared with plain code in fp32; a wrong result is not timed.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

import timm
import torch
from torch import Tensor, nn

from bench.common import (
    TOLERANCE,
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
from bench.roofline import count, floor_seconds, peaks
from configs.errors import Parser, UserError, run_main
from configs.preprocessing import Preprocessing
from configs.schema import Encoder, PretrainModel, visible_patches
from launch.training.malloc import keep_memory
from models import kernels
from models.convnext import ConvNeXt
from models.fcmae import FCMAE
from models.formats.write import to_form
from models.weights import Weights, split_by_prefix

CLASSES = 1000
PARTS = ("forward", "forward+backward", "step")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("stage", choices=["pretrain", "finetune"])
    parser.add_argument("--model", default="convnextv2_tiny", help="model name (default %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images (default %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="image side, pixels (default %(default)s)")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="bf16 = autocast")
    parser.add_argument("--recompute", default="none", choices=["none", "mlp", "block"], help="of ours")
    parser.add_argument("--no-compiled", action="store_true", help="leave the peers under torch.compile out")
    add_common(parser)
    args = parser.parse_args()
    check_arguments(args)
    if args.size % 32:
        raise UserError(f"--size {args.size} is not a multiple of the patch, 32 pixels")
    return args


def pretraining(args: argparse.Namespace) -> tuple[dict[str, tuple[nn.Module, Callable[[], Tensor]]], tuple]:
    """({name: (model, loss)}, what roofline.count takes)."""
    config = PretrainModel(args.model, recompute=args.recompute)
    ours, plain = FCMAE(config), FCMAE(replace(config, backend="masked", recompute="none"))
    fill(ours)
    plain.load_state_dict(ours.state_dict())
    ours, plain = ours.to(args.device).train(), plain.to(args.device).train()
    grid = args.size // 32, args.size // 32
    n = visible_patches(grid[0] * grid[1], config.mask_ratio)
    visible = random_masks(args.batch, grid, n)
    image, visible = torch.randn(args.batch, 3, args.size, args.size).to(args.device), visible.to(args.device)
    models = {"packed": (ours, lambda: ours(image, visible)), "masked": (plain, lambda: plain(image, visible))}
    if not args.no_compiled:
        compiled = torch.compile(plain)
        models["compiled"] = plain, lambda: compiled(image, visible)
    return models, (config, grid, n, (config.decoder_dim, config.decoder_depth))


def finetuning(args: argparse.Namespace) -> tuple[dict[str, tuple[nn.Module, Callable[[], Tensor]]], tuple]:
    """The same for a classifier; timm's model has its gradients in another order, so they are compared by name."""
    arch = Encoder(args.model)
    ours = ConvNeXt(arch, CLASSES, recompute=args.recompute)
    fill(ours)
    head, encoder = split_by_prefix(ours.state_dict(), "head.")
    theirs = timm.create_model(args.model, num_classes=CLASSES)
    weights = Weights(ours.arch, Preprocessing((args.size, args.size), 3), encoder, head=head)
    theirs.load_state_dict(to_form(weights, "timm")[0])
    ours, theirs = ours.to(args.device).train(), theirs.to(args.device).train()
    image = torch.randn(args.batch, 3, args.size, args.size).to(args.device)
    label = torch.randint(CLASSES, (args.batch,)).to(args.device)
    rows = image.contiguous(memory_format=torch.channels_last)

    def loss(model: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
        return lambda: nn.functional.cross_entropy(model(x).float(), label)

    models = {"ours": (ours, loss(ours, image)), "timm": (theirs, loss(theirs, image))}
    if not args.no_compiled:
        theirs = theirs.to(memory_format=torch.channels_last)
        models["timm-compiled"] = theirs, loss(torch.compile(theirs), rows)
    grid = args.size // 32, args.size // 32
    return models, (arch, grid, grid[0] * grid[1], None)


def parts(model: nn.Module, loss: Callable[[], Tensor], args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """The three things that are timed."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-8, fused=True)

    def forward() -> Tensor:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
            return loss()

    def forward_backward() -> None:
        model.zero_grad(set_to_none=True)
        forward().backward()

    def step() -> None:
        forward_backward()
        optimizer.step()

    return dict(zip(PARTS, (forward, forward_backward, step), strict=True))


def checked(models: dict, args: argparse.Namespace) -> float:
    """Largest relative difference from plain code in fp32, of losses and all gradients."""
    names = list(models)
    plain = models["masked" if args.stage == "pretrain" else "ours"]
    with kernels.plain():
        reference = _by_name(*plain)
    worst = 0.0
    for name in names:
        model, loss = models[name]
        found = _by_name(model, parts(model, loss, args)["forward"])
        values = [found[key].reshape(tensor.shape) for key, tensor in reference.items()]
        worst = max(worst, check(name, values, list(reference.values()), TOLERANCE[args.precision]))
    return worst


def _by_name(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    loss, *gradients = outputs(model, run)
    return {"loss": loss} | {name: grad for (name, _), grad in zip(model.named_parameters(), gradients, strict=True)}


def main() -> None:
    """Entry point."""
    args = parse()
    if args.device == "cpu":
        keep_memory()
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    models, work = pretraining(args) if args.stage == "pretrain" else finetuning(args)
    error = checked(models, args)
    first = next(iter(models))
    runs = {name: parts(model, loss, args) for name, (model, loss) in models.items()}
    memory = {name: peak_memory(run["step"], args.device) for name, run in runs.items()}
    timed = {
        part: summary(measure({name: run[part] for name, run in runs.items()}, args.rounds, args.device), first)
        for part in PARTS
    }
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    floor = args.batch * floor_seconds(count(*work), peaks(args.device, dtype), dtype)
    result = {"bench": "step", "stage": args.stage, "model": args.model, "batch": args.batch, "size": args.size}
    result |= {"precision": args.precision, "recompute": args.recompute} | machine(args.device)
    result |= {"relative_error": error, "parts": timed}
    result["roofline_share"] = {
        name: round(1e3 * floor / ms, 3) for name, ms in timed["forward+backward"]["milliseconds"].items()
    }
    if args.device == "cuda":
        result["peak_gib"] = memory
    lines = [f"{args.stage}, {args.model}, {args.precision}, batch {args.batch}, {args.size} px, {result['device']}"]
    lines.append(f"{'ms':16}{''.join(f'{name:>16}' for name in models)}")
    for part, values in timed.items():
        lines.append(f"{part:16}{''.join(f'{value:16.1f}' for value in values['milliseconds'].values())}")
    lines.append(
        f"{'images/s':16}" + "".join(f"{1e3 * args.batch / v:16.1f}" for v in timed["step"]["milliseconds"].values())
    )
    lines.append(f"{'of the roofline':16}" + "".join(f"{share:16.0%}" for share in result["roofline_share"].values()))
    for name, factor in timed["step"]["speedup"].items():
        lines.append(f"the step of {first} is {factor:.2f}x as fast as that of {name}")
    show(result, lines, args)


if __name__ == "__main__":
    run_main(main)
