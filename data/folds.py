"""Parts of a split for cross-validation, by a hash of the images' names; alike in their labels. Free of torch."""

import hashlib
import json
from typing import Any

import numpy as np

from configs.errors import UserError, counted
from data.folder import iterate_names

SEED = 0  # of the hash


class Part:
    """Some samples of a split, with the interface of `data.shards.Split`; `samples` are ids in ascending order."""

    def __init__(self, split: Any, samples: np.ndarray, name: str):
        self.split, self.samples, self.name = split, samples, name
        self.folder, self.classes, self.shards = split.folder, split.classes, split.shards
        self.targets = getattr(split, "targets", None)
        ends = np.cumsum(split.counts)
        self.counts = np.diff(np.searchsorted(samples, ends), prepend=0)  # of each shard

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def digest(self) -> str:
        """Digest of the split and of the choice, compared on resume."""
        return hashlib.sha256(f"{self.split.digest} {self.samples.tolist()}".encode()).hexdigest()[:16]

    def read(self, sample: int) -> tuple[bytes, int]:
        return self.split.read(int(self.samples[sample]))

    def read_target(self, sample: int) -> bytes:
        return self.split.read_target(int(self.samples[sample]))

    def place(self, sample: int) -> str:
        return self.split.place(int(self.samples[sample]))

    def labels(self) -> np.ndarray:
        return self.split.labels()[self.samples]

    def without_target(self) -> int:
        """Number of samples without a target."""
        return sum(not self.read_target(sample) for sample in range(len(self)))

    def fetch_shard(self, number: int) -> None:
        self.split.fetch_shard(number)


def fold_parts(split: Any, fold: int, folds: int) -> tuple[Part, Part]:
    """The samples to train on and those to evaluate in one of several folds.

    Samples are sorted by label (or labels), then by a hash of their names, and dealt out to the folds in turn. Raises
    `UserError` if there are fewer samples than folds.
    """
    if len(split) < folds:
        held = counted(len(split), "image")
        raise UserError(f"{split.folder}, split {split.name} has {held}, too few for data.folds {folds}")
    names = (
        hashlib.sha256(f"{SEED} {name}".encode(errors="surrogateescape")).digest() for name in iterate_names(split)
    )
    order = sorted(range(len(split)), key=list(zip(_strata(split), names, range(len(split)), strict=True)).__getitem__)
    number = np.empty(len(split), np.int64)
    number[order] = np.arange(len(split)) % folds
    train = Part(split, np.flatnonzero(number != fold), f"{split.name} without fold {fold}")
    return train, Part(split, np.flatnonzero(number == fold), f"fold {fold} of {split.name}")


def _strata(split: Any) -> list[str]:
    """What samples of a stratum have in common: the class, or all labels."""
    if (getattr(split, "targets", None) or {}).get("kind") == "labels":
        return [_labels(split.read_target(sample)) for sample in range(len(split))]
    return [str(label) for label in split.labels().tolist()]


def _labels(data: bytes) -> str:
    try:
        return json.dumps(sorted(json.loads(data)["labels"]))
    except (ValueError, TypeError, KeyError, RecursionError):  # none, or damaged
        return ""
