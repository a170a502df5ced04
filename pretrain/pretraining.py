"""The pretraining stage: the loss of an objective; pictures and evaluations after an epoch."""

from collections import defaultdict
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from configs.schema import Pretrain
from data.loader import Transform
from data.sheets import Sheet, draw_sheet, write_drawn
from data.transforms import normalize
from launch.training.engine import Engine
from launch.training.plateau import verdict
from launch.training.runlog import read_log
from launch.training.trainer import Report, Stage
from launch.training.watchdog import Progress
from launch.training.world import World
from models.opening import Opened
from models.weights import Tensors
from pretrain.online_eval import OnlineEval
from pretrain.pictures import feature_distance
from pretrain.unlabelled_eval import UnlabelledEval


class Objective(Protocol):
    """A self-supervised objective: one module in pretrain/objectives.

    Made before torch is imported, to refuse settings that do not fit, and again once --init's statistics are known.
    """

    per_image: bool  # the loss is a mean over images, which can be taken over held-out ones too
    pictured: int  # first images of a batch that `picture` gets
    file: str  # name of the weight file; fcmae.pt has FCMAE's decoder, whatever else was trained

    def describe(self) -> str:
        """Part of the run's first line."""

    def check_batch(self, micro: int) -> None:
        """Raise `UserError` for a micro batch that cannot be used."""

    def transform(self) -> Transform:
        """Transform of a decoded image to a sample: `image`, and what else the objective needs."""

    def build(self) -> nn.Module:
        """The model with initial weights; `encoder` is its ConvNeXt, and its forward maps `inputs` to the loss []."""

    def load(self, model: nn.Module, init: Opened) -> None:
        """Load the weights of --init, perhaps of another objective. Raises `UserError` for another model."""

    def inputs(self, image: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Arguments of the model's forward, from normalised images [B, C, H, W] on the device and the batch."""

    def beside(self) -> int:
        """Bytes of frozen models that `inputs` uses, which are not part of `build`'s. They are loaded by `build`."""

    def identity(self) -> dict[str, str]:
        """Digests of what else must be equal when a run is resumed."""

    def example(self, count: int) -> dict[str, Tensor]:
        """Everything but `image` of a batch of `count` images, for the memory estimate of --dry-run."""

    def monitor(self, model: nn.Module) -> Report:
        """Scores and warnings of the last step, every `run.log_every` steps. All ranks call this."""

    def picture(self, model: nn.Module, inputs: tuple[Tensor, ...], mean: Tensor, std: Tensor) -> tuple[str, Sheet]:
        """(title, pictures in groups) of a few inputs; the model is in evaluation mode."""

    def decoder(self, model: nn.Module) -> tuple[Tensors, dict]:
        """(tensors besides the encoder's, plain settings to rebuild them) for the weight file; may be empty."""


class Pretraining(Stage):
    """Trains an objective.

    `intro` is the first line of the console, `statistics` are mean and standard deviation per channel.
    """

    def __init__(
        self, config: Pretrain, objective: Objective, engine: Engine, world: World, intro: str, statistics: tuple,
        online: OnlineEval | None, unlabelled: UnlabelledEval | None = None,
    ):  # fmt: skip
        self.config, self.objective, self.engine, self.world = config, objective, engine, world
        self.intro, self.online, self.unlabelled = intro, online, unlabelled
        self.mean, self.std = (torch.tensor(values, device=world.device) for values in statistics)

    def describe(self) -> list[str]:
        return [self.intro, *(part.describe() for part in (self.online, self.unlabelled) if part)]

    def start(self, step: int, progress: Progress) -> Report:
        """Evaluate the initial weights, as a baseline."""
        return self.evaluate(0, True, progress) if step == 0 else Report()

    def evaluate(self, epoch: int, always: bool, progress: Progress) -> Report:
        """The evaluations that are due after an epoch, or all of them."""
        report, probe = Report(), self.config.probe
        for part, every in ((self.online, probe.every), (self.unlabelled, probe.unlabelled_every)):
            if part and (always or epoch % every == 0):
                found = part.evaluate(self.engine, epoch, progress)
                report.scores.update(found.scores)
                report.lines.extend(found.lines)
        return report

    def loss(self, batch: dict[str, Tensor], step: int, micro: int) -> Tensor:
        image = normalize(batch["image"].to(self.world.device, non_blocking=True), self.mean, self.std)
        inputs = self.objective.inputs(image, batch)
        self.last = tuple(tensor[: self.objective.pictured] for tensor in inputs)
        return self.engine(*inputs)

    def monitor(self) -> Report:
        return self.objective.monitor(self.engine.model)

    def end_epoch(self, epoch: int, last: bool, progress: Progress) -> Report:
        """Draw every `run.picture_every` epochs, evaluate as `probe` says; both after the last."""
        report = self.evaluate(epoch, last, progress)
        if last or epoch % self.config.run.picture_every == 0:
            self.draw(report)
        return report

    @torch.no_grad()
    def draw(self, report: Report) -> None:
        """Add picture and feature distances of the last batch to a report; write reconstruction.png.

        All ranks compute them, because ZeRO 3 shards the weights; the first one writes.
        """
        model = self.engine.model
        with self.engine.whole_weights(), self.engine.autocast():
            model.eval()
            title, sheet = self.objective.picture(model, self.last, self.mean, self.std)
            picture, text = draw_sheet(sheet)
            report.pictures[title] = F.pil_to_tensor(picture)
            report.scores["feature_distance"] = feature_distance(model.encoder, self.last[0])
            model.train()
        if self.world.first:
            folder = Path(self.config.run.folder) / self.config.run.name
            write_drawn(folder / "reconstruction.png", picture, text)

    def should_stop(self) -> bool:
        return False

    def state(self) -> dict:
        """Evaluations so far, for their verdict; everything random is a function of seed, epoch and sample."""
        return {"unlabelled": self.unlabelled.history} if self.unlabelled else {}

    def load_state(self, state: dict) -> None:
        if self.unlabelled:
            self.unlabelled.history = state.get("unlabelled", {})


def summarize(log: Path, config: Pretrain, steps_per_epoch: int) -> dict:
    """Results of a finished run by epoch (0 = initial weights), from log.jsonl; loss and speed are means."""
    rate = f"{config.data.unit}s_per_s"
    results: dict = {"loss": {}, rate: {}, "knn": {}, "linear": {}, "feature_distance": {}, "unlabelled": {}}
    step, parts = 0, defaultdict(list)  # by epoch: steps of each logged mean, and the means
    for line in read_log(log):
        epoch = -(-line["step"] // steps_per_epoch)
        for name in ("knn", "linear", "feature_distance", "unlabelled"):
            if name in line:
                results[name][epoch] = line[name]
        if "loss" in line:
            speed = line.get(rate, line.get("images_per_s"))  # older logs count crops as images
            parts[epoch].append((line["step"] - step, line["loss"], speed))
            step = line["step"]
    for epoch, means in parts.items():
        weights, losses, rates = zip(*means, strict=True)
        results["loss"][epoch] = float(np.average(losses, weights=weights))
        results[rate][epoch] = float(np.average(rates, weights=weights))
    if results["unlabelled"]:
        results["verdict"] = verdict(results["unlabelled"])
    return {"stage": "pretraining", "steps": step, "epochs": config.optim.epochs} | results
