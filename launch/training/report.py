"""RUN/report.html: a self-contained page with the curves, pictures, results and next commands of a run."""

import base64
import io
import json
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import jinja2
import matplotlib
import yaml
from markupsafe import Markup
from matplotlib.figure import Figure

from configs.errors import UserError, printable
from configs.files import write_atomic
from configs.shell import command
from data.shards import read_index
from launch.training.runlog import read_log

TEMPLATE = Path(__file__).with_name("report.html.jinja")
PICTURES = {  # titles by file name; other pictures are shown under their names
    "reconstruction.png": "Images of the last batch and the model's output",
    "confusion.png": "Confusion matrix of the best weights",
    "calibration.png": "Calibration of the best weights",
    "scatter.png": "Predictions of the best weights over true values",
    "examples.png": "Examples of the evaluation split, with the predictions of the best weights",
}
CURVES = {  # by title of the plot: labels of curves by their names in log.jsonl; other scores are shown under theirs
    "loss": {"loss": "training"},
    "top-1 accuracy": {"raw/top1": "raw weights", "ema/top1": "moving average"},
    "evaluation loss": {"raw/loss": "raw weights", "ema/loss": "moving average"},
    "linear classifier, top-1": {"linear/top1": "best learning rate"},
    "nearest neighbours, top-1": {f"knn/top1_k{k}": f"k = {k}" for k in (10, 20, 100, 200)},
    "feature distance (0: collapsed)": {f"feature_distance/stage_{i}": f"stage {i}" for i in (1, 2, 3, 4)},
    "learning rate": {"lr": "before layer decay"},
    "gradient norm": {"grad_norm": "before clipping"},
    "images/s": {"images_per_s": "all ranks"},
}
MAX_POINTS = 2000  # of a curve
KINDS = {"raw": "raw weights", "ema": "moving average"}
NO_CURVES = ("top5", "images")  # scores without a plot
COLOURS = ("#3b6fd4", "#d9822b", "#3a9b6a", "#a854b5")


def write_report(run: Path) -> Path:
    """Write RUN/report.html from the run's files and return its path. Raises `UserError` if RUN is not a run."""
    if not (run / "config.yaml").exists():
        raise UserError(f"{run} is not the folder of a run (no config.yaml): pass one like runs/photos")
    text, lines = (run / "config.yaml").read_text(), list(read_log(run / "log.jsonl"))
    config = yaml.safe_load(text)
    strict = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, **strict).from_string(TEMPLATE.read_text())
    pictures = {}
    for name in dict.fromkeys([*PICTURES, *sorted(path.name for path in run.glob("*.png"))]):
        if (run / name).exists():
            pictures[PICTURES.get(name, name)] = _data_url(run / name)
    shards = Path(config["data"]["path"])
    if (shards / "preview.png").exists():
        pictures["Some of the images"] = _data_url(shards / "preview.png")
    page = template.render(
        name=config["run"]["name"],
        stage="fine-tuning" if "augment" in config else "pretraining",
        results=results(run, lines),
        commands=next_commands(run, config),
        plots=[_svg(title, curves) for title, curves in curves_of(lines).items()],
        pictures=pictures,
        preview=preview(shards),
        faults=[line for line in lines if "skipped" in line or "damaged" in line],
        config=text,
    )
    write_atomic(run / "report.html", page.encode())
    return run / "report.html"


def results(run: Path, lines: list[dict]) -> dict[str, str]:
    """Results by name."""
    found = {}
    losses = [line["loss"] for line in lines if "loss" in line]
    if losses:
        found["training loss"] = f"{losses[0]:.4f} at the start, {losses[-1]:.4f} at the end"
    found["steps"] = f"{max((line['step'] for line in lines), default=0):,}"
    if knn := [line["knn"] for line in lines if "knn" in line]:
        best, k = max((value, key.removeprefix("top1_")) for key, value in knn[-1].items() if key.startswith("top1"))
        found["nearest neighbours"] = f"{best:.2%} top-1 at the end ({k})"
    if (run / "summary.json").exists():
        summary = json.loads((run / "summary.json").read_text())
        found["time and hardware"] = f"{timedelta(seconds=summary['seconds'])} on {summary['hardware']}"
        if summary["stage"] == "pretraining":
            return found
        best = summary["best"]
        which = "averaged" if best["weights"] == "ema" else "raw"
        over = f", over {best['images']:,} images" if "images" in best else ""
        where = f"in epoch {best['epoch']} of {summary['epochs']} ({which} weights){over}"
        if "shown" in summary:  # runs of earlier versions do not have it
            found["best scores"] = f"{summary['shown']}, {where}"
        found["started from"] = "scratch" if summary["init"] == "none" else summary["init"]
    return found


