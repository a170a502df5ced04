"""The training loop of both stages: forward, backward, step; report, evaluate, save, stop."""

import signal
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Protocol

from torch import Tensor

from configs.compare import to_dict
from configs.errors import INTERRUPTED, SAVED, Stopped
from configs.keys import free_keys
from configs.schema import Finetune, Pretrain
from data.loader import Loader
from launch.training.checkpoints import Checkpoints
from launch.training.engine import backward, set_lr, was_applied
from launch.training.faults import Faults
from launch.training.runlog import Mean, RunLog
from launch.training.watchdog import REQUESTS, Watchdog
from launch.training.world import Agreement, World, check_alike, gather, peers


class Stage(Protocol):
    """What a stage adds to the loop."""

    def begin(self, step: int) -> None:
        """Before the first step of this process; `step` steps are done already."""

    def loss(self, batch: dict[str, Tensor], step: int, micro: int) -> Tensor:
        """Loss [] of a micro batch; `step` counts from 0, `micro` within the step."""

    def after_step(self) -> None:
        """After each optimizer step that was applied."""

    def end_epoch(self, epoch: int, last: bool, step: int) -> float | None:
        """After each epoch, before its checkpoint: pictures, scores. Returns what the best checkpoint is best in."""

    def enough(self) -> bool:
        """Whether to end before the last step; only the end of an epoch may change it, on all ranks alike."""

    def state(self) -> dict:
        """What a checkpoint holds besides the engine."""

    def load_state(self, state: dict) -> None:
        """Go on from a checkpoint."""


class Training:
    """A run of one stage: its engine and loader, log and checkpoints, and the step it is at.

    Args:
        config: the stage's configuration
        engine: DeepSpeed engine around the stage's model
        loader: micro batches of this rank
        identity: what must be the same on resume: configuration and digests
    """

    def __init__(self, config: Pretrain | Finetune, engine, loader: Loader, world: World, identity: dict):
        self.config, self.engine, self.loader, self.world = config, engine, loader, world
        self.folder = Path(config.run.folder) / config.run.name
        check_alike(world, self.folder, identity)
        may_change = free_keys(type(config))
        self.checkpoints = Checkpoints(self.folder, engine, identity, world, config.run.keep, may_change)
        self.step, self.state = self.checkpoints.resume(config.resume)
        self.steps_per_epoch = loader.batches.steps_per_epoch
        self.steps = config.optim.epochs * self.steps_per_epoch
        if config.run.max_steps:
            self.steps = min(self.steps, config.run.max_steps)
        self.log = RunLog(self.folder, to_dict(config), self.steps, self.step, config.optim.batch_size, world.first)
        self.faults = Faults(config.optim.max_skipped, config.data.max_damaged, self.log)
        self.faults.watch(loader.samples.split)
        self.losses = Mean(world.device)
        self.watchdog = Watchdog(world, self.folder, 60 * config.run.hang_minutes)
        self.agreement = Agreement(world, 3)
        if self.state:
            self.faults.load_state(self.state["faults"])
            self.losses.load_state(self.state["losses"], world.rank)
            if engine.loss_scaling:
                vars(engine.loss_scaling).update(self.state["loss_scaling"])
        loader.batches.first_step = self.step

    def run(self, stage: Stage) -> None:
        """Train from the present step to the last.

        Raises:
            Stopped: asked to stop; the state is saved
            UserError: too many faults
        """
        if self.state:
            stage.load_state(self.state["stage"])
        try:
            with self.watchdog, peers(), closing(iter(self.loader)) as batches:
                self._train(stage, batches)
                self.checkpoints.wait()
        except BaseException:
            with suppress(OSError):  # a full disk was the reason, perhaps, and is told already
                self.log.close()
            raise
        self.log.close()

    def _train(self, stage: Stage, batches: Iterator[dict[str, Tensor]]) -> None:
        self.engine.train()
        stage.begin(self.step)
        self.log.restart_clock(self.step)
        optim, saved = self.config.optim, time.monotonic()
        while self.step < self.steps and not stage.enough():
            lr = optim.lr_at(self.step, self.steps_per_epoch)
            set_lr(self.engine, lr)
            self._optimize(stage, batches)
            self.step += 1
            epoch, last = (self.step - 1) // self.steps_per_epoch + 1, self.step == self.steps
            ends = last or self.step % self.steps_per_epoch == 0
            if self.step % self.config.run.log_every == 0 or ends:
                norm = self.engine.get_global_grad_norm()
                self.log.train(self.step, f"epoch {epoch}/{optim.epochs}", self.losses, lr, norm)
            score = stage.end_epoch(epoch, last, self.step) if ends else None
            # one step late: nobody waits to learn what the others want
            minutes = (time.monotonic() - saved) / 60
            overdue = self.world.first and 0 < self.config.run.save_minutes < minutes
            stop, overdue, news = self.agreement(self.watchdog.requested, overdue, bool(self.faults.news))
            if news:
                self._tell(stage)
            last = last or stage.enough()
            if stop or overdue or last or (ends and epoch % self.config.run.save_every == 0):
                self._save(stage, score)
                saved = time.monotonic()
            if stop and not last:
                self._stop(stop)
            if ends:
                self.log.restart_clock(self.step)
            self.checkpoints.check()
        self._tell(stage)

    def _optimize(self, stage: Stage, batches: Iterator[dict[str, Tensor]]) -> None:
        """One optimizer step; it is skipped, on all ranks, if a loss or gradient is not finite."""
        at, where = self.watchdog.at, f"step {self.step + 1}"
        _, accumulation = self.config.optim.accumulation(self.world.ranks)
        parts = []
        for micro in range(accumulation):
            at(f"{where}, waiting for data")
            batch = next(batches)
            self.faults.see(self.loader, batch)
            at(f"{where}, forward")
            loss = stage.loss(batch, self.step, micro)
            at(f"{where}, backward")
            one = 1 + 0 * loss.detach()  # or NaN: a loss that is not finite must not have gradients that are
            backward(self.engine, loss * one)
            at(f"{where}, update")
            self.engine.step()
            self.losses.add(loss)
            parts.append((loss.detach(), batch["sample"]))
        scaling = self.engine.loss_scaling
        if was_applied(self.engine):
            self.faults.applied()
            stage.after_step()
        else:
            self.faults.skip(self.step + 1, parts, scaling.cur_scale if scaling else None)

    def _tell(self, stage: Stage) -> None:
        """Name damaged images. Too many end the run, which has trained on others in their place: its state is good."""
        try:
            self.faults.tell(self.step)
        except Exception:
            self._save(stage, None)
            self.checkpoints.wait()
            raise

    def _save(self, stage: Stage, score: float | None) -> None:
        self.watchdog.at("saving a checkpoint", patient=True)
        state = {"stage": stage.state(), "faults": self.faults.state(), "losses": gather(self.losses.state())}
        if self.engine.loss_scaling:
            state["loss_scaling"] = vars(self.engine.loss_scaling)
        stall = self.checkpoints.save(self.step, state, score)
        self.log.record(self.step, "checkpoint", {"stall_s": round(stall, 3)})
        self.watchdog.at("training")

    def _stop(self, request: int) -> None:
        self.checkpoints.wait()
        number = REQUESTS[request - 1]
        by_hand = number == signal.SIGINT
        name = "Ctrl-C" if by_hand else number.name
        where = f"{self.checkpoints.folder}, step {self.step} of {self.steps}"
        raise Stopped(f"{name}; saved in {where}: the same command goes on", INTERRUPTED if by_hand else SAVED)
