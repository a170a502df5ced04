"""The training loop of both stages, and the interface of a stage."""

import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from configs.compare import to_dict
from configs.errors import INTERRUPTED, SAVED, Stopped, UserError
from configs.keys import defaults, free_keys
from configs.log import say
from configs.schema import Finetune, Pretrain
from data.loader import Loader
from data.shards import Split
from launch.training.checkpoints import Checkpoints
from launch.training.engine import Engine
from launch.training.faults import Faults
from launch.training.runlog import Mean, RunLog
from launch.training.summary import write_summary
from launch.training.watchdog import REQUESTS, Progress, Watchdog
from launch.training.world import Agreement, World, check_ranks_match, gather, process_errors


@dataclass(frozen=True)
class Report:
    """Results of an evaluation, which the trainer logs."""

    score: float | None = None  # selects the best checkpoint, higher is better
    scores: dict[str, dict[str, float]] = field(default_factory=dict)  # for log.jsonl and the trackers
    pictures: dict[str, Tensor] = field(default_factory=dict)  # uint8 [3, H, W] by title, for the trackers
    lines: list[str] = field(default_factory=list)  # for the console
    summary: dict | None = None  # content of summary.json; None = not written


class Stage(Protocol):
    """What pretraining and fine-tuning add to the loop. All ranks call all methods."""

    def describe(self) -> list[str]:
        """Lines for the console, printed first."""

    def start(self, step: int, progress: Progress) -> Report:
        """Evaluate before the first step of this process; `step` steps are done."""

    def loss(self, batch: dict[str, Tensor], step: int, micro: int) -> Tensor:
        """Loss [] of a micro batch; `step` counts from 0, `micro` within the step."""

    def after_update(self) -> None:
        """Called after each update of the weights; nothing unless defined."""

    def monitor(self) -> Report:
        """What the last step showed, every `run.log_every` steps and at the end of an epoch; nothing unless defined."""
        return Report()

    def end_epoch(self, epoch: int, last: bool, progress: Progress) -> Report:
        """Evaluate after an epoch, before its checkpoint; epochs count from 1, `last` = no step follows."""

    def should_stop(self) -> bool:
        """Whether to end early. Changes only at the end of an epoch, on all ranks alike."""

    def state(self) -> dict:
        """Content of a checkpoint besides the engine's: plain values and tensors."""

    def load_state(self, state: dict) -> None:
        """Restore it."""


