"""Curves of log.jsonl for report.html: which there are, and their plots as SVG."""

import io
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib
from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator, PercentFormatter

from configs.errors import printable
from configs.style import DARK, DASHES, INK, RC, SERIES, WIDTH, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOTS = {  # by title: labels of curves by their names in log.jsonl; other scores are shown under theirs
    "loss": {"loss": "training", "unlabelled/loss": "fixed images and masks"},
    "parts of the loss, without weights": {
        "lejepa/agreement": "agreement of crops", "lejepa/pixel_loss": "pixels",
        "teacher/hidden_loss": "hidden patches", "teacher/visible_loss": "visible patches",
        "teacher/pooled_loss": "whole image",
    },
    "SIGReg of embeddings (1: Gaussian)": {"lejepa/sigreg": "last micro batch"},
    "top-1 accuracy": {"raw/top1": "raw weights", "ema/top1": "moving average"},
    "evaluation loss": {"raw/loss": "raw weights", "ema/loss": "moving average"},
    "RankMe": {"unlabelled/rankme": "without labels"},
    "alpha-ReQ": {"unlabelled/alpha": "without labels"},
    "linear classifier, top-1": {"linear/top1": "best learning rate"},
    "nearest neighbours, top-1": {f"knn/top1_k{k}": f"k = {k}" for k in (10, 20, 100, 200)},
    "feature distance (0: collapsed)": {f"feature_distance/stage_{i}": f"stage {i}" for i in (1, 2, 3, 4)},
    "learning rate": {"lr": "before layer decay"},
    "gradient norm": {"grad_norm": "before clipping"},
    "images/s": {"images_per_s": "all ranks"},
    "crops/s": {"crops_per_s": "all ranks"},
}  # fmt: skip
KINDS = {"raw": "raw weights", "ema": "moving average"}
TITLES = {  # of other scores, by name
    "map": "mAP", "f1_micro": "micro F1", "f1_macro": "macro F1", "macro_f1": "macro F1", "miou": "mIoU",
    "ap": "AP", "ap50": "AP50", "ap75": "AP75", "r2": "R2", "mae": "MAE", "rmse": "RMSE",
}  # fmt: skip
NO_CURVES = ("top5", "images", "boxes")  # scores without a plot
SIGNED = ("r2", "kappa")  # beginnings of scores of at most 1, perhaps below 0
NO_SHARES = ("loss", "mae", "rmse", *SIGNED)
SCALES = (0.05, 0.1, 0.2, 0.5, 1.0)  # upper ends of axes of shares
TOPS = {"feature distance (0: collapsed)": 0.5}  # of other axes with a natural end
MAX_POINTS = 1000  # of a curve
MIN_EPOCHS = 2  # a shorter run has steps on its axis
HEIGHT = 2.7  # inches

Curve = tuple[list[int], list[float]]  # steps, values


@dataclass(frozen=True)
class Run:
    """The curves of a run: its name, entries of log.jsonl, and optimizer steps of an epoch (0 = not known)."""

    name: str
    lines: list[dict]
    steps_per_epoch: int


def curves_of(lines: Iterable[dict]) -> dict[str, dict[str, Curve]]:
    """(steps, values) of the curves in the log, by plot and label."""
    points: dict[str, Curve] = defaultdict(lambda: ([], []))
    for line in lines:
        for name, value in line.items():
            kind = name.rpartition("_")[2] if name.endswith(("_raw", "_ema")) else name  # of any split
            pairs = {f"{kind}/{key}": x for key, x in value.items()} if isinstance(value, dict) else {name: value}
            for key, x in pairs.items():
                if isinstance(x, int | float):
                    points[key][0].append(line["step"])
                    points[key][1].append(x)
    plots = {}
    for title, named in PLOTS.items():
        if curves := {label: points.pop(key) for key, label in named.items() if key in points}:
            plots[title] = curves
    for key, curve in points.items():  # scores that PLOTS does not know
        kind, _, score = key.partition("/")
        if kind in KINDS and score not in NO_CURVES:
            plots.setdefault(title_of(score), {})[KINDS[kind]] = curve
    return plots


def title_of(score: str) -> str:
    """The title of a score, such as `mAP`, or `R2: weight` of one of several numbers."""
    kind, _, name = score.partition("_")
    if score in TITLES or kind not in TITLES:
        return TITLES.get(score, score.replace("_", " "))
    return f"{TITLES[kind]}: {name}"


