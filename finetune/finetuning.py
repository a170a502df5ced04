"""Fine-tuning: the loss of a batch, the moving average, and the scores after an epoch."""

from dataclasses import asdict

import numpy as np
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from configs.errors import UserError
from configs.preprocessing import Preprocessing
from configs.schema import Encoder, Finetune
from data.loader import Loader
from data.sampler import STEPS
from data.transforms import normalize
from finetune.pictures import calibration_picture, confusion_picture
from finetune.scores import Predictions, Score, predict
from launch.training.engine import precision, seed_everything, whole_weights
from launch.training.summary import write_summary
from launch.training.trainer import Training
from models.weights import Weights, cpu_state, save, split_by_prefix


def check_pairs(config: Finetune, ranks: int) -> None:
    """Raise `UserError` for mixup or cutmix with an odd micro batch."""
    micro, _ = config.optim.accumulation(ranks)
    if micro % 2 and (config.augment.mixup or config.augment.cutmix):
        raise UserError(f"augment.mixup and cutmix pair images: optim.micro_batch {micro} must be even")


def moving_average(model: nn.Module, decay: float) -> ModelEmaV3 | None:
    """The moving average of a model's weights; None for decay 0. To be made before DeepSpeed gets hold of the model."""
    return ModelEmaV3(model, decay) if decay else None


class Classifier:
    """The stage that the trainer runs: batch augmentation, criterion, moving average, best score.

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
        self.precision = precision(config.optim, self.world.device)
        augment = config.augment
        self.erase = None
        if augment.erase:
            how = {"mode": augment.erase_mode, "max_count": augment.erase_count}
            self.erase = RandomErasing(augment.erase, **how, device=self.world.device)
        self.mixup = None
        self.criterion = LabelSmoothingCrossEntropy(augment.smoothing)
        if augment.mixup or augment.cutmix:
            self.mixup = Mixup(
                augment.mixup, augment.cutmix, prob=augment.mix_prob, switch_prob=augment.mix_switch,
                mode=augment.mix_mode, label_smoothing=augment.smoothing, num_classes=len(classes),
            )  # fmt: skip
            self.criterion = SoftTargetCrossEntropy()
        self.ema = ema
        self.evaluated = 0  # epoch of the last evaluation
        self.found: Predictions | None = None  # of the best weights
        training.faults.watch(val_loader.samples.split)
        self.best = {"top1": -1.0, "epoch": 0}

    def begin(self, step: int) -> None:
        """Nothing to do before the first step."""

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

    def end_epoch(self, epoch: int, last: bool, step: int) -> float | None:
        """Every `run.eval_every` epochs and after the last, evaluate raw and averaged weights.

        Writes last.pt, summary.json and, if it is the best so far, best.pt. Returns the better top-1 accuracy.
        """
        if epoch % self.config.run.eval_every and not last:
            return None
        split, log, self.evaluated = self.config.eval_split, self.training.log, epoch
        found = self.evaluate()
        scores = {kind: predictions.score() for kind, predictions in found.items()}
        winner = max(scores, key=lambda kind: scores[kind].top1)
        better = scores[winner].top1 > self.best["top1"]
        if better:
            self.found = found[winner]
            self.best = {"epoch": epoch, "weights": winner, **asdict(scores[winner])}
        for kind, score in scores.items():
            log.scores(step, f"{split}_{kind}", asdict(score))
        names = {"raw": "", "ema": "moving average "}
        shown = "; ".join(
            f"{names[kind]}top-1 {score.top1:.2%}, top-5 {score.top5:.2%}" for kind, score in scores.items()
        )
        log.say(f"epoch {epoch}: {split} {shown}{'  (best)' if better else ''}")
        with whole_weights(self.engine):
            if self.world.first:
                self.write(epoch, scores)
                if better:
                    save(self.training.folder / "best.pt", self.weights(winner))
        if self.enough() and not last:
            log.say(f"no better top-1 than that of epoch {self.best['epoch']}: ending (run.patience)")
        return scores[winner].top1

    def enough(self) -> bool:
        """Whether accuracy has not risen for `run.patience` epochs."""
        return 0 < self.config.run.patience <= self.evaluated - self.best["epoch"]

    def write(self, epoch: int, scores: dict[str, Score]) -> None:
        """Write last.pt and summary.json."""
        folder, last = self.training.folder, self.weights("raw")
        if self.ema:
            last.ema = cpu_state(self.ema.module)
        save(folder / "last.pt", last)
        summary = {"stage": "fine-tuning", "epoch": epoch, "epochs": self.config.optim.epochs}
        summary |= {"init": self.config.init, "best": self.best}
        summary["last"] = {kind: asdict(score) for kind, score in scores.items()}
        write_summary(folder, self.config, self.world, self.training.log.seconds(), summary)

    def draw(self) -> None:
        """Write pictures of what the best weights predict. The first rank calls this, at the end."""
        folder = self.training.folder
        confusion_picture(folder / "confusion.png", self.found, self.classes)
        calibration_picture(folder / "calibration.png", self.found.calibration())

    def evaluate(self) -> dict[str, Predictions]:
        """Predictions of the raw weights and, if there are any, of the averaged ones."""
        models = {"raw": self.engine.module} | ({"ema": self.ema.module} if self.ema else {})
        return predict(models, self._watched(), self.world, self.mean, self.std, self.precision)

    def _watched(self):
        """The evaluation's batches; damaged images are named and left out of the scores."""
        for batch in self.val_loader:
            self.training.watchdog.at("evaluation")
            self.training.faults.see(self.val_loader, batch)
            yield batch

    def weights(self, kind: str) -> Weights:
        """The `raw` or `ema` weights as a file's content."""
        head, encoder = split_by_prefix(cpu_state(self.ema.module if kind == "ema" else self.engine.module), "head.")
        data = self.config.data
        mean, std = tuple(self.mean.tolist()), tuple(self.std.tolist())
        crop, interpolation = self.config.augment.eval_crop, data.eval_interpolation
        preprocessing = Preprocessing(data.height_width, self.arch.channels, mean, std, crop, interpolation)
        return Weights(self.arch, preprocessing, encoder, head=head, classes=self.classes)

    def state(self) -> dict:
        """What a checkpoint holds besides the engine."""
        ema = self.ema.module.state_dict() if self.ema else None
        found = vars(self.found) if self.found else None
        return {"best": self.best, "found": found, "evaluated": self.evaluated, "ema": ema}

    def load_state(self, state: dict) -> None:
        """Go on from a checkpoint."""
        self.best, self.evaluated = state["best"], state["evaluated"]
        self.found = Predictions(**state["found"]) if state["found"] else None
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
