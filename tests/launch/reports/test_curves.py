"""Curves of a report: which there are, their axes, and their SVG."""

import re

import pytest

from configs.style import SERIES
from launch.reports.curves import MAX_POINTS, PLOTS, Run, colour_rules, curves_of, draw_plots, limits, thinned


def test_curves():
    lines = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "knn": {"top1_k20": 0.5}, "val_raw": {"top1": 0.25}},
        {"step": 3, "loss": 1},
    ]
    plots = curves_of(lines)
    assert plots["loss"] == {"training": ([1, 3], [2.0, 1])}
    assert plots["nearest neighbours, top-1"] == {"k = 20": ([2], [0.5])}
    assert plots["top-1 accuracy"] == {"raw weights": ([2], [0.25])} and set(plots) <= set(PLOTS)


def test_parts_of_an_objectives_loss():
    found = curves_of([{"step": 4, "lejepa": {"agreement": 0.25, "sigreg": 2.5, "pixel_loss": 0.5}}])
    assert found == {
        "parts of the loss, without weights": {"agreement of crops": ([4], [0.25]), "pixels": ([4], [0.5])},
        "SIGReg of embeddings (1: Gaussian)": {"last micro batch": ([4], [2.5])},
    }


def test_scores_of_any_task():
    lines = [
        {"step": 1, "start": {"parameters": 7}},
        {"step": 1, "val_ema": {"error": -1, "f1_macro": 0.5, "images": 9}},
    ]
    found = curves_of(lines)
    assert curves_of([{"step": 1, "val_raw": {"r2_a_b": 0.5}}]) == {"R2: a_b": {"raw weights": ([1], [0.5])}}
    assert found == {"error": {"moving average": ([1], [-1])}, "macro F1": {"moving average": ([1], [0.5])}}


@pytest.mark.parametrize(
    ("title", "values", "expected"),
    [
        ("loss", [0.95, 0.94], (0, pytest.approx(1.026))),  # noise does not fill the plot
        ("feature distance (0: collapsed)", [0.48, 0.49], (0, 0.5)),
        ("top-1 accuracy", [0.97, 0.98], (0, 1)),
        ("top-1 accuracy", [0.001, 0.024], (0, 0.05)),  # 1,000 classes
        ("mIoU", [0.3, 0.6], (0, 1)),
        ("R2", [-40.0, 0.8], (-1, 1)),
        ("MAE", [0.5], (0, pytest.approx(0.54))),
        ("error", [-2.0, -1.0], (pytest.approx(-2.2), 0)),
        ("loss", [], (0, pytest.approx(1.08))),
        ("loss", [0.0], (0, 1)),
    ],
)
def test_axes_start_where_meaning_does(title, values, expected):
    low, high = limits(title, values)
    assert (low, high) == expected and low < high


def run(name: str, steps: int, per_epoch: int) -> Run:
    lines = [{"step": step, "loss": 1 / step, "lr": 1e-3} for step in range(1, steps + 1)]
    return Run(name, lines, per_epoch)


@pytest.mark.parametrize(
    ("runs", "unit"),
    [([run("a", 40, 10)], "epoch"), ([run("a", 15, 10)], "step"), ([run("a", 40, 0)], "step"),
     ([run("a", 40, 10), run("b", 80, 20)], "epoch"), ([run("a", 40, 10), run("b", 80, 0)], "step")],
)  # fmt: skip
def test_epochs_on_the_axis_in_whole_numbers(runs, unit):
    svg = draw_plots(runs)[0]
    assert f">{unit}</text>" in svg
    horizontal = svg[svg.index('id="matplotlib.axis_1"') : svg.index('id="matplotlib.axis_2"')]
    ticks = re.findall(r">(\d[\d.]*)</text>", horizontal)
    last = max(r.lines[-1]["step"] / (r.steps_per_epoch if unit == "epoch" else 1) for r in runs)
    assert ticks and all("." not in tick for tick in ticks) and 0 < max(map(int, ticks)) <= last


def test_runs_have_colours_and_names():
    svg = draw_plots([run("first & last", 40, 10), run("other", 40, 10)])[0]
    assert "first &amp; last" in svg and "var(--series-1)" in svg and "var(--series-2)" in svg
    assert not any(colour in svg for colour in SERIES)  # all follow the page
    assert 'aria-label="loss"' in svg


def test_light_and_dark_colours():
    light, dark = str(colour_rules()).split("@media (prefers-color-scheme: dark)")
    for name in ("ink", "grid", "series-1", "series-6"):
        (one,), (other,) = (re.findall(rf"--{name}: (#\w+)", part) for part in (light, dark))
        assert one != other


def test_long_curves_are_thinned():
    x, y = thinned(list(range(12345)), list(range(12345)))
    assert len(x) <= MAX_POINTS + 1 and x[0] == 0 and x[-1] == 12344 and x == y
