"""Faults that a run survives: skipped steps and damaged images, counted over all ranks.

The counts are part of a checkpoint, so a run that is interrupted often still ends at its limits.
"""

from collections import ChainMap
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from configs.errors import UserError
from data.loader import Loader
from data.shards import Split
from launch.training.runlog import RunLog
from launch.training.world import gather


class Faults:
    """The faults of one run; all ranks have the same counts.

    Args:
        max_skipped: consecutive steps that may be skipped
        max_damaged: share of a split's images that may be damaged
        splits: whose damaged images count
    """

    def __init__(self, max_skipped: int, max_damaged: float, splits: Sequence[Split], log: RunLog):
        self.max_skipped, self.max_damaged, self.log = max_skipped, max_damaged, log
        self.splits = {split.name: split for split in splits}
        self.skipped = self.consecutive = 0
        self.damaged: dict[str, set[int]] = {name: set() for name in self.splits}  # samples by split
        self.unreported: dict[tuple[str, int], str] = {}  # messages by split and sample, known only to this rank

    def state(self) -> dict:
        damaged = {split: sorted(samples) for split, samples in self.damaged.items()}
        return {"skipped": self.skipped, "consecutive": self.consecutive, "damaged": damaged}

    def load_state(self, state: dict) -> None:
        self.skipped, self.consecutive = state["skipped"], state["consecutive"]
        self.damaged |= {split: set(samples) for split, samples in state["damaged"].items()}

    def applied(self) -> None:
        self.consecutive = 0

    def check_applied(self, steps: int) -> None:
        """Raise `UserError` if all `steps` of a run were skipped: its weights are those that it started with."""
        if steps and self.skipped >= steps:
            raise UserError(
                f"no step was applied: the loss or gradient of all {steps} was not finite, so the weights are those "
                "at the start (log.jsonl lists the samples): check data.mean, data.std and images, or lower optim.lr"
            )

    def skip(self, step: int, parts: list[tuple[Tensor, Tensor]], loss_scale: float | None = None) -> None:
        """A step was skipped because its loss or gradient is not finite; all ranks call this.

        Args:
            parts: loss [] and samples [B] of each micro batch of this rank
            loss_scale: of the next step; None = no loss scaling
        Raises:
            UserError: more than `max_skipped` in a row
        """
        self.skipped, self.consecutive = self.skipped + 1, self.consecutive + 1
        own = [(bool(torch.isfinite(loss)), samples.tolist()) for loss, samples in parts]
        batches = [batch for rank in gather(own) for batch in rank]
        cause = "gradient" if all(finite for finite, _ in batches) else "loss"
        samples = sorted(chain(*(samples for finite, samples in batches if not finite or cause == "gradient")))
        self.log.record(step, "skipped", {"not_finite": cause, "samples": samples})
        scale = f"; loss scale now {loss_scale:g}" if loss_scale else ""
        self.log.say(f"step {step} skipped: its {cause} is not finite; log.jsonl lists the samples{scale}")
        if self.consecutive > self.max_skipped:
            raise UserError(
                f"{self.consecutive} steps in a row up to {step} had a {cause} that is not finite (optim.max_skipped "
                f"{self.max_skipped}). Weights and checkpoints are intact: start another --run.name with a lower "
                "optim.lr or with optim.clip_grad"
            )

    def note_damaged(self, loader: Loader, batch: dict[str, Tensor]) -> None:
        """Note a batch's damaged images, if its split counts."""
        split = loader.samples.split
        if self.splits.get(split.name) is not split or not bool(batch["damaged"].any()):
            return
        for sample in batch["sample"][batch["damaged"]].tolist():
            if sample not in self.damaged[split.name] and (split.name, sample) not in self.unreported:
                self.unreported[split.name, sample] = loader.samples.describe_damage(sample)

    def report_damaged(self, step: int) -> None:
        """Log the damaged images of all ranks, which all call this. Raises `UserError` for more than `max_damaged`."""
        news, self.unreported = ChainMap(*gather(self.unreported)), {}
        for (split, sample), complaint in sorted(news.items()):
            if sample not in self.damaged[split]:
                self.damaged[split].add(sample)
                self.log.record(step, "damaged", {"split": split, "sample": sample, "error": complaint})
                self.log.say(f"replaced by another image: {complaint}")
        for name, split in self.splits.items():
            damaged = len(self.damaged[name])
            if damaged > self.max_damaged * len(split):
                remedy = "repair damaged shards with `python data/prepare.py SHARDS --repair`"
                if not split.shards:  # a collection that was not prepared
                    remedy = "make shards with `python data/prepare.py SOURCE OUT`, which leaves them out"
                raise UserError(
                    f"{damaged} of {len(split)} images of split {name} cannot be used, more than data.max_damaged "
                    f"{self.max_damaged} allows (log.jsonl lists them with reasons): {remedy}"
                )
