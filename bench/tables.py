"""What pages on experiments share: saved summaries, scores, tables, links, plots."""

import json
from fnmatch import filter as matching
from itertools import cycle
from statistics import mean

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from bench.options import RESULTS
from configs.style import SERIES

K = "top1_k20"  # the number of neighbours in tables and pictures
PROBES = (("knn", K), ("linear", "top1"))  # where summaries have the accuracies of frozen features


def load(name: str) -> dict[str, dict]:
    """The saved summaries of an experiment, by name of the run."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / name).glob("*.json"))}


def by_hand(name: str) -> str:
    """A section on what was tried outside of this project; empty if there is none."""
    path = RESULTS / f"{name}.md"
    return path.read_text() if path.exists() else ""


def recipe_links(recipe: str) -> str:
    """Links to the recipes of this name for both stages."""
    names = [f"{stage}/{recipe}" for stage in ("pretrain", "finetune")]
    return " and ".join(f"[{name}](../configs/{name}.yaml)" for name in names)


def mean_and_range(values: list[float]) -> str:
    """Mean and range over seeds, in per cent."""
    seeds = "one seed" if len(values) == 1 else f"{min(values):.2%} to {max(values):.2%}"
    return f"{mean(values):.2%} ({seeds})"


def at_best_rate(runs: dict[str, dict], start: str, share: float, metric: str) -> tuple[list[float], str] | None:
    """Best scores of the fine-tunings from a start, or from all that match a pattern, and their learning rate.

    It is the rate with the most seeds; the best one if none has more than one.
    """
    by_rate: dict[str, list[float]] = {}
    for name in matching(runs, f"{start}-labels-{share:g}-lr-*-seed-[0-9]"):
        by_rate.setdefault(name.split("-lr-")[1].split("-seed-")[0], []).append(runs[name]["best"][metric])
    if not by_rate:
        return None
    rate, scores = max(by_rate.items(), key=lambda item: (len(item[1]), item[1][0]))
    return scores, rate


def table(head: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    return "".join(f"| {' | '.join(map(str, cells))} |\n" for cells in (head, ["---"] * len(head), *rows))


def last(by_epoch: dict):
    """The value of the last epoch."""
    return list(by_epoch.values())[-1]


def probed(run: dict) -> list[str]:
    """kNN and linear accuracy at the end of a pretraining; - if not evaluated."""
    return [f"{last(run[kind])[key]:.2%}" if run[kind] else "-" for kind, key in PROBES]


def frozen(trained: list[dict]) -> list[str]:
    """kNN and linear accuracy at the end of the pretrainings of several seeds."""
    return [mean_and_range([last(run[kind])[key] for run in trained]) for kind, key in PROBES]


def speed(run: dict) -> str:
    """Mean images/s of a pretraining, or crops/s."""
    unit = "crops" if "crops_per_s" in run else "images"
    return f"{mean(run[f'{unit}_per_s'].values()):,.0f} {unit}"


def plot(title: str, x: str, lines: dict[str, tuple], style: str = "o-", percent: bool = True) -> Figure:
    """A figure of one or more lines, given as {label: (x values, y values)}."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.add_subplot(xlabel=x)
    for (label, values), colour in zip(lines.items(), cycle(SERIES), strict=False):
        axes.plot(*map(list, values), style, color=colour, label=label)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    return figure
