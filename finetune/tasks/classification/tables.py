"""Console tables of a classifier's evaluation."""

from rich.console import Console
from rich.table import Column, Table

MAX_CLASSES_SHOWN = 20  # maximum number of classes for a complete list
WORST = 10  # number of worst classes otherwise, and of confusions and damaged images


def show_evaluation(result: dict) -> None:
    """Print damaged images, scores, all or the worst classes, and the most frequent confusions."""
    console = Console(markup=False, emoji=False, highlight=False)
    scores, classes, confusions, damaged = (result[key] for key in ("scores", "classes", "confusions", "damaged"))
    show_damaged(console, damaged)
    title = f"{result['weights']} on {result['data']}, split {result['split']}"
    numbers = ["images", "loss", "top-1", "top-5", "mean over classes", "macro F1", "calibration error"]
    found = table(title, [], numbers)
    shares = (scores[key] for key in ("top1", "top5", "mean_class_accuracy", "macro_f1", "calibration_error"))
    found.add_row(f"{scores['images']:,}", f"{scores['loss']:.4f}", *map(percent, shares))
    console.print(found)

    shown = MAX_CLASSES_SHOWN if len(classes) <= MAX_CLASSES_SHOWN else WORST
    worst = sorted(classes, key=lambda row: row["accuracy"])[:shown]
    title = "classes" if len(worst) == len(classes) else f"worst of {len(classes)} classes"
    found = table(title, ["class"], ["images", "accuracy"])
    for row in worst:
        found.add_row(row["name"], f"{row['images']:,}", percent(row["accuracy"]))
    console.print(found)

    if confusions:
        found = table("most frequent confusions", ["class", "predicted as"], ["images", "of the class"])
        for row in confusions[:WORST]:
            found.add_row(row["label"], row["predicted"], f"{row['images']:,}", percent(row["share"]))
        console.print(found)


def show_damaged(console: Console, damaged: list[dict]) -> None:
    """Print the first of the damaged images."""
    for line in damaged[:WORST]:
        console.print(f"damaged, left out: {line['name']} ({line['error']})", soft_wrap=True)
    if damaged[WORST:]:
        console.print(f"and {len(damaged) - WORST} more, listed in evaluation.json")


def table(title: str, texts: list[str], numbers: list[str]) -> Table:
    """An empty table with columns of text, then of numbers."""
    return Table(*texts, *(Column(name, justify="right") for name in numbers), title=title)


def percent(share: float) -> str:
    """A share as per cent."""
    return f"{100 * share:.2f} %"
