"""Scores of an encoder's features on labelled images, as finetune/probe.py prints and writes them."""

from collections.abc import Iterable
from dataclasses import asdict

from rich.console import Console
from rich.progress import track
from torch import Tensor

from data.loader import Loader
from launch.training.feature_eval import best_of, count, features, knn, linear
from launch.training.world import World
from models.convnext import ConvNeXt


def feature_scores(
    encoder: ConvNeXt,
    loaders: list[Loader],
    mean: Tensor,
    std: Tensor,
    precision: str,
    ks: Iterable[int],
    temperature: float,
    lrs: Iterable[float] | None,
    epochs: int,
    seed: int,
    world: World,
) -> dict:
    """kNN accuracy for each k, and of the linear classifier at its best learning rate and at all, as plain values.

    Args:
        loaders: of the training and the evaluation split
        mean: [C]
        std: [C]
        precision: fp32, bf16 or fp16
        ks: numbers of neighbours
        temperature: of the votes
        lrs: learning rates of the linear classifier; None = no linear classifier
        epochs: of the linear classifier
        seed: of the linear classifier
    """

    def progress(steps: Iterable, number: int, what: str) -> Iterable:
        return track(steps, what, number, console=Console(stderr=True), disable=not world.first, show_speed=False)

    encoder, mean, std = (x.to(world.device) for x in (encoder, mean, std))
    train, evaluation = (features(encoder, loader, world, mean, std, precision, progress) for loader in loaders)
    classes = len(loaders[0].samples.split.classes)
    scores = {"train_images": count(train), "eval_images": count(evaluation), "classes": classes}
    scores["precision"] = precision
    scores["knn"] = knn(train, evaluation, classes, ks, temperature, world, progress)
    if lrs is not None:
        grid = linear(train, evaluation, classes, lrs, epochs, seed, progress)
        scores["linear"] = asdict(best_of(grid)) | {"grid": [asdict(one) for one in grid]}
    return scores
