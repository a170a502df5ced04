"""Time a training step against other implementations: forward, forward + backward, and with the optimizer.

python bench/step.py pretrain --model convnextv2_tiny --batch 8
python bench/step.py finetune --model convnextv2_tiny --batch 8 --device cuda --precision bf16

Peers in pretraining: the masked autoencoder on dense convolutions and a mask (masked), the same under torch.compile
(compiled). In fine-tuning: timm's model with the same weights (timm), and under torch.compile, channels-last
(timm-compiled). Losses and all gradients are first compared with plain code in fp32; a wrong result is not timed.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from bench.options import PATCH, ModelOptions, report
from configs.command import parse_options
from configs.errors import run_main
from configs.keys import argument, option
from configs.preprocessing import Preprocessing
from configs.schema import Encoder, FCMAESettings, PretrainModel, visible_patches

CLASSES = 1000
PARTS = ("forward", "forward+backward", "step")


@dataclass(frozen=True)
class StepOptions(ModelOptions):
    """The command line."""

    stage: Literal["pretrain", "finetune"] = argument("pretrain or finetune")
    recompute: Literal["none", "mlp", "block"] = option("none", "checkpointing of our model")
    no_compiled: bool = option(False, "skip the peers under torch.compile")


def parse() -> StepOptions:
    """The command line."""
    return parse_options(StepOptions, __doc__)


if __name__ == "__main__":
    run_main(parse)  # answers --help and mistakes before the imports below, which take seconds

import timm
import torch
from torch import Tensor, nn

from bench.roofline import count, floor_seconds, peaks
from bench.timing import (
    TOLERANCE,
    check,
    machine,
    measure,
    outputs,
    peak_memory,
    prepare,
    random_masks,
    randomize,
    summary,
)
from models import kernels
from models.convnext import ConvNeXt
from models.fcmae import FCMAE
from models.formats.write import to_form
from models.weights import Weights, split_by_prefix

Loss = Callable[[], Tensor]
Models = dict[str, tuple[nn.Module, Loss]]  # ours first, then its peers


def pretraining(options: StepOptions) -> tuple[Models, tuple[float, float]]:
    """The models with their losses, and the work of one image as `roofline.count` returns it."""
    config, settings = PretrainModel(options.model, recompute=options.recompute), FCMAESettings()
    ours, plain = FCMAE(config, settings), FCMAE(replace(config, backend="masked", recompute="none"), settings)
    randomize(ours)
    plain.load_state_dict(ours.state_dict())
    ours, plain = ours.to(options.device).train(), plain.to(options.device).train()
    grid = options.size // PATCH, options.size // PATCH
    n = visible_patches(grid[0] * grid[1], settings.mask_ratio)
    visible = random_masks(options.batch, grid, n)
    image = torch.randn(options.batch, 3, options.size, options.size)
    image, visible = image.to(options.device), visible.to(options.device)
    models = {"packed": (ours, lambda: ours(image, visible)), "masked": (plain, lambda: plain(image, visible))}
    if not options.no_compiled:
        compiled = torch.compile(plain)
        models["compiled"] = plain, lambda: compiled(image, visible)
    return models, count(config, grid, n, (settings.decoder_dim, settings.decoder_depth))


def finetuning(options: StepOptions) -> tuple[Models, tuple[float, float]]:
    """The same for a classifier, with timm's model as its peer."""
    arch = Encoder(options.model)
    ours = ConvNeXt(arch, CLASSES, recompute=options.recompute)
    randomize(ours)
    head, encoder = split_by_prefix(ours.state_dict(), "head.")
    theirs = timm.create_model(options.model, num_classes=CLASSES)
    preprocessing = Preprocessing((options.size, options.size), 3)
    theirs.load_state_dict(to_form(Weights(ours.arch, preprocessing, encoder, head=head), "timm")[0])
    ours, theirs = ours.to(options.device).train(), theirs.to(options.device).train()
    image = torch.randn(options.batch, 3, options.size, options.size).to(options.device)
    label = torch.randint(CLASSES, (options.batch,)).to(options.device)
    rows = image.contiguous(memory_format=torch.channels_last)

    def loss(model: Callable[[Tensor], Tensor], x: Tensor) -> Loss:
        return lambda: nn.functional.cross_entropy(model(x).float(), label)

    models = {"ours": (ours, loss(ours, image)), "timm": (theirs, loss(theirs, image))}
    if not options.no_compiled:
        theirs = theirs.to(memory_format=torch.channels_last)
        models["timm-compiled"] = theirs, loss(torch.compile(theirs), rows)
    grid = options.size // PATCH, options.size // PATCH
    return models, count(arch, grid, grid[0] * grid[1], None)


