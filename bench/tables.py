"""Scores and tables of Markdown pages."""

from statistics import mean


def mean_and_range(values: list[float]) -> str:
    """Mean and range over seeds, in per cent."""
    seeds = "one seed" if len(values) == 1 else f"{min(values):.2%} to {max(values):.2%}"
    return f"{mean(values):.2%} ({seeds})"


def table(head: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    return "".join(f"| {' | '.join(map(str, cells))} |\n" for cells in (head, ["---"] * len(head), *rows))
