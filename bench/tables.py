"""What pages on experiments share: saved summaries, scores, tables, links."""

import json
from statistics import mean

from bench.options import RESULTS


def load(name: str) -> dict[str, dict]:
    """The saved summaries of an experiment, by name of the run."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / name).glob("*.json"))}


def recipe_links(recipe: str) -> str:
    """Links to the recipes of this name for both stages."""
    names = [f"{stage}/{recipe}" for stage in ("pretrain", "finetune")]
    return " and ".join(f"[{name}](../configs/{name}.yaml)" for name in names)


def mean_and_range(values: list[float]) -> str:
    """Mean and range over seeds, in per cent."""
    seeds = "one seed" if len(values) == 1 else f"{min(values):.2%} to {max(values):.2%}"
    return f"{mean(values):.2%} ({seeds})"


def table(head: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    return "".join(f"| {' | '.join(map(str, cells))} |\n" for cells in (head, ["---"] * len(head), *rows))
