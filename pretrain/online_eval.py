"""The probe along the way: how well the encoder's features, as they are, tell labelled images apart."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from configs.errors import UserError
from configs.feature_eval import KS, LRS, TEMPERATURE
from configs.schema import Pretrain
from data.loader import open_split
from data.shards import Split
from data.transforms import EvalTransform
from launch.training.engine import precision, whole_weights
from launch.training.feature_eval import (
    Features,
    best_of,
    check_labels,
    count,
    features,
    knn,
    linear,
    probe_loader,
)
from launch.training.trainer import Training


def probe_splits(config: Pretrain) -> tuple[Split, Split] | None:
    """The split of the neighbours and the one that is classified; None without a probe.

    Raises:
        UserError: a split is missing, without labels or too small; names the keys
    """
    probe = config.probe
    if not probe.every:
        return None
    data = replace(config.data, path=probe.path or config.data.path)
    try:
        splits = open_split(data, probe.train_split), open_split(data, probe.eval_split)
        for split in splits:
            check_labels(split)
        images = min(probe.images, len(splits[0]))
        if images < KS[0]:
            raise UserError(
                f"{images} images of {data.path}, split {probe.train_split} (probe.images {probe.images}) are fewer "
                f"than {KS[0]} neighbours"
            )
    except UserError as error:
        keys = "probe.path, probe.train_split and probe.eval_split"
        raise UserError(f"probe.every is {probe.every}, but {error}; set {keys}, or probe.every 0") from None
    return splits


class Probing:
    """kNN and linear accuracy of the encoder as it is, for log.jsonl, TensorBoard and the console.

    Args:
        splits: the neighbours', and the one that is classified
        statistics: mean [C] and standard deviation [C] of the channels, on the device
    """

    def __init__(self, config: Pretrain, training: Training, splits: tuple[Split, Split], statistics: tuple):
        self.probe, self.training, self.statistics = config.probe, training, statistics
        self.seed = config.run.seed
        self.classes = len(splits[0].classes)
        data, world = config.data, training.world
        self.precision = precision(config.optim, world.device)
        transform = EvalTransform(data.height_width, self.probe.crop, data.eval_interpolation)
        micro, _ = config.optim.accumulation(world.ranks)
        self.loaders = [
            probe_loader(split, self.probe.images, transform, config.model.channels, data, micro, world)
            for split in splits
        ]
        for loader in self.loaders:
            loader.samples[0, 0, 0]  # images that cannot be read are to be told now, not after an epoch
        bank, queries = (f"{min(len(split), self.probe.images):,} of {split.name}" for split in splits)
        training.log.say(
            f"probe: before the first step, after every {self.probe.every} epochs and the last, kNN (temperature "
            f"{TEMPERATURE:g}) of images {queries} among {bank}, {splits[0].folder}"
        )

    def score(self, epoch: int, step: int) -> None:
        """Record accuracies for each number of neighbours. Every rank calls this; the model's mode stays as it is."""
        training, world = self.training, self.training.world
        with whole_weights(training.engine), torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed
            encoder = training.engine.module.encoder
            bank, queries = (
                features(encoder, loader, world, *self.statistics, self.precision, self._watched)
                for loader in self.loaders
            )
        found = knn(bank, queries, self.classes, KS, TEMPERATURE, world, self._watched)
        scores = {f"{top}_k{k}": score for k, held in found.items() for top, score in held.items()}
        training.log.scores(step, "knn", scores)
        shown = ", ".join(f"{held['top1']:.2%} (k {k})" for k, held in found.items())
        images = f"{count(queries):,} images by {count(bank):,}"
        training.log.say(f"epoch {epoch}: {self.probe.eval_split} kNN top-1 {shown}; {images}")
        if self.probe.linear_epochs:
            self._score_linear(bank, queries, epoch, step)

    def _score_linear(self, bank: Features, queries: Features, epoch: int, step: int) -> None:
        epochs = self.probe.linear_epochs
        best = best_of(linear(bank, queries, self.classes, LRS, epochs, self.seed, self._watched))
        self.training.log.scores(step, "linear", {"top1": best.top1, "top5": best.top5, "lr": best.lr})
        self.training.log.say(f"epoch {epoch}: {self.probe.eval_split} linear top-1 {best.top1:.2%} (lr {best.lr:g})")

    def _watched(self, steps: Iterable, number: int, what: str) -> Iterator:
        """The steps; the watchdog learns of each."""
        for i, step in enumerate(steps, 1):
            self.training.watchdog.at(f"probe, {what}, {i} of {number}")
            yield step
