"""Recipes: YAML files of configuration keys, by section.

A recipe may be for both stages: keys in a block `pretrain:` or `finetune:` are of that stage only, the others of both.
"""

import os
from dataclasses import Field
from pathlib import Path
from typing import Any

import yaml

from configs.errors import UserError, closest, nearest
from configs.keys import keys
from configs.secrets import WAY_OUT, has_secret
from configs.values import Config, build, checked, read_yaml

RECIPES = Path(__file__).parent
BLOCKS = ("pretrain", "finetune")


def load_recipe(path: Path, stage: str) -> dict[str, Any]:
    """A recipe's values for a stage of `BLOCKS`, by dotted key; those of the stage's block override common ones.

    Raises `UserError` if it cannot be read.
    """
    content = _read(path)
    own = content.get(stage, {})
    if not isinstance(own, dict):
        raise UserError(f"{path}: block {stage} holds no sections: give it some, or leave it out")
    common = {name: value for name, value in content.items() if name not in BLOCKS}
    return _check_secrets(path, _by_key(common) | _by_key(own))


def _check_secrets(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    for key, value in values.items():
        if isinstance(value, str) and has_secret(value):
            raise UserError(f"{path}: {key} has user info or a query in its URL: {WAY_OUT}")
    return values


def has_block(path: Path, stage: str) -> bool:
    """Whether a recipe has keys of this stage only. Errors as `load_recipe`."""
    return stage in _read(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path.read_text())
    except OSError as error:
        close = closest(str(path), (str(p.relative_to(RECIPES.parent)) for p in RECIPES.rglob("*.yaml")))
        hint = f" (nearest: {os.path.relpath(RECIPES.parent / close)})" if close else ""
        raise UserError(f"recipe {path}: {error.strerror.lower()}{hint}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} holds no keys: write lines like `optim:` and `  lr: 1e-3`")
    return content


def _by_key(content: dict[str, Any]) -> dict[str, Any]:
    """The values of sections by dotted key."""
    values = {}
    for name, value in content.items():
        section = value if isinstance(value, dict) else {}
        values |= {f"{name}.{key}": item for key, item in section.items()} or {f"{name}": value}
    return values


def recipe_section(path: Path, section: str, kind: type[Config]) -> Config:
    """One section of a pretraining recipe.

    Raises `UserError` for a recipe that cannot be read, an unknown key or a wrong value.
    """
    prefix = f"{section}."
    values = {key: value for key, value in load_recipe(path, "pretrain").items() if f"{key}.".startswith(prefix)}
    check_values(path, values, dict(keys(kind(), prefix)))
    return build(kind(), values, prefix)


def check_values(path: Path, found: dict[str, Any], fields: dict[str, Field]) -> None:
    """Raise a `UserError` for unknown keys, with the nearest valid one, and for values of a wrong type."""
    for key, value in found.items():
        if any(name.startswith(f"{key}.") for name in fields):
            raise UserError(f"{path}: section {key} holds no keys: give it some, or leave it out")
        if key not in fields:
            raise UserError(f"{path}: unknown key {key} {nearest(key, fields)}")
        checked(f"{path}: {key}", fields[key].type, value)
