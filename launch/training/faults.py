"""What went wrong and was worked around: skipped steps and damaged images, counted over all ranks.

The counts are part of a checkpoint, so that a run that is killed again and again still ends at its limits.
"""

from collections import ChainMap

import torch
from torch import Tensor

from configs.errors import UserError
from data.loader import Loader
from data.shards import Split
from launch.training.runlog import RunLog
from launch.training.world import gather


class Faults:
    """The faults of one run; every rank holds the same counts.

    Args:
        max_skipped: steps in a row that may be skipped
        max_damaged: share of a split's images that may be damaged
        log: names each fault
    """

    def __init__(self, max_skipped: int, max_damaged: float, log: RunLog):
        self.max_skipped, self.max_damaged, self.log = max_skipped, max_damaged, log
        self.skipped = self.in_a_row = 0
        self.damaged: dict[str, set[int]] = {}  # by split
        self.images: dict[str, int] = {}  # size of each split that is read
        self.news: dict[tuple[str, int], str] = {}  # complaints by split and sample: seen here, not yet told the others

    def watch(self, split: Split) -> None:
        """Count the damaged images of one more split."""
        self.images[split.name] = len(split)

    def state(self) -> dict:
        """For a checkpoint: plain values."""
        damaged = {split: sorted(samples) for split, samples in self.damaged.items()}
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "damaged": damaged}

    def load_state(self, state: dict) -> None:
        """Go on from a checkpoint."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self.damaged = {split: set(samples) for split, samples in state["damaged"].items()}

    def skip(self, step: int, parts: list[tuple[Tensor, Tensor]], loss_scale: float | None = None) -> None:
        """A step was left out because its loss or gradient is not finite; every rank calls this.

        Args:
            step: counted from 1
            parts: loss [] and samples [B] of each micro batch of this rank
            loss_scale: of the next step; None = no loss scaling
        Raises:
            UserError: more than `max_skipped` in a row
        """
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        bad = [samples.tolist() for loss, samples in parts if not bool(torch.isfinite(loss))]
        found = gather((bad, [samples.tolist() for _, samples in parts]))
        cause = "loss" if any(bad for bad, _ in found) else "gradient"
        samples = [sample for bad, every in found for batch in (bad if cause == "loss" else every) for sample in batch]
        self.log.record(step, "skipped", {"not_finite": cause, "samples": sorted(samples)})
        scale = f"; loss scale now {loss_scale:g}" if loss_scale else ""
        self.log.say(f"step {step} skipped: its {cause} is not finite; the samples are in log.jsonl{scale}")
        if self.in_a_row > self.max_skipped:
            raise UserError(
                f"{self.in_a_row} steps in a row had a {cause} that is not finite (optim.max_skipped "
                f"{self.max_skipped}), the last is {step}: the weights and checkpoints are whole; start another "
                "--run.name with a lower optim.lr or with optim.clip_grad"
            )

    def applied(self) -> None:
        """A step was applied."""
        self.in_a_row = 0

    def see(self, loader: Loader, batch: dict[str, Tensor]) -> None:
        """Note the damaged images of a batch; this rank alone."""
        if not bool(batch["damaged"].any()):
            return
        split = loader.samples.split
        known = self.damaged.setdefault(split.name, set())
        for sample in batch["sample"][batch["damaged"]].tolist():
            if sample not in known and (split.name, sample) not in self.news:
                self.news[split.name, sample] = loader.samples.describe_damage(sample)

    def tell(self, step: int) -> None:
        """Name the images that any rank found damaged; every rank calls this.

        Raises:
            UserError: more than `max_damaged` of a split
        """
        news, self.news = ChainMap(*gather(self.news)), {}
        for (split, sample), complaint in sorted(news.items()):
            if sample not in self.damaged.setdefault(split, set()):
                self.damaged[split].add(sample)
                self.log.record(step, "damaged", {"split": split, "sample": sample, "error": complaint})
                self.log.say(f"damaged, replaced by another image: {complaint}")
        for split, images in self.images.items():
            samples = self.damaged.get(split, ())
            if len(samples) > self.max_damaged * images:
                raise UserError(
                    f"{len(samples)} of {images} images of split {split} are damaged, more than "
                    f"data.max_damaged {self.max_damaged} allows; log.jsonl names them; `python data/prepare.py SHARDS "
                    "--repair` mends a folder of shards"
                )
