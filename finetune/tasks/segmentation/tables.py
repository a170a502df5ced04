"""Console tables of a segmentation model's evaluation."""

from finetune.tasks.classification.tables import MAX_CLASSES_SHOWN, WORST
from finetune.tasks.tables import percent, show, table, title_of


def show_evaluation(result: dict) -> None:
    """Print damaged images, scores, all or the worst classes, and the most frequent confusions."""
    scores, classes, confusions = (result[key] for key in ("scores", "classes", "confusions"))
    shares = (scores[key] for key in ("miou", "pixel_accuracy", "mean_accuracy"))
    row = [f"{scores['images']:,}", *map(percent, shares)]
    tables = [table(title_of(result), [], ["images", "mIoU", "pixel accuracy", "mean accuracy"], [row])]

    shown = MAX_CLASSES_SHOWN if len(classes) <= MAX_CLASSES_SHOWN else WORST
    worst = sorted(classes, key=lambda row: row["iou"])[:shown]
    title = "classes" if len(worst) == len(classes) else f"worst of {len(classes)} classes"
    rows = []
    for row in worst:
        rates = ["" if row[key] is None else percent(row[key]) for key in ("iou", "accuracy", "precision")]
        rows.append([row["name"], f"{row['pixels']:,}", *rates])
    tables.append(table(title, ["class"], ["pixels", "IoU", "accuracy", "precision"], rows))

    if confusions:
        rows = [
            [row["label"], row["predicted"], f"{row['pixels']:,}", percent(row["share"])] for row in confusions[:WORST]
        ]
        tables.append(table("most frequent confusions", ["class", "predicted as"], ["pixels", "of the class"], rows))
    show(result, *tables)
