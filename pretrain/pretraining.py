"""Pretraining: the loss of a batch; pictures and probes after an epoch; what came of the run."""

import numpy as np
import torch
from torch import Tensor

from configs.schema import Pretrain
from data.shards import Split
from data.transforms import normalize
from launch.training.engine import whole_weights
from launch.training.runlog import read_log
from launch.training.trainer import Training
from pretrain.online_eval import Probing
from pretrain.pictures import feature_distance, reconstruction_grid, write_png

PICTURES = 8  # images in a reconstruction grid


class Pretraining:
    """The stage that `launch.training.trainer` trains (its `Stage`).

    Args:
        statistics: mean and standard deviation of each channel
        splits: of the probe: the neighbours', and the one that is classified; None = no probe
    """

    def __init__(
        self, config: Pretrain, training: Training, statistics: tuple, splits: tuple[Split, Split] | None = None
    ):
        self.config, self.training = config, training
        self.mean, self.std = (torch.tensor(values, device=training.world.device) for values in statistics)
        self.probing = Probing(config, training, splits, (self.mean, self.std)) if splits else None

    def begin(self, step: int) -> None:
        """Probe the weights that the run starts from: what training adds is told by the difference."""
        if self.probing and step == 0:
            self.probing.score(0, 0)

    def loss(self, batch: dict[str, Tensor], step: int, micro: int) -> Tensor:
        """Mean squared error of the hidden patches."""
        device = self.training.world.device
        image = normalize(batch["image"].to(device, non_blocking=True), self.mean, self.std)
        visible = batch["visible"].to(device, non_blocking=True)
        self.last = image[:PICTURES], visible[:PICTURES]
        return self.training.engine(image, visible)

    def after_step(self) -> None:
        """Nothing goes with the weights."""

    def end_epoch(self, epoch: int, last: bool, step: int) -> None:
        """A picture every `run.picture_every` epochs, a probe every `probe.every`; both after the last."""
        if last or epoch % self.config.run.picture_every == 0:
            with whole_weights(self.training.engine):
                self.show(step)
        if self.probing and (last or epoch % self.config.probe.every == 0):
            self.probing.score(epoch, step)

    def summary(self) -> dict:
        """What came of the run, as plain values: by epoch the mean loss, and what was measured then; 0 = at first."""
        steps = self.training.steps_per_epoch
        found = {"stage": "pretraining", "steps": self.training.step, "epochs": self.config.optim.epochs}
        found |= {"loss": {}, "images_per_s": {}, "knn": {}, "linear": {}, "feature_distance": {}}
        before, parts = 0, []
        for line in read_log(self.training.folder / "log.jsonl"):
            epoch = -(-line["step"] // steps)
            for name in ("knn", "linear", "feature_distance"):
                if name in line:
                    found[name][epoch] = line[name]
            if "loss" in line:
                parts.append((line["step"] - before, line["loss"], line["images_per_s"]))
                before = line["step"]
                if before % steps == 0 or before == self.training.step:
                    steps_each, losses, rates = zip(*parts, strict=True)
                    found["loss"][epoch] = float(np.average(losses, weights=steps_each))
                    found["images_per_s"][epoch] = float(np.average(rates, weights=steps_each))
                    parts = []
        return found

    def enough(self) -> bool:
        """Pretraining goes on to its last step."""
        return False

    @torch.no_grad()
    def show(self, step: int) -> None:
        """Reconstructions and the feature-collapse measure, into TensorBoard and reconstruction.png.

        Every rank computes them, because with ZeRO 3 each holds a part of the weights; the first one writes.
        """
        model, log = self.training.engine.module, self.training.log
        image, visible = self.last
        model.eval()
        picture = reconstruction_grid(model, image, visible, self.mean, self.std)
        if self.training.world.first:
            write_png(self.training.folder / "reconstruction.png", picture)
        log.picture(step, "input, visible patches, reconstruction", picture)
        log.scores(step, "feature_distance", feature_distance(model.encoder, image))
        model.train()

    def state(self) -> dict:
        """Nothing besides the engine: what is random is a function of seed, epoch and sample."""
        return {}

    def load_state(self, state: dict) -> None:
        """Nothing to load."""
