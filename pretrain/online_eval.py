"""kNN and linear evaluation of the encoder during pretraining."""

from dataclasses import replace

import torch

from configs.errors import UserError
from configs.feature_eval import KS, LRS, TEMPERATURE
from configs.schema import Pretrain
from data.folder import Folder
from data.shards import Split
from data.transforms import EvalTransform
from launch.training.engine import Engine
from launch.training.feature_eval import best_of, check_labels, count, features, knn, linear, probe_loader
from launch.training.images import Images
from launch.training.trainer import Report
from launch.training.watchdog import Progress
from launch.training.world import World


def probe_splits(config: Pretrain, images: Images) -> list[Split | Folder] | None:
    """Training and evaluation split of the probe; None if `probe.every` is 0.

    Raises:
        UserError: a split is missing, unlabelled or too small; names the keys to set
    """
    probe = config.probe
    if not probe.every:
        return None
    data = replace(config.data, path=probe.path or config.data.path)
    try:
        splits = images.open(data, [probe.train_split, probe.eval_split], "probe-collection.npz")
        for split in splits:
            check_labels(split)
        bank = min(probe.images, len(splits[0]))
        if bank < KS[0]:
            counts = f"{bank} images (probe.images {probe.images}), fewer than {KS[0]} neighbours"
            raise UserError(f"{data.path}, split {probe.train_split} has {counts}")
    except UserError as error:
        keys = "probe.path, probe.train_split and probe.eval_split"
        raise UserError(f"probe.every is {probe.every}, but {error}; set {keys}, or probe.every 0") from None
    return splits


class OnlineEval:
    """kNN and linear accuracy of the encoder's features; `statistics` are mean and standard deviation per channel.

    Raises:
        UserError: the first image of a split cannot be read
    """

    def __init__(self, config: Pretrain, splits: list[Split | Folder], statistics: tuple, world: World):
        self.probe, self.world, self.splits, self.seed = config.probe, world, splits, config.run.seed
        self.mean, self.std = (torch.tensor(values, device=world.device) for values in statistics)
        data, channels, images = config.data, config.model.channels, self.probe.images
        transform = EvalTransform(data.height_width, self.probe.crop, data.eval_interpolation)
        micro, _ = config.optim.accumulation(world.ranks)
        self.loaders = [probe_loader(split, images, transform, channels, data, micro, world) for split in splits]
        for loader in self.loaders:
            loader.samples[0, 0, 0]  # fail now rather than after an epoch

    def describe(self) -> str:
        """One line: what is evaluated, and when."""
        bank, queries = (f"{min(len(split), self.probe.images):,} of {split.name}" for split in self.splits)
        images = f"{queries} among {bank}, {self.splits[0].folder} (temperature {TEMPERATURE:g})"
        when = f"before the first step, every {self.probe.every} epochs and after the last"
        return f"kNN evaluation {when}: images {images}"

    def evaluate(self, engine: Engine, epoch: int, progress: Progress) -> Report:
        """kNN accuracy for each k and accuracy of the linear classifier. The model's mode is unchanged."""
        classes, world, encoder = len(self.splits[0].classes), self.world, engine.model.encoder
        settings = world, self.mean, self.std, engine.precision, progress
        with engine.whole_weights(), torch.random.fork_rng(devices=[]):  # DataLoader draws a random seed
            bank, queries = (features(encoder, loader, *settings) for loader in self.loaders)
        accuracy = knn(bank, queries, classes, KS, TEMPERATURE, world, progress)
        scores = {"knn": {f"{top}_k{k}": share for k, tops in accuracy.items() for top, share in tops.items()}}
        shown = ", ".join(f"{tops['top1']:.2%} (k {k})" for k, tops in accuracy.items())
        images = f"{count(queries):,} images by {count(bank):,}"
        lines = [f"epoch {epoch}: {self.probe.eval_split} kNN top-1 {shown}; {images}"]
        if self.probe.linear_epochs:
            best = best_of(linear(bank, queries, classes, LRS, self.probe.linear_epochs, self.seed, progress))
            scores["linear"] = {"top1": best.top1, "top5": best.top5, "lr": best.lr}
            lines.append(f"epoch {epoch}: {self.probe.eval_split} linear top-1 {best.top1:.2%} (lr {best.lr:g})")
        return Report(scores=scores, lines=lines)
