"""Console tables of a classifier's evaluation."""

from rich.console import Console
from rich.table import Table

MAX_CLASSES_SHOWN = 20  # maximum number of classes for a complete list
WORST = 10  # number of worst classes otherwise, and of confusions and damaged images


def show_evaluation(result: dict) -> None:
    """Print damaged images, scores, all or the worst classes, and the most frequent confusions."""
    console = Console(markup=False, emoji=False, highlight=False)
    scores, classes, confusions, damaged = (result[key] for key in ("scores", "classes", "confusions", "damaged"))
    for line in damaged[:WORST]:
        console.print(f"damaged, left out: {line['name']} ({line['error']})", soft_wrap=True)
    if damaged[WORST:]:
        console.print(f"and {len(damaged) - WORST} more, listed in evaluation.json")
    table = Table(title=f"{result['weights']} on {result['data']}, split {result['split']}")
    titles = {
        "top1": "top-1",
        "top5": "top-5",
        "mean_class_accuracy": "mean over classes",
        "macro_f1": "macro F1",
        "calibration_error": "calibration error",
    }
    _add_columns(table, "images", "loss", *titles.values())
    table.add_row(f"{scores['images']:,}", f"{scores['loss']:.4f}", *(percent(scores[key]) for key in titles))
    console.print(table)

    shown = MAX_CLASSES_SHOWN if len(classes) <= MAX_CLASSES_SHOWN else WORST
    worst = sorted(classes, key=lambda row: row["accuracy"])[:shown]
    table = Table("class", title="classes" if len(worst) == len(classes) else f"worst of {len(classes)} classes")
    _add_columns(table, "images", "accuracy")
    for row in worst:
        table.add_row(row["name"], f"{row['images']:,}", percent(row["accuracy"]))
    console.print(table)

    if confusions:
        table = Table("class", "predicted as", title="most frequent confusions")
        _add_columns(table, "images", "of the class")
        for row in confusions[:WORST]:
            table.add_row(row["label"], row["predicted"], f"{row['images']:,}", percent(row["share"]))
        console.print(table)


def _add_columns(table: Table, *titles: str) -> None:
    for title in titles:
        table.add_column(title, justify="right")


def percent(share: float) -> str:
    """Format a share from 0 to 1 as a percentage."""
    return f"{100 * share:.2f} %"
