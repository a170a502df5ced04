"""The fine-tuning stage: the loss of a task, the moving average of the weights (EMA), and scores after an epoch."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from timm.data.random_erasing import RandomErasing
from timm.utils import ModelEmaV3, random_seed
from torch import Tensor, nn

from configs.errors import UserError, counted, few
from configs.preprocessing import Preprocessing
from configs.schema import Encoder, Finetune
from data.loader import Loader, ReadTarget, Transform
from data.sampler import STEPS
from data.transforms import normalize
from finetune.inference import Collector, predict
from launch.training.engine import Engine
from launch.training.trainer import Report, Stage
from launch.training.watchdog import Progress
from launch.training.world import World
from models.opening import Opened
from models.weights import Weights, cpu_state, save, split_by_prefix

LOWER_IS_BETTER = ("loss", "mae", "rmse")  # names of scores
LABELS = {"raw": "", "ema": "moving average "}  # of the two kinds of weights in the console


class Task(Collector, Protocol):
    """A supervised task: one module in finetune/tasks."""

    metric: str  # name of the score that selects the best weights; higher is better unless it is `LOWER_IS_BETTER`
    read_target: ReadTarget | None  # of the samples; None = the target is the label
    classes: list[str] | None  # names for the weight file, if the task has classes
    unseen: list[str]  # classes that no evaluated image has. Optional
    head_config: dict  # plain values for the weight file, from which `make_inference` builds the head

    def describe(self) -> str:
        """Part of the run's first line."""

    def check_batch(self, micro: int) -> None:
        """Raise `UserError` for a micro batch size that the task cannot use."""

    def train_transform(self, mean: tuple[float, ...]) -> Transform:
        """Crop and augmentation of image and target; `mean` [C] of the channels."""

    def eval_transform(self) -> Transform:
        """Transform for evaluation."""

    def sample_weights(self) -> np.ndarray | None:
        """Weights [N] of the training samples for `EpochOrder`; None = uniform."""

    def build(self, arch: Encoder) -> nn.Module:
        """The model with initial weights: a `ConvNeXt` whose `head` maps tokens [B, H, W, C] to the output.

        A subclass may give its head the tokens of all stages (`forward_stages`).
        """

    def load(self, model: nn.Module, init: Opened | None) -> None:
        """Load the weights of --init; None = from scratch. Raises `UserError` if they are of another model."""

    def inputs(self, image: Tensor) -> tuple[Tensor, ...]:
        """Arguments of the model's forward pass in training, for images [B, C, H, W]: to estimate its memory."""

    def loss(self, model: Any, image: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Loss [] of normalised images [B, C, H, W] on the device; `model` wraps the one of `build`."""

    def restore(self, state: dict) -> Any:
        """Predictions from a checkpoint: the inverse of `vars(predictions)`."""

    def format(self, scores: dict[str, float]) -> str:
        """Scores as one line for the console and report.html."""

    def fitted(self, predictions: Any) -> dict:
        """Values chosen on the evaluation split, such as thresholds, for the weight file. Optional."""

    def draw(self, folder: Path, predictions: Any) -> None:
        """Write pictures (*.png) of the best weights' predictions; report.html shows them."""


class Finetuning(Stage):
    """Trains a task.

    `val_loader` has this rank's share of the evaluation split, `arch` is resolved, `intro` is the first line of the
    console, `statistics` are mean and standard deviation per channel.
    """

    def __init__(
        self, config: Finetune, task: Task, engine: Engine, world: World, ema: ModelEmaV3 | None, val_loader: Loader,
        arch: Encoder, intro: str, statistics: tuple,
    ):  # fmt: skip
        self.config, self.task, self.engine, self.world, self.ema = config, task, engine, world, ema
        self.val_loader, self.arch, self.intro = val_loader, arch, intro
        self.folder, self.statistics = Path(config.run.folder) / config.run.name, statistics
        self.mean, self.std = (torch.tensor(values, device=world.device) for values in statistics)
        share, mode, areas = config.augment.erase, config.augment.erase_mode, config.augment.erase_count
        self.erase = RandomErasing(share, mode=mode, max_count=areas, device=world.device) if share else None
        self.evaluated = 0  # epoch of the last evaluation
        self.best: dict = {"epoch": 0}  # none yet
        self.best_predictions: Any = None
        self.moved = False  # whether a step has changed the weights
        self.split = f"fold_{config.data.fold}" if config.data.folds else config.eval_split
        self.unseen = getattr(task, "unseen", [])

    def describe(self) -> list[str]:
        return [self.intro, *([f"warning: {self.unseen_classes()}"] if self.unseen else [])]

    def unseen_classes(self) -> str:
        """A line on the classes that no score covers, because no evaluated image has them."""
        count = counted(len(self.unseen), "class has", "classes have")
        return f"{count} no image in {self.split}, so no score covers {few(self.unseen)}"

    def start(self, step: int, progress: Progress) -> Report:
        """No evaluation before the first step."""
        return Report()

    def loss(self, batch: dict[str, Tensor], step: int, micro: int) -> Tensor:
        """The task's loss after random erasing.

        Generators are seeded with (seed, step, rank, micro batch), so a resumed run equals an uninterrupted one.
        """
        key = np.random.SeedSequence([self.config.run.seed, STEPS, step, self.world.rank, micro])
        random_seed(int(key.generate_state(1)[0]))
        image = normalize(batch["image"].to(self.world.device, non_blocking=True), self.mean, self.std)
        return self.task.loss(self.engine, self.erase(image) if self.erase else image, batch)

    def after_update(self) -> None:
        rates = [group["lr"] for group in self.engine.optimizer.param_groups]
        self.moved |= any(rates) or self.config.run.max_steps is not None  # a trial may be one step of warm-up, lr 0
        if self.ema:
            self.ema.update(self.engine.model)

    def end_epoch(self, epoch: int, last: bool, progress: Progress) -> Report:
        """Evaluate raw weights and EMA every `run.eval_every` epochs and after the last.

        Writes last.pt and, for the best score so far of weights that a step has changed, best.pt.
        """
        if epoch % self.config.run.eval_every and not last:
            return Report()
        metric, split, self.evaluated = self.task.metric, self.split, epoch
        sign = -1 if metric in LOWER_IS_BETTER else 1
        models = {"raw": self.engine.model} | ({"ema": self.ema.module} if self.ema else {})
        batches = progress(self.val_loader, len(self.val_loader.batches), "evaluation")
        with self.engine.whole_weights():
            predictions = predict(self.task, models, batches, self.world, self.mean, self.std, self.engine.precision)
        scores = {kind: part.scores() for kind, part in predictions.items()}
        signed = {kind: sign * values[metric] for kind, values in scores.items()}
        signed = {kind: -math.inf if math.isnan(score) else score for kind, score in signed.items()}  # diverged
        winner = max(signed, key=signed.get)
        best = self.best.get(metric, math.nan)  # of no epoch yet, or of weights that diverged
        improved = self.moved and (math.isnan(best) or signed[winner] > sign * best)
        if improved:
            self.best_predictions = predictions[winner]
            self.best = {"epoch": epoch, "weights": winner, **scores[winner]}
        with self.engine.whole_weights():
            if self.world.first:
                ema = cpu_state(self.ema.module) if self.ema else None
                save(self.folder / "last.pt", replace(self.weights("raw", predictions["raw"]), ema=ema))
                if improved:
                    save(self.folder / "best.pt", self.weights(winner, predictions[winner]))
        shown = "; ".join(f"{LABELS[kind]}{self.task.format(values)}" for kind, values in scores.items())
        lines = [f"epoch {epoch}: {split} {shown}{'  (best)' if improved else ''}"]
        if self.should_stop() and not last:
            lines.append(f"no improvement of {metric} since epoch {self.best['epoch']}: stopping early (run.patience)")
        summary = {"stage": "fine-tuning", "epoch": epoch, "epochs": self.config.optim.epochs, "init": self.config.init}
        logged = {f"{split}_{kind}": values for kind, values in scores.items()}
        if not self.moved:
            return Report(None, logged, lines=[f"{lines[0]}: of the initial weights, no step has changed them"])
        shown = f"{self.task.format(self.best)}{f'; {self.unseen_classes()}' if self.unseen else ''}"
        summary |= {"best": self.best, "last": scores, "shown": shown, "unseen_classes": self.unseen}
        score = signed[winner] if math.isfinite(signed[winner]) else None
        return Report(score, logged, lines=lines, summary=summary)

    def check_best(self) -> None:
        """Raise `UserError` if no evaluated weights differ from the initial ones."""
        if not self.best["epoch"]:
            raise UserError(
                "no evaluated weights differ from those at the start, so there is no best.pt: steps were skipped, or "
                "their learning rate was 0 (optim.warmup_epochs): train for more epochs, and see log.jsonl"
            )

    def should_stop(self) -> bool:
        """Whether the score has not improved for `run.patience` epochs."""
        return 0 < self.config.run.patience <= self.evaluated - self.best["epoch"]

    def weights(self, kind: str, predictions: Any) -> Weights:
        """The `raw` or `ema` weights, which made the predictions, as a weight file's content."""
        model, config = self.ema.module if kind == "ema" else self.engine.model, self.config
        head, encoder = split_by_prefix(cpu_state(model), "head.")
        size, crop, interpolation = config.data.height_width, config.augment.eval_crop, config.data.eval_interpolation
        preprocessing = Preprocessing(size, self.arch.channels, *self.statistics, crop, interpolation)
        fitted = self.task.fitted(predictions) if hasattr(self.task, "fitted") else {}
        about = {"classes": self.task.classes, "task": config.task.name}
        about["task_config"] = self.task.head_config | fitted
        return Weights(self.arch, preprocessing, encoder, head=head, **about)

    def state(self) -> dict:
        ema = self.ema.module.state_dict() if self.ema else None
        best = vars(self.best_predictions) if self.best_predictions else None
        return {
            "best": self.best,
            "best_predictions": best,
            "evaluated": self.evaluated,
            "ema": ema,
            "moved": self.moved,
        }

    def load_state(self, state: dict) -> None:
        self.best, self.evaluated, best = state["best"], state["evaluated"], state["best_predictions"]
        self.best_predictions = self.task.restore(best) if best else None
        self.moved = state.get("moved", True)  # checkpoints of earlier versions lack it
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
