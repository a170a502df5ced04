"""Model cards: the README.md of a model folder, with what the files of the run say about data, recipe and result.

Paths and addresses are cut to their last part, because a card is published. Text of files is shown as JSON or YAML in
code blocks, where it has no effect.
"""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import yaml

from configs.errors import UserError
from configs.hub import is_hub
from models.formats.files import read_json
from models.weights import Weights

NO_LICENSE = "unknown"  # a value that the hub knows
LEFT_OUT = ("run", "resume")  # of the recipe: what concerns the machine
SHOWN = 100  # class names


def model_card(weights: Weights, source: str, library: str, name: str, call: str, license_id: str | None) -> str:
    """README.md of a model folder.

    Args:
        source: where the weights were read; the files of a run beside it are used if it is one of its results
        library: timm or transformers
        name: title
        call: Python expression that loads the folder
        license_id: identifier such as `mit`; None = unknown
    """
    summary = _summary(source, weights)
    about = {"license": license_id or NO_LICENSE, "library_name": library}
    about["pipeline_tag"] = "image-classification" if weights.outputs else "image-feature-extraction"
    about["tags"] = [weights.arch.name.partition("_")[0], "convnext-fcmae"]
    parts = [f"---\n{yaml.safe_dump(about, sort_keys=False)}---", f"# {name}"]
    parts.append(replace(weights, decoder={}, ema=None).describe() + ".")
    image = weights.preprocessing
    if image.mean is not None:
        text = f"{image.channels} channels of {image.size[0]} x {image.size[1]} pixels, scaled to 0..1, then normalised"
        parts.append(f"Images: {text} with mean {_numbers(image.mean)} and std {_numbers(image.std)}.")
    parts.append(f"```python\nimport {library}\n\nmodel = {call}\n```")
    parts += ["## Data", *_data(weights, summary), "## Recipe", *_recipe(summary)]
    parts += ["## Result", *_result(summary, Path(source).stem), "## Licence", _license(license_id, summary)]
    return "\n\n".join(parts) + "\n"


def _summary(source: str, weights: Weights) -> dict:
    """summary.json beside weights of this project; empty if there is none that fits."""
    if not is_hub(source) and Path(source).suffix == ".pt":
        with suppress(UserError, OSError):
            found = read_json(Path(source).with_name("summary.json"))
            config = found.get("config")
            model = config.get("model") if isinstance(config, dict) else None
            if isinstance(model, dict) and model.get("name") in (None, weights.arch.name):
                return found
    return {}


def _data(weights: Weights, summary: dict) -> list[str]:
    data = summary.get("config", {}).get("data")
    where = _last(data.get("path", "")) if isinstance(data, dict) else ""
    parts = (
        [_block("json", json.dumps({"data": where, "split": data.get("split")}, ensure_ascii=False))] if where else []
    )
    if weights.classes:
        more = f", of which these are the first {SHOWN}" if weights.classes[SHOWN:] else ""
        names = json.dumps(weights.classes[:SHOWN], ensure_ascii=False)
        parts.append(f"{len(weights.classes)} classes{more}:\n\n{_block('json', names)}")
    return parts or ["Not recorded in the weights: describe the images here."]


def _recipe(summary: dict) -> list[str]:
    config = summary.get("config")
    if not config:
        return ["Not recorded in the weights: describe the training here."]
    kept = _public({key: value for key, value in config.items() if key not in LEFT_OUT})
    seconds, hardware = summary.get("seconds"), summary.get("hardware")
    stage = "Fine-tuning" if summary.get("stage") == "fine-tuning" else "Pretraining"
    time = f", {seconds:,} seconds on this hardware:" if isinstance(seconds, int) and hardware else ":"
    lines = [f"{stage} with convnext-fcmae{time}"]
    lines += [_block("json", json.dumps(hardware))] if time != ":" else []
    return [*lines, _block("yaml", yaml.safe_dump(kept, sort_keys=False, allow_unicode=False).rstrip())]


def _result(summary: dict, stem: str) -> list[str]:
    """Scores of the epoch that the file is of, or the last values of a pretraining."""
    best = summary.get("best" if stem == "best" else "last")
    text = "which also selected this epoch" if stem == "best" else "of the last epoch"
    if isinstance(best, dict):
        values = _scores(best)
    else:
        last = {key: summary.get(key) for key in ("loss", "knn", "linear")}
        values = {key: [*found.values()][-1] for key, found in last.items() if isinstance(found, dict) and found}
    if not values:
        return ["Not recorded in the weights: give the scores here, and what they were measured on."]
    where = f"On the validation images of the run, {text}:" if isinstance(best, dict) else "After the last epoch:"
    return [where, _block("json", json.dumps(values, indent=1))]


def _scores(values: dict) -> dict:
    """The single values, also of raw and averaged weights."""
    parts = {key: _scores(value) for key, value in values.items() if key in ("raw", "ema") and isinstance(value, dict)}
    return parts | {key: value for key, value in values.items() if isinstance(value, int | float | str)}


def _license(license_id: str | None, summary: dict) -> str:
    config = summary.get("config", {})
    objective = config.get("objective")
    teacher = objective.get("teacher") if isinstance(objective, dict) else None
    used = {"init": config.get("init"), "teacher": teacher}
    used = {key: _last(str(value)) for key, value in used.items() if value not in (None, "none")}
    text = f"`{license_id}`." if license_id else "Not given: whoever publishes this model should state one."
    if not used:
        return text
    other = "Training used other weights, whose licence may apply too:"
    return f"{text} {other}\n\n{_block('json', json.dumps(used))}"


def _public(value: object) -> object:
    """Values of a configuration, with paths and URLs cut."""
    if isinstance(value, dict):
        return {key: _public(inner) for key, inner in value.items() if key != "cache"}
    if isinstance(value, list):
        return [_public(inner) for inner in value]
    return _last(value) if isinstance(value, str) else value


def _last(path: object) -> str:
    """The last part of a path or URL, without a query, so that no folder, host, user or signature is published."""
    if is_hub(path):
        return str(path)  # public, and checked when it was read
    text = str(path).partition("?")[0].partition("#")[0].rstrip("/\\")
    return text.replace("\\", "/").rpartition("/")[2].rpartition("::")[2]


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _block(language: str, text: str) -> str:
    """A code block whose fence is longer than any in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