class Trainer:
    """Trains a stage. Nothing happens before `run`.

    Args:
        engine: around the stage's model
        loader: micro batches of this rank
        identity: what must be equal on resume: configuration and digests of data and initial weights
        evaluated: more splits whose damaged images are reported and limited (data.max_damaged)
        about: facts about the run for its log, by name; see `launch.training.facts`
    """

    def __init__(
        self, config: Pretrain | Finetune, engine: Engine, loader: Loader, stage: Stage, world: World, identity: dict,
        evaluated: Sequence[Split] = (), about: dict | None = None,
    ):  # fmt: skip
        self.config, self.engine, self.loader, self.stage, self.world = config, engine, loader, stage, world
        self.identity, self.splits, self.about = identity, (loader.samples.split, *evaluated), about or {}
        self.folder = Path(config.run.folder) / config.run.name
        self.steps_per_epoch = loader.batches.steps_per_epoch
        self.steps = config.optim.epochs * self.steps_per_epoch
        if config.run.max_steps:
            self.steps = min(self.steps, config.run.max_steps)

    def run(self) -> float:
        """Resume, train to the last step, close. Returns the duration in seconds, without interruptions.

        Raises:
            Stopped: asked to stop; the state is saved
            UserError: too many faults, or the ranks differ
        """
        self._resume()
        try:
            with self.watchdog, process_errors(), closing(self.loader.iterate(self.step)) as batches:
                for line in (*self.stage.describe(), *self.log.where()):
                    self.log.say(line)
                self._train(batches)
                self.checkpoints.wait()
        except BaseException:
            with suppress(OSError):  # of a full disk, which may be the first error
                self.log.close(finished=False)
            raise
        self.log.close()
        return self.log.seconds()

    def _resume(self) -> None:
        config, world = self.config, self.world
        check_ranks_match(world, self.folder, self.identity)
        rules = config.run.keep, free_keys(config), defaults(config)
        self.checkpoints = Checkpoints(self.folder, self.engine, self.identity, world, *rules)
        self.step, state = self.checkpoints.resume(config.resume)
        self._check_length()
        known, per_step = to_dict(config), config.optim.batch_size
        trackers, unit = config.run.trackers, config.data.unit
        self.log = RunLog(self.folder, known, self.steps, self.step, per_step, world.first, trackers, unit)
        if self.step < self.steps:
            self.log.record(self.step, "start", {"steps_per_epoch": self.steps_per_epoch, **self.about})
        self.faults = Faults(config.optim.max_skipped, config.data.max_damaged, self.splits, self.log)
        self.losses = Mean(world.device)
        self.watchdog = Watchdog(world, self.folder, 60 * config.run.hang_minutes)
        self.agreement = Agreement(world, 3)
        if state:
            self.faults.load_state(state["faults"])
            self.losses.load_state(state["losses"], world.rank)
            self.stage.load_state(state["stage"])

    def _check_length(self) -> None:
        """Print which schedule follows if `optim.epochs` has changed.

        Raises `UserError` if more epochs are done, or for a run of one step whose learning rate is 0.
        """
        optim, before = self.config.optim, self.checkpoints.epochs
        if self.steps == 1 and not optim.lr_at(0, self.steps_per_epoch) and self.config.run.max_steps is None:
            way_out = "train for more epochs, or set optim.warmup_epochs to 0"
            raise UserError(f"the run has one step, and its learning rate is 0, the first of the warm-up: {way_out}")
        if before in (None, optim.epochs):
            return
        done = -(-self.step // self.steps_per_epoch)
        if optim.epochs < done:
            way_out = f"give at least {done}, or start another --run.name"
            raise UserError(f"optim.epochs is {optim.epochs}, but {self.folder} has trained {done}: {way_out}")
        lr = optim.lr_at(self.step, self.steps_per_epoch)
        say(
            f"optim.epochs {before} -> {optim.epochs}: from step {self.step:,} on, the learning rate is that of a run "
            f"of {optim.epochs} epochs, now {lr:.2e}"
        )

    def _train(self, batches: Iterator[dict[str, Tensor]]) -> None:
        """The loop. A resumed run repeats the uninterrupted one because of its order:

        The learning rate depends on the steps done, so it is set first. An epoch is evaluated after its last update
        and before its checkpoint, which stores the score. The agreement comes after the evaluation, which may be long,
        and before the save, so that all ranks save after the same step: it returns the requests of one step ago
        without blocking. A stop follows the save.
        """
        config, stage = self.config, self.stage
        self.engine.train()
        self._log(stage.start(self.step, self._progress))
        self.log.restart_clock(self.step)
        saved = time.monotonic()
        while self.step < self.steps and not stage.should_stop():
            lr = config.optim.lr_at(self.step, self.steps_per_epoch)
            self.engine.set_lr(lr)
            self._update(batches)
            self.step += 1
            epoch, last = (self.step - 1) // self.steps_per_epoch + 1, self.step == self.steps
            epoch_ends = last or self.step % self.steps_per_epoch == 0
            if self.step % config.run.log_every == 0 or epoch_ends:
                name = f"epoch {epoch}/{config.optim.epochs}"
                self.log.train(self.step, name, self.losses, lr, self.engine.grad_norm)
                self._log(stage.monitor())
            report = stage.end_epoch(epoch, last, self._progress) if epoch_ends else Report()
            self._log(report)
            overdue = self.world.first and 0 < config.run.save_minutes < (time.monotonic() - saved) / 60
            stop, overdue, damaged = self.agreement(self.watchdog.requested, overdue, bool(self.faults.unreported))
            if damaged:
                self._report_damaged()
            last = last or stage.should_stop()
            if stop or overdue or last or (epoch_ends and epoch % config.run.save_every == 0):
                self._save(report.score)
                saved = time.monotonic()
            if stop and not last:
                self._stop(stop)
            if epoch_ends:
                self.log.restart_clock(self.step)
            self.checkpoints.check()
        self._report_damaged()
        self.faults.check_applied(self.step)

    def _update(self, batches: Iterator[dict[str, Tensor]]) -> None:
        """One optimizer step; all ranks skip it if a loss or gradient of any rank is not finite."""
        begin, step = self.watchdog.begin, f"step {self.step + 1}"
        _, accumulation = self.config.optim.accumulation(self.world.ranks)
        parts, applied = [], True
        for micro in range(accumulation):
            begin(f"{step}, waiting for data")
            batch = next(batches)
            self.faults.note_damaged(self.loader, batch)
            begin(f"{step}, forward")
            loss = self.stage.loss(batch, self.step, micro)
            begin(f"{step}, backward")
            applied = self.engine.step(loss)
            self.losses.add(loss)
            parts.append((loss.detach(), batch["sample"]))
        if applied:
            self.faults.applied()
            self.stage.after_update()
        else:
            self.faults.skip(self.step + 1, parts, self.engine.loss_scale)

    def _progress(self, steps: Iterable, count: int, what: str) -> Iterator:
        """The steps of an evaluation, reported to the watchdog; damaged images are noted."""
        for i, step in enumerate(steps, 1):
            self.watchdog.begin(f"{what}, {i} of {count}")
            if isinstance(steps, Loader):
                self.faults.note_damaged(steps, step)
            yield step

    def _log(self, report: Report) -> None:
        for name, picture in report.pictures.items():
            self.log.picture(self.step, name, picture)
        for name, values in report.scores.items():
            self.log.scores(self.step, name, values)
        for line in report.lines:
            self.log.say(line)
        if report.summary is not None and self.world.first:
            write_summary(self.folder, self.config, self.world, self.log.seconds(), report.summary)

    def _report_damaged(self) -> None:
        """Log damaged images; too many end the run, with a checkpoint: they were replaced, so its state is valid."""
        try:
            self.faults.report_damaged(self.step)
        except Exception:
            self._save(None)
            self.checkpoints.wait()
            raise

    def _save(self, score: float | None) -> None:
        self.watchdog.begin("saving a checkpoint", patient=True)
        state = {"stage": self.stage.state(), "faults": self.faults.state(), "losses": gather(self.losses.state())}
        stall = self.checkpoints.save(self.step, state, score)
        self.log.record(self.step, "checkpoint", {"stall_s": round(stall, 3)})
        self.watchdog.begin("training")

    def _stop(self, request: int) -> None:
        self.checkpoints.wait()
        number = REQUESTS[request - 1]
        name, code = ("Ctrl-C", INTERRUPTED) if number == signal.SIGINT else (number.name, SAVED)
        where = f"{self.checkpoints.folder} after step {self.step} of {self.steps}"
        raise Stopped(f"{name}; saved in {where}: run the same command to resume", code)
