"""Inference with trained models: predictions for a split on any number of ranks, and the interface of a task."""

from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from data.folder import Folder
from data.loader import ReadTarget, Transform
from data.reading import Reading
from data.shards import Split
from data.transforms import normalize
from launch.training.precision import autocast
from launch.training.world import World, gather
from models.opening import Trained


class Predictions(Protocol):
    """What a task predicts for samples of a split. Ranks exchange it by pickle; a checkpoint holds its attributes."""

    def scores(self) -> dict[str, float]:
        """Means over the samples, by name."""


def join(parts: list) -> Any:
    """Concatenate predictions, dataclasses of arrays [N, ...] with `sample` [N], in the order of the samples.

    Fields that are not arrays must be equal in all parts.
    """
    rows = {field.name for field in fields(parts[0]) if isinstance(getattr(parts[0], field.name), np.ndarray)}
    order = np.argsort(np.concatenate([part.sample for part in parts]))
    return replace(parts[0], **{name: np.concatenate([getattr(part, name) for part in parts])[order] for name in rows})


class Collector(Protocol):
    """Turns a model's outputs into predictions."""

    def run(self, model: nn.Module, image: Tensor, batch: dict[str, Tensor]) -> Any:
        """The model's output for normalised images [B, C, H, W], and the other entries of their batch."""

    def collect(self, output: Any, batch: dict[str, Tensor]) -> Predictions:
        """Predictions for a batch; samples whose `label` is -1 are padding and left out."""

    def join(self, parts: list) -> Predictions:
        """Concatenate predictions of batches or ranks, in the order of `sample`."""


class Inference(Collector, Protocol):
    """A task's part of evaluate.py, predict.py and export.py, for a trained model.

    A task with a head of its own builds `trained.model` from the weights that `make_inference` is given.
    """

    trained: Trained  # the task's model and its preprocessing
    transform: Transform  # of pictures in evaluation; entries besides `image` reach `collect` and `predict`
    files: str  # names of the files of `write_evaluation`
    read_target: ReadTarget | None  # of the samples; None = the target is the label
    batch: int  # images that an exported graph takes. Optional: any number
    score: str  # name of the score, at most 1, that quantisation must keep. Optional; its graph has one output

    def match(self, images: Split | Folder) -> None:
        """Map a data set's targets to the model's. Raises `UserError` if they do not fit."""

    def evaluation(self, predictions: Any) -> dict:
        """Content of evaluation.json. Raises `UserError` for predictions that are not finite."""

    def write_evaluation(self, out: Path, result: dict, predictions: Any, names: list[str]) -> None:
        """Write the files of an evaluation; `names` are the sources of the split's samples."""

    def show_evaluation(self, result: dict) -> None:
        """Print an evaluation."""

    def name_outputs(self, file: str | None) -> None:
        """Set names of the outputs from a text file, or else from the weights. Raises `UserError` if there are none."""

    def predict(self, output: Any, batch: dict[str, Tensor], paths: list[Path], top: int) -> list[Any]:
        """Predictions, with `path` and `lines` (text), of pictures; `top` classes each if the task has classes."""

    def average(self, outputs: list[Any]) -> Any:
        """Mean output for views of the same images, for --tta. Optional."""

    def annotate(self, folder: Path, number: int, prediction: Any, reading: Reading) -> None:
        """Write a copy of a picture, read as before, with its prediction; `number` makes the file name unique."""

    def explained(self, output: Tensor, name: str | None) -> Tensor:
        """Number [B] of the output that --cam explains, for outputs [B, K]; raises `UserError` for a wrong name.

        Optional, with `draw_evidence`; the model must be a `ConvNeXt` whose head takes the last stage's tokens.
        """

    def draw_evidence(
        self, folder: Path, number: int, prediction: Any, evidence: Tensor, name: str, reading: Reading
    ) -> None:
        """Write a copy of a picture with the evidence for an output drawn over it."""

    def write_csv(self, file: Path, predictions: list[Any], top: int) -> None:
        """Write predictions as a table; `top` as in `predict`."""

    def write_json(self, file: Path, predictions: list[Any]) -> None:
        """Write predictions as a list of objects."""

    def difference(self, outputs: list[Tensor], references: list[Tensor]) -> list[float]:
        """How far an exported model's outputs are from the source's, as a share. Optional.

        Raises `UserError` if they mean something else.
        """

    def outputs(self) -> dict[str, str]:
        """Name and description of each output of the exported model."""


@torch.no_grad()
def output_of(
    task: Collector, model: nn.Module, batch: dict[str, Tensor], mean: Tensor, std: Tensor, precision: str
) -> Any:
    """A task's output for a batch as loaded; `mean` and `std` are [C], `precision` fp32, bf16 or fp16."""
    image = normalize(batch["image"].to(mean.device, non_blocking=True), mean, std)
    with autocast(image.device, precision):
        return task.run(model, image, batch)


def predict(
    task: Collector, models: dict[str, nn.Module], batches: Iterable[dict[str, Tensor]], world: World, mean: Tensor,
    std: Tensor, precision: str,
) -> dict[str, Any]:  # fmt: skip
    """Predictions of models for a split, by the models' names; the same on every rank.

    The models' modes are restored. `batches` are this rank's; the rest is as in `output_of`.
    """
    modes, parts = {name: model.training for name, model in models.items()}, {name: [] for name in models}
    for model in models.values():
        model.eval()
    for batch in batches:
        for name, model in models.items():
            parts[name].append(task.collect(output_of(task, model, batch, mean, std, precision), batch))
    for name, model in models.items():
        model.train(modes[name])
    return {name: task.join(gather(task.join(batches))) for name, batches in parts.items()}
