"""Console tables of a segmentation model's evaluation."""

from rich.console import Console

from finetune.tasks.classification.tables import MAX_CLASSES_SHOWN, WORST, percent, show_damaged, table


def show_evaluation(result: dict) -> None:
    """Print damaged images, scores, all or the worst classes, and the most frequent confusions."""
    console = Console(markup=False, emoji=False, highlight=False)
    scores, classes, confusions = (result[key] for key in ("scores", "classes", "confusions"))
    show_damaged(console, result["damaged"])
    title = f"{result['weights']} on {result['data']}, split {result['split']}"
    found = table(title, [], ["images", "mIoU", "pixel accuracy", "mean accuracy"])
    shares = (scores[key] for key in ("miou", "pixel_accuracy", "mean_accuracy"))
    found.add_row(f"{scores['images']:,}", *map(percent, shares))
    console.print(found)

    shown = MAX_CLASSES_SHOWN if len(classes) <= MAX_CLASSES_SHOWN else WORST
    worst = sorted(classes, key=lambda row: row["iou"])[:shown]
    title = "classes" if len(worst) == len(classes) else f"worst of {len(classes)} classes"
    found = table(title, ["class"], ["pixels", "IoU", "accuracy", "precision"])
    for row in worst:
        rates = ("" if row[key] is None else percent(row[key]) for key in ("iou", "accuracy", "precision"))
        found.add_row(row["name"], f"{row['pixels']:,}", *rates)
    console.print(found)

    if confusions:
        found = table("most frequent confusions", ["class", "predicted as"], ["pixels", "of the class"])
        for row in confusions[:WORST]:
            found.add_row(row["label"], row["predicted"], f"{row['pixels']:,}", percent(row["share"]))
        console.print(found)
