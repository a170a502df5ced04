"""Console tables of a detector's evaluation."""

from rich.console import Console
from rich.table import Column, Table

from configs.errors import printable

MAX_CLASSES_SHOWN = 30


def show_evaluation(result: dict) -> None:
    """Print damaged images, scores, and all or the worst classes."""
    console = Console(markup=False, emoji=False, highlight=False)
    scores, classes = result["scores"], result["classes"]
    for line in result["damaged"]:
        console.print(printable(f"damaged, left out: {line['name']} ({line['error']})"), soft_wrap=True)
    names = [name for name in scores if "ap" in name]
    headings = [name.replace("_", " ").replace("ap", "AP") for name in names]
    numbers = (Column(name, justify="right") for name in ("images", "boxes", *headings))
    table = Table(*numbers, title=printable(f"{result['weights']} on {result['data']}, split {result['split']}"))
    table.add_row(f"{scores['images']:,}", f"{scores['boxes']:,}", *(percent(scores[name]) for name in names))
    console.print(table)
    worst = sorted(classes, key=lambda row: 2.0 if row["ap"] is None else row["ap"])[:MAX_CLASSES_SHOWN]
    names = [name for name in worst[0] if "ap" in name]
    headings = [name.replace("_", " ").replace("ap", "AP") for name in names]
    numbers = (Column(name, justify="right") for name in ("boxes", *headings))
    title = "classes" if len(worst) == len(classes) else f"worst of {len(classes)} classes"
    table = Table("class", *numbers, title=title)
    for row in worst:
        table.add_row(printable(row["name"]), f"{row['boxes']:,}", *(percent(row[name]) for name in names))
    console.print(table)


def percent(share: float | None) -> str:
    """A score as per cent; a dash if there are no boxes to score."""
    return "-" if share is None or share < 0 else f"{100 * share:.2f} %"
