"""Time a training step of segmentation or detection against the same head on timm's encoder (`features_only`).

python bench/dense_step.py segmentation --model convnextv2_tiny --batch 2 --size 512 --head upernet --width 512
python bench/dense_step.py detection --model convnextv2_atto --batch 4 --size 256 --precision bf16

Loss and all gradients are first compared with plain code in fp32; a wrong result is not timed.
"""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from pydantic import PositiveInt

from bench.options import ModelOptions, report
from configs.command import parse_options
from configs.errors import run_main
from configs.keys import argument, option
from configs.preprocessing import Preprocessing
from configs.schema import Encoder

CLASSES = 80  # as in COCO
OBJECTS = 5  # of an image
TOLERANCE = 5e-3  # in fp32: rounding flips some of the heads' millions of ReLUs, and moves proposals
ALL = 1 << 14  # proposals of an image, more than there are


@dataclass(frozen=True)
class DenseOptions(ModelOptions):
    """The command line."""

    task: Literal["segmentation", "detection"] = argument("segmentation, or detection with Faster R-CNN")
    head: Literal["fpn", "upernet"] = option("fpn", "decoder of segmentation")
    width: PositiveInt = option(128, "channels of the head")
    classes: PositiveInt = option(CLASSES, "classes")


parse = partial(parse_options, DenseOptions, __doc__)
if __name__ == "__main__":
    run_main(parse)  # answers --help and mistakes before the imports below, which take seconds

import timm
import torch
from torch import Tensor, nn

from bench import timing
from finetune.tasks.detection.model import Detector
from finetune.tasks.segmentation.model import HeadConfig, Loss, Segmenter
from models.convnext import ConvNeXt
from models.formats.write import to_form
from models.weights import Weights, split_by_prefix


class Timm(nn.Module):
    """timm's feature maps with a head and its loss; parameters have our names."""

    def __init__(self, ours: ConvNeXt, name: str, loss: Callable[..., Tensor]):
        super().__init__()
        encoder = split_by_prefix(ours.state_dict(), "head.")[1]
        state, _ = to_form(Weights(ours.arch, Preprocessing((224, 224), 3), encoder), "timm-features")
        self.encoder = timm.create_model(name, features_only=True)
        self.encoder.load_state_dict(state)
        self.head, self.loss = ours.head, loss

    def forward(self, image: Tensor, *targets: Tensor) -> Tensor:
        """The loss []."""
        return self.loss(image, [x.permute(0, 2, 3, 1) for x in self.encoder(image)], *targets)

    def named_parameters(self, *args: object, **kwargs: object) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by our names."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield re.sub(r"^encoder\.(stem|stages)_", r"\1.", name), parameter


def segmentation(options: DenseOptions, image: Tensor) -> tuple[ConvNeXt, Callable[..., Tensor], tuple[Tensor, ...]]:
    """Our model, the loss of tokens and targets, and targets."""
    config = HeadConfig(options.head, options.width, options.classes, False, "whole", False, None)
    ours = Segmenter(Encoder(options.model), config, criterion=Loss("ce"))
    ours.head.eval()  # no dropout: losses are compared
    target = torch.randint(options.classes, (len(image), *image.shape[2:]), device=image.device)
    return ours, lambda image, tokens, target: ours.loss(tokens, target), (target,)


def detection(options: DenseOptions, image: Tensor) -> tuple[ConvNeXt, Callable[..., Tensor], tuple[Tensor, ...]]:
    """Our model, the loss of tokens and targets, and targets."""
    head = {"classes": options.classes, "width": options.width, "hidden": 1024, "masks": False}
    ours = Detector(Encoder(options.model), head | {"samples": 512, "detections": 100})
    count = len(image) * OBJECTS
    start = torch.rand(count, 2) / 2
    boxes = torch.cat([start, start + 0.1 + torch.rand(count, 2) / 3], 1) * options.size
    labels = torch.randint(options.classes, (count,))
    targets = (boxes.to(image.device), labels.to(image.device))
    return ours, lambda image, tokens, *given: ours.head(image, *tokens, *given), (
        torch.full((len(image),), OBJECTS), *targets,
    )  # fmt: skip


@contextmanager
def every_proposal(model: Segmenter | Detector) -> Iterator[None]:
    """A detector's loss is of all proposals: one more or less would change the sample that it is of in training."""
    if isinstance(model, Segmenter):
        yield
        return
    sampler = model.head.roi.fg_bg_sampler
    size, sampler.batch_size_per_image = sampler.batch_size_per_image, ALL
    yield
    sampler.batch_size_per_image = size


def seeded(model: nn.Module, *inputs: Tensor) -> Tensor:
    """The loss [], with the same sample of proposals each time."""
    torch.manual_seed(1)
    return model(*inputs)


def main() -> None:
    """Entry point."""
    options = parse()
    device, precision, size = options.device, options.precision, options.size
    timing.prepare(device, options.threads)
    image = torch.randn(options.batch, 3, size, size, device=device)
    ours, loss, targets = {"segmentation": segmentation, "detection": detection}[options.task](options, image)
    timing.randomize(ours)
    ours = ours.to(device)
    theirs = Timm(ours, options.model, loss).to(device)
    plain = ours, partial(seeded, ours, image, *targets)
    autocast = timing.autocast(device, precision)
    models = {"ours": (ours, autocast(plain[1])), "timm": (theirs, autocast(partial(seeded, theirs, image, *targets)))}
    with every_proposal(ours):
        error = timing.check_models(models, plain, precision, TOLERANCE)
    runs = {name: partial(timing.backward, *pair) for name, pair in models.items()}
    timed = timing.measure(runs, options.rounds, device)
    keys = ("model", "head", "width", "classes", "batch", "size", "precision")
    result = {"bench": options.task} | {key: getattr(options, key) for key in keys} | timing.machine(device)
    result |= {"relative_error": error, "forward+backward": timed} | timing.peak_memory(runs, device)
    head = options.head if options.task == "segmentation" else "Faster R-CNN"
    about = f"{options.model}, {head} {options.width}, {precision}, batch {options.batch}, {size} px"
    lines = [f"{about}, {result['device']}"]
    lines += [f"{name:6} {ms:10.1f} ms forward + backward" for name, ms in timed["milliseconds"].items()]
    lines += [f"ours is {x:.2f}x as fast as {name}" for name, x in timed["speedup"].items()]
    report(result, lines, options)


if __name__ == "__main__":
    run_main(main)
