"""Console tables of a detector's evaluation."""

from rich.console import Console

from configs.errors import printable
from finetune.tasks.tables import percent, table, title_of

MAX_CLASSES_SHOWN = 30


def show_evaluation(result: dict) -> None:
    """Print damaged images, scores, and all or the worst classes."""
    console = Console(markup=False, emoji=False, highlight=False)
    scores, classes = result["scores"], result["classes"]
    for line in result["damaged"]:
        console.print(printable(f"damaged, left out: {line['name']} ({line['error']})"), soft_wrap=True)
    names = [name for name in scores if "ap" in name]
    headings = [name.replace("_", " ").replace("ap", "AP") for name in names]
    row = [f"{scores['images']:,}", f"{scores['boxes']:,}", *(score(scores[name]) for name in names)]
    console.print(table(title_of(result), [], ["images", "boxes", *headings], [row]))
    worst = sorted(classes, key=lambda row: 2.0 if row["ap"] is None else row["ap"])[:MAX_CLASSES_SHOWN]
    names = [name for name in worst[0] if "ap" in name]
    headings = [name.replace("_", " ").replace("ap", "AP") for name in names]
    title = "classes" if len(worst) == len(classes) else f"worst of {len(classes)} classes"
    rows = [[row["name"], f"{row['boxes']:,}", *(score(row[name]) for name in names)] for row in worst]
    console.print(table(title, ["class"], ["boxes", *headings], rows))


def score(share: float | None) -> str:
    """A score as per cent; a dash if there are no boxes to score."""
    return "-" if share is None or share < 0 else percent(share)
