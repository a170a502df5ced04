"""Scatter plot and examples of predicted numbers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.errors import counted, printable
from configs.style import INK, SERIES, WIDTH
from finetune.tasks.examples import ROW, Example, write_examples
from finetune.tasks.numbers.scores import Predictions
from finetune.tasks.pictures import figure_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_PLOTS, COLUMNS = 12, 2
MAX_POINTS = 5000  # of a plot


def write_pictures(folder: Path, predictions: Predictions, images: Any) -> None:
    """Write scatter.png and examples.png; `images` is the split of the predictions."""
    if not predictions.finite:
        return
    scatter_picture(folder / "scatter.png", predictions)
    error = np.nan_to_num(predictions.error())
    order = np.argsort(np.nanmean(predictions.error(), 1), kind="stable")
    signed = error * np.sign(np.nan_to_num(predictions.number - predictions.label))
    ranks = [np.argsort(values, axis=None, kind="stable")[:ROW] for values in (-signed, signed)]

    def whole(i: int) -> Example:
        worst = int(error[i].argmax())
        return _example(predictions, i, worst)

    def single(rank: np.ndarray, sign: int) -> list[Example]:
        pairs = [np.unravel_index(flat, signed.shape) for flat in rank if sign * signed.flat[flat] > 0]
        return [_example(predictions, *map(int, pair)) for pair in pairs]

    groups = {
        f"Worst of {counted(len(order), 'image')}: the largest error, in standard deviations": [
            whole(i) for i in order[::-1][:ROW]
        ],
        "Best: the smallest error": [whole(i) for i in order[:ROW]],
        "Predicted too high": single(ranks[0], 1),
        "Predicted too low": single(ranks[1], -1),
    }
    write_examples(folder / "examples.png", images, groups)


def _example(predictions: Predictions, i: int, j: int) -> Example:
    name = f"{predictions.names[j]} " if len(predictions.names) > 1 else ""
    truth, number = predictions.label[i, j], predictions.number[i, j]
    return int(predictions.sample[i]), f"{name}is {truth:.4g}", f"predicted {number:.4g}"


def scatter_picture(path: Path, predictions: Predictions) -> None:
    """Write a plot of predicted over true values for each number."""
    shown = min(len(predictions.names), MAX_PLOTS)
    columns = min(COLUMNS, shown)
    rows = -(-shown // columns)
    with figure_file(path, WIDTH * columns, WIDTH * rows) as figure:
        plots = figure.subplots(rows, columns, squeeze=False)
        for i, axes in enumerate(plots.flat):
            if i < shown:
                _scatter(axes, predictions, i)
            else:
                axes.set_axis_off()


def _scatter(axes: "Axes", predictions: Predictions, i: int) -> None:
    """Draw one number, with equal scales."""
    known = np.flatnonzero(np.isfinite(predictions.label[:, i]))
    axes.set_title(f"{printable(predictions.names[i])}: {counted(len(known), 'image')}", loc="left", parse_math=False)
    known = known[:: -(-len(known) // MAX_POINTS) or 1]
    truth, number = predictions.label[known, i], predictions.number[known, i]
    if len(known):
        ends = [min(truth.min(), number.min()), max(truth.max(), number.max())]
        axes.plot(ends, ends, "--", linewidth=1, color=INK)
    axes.scatter(truth, number, s=12, alpha=0.5, linewidths=0, color=SERIES[0])
    axes.set(xlabel="true value", ylabel="prediction", aspect="equal", adjustable="datalim")
    axes.grid()
