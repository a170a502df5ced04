"""What follows a pretraining: the command that fine-tunes, or why there is none."""

import json
import os
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.keys import keys
from configs.recipes import RECIPES, has_block, load_recipe
from configs.schema import Finetune, Pretrain
from configs.shell import command
from data.folder import Folder, count_labels
from data.shards import Split
from launch.plans.facts import TASKS, evaluated_split, look_at, target_kind, why_no_finetuning

LOOKED = 8  # images


def after_pretraining(weights: Path, config: Pretrain, recipe: Path, images: Split | Folder) -> list[str]:
    """Lines that end in `next: COMMAND`: fine-tuning on the labels of the images; without labels, their features.

    Args:
        weights: what the run has written
        config: its configuration
        recipe: that it was started with; its block `finetune` is used if it has one
        images: its split
    """
    try:
        splits = count_labels(config.data.path)
        evaluated, kind = evaluated_split(splits), target_kind(config.data.path)
        if kind and evaluated:
            task, name = TASKS[kind]
            recipe = Path(os.path.relpath(RECIPES / f"finetune/{name}.yaml"))
            flags = ["--task.name", task, *_flags(load_recipe(recipe, "finetune"), config, images, evaluated)]
            return [f"next: {command('finetune/main.py', '--config', recipe, '--init', weights, *flags)}"]
        if problem := why_no_finetuning(splits, evaluated, kind):
            words = (weights, config.data.path, f"{config.run.name}.parquet", "--split", config.data.split)
            return [problem, f"next: {command('finetune/embed.py', *words)}"]
        recipe = recipe if has_block(recipe, "finetune") else finetuning_recipe(recipe)
        flags = _flags(load_recipe(recipe, "finetune"), config, images, evaluated)
        return [f"next: {command('finetune/main.py', '--config', recipe, '--init', weights, *flags)}"]
    except UserError as error:  # images that are gone: the run is complete nevertheless
        return [f"no command to continue with: {error}"]


def finetuning_recipe(recipe: Path) -> Path:
    """The recipe in configs/finetune that follows one in configs/pretrain: of the same name, with `-1k` (ImageNet), or
    without last words (`cifar10-small-lejepa` is for the images of `cifar10-small`); else that of photographs."""
    pretraining = RECIPES / "pretrain"
    if recipe.absolute().is_relative_to(pretraining):
        folder = RECIPES / "finetune" / recipe.absolute().parent.relative_to(pretraining)
        words = recipe.stem.split("-")
        shorter = ("-".join(words[:count]) for count in range(len(words), 0, -1))
        for name in (f"{recipe.stem}-1k", *shorter):
            if (folder / f"{name}.yaml").exists():
                return Path(os.path.relpath(folder / f"{name}.yaml"))
    return Path(os.path.relpath(RECIPES / "finetune/photos.yaml"))


def _flags(values: dict[str, Any], config: Pretrain, images: Split | Folder, evaluated: str) -> list[str]:
    """Flags for what a recipe says otherwise than the images or the pretraining need."""
    data, channels = config.data, config.model.channels
    wanted = {"data.path": data.path, "data.size": data.size, "eval_split": evaluated, "run.folder": config.run.folder}
    wanted |= {"run.name": f"{config.run.name}-finetuned", "data.max_pixels": data.max_pixels}
    mean, std = data.statistics(channels)
    if (values.get("data.mean"), values.get("data.std")) not in ((None, None), (list(mean), list(std))):
        wanted |= {"data.mean": None, "data.std": None}  # those of --init
    if channels != 3 or any(look.deep for look in look_at(images, LOOKED)):
        wanted["augment.auto_augment"] = None  # policies need 3 channels of 8 bits
    if channels != 3:
        wanted["augment.color_jitter"] = 0.0
    defaults = {key: field.default for key, field in keys(Finetune())}
    words = []
    for key, value in wanted.items():
        plain = list(value) if isinstance(value, tuple) else value
        if plain != values.get(key, defaults[key]):
            text = plain if isinstance(plain, str) else json.dumps(plain, separators=(",", ":"))
            words += [f"--{key}", text]
    return words
