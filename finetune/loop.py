"""The fine-tuning loop."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor

from configs.errors import UserError
from configs.files import write_whole
from configs.schema import Encoder, Finetune
from data.loader import Loader
from data.sampler import STEPS
from data.transforms import normalize
from finetune.evaluate import Score, evaluate
from launch import checkpoints
from launch.engine import World, precision, seed_everything, set_lr
from launch.runlog import Mean, RunLog
from models.weights import Weights, cpu_state, divide, save


class Classifier:
    """The model in training and what goes with it: augmentation of batches, criterion, moving average, best score.

    Args:
        engine: DeepSpeed engine around a ConvNeXt with a head
        ema: moving average of the weights, if asked for
        arch: resolved architecture
        classes: class names
        statistics: mean and standard deviation of each channel
    Raises:
        UserError: mixup with an odd micro batch
    """

    def __init__(
        self, config: Finetune, engine, ema: ModelEmaV3 | None, world: World, arch: Encoder, classes: list[str],
        statistics: tuple,
    ):  # fmt: skip
        self.config, self.engine, self.world, self.arch, self.classes = config, engine, world, arch, classes
        self.mean, self.std = (torch.tensor(values, device=world.device) for values in statistics)
        self.autocast = precision(config.optim, world.device) == "bf16"
        augment = config.augment
        self.erase = RandomErasing(augment.erase, mode="pixel", device=world.device) if augment.erase else None
        self.mixup = None
        self.criterion = LabelSmoothingCrossEntropy(augment.smoothing)
        if augment.mixup or augment.cutmix:
            micro, _ = config.optim.accumulation(world.ranks)
            if micro % 2:
                raise UserError(f"augment.mixup and cutmix pair images: optim.micro_batch {micro} must be even")
            self.mixup = Mixup(
                augment.mixup, augment.cutmix, label_smoothing=augment.smoothing, num_classes=len(classes)
            )
            self.criterion = SoftTargetCrossEntropy()
        self.ema = ema
        self.best = {"top1": -1.0}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Loss of one micro batch, after erasing and mixing."""
        label = batch["label"].to(self.world.device, non_blocking=True)
        image = normalize(batch["image"].to(self.world.device, non_blocking=True), self.mean, self.std)
        if self.erase is not None:
            image = self.erase(image)
        if self.mixup is not None:
            image, label = self.mixup(image, label)
        return self.criterion(self.engine(image).float(), label)

    def evaluate(self, loader: Loader) -> dict[str, Score]:
        """Scores of the raw weights and, if there are any, of the averaged ones."""
        models = {"raw": self.engine.module} | ({"ema": self.ema.module} if self.ema else {})
        return evaluate(models, loader, self.world, self.mean, self.std, self.autocast)

    def weights(self, kind: str) -> Weights:
        """The `raw` or `ema` weights as a file's content."""
        head, encoder = divide(cpu_state(self.ema.module if kind == "ema" else self.engine.module), "head.")
        data = self.config.data
        image = {
            "size": list(data.height_width), "mean": self.mean.tolist(), "std": self.std.tolist(),
            "eval_crop": self.config.augment.eval_crop,
        }  # fmt: skip
        return Weights(self.arch, image, encoder, head=head, classes=self.classes)

    def state(self) -> dict:
        """What a checkpoint holds besides the engine."""
        return {"best": self.best, "ema": self.ema.module.state_dict() if self.ema else None}

    def load_state(self, state: dict) -> None:
        """Go on from a checkpoint."""
        self.best = state["best"]
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])


def finetune(
    config: Finetune, classifier: Classifier, loader: Loader, val_loader: Loader, step: int, log: RunLog, identity: dict
) -> None:
    """Train from optimizer step `step` to the end; after each epoch evaluate, keep best and last, checkpoint.

    Args:
        loader: micro batches of this rank from `step` on
        val_loader: this rank's part of the evaluation split
        identity: resolved configuration and data digest, stored with each checkpoint
    """
    optim, engine, world = config.optim, classifier.engine, classifier.world
    run = Path(config.run.folder) / config.run.name
    steps_per_epoch = loader.batches.steps_per_epoch
    losses = Mean(world.device)
    batches = iter(loader)
    engine.train()
    while step < optim.epochs * steps_per_epoch:
        lr = optim.lr_at(step, steps_per_epoch)
        set_lr(engine, lr)
        for loss in micro_losses(classifier, batches, step):
            losses.add(loss)
        if classifier.ema:
            classifier.ema.update(engine.module)
        step += 1
        epoch, epoch_ends = (step - 1) // steps_per_epoch + 1, step % steps_per_epoch == 0
        if step % config.run.log_every == 0 or epoch_ends:
            log.train(step, f"epoch {epoch}/{optim.epochs}", losses, lr, engine.get_global_grad_norm())
        if epoch_ends:
            end_epoch(config, classifier, val_loader, run, epoch, step, log)
            if epoch % config.run.save_every == 0 or epoch == optim.epochs:
                checkpoints.save(engine, run, step, classifier.state(), identity, world, config.run.keep)
            log.restart_clock(step)


def micro_losses(classifier: Classifier, batches: Iterator, step: int) -> Iterator[Tensor]:
    """Do one optimizer step; yields the loss of each accumulated micro batch.

    Drop path, erasing and mixing draw from generators seeded by (seed, step, rank, micro batch), so that a resumed run
    repeats the uninterrupted one.
    """
    config, engine, world = classifier.config, classifier.engine, classifier.world
    _, accumulation = config.optim.accumulation(world.ranks)
    for micro in range(accumulation):
        batch = next(batches)
        key = np.random.SeedSequence([config.run.seed, STEPS, step, world.rank, micro])
        seed_everything(int(key.generate_state(1)[0]))
        loss = classifier.loss(batch)
        engine.backward(loss)
        engine.step()
        yield loss


def end_epoch(
    config: Finetune, classifier: Classifier, val_loader: Loader, run: Path, epoch: int, step: int, log: RunLog
) -> None:
    """Evaluate raw and averaged weights; write last.pt, summary.json and, if it is the best so far, best.pt."""
    scores = classifier.evaluate(val_loader)
    winner = max(scores, key=lambda kind: scores[kind].top1)
    better = scores[winner].top1 > classifier.best["top1"]
    if better:
        classifier.best = {"epoch": epoch, "weights": winner, **asdict(scores[winner])}
    for kind, score in scores.items():
        log.scores(step, f"{config.eval_split}_{kind}", asdict(score))
    names = {"raw": "", "ema": "moving average "}
    shown = "; ".join(f"{names[kind]}top-1 {score.top1:.2%}, top-5 {score.top5:.2%}" for kind, score in scores.items())
    log.say(f"epoch {epoch}: {config.eval_split} {shown}{'  (best)' if better else ''}")
    if not classifier.world.first:
        return
    last = classifier.weights("raw")
    if classifier.ema:
        last.ema = cpu_state(classifier.ema.module)
    save(run / "last.pt", last)
    if better:
        save(run / "best.pt", classifier.weights(winner))
    summary = {"epoch": epoch, "epochs": config.optim.epochs, "init": config.init, "best": classifier.best}
    summary["last"] = {kind: asdict(score) for kind, score in scores.items()}
    write_whole(run / "summary.json", json.dumps(summary, indent=1).encode())
