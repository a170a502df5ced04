"""Console tables of a classifier's evaluation."""

from configs.errors import counted, few
from configs.log import say
from finetune.tasks.tables import percent, show, table, title_of

MAX_CLASSES_SHOWN = 20  # maximum number of classes for a complete list
WORST = 10  # number of worst classes otherwise, and of confusions


def show_evaluation(result: dict) -> None:
    """Print damaged images, scores, all or the worst classes, and the most frequent confusions."""
    scores, classes, confusions = (result[key] for key in ("scores", "classes", "confusions"))
    numbers = ["images", "loss", "top-1", "top-5", "balanced", "macro F1", "calibration error"]
    shares = (scores[key] for key in ("top1", "top5", "balanced_accuracy", "macro_f1", "calibration_error"))
    row = [f"{scores['images']:,}", f"{scores['loss']:.4f}", *map(percent, shares)]
    tables = [table(title_of(result), [], numbers, [row])]

    shown = MAX_CLASSES_SHOWN if len(classes) <= MAX_CLASSES_SHOWN else WORST
    worst = sorted(classes, key=lambda row: row["accuracy"])[:shown]
    title = "classes" if len(worst) == len(classes) else f"worst of {len(classes)} classes"
    rows = [[row["name"], f"{row['images']:,}", percent(row["accuracy"])] for row in worst]
    tables.append(table(title, ["class"], ["images", "accuracy"], rows))

    if absent := result["without_images"]:
        count = counted(len(absent), "class has", "classes have")
        say(f"{count} no image in split {result['split']}, so no score covers {few(absent)}")
    if confusions:
        rows = [
            [row["label"], row["predicted"], f"{row['images']:,}", percent(row["share"])] for row in confusions[:WORST]
        ]
        columns = ["class", "predicted as"], ["images", "of the class"]
        tables.append(table("most frequent confusions", *columns, rows))
    show(result, *tables)
