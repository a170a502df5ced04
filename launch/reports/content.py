"""What the page says of a run: facts, results, and commands to continue with."""

import json
from datetime import datetime, timedelta
from pathlib import Path

from configs.errors import UserError, counted, printable
from configs.shell import command
from data.shard_index import read_index
from launch.training.plateau import verdict


def facts_of(config: dict, starts: list[dict]) -> dict[str, str]:
    """What a run is, by name: model, data, precision, date, code. Runs of earlier versions have few `starts`."""
    first, last = (starts[0], starts[-1]) if starts else ({}, {})
    found, optim = {}, config.get("optim", {})
    if last.get("model"):
        found["model"] = f"{last['model']}, {last['parameters'] / 1e6:.1f}M parameters"
    if "task" in last:
        found["task"] = f"{config['task']['name']}, {last['task']}"
    found["masking"] = last.get("objective", "")
    found["data"] = str(config["data"]["path"])
    found["images"] = ", ".join(f"{count:,} {split}" for split, count in last.get("images", {}).items())
    if last.get("classes") and "task" not in last:
        found["classes"] = f"{last['classes']:,}"
    if optim:
        unit = "crop" if config["data"].get("repeats", 1) > 1 else "image"
        found["training"] = f"{counted(optim['epochs'], 'epoch')} in batches of {counted(optim['batch_size'], unit)}"
    found["precision"] = last.get("precision", "")
    if first.get("date"):
        again = f", resumed {counted(len(starts) - 1, 'time')}" if len(starts) > 1 else ""
        found["date"] = f"{datetime.fromisoformat(first['date']):%-d %B %Y, %H:%M} UTC{again}"
    found["hardware"] = last.get("hardware", "")
    found["versions"] = ", ".join(f"{name} {version}" for name, version in last.get("versions", {}).items())
    found["commit"] = last.get("commit", "").replace("-dirty", ", with changes")
    return {name: printable(value) for name, value in found.items() if value}


def results(run: Path, lines: list[dict]) -> dict[str, str]:
    """Results by name, the most important first."""
    found, summary = {}, {}
    if (run / "summary.json").exists():
        summary = json.loads((run / "summary.json").read_text())
    if "best" in summary:
        best = summary["best"]
        which = "averaged" if best["weights"] == "ema" else "raw"
        over = f", over {best['images']:,} images" if "images" in best else ""
        where = f"in epoch {best['epoch']} of {summary['epochs']} ({which} weights){over}"
        if "shown" in summary:  # runs of earlier versions do not have it
            found["best scores"] = f"{summary['shown']}, {where}"
        found["started from"] = "scratch" if summary["init"] == "none" else summary["init"]
    if knn := [line["knn"] for line in lines if "knn" in line]:
        best, k = max((value, key.removeprefix("top1_")) for key, value in knn[-1].items() if key.startswith("top1"))
        found["nearest neighbours"] = f"{best:.2%} top-1 at the end ({k})"
    if shown := progress(lines):
        found["without labels"] = shown
    losses = [line["loss"] for line in lines if "loss" in line]
    if losses:
        found["training loss"] = f"{losses[0]:.4f} at the start, {losses[-1]:.4f} at the end"
    found["steps"] = f"{max((line['step'] for line in lines), default=0):,}"
    if summary:
        found["time"] = f"{timedelta(seconds=summary['seconds'])} on {summary['hardware']}"
    return {name: printable(value) for name, value in found.items()}


def progress(lines: list[dict]) -> str:
    """What the evaluations without labels show; empty if there are none."""
    evaluated = {line["step"]: line["unlabelled"] for line in lines if "unlabelled" in line}
    steps = next((line["start"].get("steps_per_epoch", 1) for line in reversed(lines) if "start" in line), 1)
    names, last = {"loss": "loss", "rankme": "RankMe", "alpha": "alpha-ReQ"}, list(evaluated.values())[-1:]
    shown = ", ".join(f"{names[name]} {value:.4g}" for values in last for name, value in values.items())
    history = {-(-step // steps): values for step, values in evaluated.items()}
    return f"{verdict(history)} ({shown})" if evaluated else ""


def preview(shards: Path) -> list[str]:
    """What data/prepare.py found in the images, line by line; none if it did not make these shards."""
    try:
        return [*map(printable, (read_index(shards).survey or {}).get("preview") or [])]
    except UserError:  # a URL, images without shards, or shards that are gone
        return []


def next_commands(run: Path, config: dict) -> dict[str, str]:
    """Commands to continue with, by purpose."""
    shards, objective = config["data"]["path"], config.get("objective", {}).get("name")
    recorded = _recorded(run)
    best, pretrained = run / "best.pt", run / recorded.get("weights", f"{objective}.pt")
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
        lines = recorded.get("next", [])  # what the pretraining has printed at its end
        following = next((line.removeprefix("next: ") for line in lines if line.startswith("next: ")), "")
        evaluated = config.get("probe", {}).get("eval_split", "val")
        probe = command("finetune/probe.py", pretrained, shards, "--eval-split", evaluated)
        grid = command("pretrain/reconstruct.py", "photos/", "--weights", pretrained, "--out", "grid.png")
        return {
            **({"continue": following} if following else {}),
            **({"evaluate its features by labels": probe} if "finetune/main.py" in following else {}),
            **({"draw reconstructions of images in photos/": grid} if pretrained.name == "fcmae.pt" else {}),
            "use it in transformers": command("models/convert.py", pretrained, run / "hf", "--to", "transformers"),
        }
    return {"resume it": "run the command that started it again"}


def _recorded(run: Path) -> dict:
    """The summary of a run; empty before its end. Those of earlier versions have fewer keys."""
    return json.loads((run / "summary.json").read_text()) if (run / "summary.json").exists() else {}