def draw_plots(runs: list[Run]) -> list[Markup]:
    """The plots of some runs as SVG elements; several runs are in one plot, with a colour for each."""
    found = {run.name: curves_of(run.lines) for run in runs}
    titles = dict.fromkeys(title for plots in found.values() for title in plots)
    order = sorted(titles, key=lambda title: list(PLOTS).index(title) if title in PLOTS else 1.5)  # scores come early
    known = all(run.steps_per_epoch for run in runs)
    epochs = [line["step"] / run.steps_per_epoch for run in runs for line in run.lines] if known else []
    by_epoch = max(epochs, default=0) >= MIN_EPOCHS
    drawn = []
    for title in order:
        curves = {}
        for run in runs:
            for label, (x, values) in found[run.name].get(title, {}).items():
                scale = run.steps_per_epoch if by_epoch else 1
                curves[run.name, label] = [step / scale for step in x], values
        drawn.append(_svg(title, curves, "epoch" if by_epoch else "step"))
    return drawn


Curves = dict[tuple[str, str], tuple[list[float], list[float]]]  # x and y by run and label


def _svg(title: str, curves: Curves, unit: str) -> Markup:
    """A plot as an SVG element whose colours follow the page."""
    with matplotlib.rc_context(RC | {"svg.fonttype": "none", "svg.hashsalt": title}):  # real text, reproducible bytes
        figure, out = new_figure(WIDTH, HEIGHT), io.StringIO()
        _draw(figure.add_subplot(), title, curves, unit)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]  # without the XML declaration
    for i, colour in enumerate(SERIES):
        text = text.replace(colour, f"var(--series-{i + 1})")
    text = text.replace(INK, "var(--ink)").replace(RC["grid.color"], "var(--grid)")
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{escape(printable(title))}" ', 1))


def _draw(axes: "Axes", title: str, curves: Curves, unit: str) -> None:
    """Draw curves: one run in a colour for each label, several in a colour for each run and dashes for each label."""
    runs, labels = (list(dict.fromkeys(part)) for part in zip(*curves, strict=True))
    every = [value for _, values in curves.values() for value in values if math.isfinite(value)]
    low, high = limits(title, every)
    cut = any(not low <= value <= high for value in every)  # else markers at the edge are whole
    for (run, label), (x, y) in curves.items():
        number, dash = runs.index(run), labels.index(label)
        colour = SERIES[(number if len(runs) > 1 else dash) % len(SERIES)]
        parts = [run] * (len(runs) > 1) + [label] * (len(labels) > 1)
        x, y = thinned(x, y)
        axes.plot(
            x, y, marker="o" if len(x) < 30 else "", ms=3.5, lw=1.6, color=colour, clip_on=cut,
            ls=DASHES[(dash if len(labels) > 1 else number) % len(DASHES)], label=printable(", ".join(parts)),
        )  # fmt: skip
    axes.set_title(printable(title), loc="left", parse_math=False)
    axes.set(xlabel=unit, ylim=(low, high))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    if is_share(title, every):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.grid()
    if len(curves) > 1:
        for text in axes.legend(loc="best").get_texts():
            text.set_parse_math(False)


def thinned(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    """A curve of at most `MAX_POINTS` points; the last one stays."""
    stride = -(-len(x) // MAX_POINTS)
    if stride <= 1:
        return x, y
    kept = [*range(0, len(x) - 1, stride), len(x) - 1]
    return [x[i] for i in kept], [y[i] for i in kept]


def limits(title: str, values: list[float]) -> tuple[float, float]:
    """Ends of an axis of finite values: from 0, so that noise does not look like progress; shares end at a round one.

    Scores below 0, like R2 of a poor fit, are shown down to -1.
    """
    low, high = min(values, default=0), max(values, default=1)
    if title in TOPS:
        return 0, TOPS[title]
    if is_share(title, values) or (high <= 1 and title.lower().startswith(SIGNED)):
        return min(0.0, max(-1.0, 1.1 * low)), next((scale for scale in SCALES if scale >= high), 1.0)
    bottom = min(0.0, 1.1 * low)
    return bottom, 1.08 * high if high > 0 else 0.0 if bottom else 1.0


def is_share(title: str, values: list[float]) -> bool:
    """Whether values are shares from 0 to 1, which are shown in per cent."""
    inside = all(0 <= value <= 1 for value in values)
    return "top-1" in title or (title not in PLOTS and inside and not title.lower().startswith(NO_SHARES))


def colour_rules() -> Markup:
    """CSS that sets the colours of the plots for light and for dark pages."""
    names = {INK: "ink", RC["grid.color"]: "grid"} | {colour: f"series-{i + 1}" for i, colour in enumerate(SERIES)}
    light = "; ".join(f"--{name}: {colour}" for colour, name in names.items())
    dark = "; ".join(f"--{name}: {DARK[colour]}" for colour, name in names.items())
    return Markup(f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}")
