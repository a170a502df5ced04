"""Fine-tuning: the loss of a batch, the moving average, and the scores after an epoch."""

import json
from dataclasses import asdict

import numpy as np
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from configs.errors import UserError
from configs.files import write_whole
from configs.schema import Encoder, Finetune
from data.loader import Loader
from data.sampler import STEPS
from data.transforms import normalize
from finetune.evaluate import Score, evaluate
from launch.engine import precision, seed_everything, whole_weights
from launch.loop import Training
from models.weights import Weights, cpu_state, divide, save


def check_pairs(config: Finetune, ranks: int) -> None:
    """Raise `UserError` for mixup or cutmix with an odd micro batch."""
    micro, _ = config.optim.accumulation(ranks)
    if micro % 2 and (config.augment.mixup or config.augment.cutmix):
        raise UserError(f"augment.mixup and cutmix pair images: optim.micro_batch {micro} must be even")


def moving_average(model: nn.Module, decay: float) -> ModelEmaV3 | None:
    """The moving average of a model's weights; None for decay 0. To be made before DeepSpeed gets hold of the model."""
    return ModelEmaV3(model, decay) if decay else None


class Classifier:
    """The stage that `launch.loop` trains (its `Stage`): batch augmentation, criterion, moving average, best score.

    Args:
        ema: moving average of the weights, if asked for
        val_loader: this rank's part of the evaluation split
        arch: resolved architecture
        classes: class names
        statistics: mean and standard deviation of each channel
    """

    def __init__(
        self, config: Finetune, training: Training, ema: ModelEmaV3 | None, val_loader: Loader, arch: Encoder,
        classes: list[str], statistics: tuple,
    ):  # fmt: skip
        self.config, self.training, self.val_loader = config, training, val_loader
        self.arch, self.classes = arch, classes
        self.engine, self.world = training.engine, training.world
        self.mean, self.std = (torch.tensor(values, device=self.world.device) for values in statistics)
        self.autocast = precision(config.optim, self.world.device) == "bf16"
        augment = config.augment
        self.erase = RandomErasing(augment.erase, mode="pixel", device=self.world.device) if augment.erase else None
        self.mixup = None
        self.criterion = LabelSmoothingCrossEntropy(augment.smoothing)
        if augment.mixup or augment.cutmix:
            self.mixup = Mixup(
                augment.mixup, augment.cutmix, label_smoothing=augment.smoothing, num_classes=len(classes)
            )
            self.criterion = SoftTargetCrossEntropy()
        self.ema = ema
        training.faults.watch(val_loader.samples.split)
        self.best = {"top1": -1.0}

    def loss(self, batch: dict[str, Tensor], step: int, micro: int) -> Tensor:
        """Loss of one micro batch, after erasing and mixing.

        Drop path, erasing and mixing draw from generators seeded by (seed, step, rank, micro batch), so that a resumed
        run repeats the uninterrupted one.
        """
        key = np.random.SeedSequence([self.config.run.seed, STEPS, step, self.world.rank, micro])
        seed_everything(int(key.generate_state(1)[0]))
        label = batch["label"].to(self.world.device, non_blocking=True)
        image = normalize(batch["image"].to(self.world.device, non_blocking=True), self.mean, self.std)
        if self.erase is not None:
            image = self.erase(image)
        if self.mixup is not None:
            image, label = self.mixup(image, label)
        return self.criterion(self.engine(image).float(), label)

    def after_step(self) -> None:
        """Move the average."""
        if self.ema:
            self.ema.update(self.engine.module)

    def end_epoch(self, epoch: int, step: int) -> float:
        """Evaluate raw and averaged weights; write last.pt, summary.json and, if it is the best so far, best.pt.

        Returns the better top-1 accuracy.
        """
        split, log = self.config.eval_split, self.training.log
        scores = self.evaluate()
        winner = max(scores, key=lambda kind: scores[kind].top1)
        better = scores[winner].top1 > self.best["top1"]
        if better:
            self.best = {"epoch": epoch, "weights": winner, **asdict(scores[winner])}
        for kind, score in scores.items():
            log.scores(step, f"{split}_{kind}", asdict(score))
        names = {"raw": "", "ema": "moving average "}
        shown = "; ".join(
            f"{names[kind]}top-1 {score.top1:.2%}, top-5 {score.top5:.2%}" for kind, score in scores.items()
        )
        log.say(f"epoch {epoch}: {split} {shown}{'  (best)' if better else ''}")
        files = {"last.pt": self.weights("raw")} | ({"best.pt": self.weights(winner)} if better else {})
        if self.ema:
            files["last.pt"].ema = cpu_state(self.ema.module)
        if self.world.first:
            for name, weights in files.items():
                save(self.training.folder / name, weights)
            summary = {"epoch": epoch, "epochs": self.config.optim.epochs, "init": self.config.init, "best": self.best}
            summary["last"] = {kind: asdict(score) for kind, score in scores.items()}
            write_whole(self.training.folder / "summary.json", json.dumps(summary, indent=1).encode())
        return scores[winner].top1

    def evaluate(self) -> dict[str, Score]:
        """Scores of the raw weights and, if there are any, of the averaged ones."""
        models = {"raw": self.engine.module} | ({"ema": self.ema.module} if self.ema else {})
        return evaluate(models, self._watched(), self.world, self.mean, self.std, self.autocast)

    def _watched(self):
        """The evaluation's batches; damaged images are named and left out of the scores."""
        for batch in self.val_loader:
            self.training.watchdog.at("evaluation")
            self.training.faults.see(self.val_loader, batch)
            yield batch

    def weights(self, kind: str) -> Weights:
        """The `raw` or `ema` weights as a file's content; every rank calls this."""
        with whole_weights(self.engine):
            state = cpu_state(self.ema.module if kind == "ema" else self.engine.module)
        head, encoder = divide(state, "head.")
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
