"""What the tasks with one output row per image share in training: transforms, model, head, rows of targets."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from configs.errors import UserError, counted, nearest
from configs.log import say
from configs.schema import Encoder, Finetune
from data.loader import Transform
from data.sampler import labelled_share
from data.shards import Split
from data.transforms import EvalTransform, RowTransform, TrainTransform
from data.vectors import all_targets, reader, target_names
from finetune.tasks.building import build_model
from models.convnext import ConvNeXt
from models.opening import Opened
from models.start import start_encoder


def choose_metric(name: str, valid: Iterable[str]) -> str:
    """The score of `task.metric`. Raises `UserError` if the task has no such score."""
    if name not in valid:
        raise UserError(f"task.metric is {name}: {nearest(name, valid)}")
    return name


class ImageTask:
    """Transforms, model and head; parts of `finetune.finetuning.Task`."""

    read_target = None
    head_config: dict = {}  # noqa: RUF012  # nothing

    def __init__(self, config: Finetune, train: Split, evaluation: Split, outputs: int):
        self.config, self.train, self.evaluation, self.outputs = config, train, evaluation, outputs

    def run(self, model: nn.Module, image: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return model(image)

    def inputs(self, image: Tensor) -> tuple[Tensor, ...]:
        return (image,)

    def check_batch(self, micro: int) -> None:
        """Any micro batch will do."""

    def train_transform(self, mean: tuple[float, ...]) -> Transform:
        return TrainTransform(self.config.data, self.config.augment, mean)

    def eval_transform(self) -> Transform:
        data = self.config.data
        return EvalTransform(data.height_width, self.config.augment.eval_crop, data.eval_interpolation)

    def build(self, arch: Encoder) -> ConvNeXt:
        return build_model(self.config.model, lambda *options: ConvNeXt(arch, self.outputs, *options))

    def scale_head(self, model: ConvNeXt, init: Opened | None) -> None:
        """Scale a new head by `task.head_init`."""
        scale = self.config.task.head_init
        for parameter in model.head.fc.parameters():
            parameter.data.mul_((1.0 if init is None else 0.001) if scale is None else scale)


class RowTask(ImageTask):
    """A task whose targets are the rows of `data/vectors.py`.

    `rows` [N, names] are those of the training split, `others` those of the evaluation split, `used` [M, names] those
    that are trained on.

    Raises:
        UserError: the data has no such targets, or a split has no image with one
    """

    kind: str  # of the targets
    by_class: tuple[float, ...] | None = None  # values of the classes, if the targets are labels of single classes

    def __init__(self, config: Finetune, train: Split, evaluation: Split):
        self.names = self.target_names(train)
        super().__init__(config, train, evaluation, len(self.names))
        if self.by_class is None:
            self.read_target = reader(self.kind, self.names, self.names)
        self.rows, self.others = self._rows(train), self._rows(evaluation)
        for split, rows in ((train, self.rows), (evaluation, self.others)):
            without = int((~np.isfinite(rows).any(1)).sum())
            where = f"{split.folder}, split {split.name}"
            if without == len(rows):
                raise UserError(f"{where} has no image with {self.kind}: prepare it with --labels TABLE")
            if without:
                say(f"{where}: {counted(without, 'image')} without {self.kind} are left out")
        weights = self.sample_weights()
        self.used = self.rows if weights is None else self.rows[weights > 0]

    def target_names(self, train: Split) -> list[str]:
        """Names of the outputs."""
        return target_names(train, self.kind)

    def _rows(self, split: Split) -> np.ndarray:
        if self.by_class is None:
            return all_targets(split, self.read_target, len(self.names))
        labels = split.labels()
        return np.where(labels < 0, np.nan, np.array(self.by_class, np.float32)[labels])[:, None]

    def describe(self) -> str:
        return counted(self.outputs, self.kind.removesuffix("s"))

    def train_transform(self, mean: tuple[float, ...]) -> Transform:
        return RowTransform(super().train_transform(mean), self.outputs, self.by_class)

    def eval_transform(self) -> Transform:
        return RowTransform(super().eval_transform(), self.outputs, self.by_class)

    def sample_weights(self) -> np.ndarray | None:
        """Only images with a target are used, and `task.label_share` of these."""
        known, share = np.isfinite(self.rows).any(1), self.config.task.label_share
        if share == 1 and known.all():
            return None
        used = np.zeros(len(known))
        number = np.flatnonzero(known)
        used[number[labelled_share(np.zeros(len(number), int), share, self.config.run.seed)]] = 1
        return used

    def load(self, model: ConvNeXt, init: Opened | None) -> None:
        """Load the encoder of --init, and its head if it has the same outputs; a new one is scaled."""
        if init:
            start_encoder(model, init)
        if not (init and self.load_head(model, init)):
            self.scale_head(model, init)

    def load_head(self, model: ConvNeXt, init: Opened) -> bool:
        """Load the head of --init. Returns whether it fits."""
        return False


def scored(batch: dict[str, Tensor]) -> Tensor:
    """Bools [B]: images with a target that count, so neither padding nor replacements of damaged ones."""
    return (batch["sample"] >= 0) & torch.isfinite(batch["label"]).any(1)
