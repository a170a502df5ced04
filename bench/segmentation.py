"""Time a training step of segmentation against the same head on timm's encoder (`features_only`).

python bench/segmentation.py --model convnextv2_tiny --batch 2 --size 512 --head upernet --width 512
python bench/segmentation.py --model convnextv2_atto --batch 4 --size 256 --precision bf16

Loss and all gradients are first compared with plain code in fp32; a wrong result is not timed.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, not this folder

from pydantic import PositiveInt

from bench.options import ModelOptions, report
from configs.command import parse_options
from configs.errors import run_main
from configs.keys import option
from configs.preprocessing import Preprocessing
from configs.schema import Encoder

CLASSES = 150


@dataclass(frozen=True)
class SegmentationOptions(ModelOptions):
    """The command line."""

    head: Literal["fpn", "upernet"] = option("fpn", "decoder")
    width: PositiveInt = option(128, "channels of the head")
    classes: PositiveInt = option(CLASSES, "classes")


parse = partial(parse_options, SegmentationOptions, __doc__)
if __name__ == "__main__":
    run_main(parse)  # answers --help and mistakes before the imports below, which take seconds

import timm
import torch
from torch import Tensor, nn

from bench import timing
from finetune.tasks.segmentation.heads import resize
from finetune.tasks.segmentation.model import HeadConfig, Loss, Segmenter
from models.formats.write import to_form
from models.weights import Weights, split_by_prefix


class TimmSegmenter(nn.Module):
    """timm's feature maps with the head of `ours`; parameters have our names."""

    def __init__(self, ours: Segmenter, name: str):
        super().__init__()
        encoder = split_by_prefix(ours.state_dict(), "head.")[1]
        state, _ = to_form(Weights(ours.arch, Preprocessing((224, 224), 3), encoder), "timm")
        state = {re.sub(r"^(stem|stages)\.", r"\1_", key): x for key, x in state.items()}
        self.encoder = timm.create_model(name, features_only=True)
        self.encoder.load_state_dict(state)
        self.head, self.criterion = ours.head, ours.criterion

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        """The loss []."""
        logits = self.head([x.permute(0, 2, 3, 1) for x in self.encoder(image)])
        with torch.autocast(image.device.type, enabled=False):
            return self.criterion(resize(logits.float(), *target.shape[1:]), target)

    def named_parameters(self, *args: object, **kwargs: object) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by our names."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield re.sub(r"^encoder\.(stem|stages)_", r"\1.", name), parameter


def main() -> None:
    """Entry point."""
    options = parse()
    device, precision, size = options.device, options.precision, options.size
    timing.prepare(device, options.threads)
    config = HeadConfig(options.head, options.width, options.classes, False, "whole", False, None)
    ours = Segmenter(Encoder(options.model), config, criterion=Loss("ce"))
    timing.randomize(ours)
    ours = ours.to(device)
    ours.head.eval()  # no dropout: losses are compared
    theirs = TimmSegmenter(ours, options.model).to(device)
    image = torch.randn(options.batch, 3, size, size, device=device)
    target = torch.randint(options.classes, (options.batch, size, size), device=device)
    plain = ours, partial(ours, image, target)
    autocast = timing.autocast(device, precision)
    models = {"ours": (ours, autocast(plain[1])), "timm": (theirs, autocast(partial(theirs, image, target)))}
    error = timing.check_models(models, plain, precision)
    runs = {name: partial(timing.backward, *pair) for name, pair in models.items()}
    timed = timing.measure(runs, options.rounds, device)
    keys = ("model", "head", "width", "classes", "batch", "size", "precision")
    result = {"bench": "segmentation"} | {key: getattr(options, key) for key in keys} | timing.machine(device)
    result |= {"relative_error": error, "forward+backward": timed} | timing.peak_memory(runs, device)
    about = f"{options.model}, {options.head} {options.width}, {precision}, batch {options.batch}, {size} px"
    lines = [f"{about}, {result['device']}"]
    lines += [f"{name:6} {ms:10.1f} ms forward + backward" for name, ms in timed["milliseconds"].items()]
    lines += [f"ours is {x:.2f}x as fast as {name}" for name, x in timed["speedup"].items()]
    report(result, lines, options)


if __name__ == "__main__":
    run_main(main)
