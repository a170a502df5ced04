"""The pretraining stage: an objective's loss on batches of images; pictures and evaluations after an epoch."""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from configs.schema import Pretrain
from data.loader import Transform
from data.transforms import normalize
from launch.training.engine import Engine
from launch.training.runlog import read_log
from launch.training.trainer import Report
from launch.training.watchdog import Watch
from launch.training.world import World
from models.opening import Opened
from models.weights import Tensors
from pretrain.online_eval import OnlineEval
from pretrain.pictures import feature_distance, write_png

PICTURES = 8  # images in a picture


class Objective(Protocol):
    """What is learnt from images without labels: one module in pretrain/objectives.

    It is made twice from the configuration: before torch is imported, when it refuses settings that do not fit, and
    once the statistics of --init are known.
    """

    def describe(self) -> str:
        """Part of the run's first line."""

    def transform(self) -> Transform:
        """Makes a sample of a decoded image: `image`, and whatever else the objective needs of a batch."""

    def build(self) -> nn.Module:
        """The model with initial weights: `encoder` is its ConvNeXt, its forward maps `inputs` to the loss []."""

    def load(self, model: nn.Module, init: Opened) -> None:
        """Start from the weights of --init, which another objective may have written."""

    def inputs(self, image: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """What the model's forward takes, from normalised images [B, C, H, W] on the device and the batch."""

    def example(self, count: int) -> dict[str, Tensor]:
        """What `transform` adds to a batch of `count` images, to measure memory with."""

    def picture(self, model: nn.Module, inputs: tuple[Tensor, ...], mean: Tensor, std: Tensor) -> tuple[str, Tensor]:
        """Title and picture uint8 [3, H, W], on the CPU, of a few images; the model is in evaluation mode."""

    def decoder(self, model: nn.Module) -> tuple[Tensors, dict]:
        """Tensors besides the encoder's for the weight file, and plain values to build them with; may be empty."""


class Pretraining:
    """The stage that the trainer runs for an objective (`launch.training.trainer.Stage`).

    Args:
        engine: around the objective's model
        intro: first line of the console
        statistics: mean and standard deviation of each channel
        online: kNN and linear evaluation during the run; None = none
    """

    def __init__(
        self, config: Pretrain, objective: Objective, engine: Engine, world: World, intro: str, statistics: tuple,
        online: OnlineEval | None,
    ):  # fmt: skip
        self.config, self.objective, self.engine, self.world = config, objective, engine, world
        self.intro, self.online = intro, online
        self.mean, self.std = (torch.tensor(values, device=world.device) for values in statistics)

    def describe(self) -> list[str]:
        """The run, and the evaluation along the way."""
        return [self.intro, *([self.online.describe()] if self.online else [])]

    def start(self, step: int, watch: Watch) -> Report:
        """Evaluate the initial weights: what training adds is the difference from them."""
        return self.online.evaluate(self.engine, 0, watch) if self.online and step == 0 else Report()

    def loss(self, batch: dict[str, Tensor], step: int, micro: int) -> Tensor:
        """The objective's loss."""
        image = normalize(batch["image"].to(self.world.device, non_blocking=True), self.mean, self.std)
        inputs = self.objective.inputs(image, batch)
        self.last = tuple(tensor[:PICTURES] for tensor in inputs)
        return self.engine(*inputs)

    def after_update(self) -> None:
        """No-op: pretraining keeps no average of the weights."""

    def end_epoch(self, epoch: int, last: bool, watch: Watch) -> Report:
        """A picture every `run.picture_every` epochs, an evaluation every `probe.every`; both after the last."""
        report = Report()
        if last or epoch % self.config.run.picture_every == 0:
            title, picture, distance = self.draw()
            report.pictures[title] = picture
            report.scores["feature_distance"] = distance
        if self.online and (last or epoch % self.config.probe.every == 0):
            found = self.online.evaluate(self.engine, epoch, watch)
            report.scores.update(found.scores)
            report.lines.extend(found.lines)
        return report

    @torch.no_grad()
    def draw(self) -> tuple[str, Tensor, dict[str, float]]:
        """Title and picture of the last batch, also written to reconstruction.png, and its feature distances.

        Every rank computes them, because with ZeRO 3 each has a part of the weights; the first one writes.
        """
        model = self.engine.model
        with self.engine.whole_weights(), self.engine.autocast():
            model.eval()
            title, picture = self.objective.picture(model, self.last, self.mean, self.std)
            distance = feature_distance(model.encoder, self.last[0])
            model.train()
        if self.world.first:
            write_png(Path(self.config.run.folder) / self.config.run.name / "reconstruction.png", picture)
        return title, picture, distance

    def should_stop(self) -> bool:
        """Pretraining runs to its last step."""
        return False

    def state(self) -> dict:
        """Nothing besides the engine's: everything random is a function of seed, epoch and sample."""
        return {}

    def load_state(self, state: dict) -> None:
        """Nothing to restore."""


def summarize(log: Path, config: Pretrain, steps_per_epoch: int) -> dict:
    """Results of a finished run from its log.jsonl, as plain values by epoch (0 = before the first).

    Losses and images/s are means over an epoch.
    """
    found: dict = {"stage": "pretraining", "steps": 0, "epochs": config.optim.epochs}
    found |= {"loss": {}, "images_per_s": {}, "knn": {}, "linear": {}, "feature_distance": {}}
    lines = list(read_log(log))
    total = max((line["step"] for line in lines), default=0)
    before, parts = 0, []
    for line in lines:
        epoch = -(-line["step"] // steps_per_epoch)
        for name in ("knn", "linear", "feature_distance"):
            if name in line:
                found[name][epoch] = line[name]
        if "loss" in line:
            parts.append((line["step"] - before, line["loss"], line["images_per_s"]))
            before = line["step"]
            if before % steps_per_epoch == 0 or before == total:
                weights, losses, rates = zip(*parts, strict=True)
                found["loss"][epoch] = float(np.average(losses, weights=weights))
                found["images_per_s"][epoch] = float(np.average(rates, weights=weights))
                parts = []
    return found | {"steps": total}