def parts(model: nn.Module, loss: Loss, options: StepOptions) -> dict[str, Callable[[], object]]:
    """What is timed, by the names in `PARTS`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-8, fused=True)

    def forward() -> Tensor:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16"):
            return loss()

    def forward_backward() -> None:
        model.zero_grad(set_to_none=True)
        forward().backward()

    def step() -> None:
        forward_backward()
        optimizer.step()

    return dict(zip(PARTS, (forward, forward_backward, step), strict=True))


def compare(models: Models, options: StepOptions) -> float:
    """Largest relative difference of losses and all gradients from plain code in fp32, compared by name."""
    plain = models["masked" if options.stage == "pretrain" else "ours"]
    with kernels.plain():
        reference = _by_name(*plain)
    errors = []
    for name, (model, loss) in models.items():
        tensors = _by_name(model, parts(model, loss, options)["forward"])
        values = [tensors[key].reshape(tensor.shape) for key, tensor in reference.items()]
        errors.append(check(name, values, list(reference.values()), TOLERANCE[options.precision]))
    return max(errors)


def _by_name(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    loss, *gradients = outputs(model, run)
    return {"loss": loss} | {name: grad for (name, _), grad in zip(model.named_parameters(), gradients, strict=True)}


def main() -> None:
    """Entry point."""
    options = parse()
    prepare(options.device)
    models, work = pretraining(options) if options.stage == "pretrain" else finetuning(options)
    error = compare(models, options)
    first = next(iter(models))
    runs = {name: parts(model, loss, options) for name, (model, loss) in models.items()}
    memory = {name: peak_memory(run["step"], options.device) for name, run in runs.items()}
    timed = {
        part: summary(measure({name: run[part] for name, run in runs.items()}, options.rounds, options.device), first)
        for part in PARTS
    }
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    floor = options.batch * floor_seconds(work, peaks(options.device, dtype), dtype)
    keys = ("stage", "model", "batch", "size", "precision", "recompute")
    result = {"bench": "step"} | {key: getattr(options, key) for key in keys} | machine(options.device)
    result |= {"relative_error": error, "parts": timed}
    result["roofline_share"] = {
        name: round(1e3 * floor / ms, 3) for name, ms in timed["forward+backward"]["milliseconds"].items()
    }
    if options.device == "cuda":
        result["peak_gib"] = memory
    about = f"{options.stage}, {options.model}, {options.precision}, batch {options.batch}, {options.size} px"
    lines = [f"{about}, {result['device']}"]
    lines.append(f"{'ms':16}{''.join(f'{name:>16}' for name in models)}")
    for part, values in timed.items():
        lines.append(f"{part:16}{''.join(f'{value:16.1f}' for value in values['milliseconds'].values())}")
    lines.append(
        f"{'images/s':16}" + "".join(f"{1e3 * options.batch / v:16.1f}" for v in timed["step"]["milliseconds"].values())
    )
    lines.append(f"{'of the roofline':16}" + "".join(f"{share:16.0%}" for share in result["roofline_share"].values()))
    for name, factor in timed["step"]["speedup"].items():
        lines.append(f"the step of {first} is {factor:.2f}x as fast as that of {name}")
    report(result, lines, options)


if __name__ == "__main__":
    run_main(main)