def preview(shards: Path) -> list[str]:
    """What data/prepare.py found in the images, line by line; none if it did not make these shards."""
    try:
        return [*map(printable, (read_index(shards).survey or {}).get("preview") or [])]
    except UserError:  # a URL, images without shards, or shards that are gone
        return []


def _data_url(path: Path) -> str:
    """A PNG as a URL that contains it."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def next_commands(run: Path, config: dict) -> dict[str, str]:
    """Commands to continue with, by purpose."""
    shards, objective = config["data"]["path"], config.get("objective", {}).get("name")
    best, pretrained = run / "best.pt", run / f"{objective}.pt"
    if best.exists():
        split = ("--split", config["eval_split"])
        evaluate = command("finetune/evaluate.py", best, shards, *split)
        compared = ("--to", "onnx", "--images", shards, *split)
        return {
            **({} if config["data"].get("folds") else {"evaluate it in detail": evaluate}),  # a fold is no split
            "use it on images in photos/": command("finetune/predict.py", best, "photos/"),
            "export it": command("finetune/export.py", best, run / "model.onnx", *compared),
            "use it in transformers": command("models/convert.py", best, run / "hf", "--to", "transformers"),
        }
    if pretrained.exists():
        following = _recorded(run)
        evaluated = config.get("probe", {}).get("eval_split", "val")
        probe = command("finetune/probe.py", pretrained, shards, "--eval-split", evaluated)
        grid = command("pretrain/reconstruct.py", "photos/", "--weights", pretrained, "--out", "grid.png")
        return {
            **({"continue": following} if following else {}),
            **({"evaluate its features by labels": probe} if "finetune/main.py" in following else {}),
            **({"draw reconstructions of images in photos/": grid} if objective == "fcmae" else {}),
            "use it in transformers": command("models/convert.py", pretrained, run / "hf", "--to", "transformers"),
        }
    return {"resume it": "run the command that started it again"}


def _recorded(run: Path) -> str:
    """The command that a pretraining has printed at its end; empty if it recorded none, as earlier versions."""
    lines = json.loads((run / "summary.json").read_text()).get("next", []) if (run / "summary.json").exists() else []
    return next((line.removeprefix("next: ") for line in lines if line.startswith("next: ")), "")


def curves_of(lines: list[dict]) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """(steps, values) of the curves in the log, by plot and label."""
    points: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    for line in lines:
        for name, value in line.items():
            kind = name.rpartition("_")[2] if name.endswith(("_raw", "_ema")) else name  # of any split
            pairs = {f"{kind}/{key}": x for key, x in value.items()} if isinstance(value, dict) else {name: value}
            for key, x in pairs.items():
                if isinstance(x, int | float):
                    points[key][0].append(line["step"])
                    points[key][1].append(x)
    plots = {}
    for title, named in CURVES.items():
        if curves := {label: points.pop(key) for key, label in named.items() if key in points}:
            plots[title] = curves
    for key, curve in points.items():  # scores that CURVES does not know
        kind, _, score = key.partition("/")
        if kind in KINDS and score not in NO_CURVES:
            plots.setdefault(score, {})[KINDS[kind]] = curve
    return plots


def _svg(title: str, curves: dict[str, tuple[list[int], list[float]]]) -> Markup:
    """A plot as an SVG element, in colours for light and dark pages."""
    figure = Figure(figsize=(5, 2.8), layout="constrained")
    axes = figure.add_subplot()
    for colour, (label, (steps, values)) in zip(COLOURS, curves.items(), strict=False):
        stride = max(1, len(steps) // MAX_POINTS)
        x, y, marker = steps[::stride], values[::stride], "o" if len(steps) < 30 else ""
        axes.plot(x, y, marker=marker, ms=3, lw=1.4, color=colour, label=label)
    axes.set_title(title, fontsize=10, color="#808080")
    axes.tick_params(labelsize=8, colors="#808080")
    axes.grid(alpha=0.25)
    axes.spines[:].set_color("#808080")
    if len(curves) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor="#808080")
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):  # real text, reproducible bytes
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return Markup(text[text.index("<svg") :])  # without the XML declaration
