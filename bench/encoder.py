"""Time the encoder, forward and backward, on visible patches: the packed backend against others, in one process.

python bench/encoder.py --model convnextv2_tiny --batch 8
python bench/encoder.py --model convnextv2_atto --batch 8 --peers masked minkowski compiled --json
python bench/encoder.py --model convnextv2_tiny --sweep --picture docs/scaling.svg    over mask ratios, sizes, batches

Peers: masked = dense convolutions and a mask; compiled = the same under torch.compile; minkowski = MinkowskiEngine's
sparse convolutions. Outputs and all parameter gradients are first compared with the masked backend in fp32; a wrong
result is not timed.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from bench.options import ModelOptions, report
from configs.command import parse_options
from configs.errors import UserError, run_main
from configs.keys import BelowOne, option
from configs.schema import Encoder

SWEEP = {
    "mask_ratio": (0.0, 0.3, 0.5, 0.6, 0.75, 0.9),
    "size": (96, 160, 224, 320, 384, 512),
    "batch": (1, 2, 4, 8, 16),
}
AXES = {"mask_ratio": "mask ratio", "size": "image side, pixels (same pixels per batch)", "batch": "batch, images"}


@dataclass(frozen=True)
class EncoderOptions(ModelOptions):
    """The command line."""

    mask_ratio: BelowOne = option(0.6, "share of hidden patches")
    peers: tuple[Literal["masked", "compiled", "minkowski"], ...] = option(("masked",), "what to compare with")
    sweep: bool = option(False, "time several mask ratios, sizes and batches")
    picture: Path | None = option(None, "draw the sweep, as SVG")

    def __post_init__(self):
        if self.picture and not self.sweep:
            raise UserError("--picture draws a sweep: add --sweep")


parse = partial(parse_options, EncoderOptions, __doc__)
if __name__ == "__main__":
    run_main(parse)  # answers --help and mistakes before the imports below, which take seconds

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from bench import timing
from models.convnext import ConvNeXt
from models.sparse.layouts import layout_of


def peers(encoder: ConvNeXt, image: Tensor, visible: Tensor, n: int, names: Sequence[str]) -> dict[str, timing.Run]:
    """Ways to compute the mean square of the visible outputs, by name: packed, then those in `names`."""

    def mean_square(backend: str) -> Tensor:
        out = encoder.forward_features(image, layout_of(backend, visible, n))
        return (out[visible] if backend == "masked" else out).float().square().mean()

    def way(name: str) -> timing.Run:
        return partial(torch.compile(mean_square), "masked") if name == "compiled" else partial(mean_square, name)

    return {name: way(name) for name in ("packed", *names)}


def compare(options: EncoderOptions, encoder: ConvNeXt, batch: int, size: int, mask_ratio: float) -> dict:
    """Check, then time, one setting."""
    image, visible, n = timing.inputs(batch, size, mask_ratio, options.device)
    autocast = timing.autocast(options.device, options.precision)
    plain = peers(encoder, image, visible, n, ["masked"])["masked"]
    runs = {name: autocast(run) for name, run in peers(encoder, image, visible, n, options.peers).items()}
    models = {name: (encoder, run) for name, run in runs.items()}
    error = timing.check_models(models, (encoder, plain), options.precision)
    steps = {name: partial(timing.backward, encoder, run) for name, run in runs.items()}
    setting = {"batch": batch, "size": size, "mask_ratio": mask_ratio, "visible": f"{n}/{visible[0].numel()}"}
    memory = timing.peak_memory(steps, options.device)
    return setting | {"relative_error": error} | timing.measure(steps, options.rounds, options.device) | memory


def settings(options: EncoderOptions) -> list[tuple[int, int, float]]:
    """(batch, size, mask ratio) of everything that is timed, a sweep in the order of `SWEEP`."""
    batch, size, ratio = options.batch, options.size, options.mask_ratio
    if not options.sweep:
        return [(batch, size, ratio)]
    ratios = [(batch, size, value) for value in SWEEP["mask_ratio"]]
    sizes = [(max(1, batch * size**2 // value**2), value, ratio) for value in SWEEP["size"]]
    return ratios + sizes + [(value, size, ratio) for value in SWEEP["batch"]]


def draw(result: dict, path: Path) -> None:
    """Draw images/s of a sweep against mask ratio, image size and batch."""
    figure, points = Figure(figsize=(12, 3.6), layout="constrained"), iter(result["sweep"])
    for axis, (key, values) in zip(figure.subplots(1, 3), SWEEP.items(), strict=True):
        part = [next(points) for _ in values]
        for name, colour in (("packed", "#d97706"), ("masked", "#64748b")):
            rate = [1e3 * point["batch"] / point["milliseconds"][name] for point in part]
            axis.plot([point[key] for point in part], rate, "o-", color=colour, label=name)
        axis.set(xlabel=AXES[key], ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel(f"{result['model']}\nimages/s, forward + backward")
    figure.axes[0].legend(frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": "performance", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Entry point."""
    options = parse()
    timing.prepare(options.device, options.threads)
    encoder = ConvNeXt(Encoder(options.model)).to(options.device)
    timing.randomize(encoder)
    about = {"bench": "encoder", "model": options.model, "precision": options.precision}
    result, lines = about | timing.machine(options.device), []
    results = [compare(options, encoder, *setting) for setting in settings(options)]
    for timed in results:
        setting = f"batch {timed['batch']}, {timed['size']} px, {timed['visible']} patches visible, {result['device']}"
        lines.append(f"{options.model}, {options.precision}, {setting}")
        lines.append(f"{'':10}{'ms':>10}{'images/s':>10}{'packed is':>14}")
        for name, value in timed["milliseconds"].items():
            factor = f"{timed['speedup'][name]:.2f}x faster" if name != "packed" else ""
            lines.append(f"{name:10}{value:10.1f}{1e3 * timed['batch'] / value:10.1f}{factor:>14}")
    result |= {"sweep": results} if options.sweep else results[0]
    report(result, lines, options)
    if options.picture:
        draw(result, options.picture)


if __name__ == "__main__":
    run_main(main)
