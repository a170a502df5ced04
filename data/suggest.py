"""Options and commands that fit a folder of shards, for the lines that say what to do next."""

import json
import shlex
from pathlib import Path

from configs.errors import UserError
from data.shards import Index, read_index
from data.vectors import KINDS

SIZES = {40: (32, 1), 56: (48, 1), 80: (64, 2), 112: (96, 2), 176: (128, 4)}  # shorter side up to: size, stem stride


def made_of_digits(folder: Path) -> bool:
    """Whether the shards are of the built-in digits, which have recipes of their own."""
    try:
        return json.loads((folder / "source.json").read_bytes())["source"] == "digits"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _has_masks(folder: Path) -> bool:
    """Whether the shards have masks of semantic segmentation."""
    try:
        return json.loads((folder / "index.json").read_bytes())["targets"]["kind"] == "mask"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def pretrain_command(folder: Path, index: Index) -> str:
    """The command that pretrains on a folder of shards, with sizes and channels of its images."""
    recipe = "digits" if made_of_digits(folder) else "photos"
    words = ["deepspeed", "pretrain/main.py", "--config", f"configs/pretrain/{recipe}.yaml", "--data.path", str(folder)]
    if "train" not in index.splits:
        words += ["--data.split", next(iter(index.splits))]
    if recipe == "photos":
        words += _image_options(index.survey or {})
    return shlex.join([*words, "--run.name", folder.absolute().name])


def _image_options(survey: dict) -> list[str]:
    options = []
    if "height" in survey and "width" in survey:
        shorter = min(survey["height"][1], survey["width"][1])
        for limit, (size, stride) in SIZES.items():
            if shorter <= limit:
                options += ["--data.size", str(size), "--model.stem_stride", str(stride)]
                break
    channels = {int(key.split(" ")[0]) for key in survey.get("pixels", {})}
    if len(channels) == 1 and channels.isdisjoint({2, 3, 4}):  # pictures with alpha are converted to colour
        options += ["--model.channels", str(*channels), "--data.mean", "null", "--data.std", "null"]
    return options


def finetune_command(weights: Path, config: dict) -> str:
    """The command that fine-tunes pretrained weights on the images of their run; `config` is the run's."""
    data = config["data"]
    words = ["python", "finetune/main.py", "--init", str(weights), "--data.path", data["path"]]
    if _has_masks(Path(data["path"])):
        words += ["--config", "configs/finetune/streets.yaml"]
        if config.get("model", {}).get("channels", 3) != 3:
            words += ["--augment.color_jitter", "0"]
    elif not made_of_digits(Path(data["path"])):
        words += ["--config", "configs/finetune/photos.yaml"]
        if size := data.get("size"):
            words += ["--data.size", json.dumps(size).replace(" ", "")]
        if config.get("model", {}).get("channels", 3) != 3:
            words += ["--augment.auto_augment", "null", "--data.mean", "null", "--data.std", "null"]
    return shlex.join([*words, *_task_options(data["path"]), "--run.name", f"{config['run']['name']}-finetuned"])


def _task_options(path: str) -> list[str]:
    try:
        targets = read_index(Path(path)).targets
    except UserError:  # a URL, or images without shards
        return []
    return ["--task.name", targets["kind"]] if targets and targets["kind"] in KINDS else []
