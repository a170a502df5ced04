"""Time a training step against other implementations: forward, forward + backward, and with the optimizer.

python bench/step.py pretrain --model convnextv2_tiny --batch 8 --threads 1
python bench/step.py finetune --model convnextv2_tiny --batch 8 --device cuda --precision bf16

Peers in pretraining: the masked autoencoder on dense convolutions and a mask (masked), the same under torch.compile
(compiled), and on MinkowskiEngine's sparse convolutions (minkowski; it has no bf16, so it is always fp32). In
fine-tuning: timm's model with the same weights (timm), channels-last (timm-nhwc), and so under torch.compile
(timm-compiled). Peers have the same number of threads, matrix products and precision as ours. Losses and all
gradients are first compared with plain code in fp32; a wrong result is not timed.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from bench.options import PATCH, ModelOptions, report
from configs.command import parse_options
from configs.errors import UserError, run_main
from configs.keys import argument, option
from configs.preprocessing import Preprocessing
from configs.schema import Encoder, FCMAESettings, PretrainModel

CLASSES = 1000
PEERS = {
    "pretrain": ("masked", "compiled", "minkowski"),
    "finetune": ("timm", "timm-nhwc", "timm-compiled"),
}


@dataclass(frozen=True)
class StepOptions(ModelOptions):
    """The command line."""

    stage: Literal["pretrain", "finetune"] = argument("pretrain or finetune")
    recompute: Literal["none", "mlp", "block"] = option("none", "checkpointing of our model")
    peers: tuple[str, ...] = option((), "some of the peers (default: all but minkowski)")
    gradients: bool = option(False, "time forward + backward only")

    def __post_init__(self):
        if unknown := set(self.peers) - set(PEERS[self.stage]):
            raise UserError(f"--peers {' '.join(sorted(unknown))}: {self.stage} has {', '.join(PEERS[self.stage])}")

    @property
    def chosen(self) -> list[str]:
        """The peers to time."""
        return [name for name in PEERS[self.stage] if name in self.peers or (not self.peers and name != "minkowski")]


parse = partial(parse_options, StepOptions, __doc__)
if __name__ == "__main__":
    run_main(parse)  # answers --help and mistakes before the imports below, which take seconds

import timm
import torch
from torch import Tensor, nn

from bench import timing
from bench.roofline import count, floor_seconds, peaks
from models.convnext import ConvNeXt
from models.fcmae import FCMAE
from models.formats.write import to_form
from models.weights import Weights, split_by_prefix

Models = dict[str, tuple[nn.Module, timing.Run]]  # with their losses; ours first, then its peers


def pretraining(options: StepOptions) -> tuple[Models, tuple[nn.Module, timing.Run], tuple[float, float]]:
    """The models, plain code to check them against, and the work of one image as `roofline.count` returns it."""
    config, settings = PretrainModel(options.model, recompute=options.recompute), FCMAESettings()
    ours, plain = FCMAE(config, settings), FCMAE(replace(config, backend="masked", recompute="none"), settings)
    timing.randomize(ours)
    plain.load_state_dict(ours.state_dict())
    ours, plain = ours.to(options.device), plain.to(options.device)
    image, visible, n = timing.inputs(options.batch, options.size, settings.mask_ratio, options.device)
    models = {"packed": (ours, lambda: ours(image, visible))}
    for name in options.chosen:
        model = plain
        if name == "minkowski":
            model = FCMAE(replace(config, backend="minkowski"), settings).to(options.device)
            model.load_state_dict(ours.state_dict())
        models[name] = model, partial(torch.compile(model) if name == "compiled" else model, image, visible)
    return (
        models,
        (plain, partial(plain, image, visible)),
        count(config, n, visible[0].numel(), (settings.decoder_dim, settings.decoder_depth)),
    )


def finetuning(options: StepOptions) -> tuple[Models, tuple[nn.Module, timing.Run], tuple[float, float]]:
    """The same for a classifier, with timm's model as its peer."""
    arch = Encoder(options.model)
    ours = ConvNeXt(arch, CLASSES, recompute=options.recompute)
    timing.randomize(ours)
    head, encoder = split_by_prefix(ours.state_dict(), "head.")
    preprocessing = Preprocessing((options.size, options.size), 3)
    state, _ = to_form(Weights(ours.arch, preprocessing, encoder, head=head), "timm")
    ours = ours.to(options.device)
    image = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    label = torch.randint(CLASSES, (options.batch,), device=options.device)

    def loss(model: Callable[[Tensor], Tensor], x: Tensor = image) -> timing.Run:
        return lambda: nn.functional.cross_entropy(model(x).float(), label)

    models = {"ours": (ours, loss(ours))}
    for name in options.chosen:
        form = torch.contiguous_format if name == "timm" else torch.channels_last
        theirs = timm.create_model(options.model, num_classes=CLASSES)
        theirs.load_state_dict(state)
        theirs = theirs.to(options.device, memory_format=form)
        run = torch.compile(theirs) if name == "timm-compiled" else theirs
        models[name] = theirs, loss(run, image.contiguous(memory_format=form))
    return models, models["ours"], count(arch, (options.size // PATCH) ** 2)


def optimizer_step(model: nn.Module, loss: timing.Run) -> Callable[[], None]:
    """A training step: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-8, fused=True)

    def step() -> None:
        timing.backward(model, loss)
        optimizer.step()

    return step


def main() -> None:
    """Entry point."""
    options = parse()
    device, precision = options.device, options.precision
    timing.prepare(device, options.threads)
    models, plain, work = pretraining(options) if options.stage == "pretrain" else finetuning(options)
    autocast = timing.autocast(device, precision)
    models = {name: (model, loss if name == "minkowski" else autocast(loss)) for name, (model, loss) in models.items()}
    error = timing.check_models(models, plain, precision)
    runs = {
        "forward": {name: loss for name, (_, loss) in models.items()},
        "forward+backward": {name: partial(timing.backward, *pair) for name, pair in models.items()},
        "step": {name: optimizer_step(*pair) for name, pair in models.items()},
    }
    memory = timing.peak_memory(runs["step"], device)
    if options.gradients:
        runs = {"forward+backward": runs["forward+backward"]}
    timed = {part: timing.measure(run, options.rounds, device) for part, run in runs.items()}
    dtype = timing.DTYPES[precision]
    peak = peaks(device, dtype)
    floor = 1e3 * options.batch * floor_seconds(work, peak, dtype)
    roofline = {name: round(floor / ms, 3) for name, ms in timed["forward+backward"]["milliseconds"].items()}
    keys = ("stage", "model", "batch", "size", "precision", "recompute")
    result = {"bench": "step"} | {key: getattr(options, key) for key in keys} | timing.machine(device)
    result |= {"relative_error": error, "parts": timed, "roofline_share": roofline} | memory
    result["peak"] = {"gflops": round(peak[0] / 1e9), "gb_per_second": round(peak[1] / 1e9), "product": peak[2]}

    def row(head: str, cells: Iterable[object], form: str = "16.1f") -> str:
        return f"{head:16}{''.join(format(cell, form) for cell in cells)}"

    (last, step), first = list(timed.items())[-1], next(iter(models))
    about = f"{options.stage}, {options.model}, {precision}, batch {options.batch}, {options.size} px"
    about += f", {result['threads']} threads" if device == "cpu" else ""
    lines = [f"{about}, {result['device']}", row("ms", models, ">16")]
    lines += [row(part, values["milliseconds"].values()) for part, values in timed.items()]
    lines.append(row("images/s", (1e3 * options.batch / ms for ms in step["milliseconds"].values())))
    lines.append(row("of the roofline", roofline.values(), "16.0%"))
    lines.append(
        "the roofline has {gflops} GFLOP/s (product by {product}), {gb_per_second} GB/s".format(**result["peak"])
    )
    lines += [f"{last} of {first} is {x:.2f}x as fast as that of {name}" for name, x in step["speedup"].items()]
    report(result, lines, options)


if __name__ == "__main__":
    run_main(main)
