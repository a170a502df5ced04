"""Console tables of evaluations."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table

from configs.errors import printable

MAX_DAMAGED = 10  # lines


def table(title: str, texts: list[str], numbers: list[str], rows: list[Sequence[str]]) -> Table:
    """A table with columns of texts, then of numbers."""
    columns = (Column(name, justify="right") for name in map(printable, numbers))
    found = Table(*map(printable, texts), *columns, title=printable(title))
    for row in rows:
        found.add_row(*map(printable, row))
    return found


def show(result: dict, *tables: Table) -> None:
    """Print the damaged images of an evaluation and its tables."""
    console, damaged = Console(markup=False, emoji=False, highlight=False), result["damaged"]
    for line in damaged[:MAX_DAMAGED]:
        console.print(printable(f"damaged, left out: {line['name']} ({line['error']})"), soft_wrap=True)
    if damaged[MAX_DAMAGED:]:
        console.print(f"and {len(damaged) - MAX_DAMAGED} more, listed in evaluation.json")
    for one in tables:
        console.print(one)


def title_of(result: dict) -> str:
    """The title of an evaluation's first table."""
    return f"{result['weights']} on {result['data']}, split {result['split']}"


def percent(share: float) -> str:
    """A share with two decimals."""
    return f"{100 * share:.2f} %"
