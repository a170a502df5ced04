"""Classification: one class per image."""

from dataclasses import dataclass
from typing import Literal

from configs.keys import fixed, require


@dataclass(frozen=True)
class Settings:
    """Settings of labels, head and loss."""

    smoothing: float = fixed(0.1, "label smoothing")
    mixup: float = fixed(0.0, "alpha of mixup; 0 = off")
    cutmix: float = fixed(0.0, "alpha of cutmix; 0 = off")
    mix_prob: float = fixed(1.0, "probability of mixup or cutmix")
    mix_switch: float = fixed(0.5, "probability of cutmix rather than mixup if both are on")
    mix_mode: Literal["batch", "pair", "elem"] = fixed("batch", "granularity of mixup sampling: batch, pair or element")
    head_init: float | None = fixed(
        None, "scale of a new head's initial weights; null = .001 with --init, 1 from scratch"
    )
    balance: float = fixed(
        0.0, "oversampling of rare classes, from 0 = none to 1 = all classes alike: weight n ** -balance for n images"
    )
    label_share: float = fixed(1.0, "share of each class's images to train on, drawn with run.seed")

    def __post_init__(self):
        require(0 <= self.smoothing < 1, "task.smoothing", self.smoothing, "at least 0 and below 1")
        for key in ("mixup", "cutmix"):
            require(getattr(self, key) >= 0, f"task.{key}", getattr(self, key), "0 or more")
        for key in ("mix_prob", "mix_switch"):
            require(0 <= getattr(self, key) <= 1, f"task.{key}", getattr(self, key), "a probability")
        require(0 <= self.balance <= 1, "task.balance", self.balance, "from 0 to 1")
        require(0 < self.label_share <= 1, "task.label_share", self.label_share, "above 0 and at most 1")
