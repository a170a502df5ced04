"""Examples of an evaluation of several labels."""

from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import counted
from finetune.tasks.examples import ROW, Example, spread, write_examples
from finetune.tasks.labels.scores import Predictions


def examples_picture(path: Path, predictions: Predictions, names: list[str], images: Any) -> None:
    """Write the worst and best images of a split, and the wrong labels with the highest confidence."""
    if not predictions.finite:
        return
    order, predicted = np.argsort(predictions.loss, kind="stable"), predictions.predicted()
    wrong = (predicted != predictions.label).any(1)
    error = np.where(predicted != predictions.label, np.abs(predictions.label - predictions.probability), 0)
    mistakes = np.argsort(-error, axis=None, kind="stable")[:ROW]
    pairs = [np.unravel_index(flat, error.shape) for flat in mistakes if error.flat[flat]]

    def whole(i: int) -> Example:
        true, found = (_listed(flags, names) for flags in (predictions.label[i], predicted[i]))
        return int(predictions.sample[i]), f"is {true}", f"predicted {found}"

    def single(i: int, j: int) -> Example:
        is_, share = "is" if predictions.label[i, j] else "is not", predictions.probability[i, j]
        return int(predictions.sample[i]), f"{is_} {names[j]}", f"predicted {100 * share:.0f} %"

    write_examples(
        path,
        images,
        {
            f"Most confident mistakes of {np.count_nonzero(error):,} wrong labels": [single(i, j) for i, j in pairs],
            f"A label is wrong: {wrong.sum():,} of {counted(len(wrong), 'image')}, highest loss first": [
                whole(i) for i in order[wrong[order]][::-1][:ROW]
            ],
            f"All labels are right: {(~wrong).sum():,} of {counted(len(wrong), 'image')}, some of them": [
                whole(i) for i in spread(np.flatnonzero(~wrong))
            ],
        },
    )


def _listed(flags: np.ndarray, names: list[str]) -> str:
    return ", ".join(names[j] for j in np.flatnonzero(flags)) or "none"
