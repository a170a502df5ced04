"""kNN and linear evaluation of an encoder's features, for finetune/probe.py."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.progress import track

from data.loader import Loader
from launch.training.feature_eval import best_of, count, features, knn, linear
from launch.training.world import World
from models.opening import Trained


@dataclass(frozen=True)
class Settings:
    """Settings of both evaluations.

    Args:
        ks: numbers of neighbours
        temperature: of the neighbours' votes
        lrs: learning rates of the linear classifier; None = no linear classifier
        epochs: of the linear classifier
        seed: of the linear classifier
    """

    ks: Iterable[int]
    temperature: float
    lrs: Iterable[float] | None
    epochs: int
    seed: int


def feature_scores(trained: Trained, loaders: list[Loader], precision: str, settings: Settings, world: World) -> dict:
    """kNN accuracy for each k, and the linear classifier's at all learning rates and the best, as plain values.

    `trained` is an encoder, `loaders` are those of training and evaluation split, `precision` is fp32, bf16 or fp16.
    """

    def progress(steps: Iterable, number: int, what: str) -> Iterable:
        return track(steps, what, number, console=Console(stderr=True), disable=not world.first, show_speed=False)

    encoder, mean, std = (x.to(world.device) for x in (trained.model, trained.mean, trained.std))
    train, evaluation = (features(encoder, loader, world, mean, std, precision, progress) for loader in loaders)
    classes = len(loaders[0].samples.split.classes)
    scores = {"train_images": count(train), "eval_images": count(evaluation), "classes": classes}
    scores["precision"] = precision
    scores["knn"] = knn(train, evaluation, classes, settings.ks, settings.temperature, world, progress)
    if settings.lrs is not None:
        grid = linear(train, evaluation, classes, settings.lrs, settings.epochs, settings.seed, progress)
        scores["linear"] = asdict(best_of(grid)) | {"grid": [asdict(point) for point in grid]}
    return scores
