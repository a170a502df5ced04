"""Evaluation during pretraining without labels: RankMe, alpha-ReQ and the loss of held-out images."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from configs.errors import UserError
from configs.schema import Pretrain
from data.folder import Folder
from data.loader import eval_loader
from data.shards import Split
from data.transforms import EvalTransform, normalize
from launch.training.engine import Engine
from launch.training.feature_eval import features
from launch.training.images import Images
from launch.training.plateau import verdict
from launch.training.spectrum import alpha_req, rankme, spectra
from launch.training.trainer import Report
from launch.training.watchdog import Progress
from launch.training.world import World, sum_over_ranks

if TYPE_CHECKING:  # pretraining.py imports this module
    from pretrain.pretraining import Objective

BATCH = 32  # images at a time, or the micro batch if that is smaller


def unlabelled_split(config: Pretrain, images: Images, training: Split | Folder) -> Split | Folder | None:
    """The images of the evaluation: probe.eval_split, or the training split if there is no such; None if not asked for.

    Raises `UserError` if they cannot be opened.
    """
    probe = config.probe
    if not probe.unlabelled_every:
        return None
    data = replace(config.data, path=probe.path or config.data.path)
    if probe.path is None and probe.eval_split not in images.split_names(data):
        return training
    try:
        (split,) = images.open(data, [probe.eval_split], "probe-collection.npz")
    except UserError as error:
        way_out = "set probe.path and probe.eval_split, or probe.unlabelled_every 0"
        raise UserError(f"probe.unlabelled_every is {probe.unlabelled_every}, but {error}; {way_out}") from None
    return split


class UnlabelledEval:
    """RankMe and alpha-ReQ of the encoder's features, and the objective's loss, on fixed images.

    The loss is of fixed crops and masks, in evaluation mode, in the same batches on any number of ranks, so epochs
    compare; objectives that compare images have none. `history` has the values by epoch.

    Raises:
        UserError: the first image of the split cannot be read
    """

    def __init__(
        self, config: Pretrain, objective: "Objective", split: Split | Folder, statistics: tuple, world: World
    ):
        self.probe, self.objective, self.split, self.world = config.probe, objective, split, world
        self.mean, self.std = (torch.tensor(values, device=world.device) for values in statistics)
        self.training = split.name == config.data.split and config.probe.path is None
        self.images = min(len(split), self.probe.unlabelled_images)
        self.history: dict[int, dict[str, float]] = {}
        data, micro = config.data, config.optim.accumulation(world.ranks)[0]
        crop = EvalTransform(data.height_width, self.probe.crop, data.eval_interpolation)
        batch, samples = min(BATCH, micro), np.arange(self.images) * len(split) // self.images
        place = world.rank, world.ranks, world.device.type == "cuda", arranged(samples, batch, world.ranks)
        self.feature_loader, self.loss_loader = (
            eval_loader(split, transform, config.model.channels, data, batch, *place)
            for transform in (crop, objective.transform())
        )
        self.loss_loader.samples[0, 0, 0]  # fail now rather than after an epoch

    def describe(self) -> str:
        """One line: what is evaluated, and when."""
        when = f"before the first step, every {self.probe.unlabelled_every} epochs and after the last"
        note = ", which are trained on: there is no other split" if self.training else ""
        return f"evaluation without labels {when}: {self.images:,} images of {self.split.name}{note}"

    def evaluate(self, engine: Engine, epoch: int, progress: Progress) -> Report:
        """`loss`, `rankme` and `alpha`, those that are finite, and what they show. The model's mode is unchanged."""
        settings = self.world, self.mean, self.std, engine.precision, progress
        devices = [self.world.device] if self.world.device.type == "cuda" else []
        with engine.whole_weights(), torch.random.fork_rng(devices):
            torch.manual_seed(0)  # an objective may draw in its forward pass
            loss = self.loss(engine, progress) if self.objective.per_image else math.nan
            singular, variances = spectra(features(engine.model.encoder, self.feature_loader, *settings).x)
        values = {"loss": loss, "rankme": rankme(singular), "alpha": alpha_req(variances)}
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        self.history[epoch] = values
        names = {"loss": "loss", "rankme": "RankMe", "alpha": "alpha"}
        shown = ", ".join(f"{names[name]} {value:.4g}" for name, value in values.items())
        where = f"{self.images:,} images of {self.split.name}"
        line = f"epoch {epoch}: {shown or 'no finite value'} of {where} without labels: {verdict(self.history)}"
        return Report(scores={"unlabelled": values}, lines=[line])

    @torch.no_grad()
    def loss(self, engine: Engine, progress: Progress) -> float:
        """Mean loss of all ranks' images. Padding and damaged images do not count."""
        model, total = engine.model, torch.zeros(2, dtype=torch.float64, device=self.world.device)
        model.eval()
        loader = self.loss_loader
        for batch in progress(loader, len(loader.batches), f"loss of {self.split.name}"):
            real = (batch["sample"] >= 0) & ~batch["damaged"]
            image = normalize(batch["image"].to(self.world.device, non_blocking=True), self.mean, self.std)
            inputs = self.objective.inputs(image, batch)
            count = int(real.sum())
            if count:
                inputs = tuple(tensor[real.to(tensor.device)] for tensor in inputs)
            with engine.autocast():
                # also of padding alone, as all ranks must call it; ZeRO 3's hook of a call would release the stem
                loss = model.forward(*inputs)
            if count:
                total += torch.stack([loss.double() * count, torch.full_like(loss, count, dtype=torch.float64)])
        model.train()
        loss, count = sum_over_ranks(total).tolist()
        return loss / count if count else math.nan


def arranged(samples: Sequence[int], batch: int, ranks: int) -> np.ndarray:
    """Samples in the order in which `EvalBatches` makes the same batches on any number of ranks; padded with -1."""
    padded = np.full(-(-len(samples) // (batch * ranks)) * batch * ranks, -1)
    padded[: len(samples)] = samples
    return padded.reshape(-1, ranks, batch).transpose(0, 2, 1).reshape(-1)
