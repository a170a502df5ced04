"""Using trained models, for any task: predictions for a split on any number of ranks, and what a task adds."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from data.folder import Folder
from data.shards import Split
from data.transforms import normalize
from launch.training.precision import autocast
from launch.training.world import World, gather


class Predictions(Protocol):
    """What a task predicts for samples of a split. Ranks exchange it by pickle; a checkpoint holds its attributes."""

    def scores(self) -> dict[str, float]:
        """Means over the samples, by name."""


class Collector(Protocol):
    """The part of a task that turns a model's outputs into predictions."""

    def collect(self, output: Any, batch: dict[str, Tensor]) -> Predictions:
        """Predictions for a batch; samples whose `label` is -1 are padding and left out."""

    def join(self, parts: list) -> Predictions:
        """Predictions for a split from those of its batches, or of all ranks, in the order of `sample`."""


class Inference(Collector, Protocol):
    """A trained model in use: what evaluate.py, predict.py and export.py need of its task.

    A task with a head of its own adds it, with the weights of the file, to the model that `make_inference` is given.
    """

    files: str  # written by evaluate.py, for its last line

    def match(self, images: Split | Folder) -> None:
        """Relate the targets of a data set to the model's. Raises `UserError` where they do not fit."""

    def evaluation(self, predictions: Any) -> dict:
        """Content of evaluation.json. Raises `UserError` for predictions that are not finite."""

    def write_evaluation(self, out: Path, result: dict, predictions: Any, names: list[str]) -> None:
        """Write the files of an evaluation; `names` [samples of the split] says where each came from."""

    def show_evaluation(self, result: dict) -> None:
        """Print an evaluation."""

    def name_outputs(self, file: str | None) -> None:
        """Take names for the outputs from a text file, or else from the weights. Raises `UserError` without names."""

    def predict(self, output: Any, paths: list[Path], top: int) -> list[Any]:
        """Predictions for pictures, each with `path` and `lines` (text to print), from the model's output.

        `top` is how many classes are shown; tasks without classes ignore it.
        """

    def annotate(self, folder: Path, number: int, prediction: Any) -> None:
        """Write a copy of a picture that shows its prediction."""

    def write_csv(self, file: Path, predictions: list[Any]) -> None:
        """Write the predictions of all pictures as a table."""

    def write_json(self, file: Path, predictions: list[Any]) -> None:
        """Write the predictions of all pictures as a list of objects."""

    def outputs(self) -> dict[str, str]:
        """Name and description of each output of the exported model."""


@torch.no_grad()
def output_of(model: nn.Module, image: Tensor, mean: Tensor, std: Tensor, precision: str) -> Tensor:
    """A model's output for images [B, C, H, W] as loaded, on its device; the model is in evaluation mode.

    Args:
        mean: [C] of the channels
        std: [C]
        precision: fp32, bf16 or fp16
    """
    with autocast(image.device, precision):
        return model(normalize(image, mean, std))


def predict(
    task: Collector,
    models: dict[str, nn.Module],
    batches: Iterable[dict[str, Tensor]],
    world: World,
    mean: Tensor,
    std: Tensor,
    precision: str,
) -> dict[str, Any]:
    """Predictions of several models for a split, each sample once; every rank gets the same.

    Args:
        models: by name; their mode stays as it is
        batches: of this rank's part of the samples
        mean: [C] of the channels
        std: [C]
        precision: fp32, bf16 or fp16
    """
    modes = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    parts: dict[str, list] = {name: [] for name in models}
    for batch in batches:
        image = batch["image"].to(world.device, non_blocking=True)
        for name, model in models.items():
            parts[name].append(task.collect(output_of(model, image, mean, std, precision), batch))
    for name, model in models.items():
        model.train(modes[name])
    return {name: task.join(gather(task.join(found))) for name, found in parts.items()}
