"""Recipes: YAML files of configuration keys, by section."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from configs.errors import UserError, nearest
from configs.keys import keys
from configs.values import Config, Loader, build

RECIPES = Path(__file__).parent


def load_recipe(path: Path) -> dict[str, Any]:
    """A recipe's values by dotted key. Raises `UserError` if it cannot be read."""
    try:
        content = yaml.load(path.read_text(), Loader)
    except OSError as error:
        known = sorted(str(p.relative_to(RECIPES.parent)) for p in RECIPES.rglob("*.yaml"))
        raise UserError(f"recipe {path}: {error.strerror.lower()} {nearest(str(path), known)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} holds no keys: write lines like `optim:` and `  lr: 1e-3`")
    values = {}
    for name, value in content.items():
        section = value if isinstance(value, dict) else {}
        values |= {f"{name}.{key}": item for key, item in section.items()} or {f"{name}": value}
    return values


def recipe_section(path: Path, section: str, kind: type[Config]) -> Config:
    """One section of a recipe. Raises `UserError` for a recipe that cannot be read, an unknown key or a wrong value."""
    prefix = f"{section}."
    values = {key: value for key, value in load_recipe(path).items() if f"{key}.".startswith(prefix)}
    check_keys(path, values, [key for key, _ in keys(kind(), prefix)])
    return build(kind(), values, prefix)


def check_keys(path: Path, found: Iterable[str], valid: list[str]) -> None:
    """Raise a `UserError` for keys that are not valid, with the nearest one that is."""
    for key in found:
        if any(name.startswith(f"{key}.") for name in valid):
            raise UserError(f"{path}: section {key} holds no keys: give it some, or leave it out")
        if key not in valid:
            raise UserError(f"{path}: unknown key {key} {nearest(key, valid)}")
