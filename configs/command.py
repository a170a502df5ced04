"""The command line of both stages: recipe, dotted overrides, `--help`, `--print_config`, `--dry-run`."""

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from configs.compare import to_dict
from configs.errors import UserError, nearest
from configs.help import help_text, in_words, takes_bool, takes_text
from configs.keys import choose, keys
from configs.log import say

RECIPES = Path(__file__).parent
ALONE = {"help": "", "print_config": "", "resume": "must", "dry-run": ""}  # flags without a value, and what they mean
Config = TypeVar("Config")


class Loader(yaml.SafeLoader):
    """YAML 1.1, but 1e-3 is a number, as in YAML 1.2."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse(
    schema: type[Config],
    recipe: str,
    about: str,
    choices: Mapping[str, Mapping[str, ModuleType]],
    argv: list[str] | None = None,
) -> Config:
    """Read a configuration: schema defaults, under a recipe (`--config`), under single keys (`--optim.lr 1e-3`).

    Args:
        schema: Pretrain or Finetune
        recipe: built-in recipe that is used without `--config`, like `pretrain/digits.yaml`
        about: description for `--help`
        choices: modules by name for each section chosen by name, like `{"objective": OBJECTIVES}`; the section has the
            keys of the chosen module's dataclass `Settings`
        argv: arguments; default the process's. `--resume` alone means `must`; `--dry-run` and DeepSpeed's
            `--local_rank` are ignored
    Returns:
        an instance of (a subclass of) `schema`
    Raises:
        UserError: an unknown key (with the nearest valid one), a wrong value, a recipe that cannot be read
    """
    flags = list(_flags(sys.argv[1:] if argv is None else argv))
    given = dict(flags)
    asks = given.keys() & {"help", "print_config"}
    built_in = os.path.relpath(RECIPES / recipe)
    if "config" not in given and not asks:
        say(f"no --config: using the built-in recipe {built_in}")
    path = Path(given.get("config", built_in))
    content = load_recipe(path)
    for key, modules in choices.items():
        part = content.get(key)
        named = part.get("name") if isinstance(part, dict) else None
        default = next(field for field in fields(schema) if field.name == key).default_factory().name
        schema = choose(schema, key, given.get(f"{key}.name") or named or default, modules)
    valid = dict(keys(schema))
    values = dict(_recipe_values(path, content, schema))
    for key, text in flags:
        if key in valid:
            values[key] = _value(valid[key], text)
        elif key not in {*ALONE, "config", "local_rank"}:
            raise UserError(f"unknown key --{key} {nearest(key, {*valid, 'config', *ALONE})}")
    if "help" in asks:
        print(help_text(schema, built_in, about, choices))
        sys.exit(0)
    config = _build(schema, values)
    if asks:
        print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
        sys.exit(0)
    return config


def dry_run(argv: list[str] | None = None) -> int | None:
    """Ranks to plan for with `--dry-run [RANKS]`: 0 = those of this machine; None = it was not given.

    Raises:
        UserError: not a number of ranks
    """
    ranks = dict(_flags(sys.argv[1:] if argv is None else argv)).get("dry-run")
    if not ranks:
        return None if ranks is None else 0
    if not (ranks.isdecimal() and int(ranks) > 0):
        raise UserError(f"--dry-run is {ranks}: it must be a number of ranks, like 64, or alone for this machine's")
    return int(ranks)


def _flags(argv: list[str]) -> Iterator[tuple[str, str]]:
    """(key, text) of `--key value` and `--key=value`. Raises `UserError` for anything else."""
    words = ["--help" if word == "-h" else word for word in argv]
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(f"{word} belongs to no key: write --KEY VALUE (see --help)")
        key, equals, text = word.removeprefix("--").partition("=")
        if not equals and words and not words[0].startswith("--") and key not in ("help", "print_config"):
            text = words.pop(0)
        elif not equals and key not in ALONE:
            example = f", like {os.path.relpath(RECIPES / 'pretrain/cifar10.yaml')}" if key == "config" else ""
            raise UserError(f"--{key} needs a {'file' if key == 'config' else 'value'}{example}")
        elif not equals:
            text = ALONE[key]
        yield key, text


def load_recipe(path: Path) -> dict:
    """A recipe's YAML as nested dicts. Raises `UserError` if it cannot be read."""
    try:
        content = yaml.load(path.read_text(), Loader)
    except OSError as error:
        known = sorted(str(p.relative_to(RECIPES.parent)) for p in RECIPES.rglob("*.yaml"))
        raise UserError(f"recipe {path}: {error.strerror.lower()} {nearest(str(path), known)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} holds no keys: write lines like `optim:` and `  lr: 1e-3`")
    return content


def recipe_section(path: Path, section: str, kind: type[Config]) -> Config:
    """One section of a recipe. Raises `UserError` for a recipe that cannot be read, an unknown key or a wrong value."""
    content = load_recipe(path).get(section, {})
    prefix = f"{section}."
    return _build(kind, dict(_recipe_values(path, content, kind, prefix)), prefix)


def _recipe_values(path: Path, content: dict, schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a recipe. Raises `UserError` for keys that the schema does not have."""
    if not isinstance(content, dict):
        raise UserError(f"{path}: section {prefix[:-1]} holds no keys: give it some, or leave it out")
    known = {field.name: field.type for field in fields(schema)}
    for name, value in content.items():
        key = f"{prefix}{name}"
        if name not in known:
            inner = f".{next(iter(value))}" if isinstance(value, dict) and value else ""
            valid = [f"{prefix}{key}" for key, _ in keys(schema)]
            raise UserError(f"{path}: unknown key {key}{inner} {nearest(f'{key}{inner}', valid)}")
        if is_dataclass(known[name]):
            yield from _recipe_values(path, value, known[name], f"{key}.")
        else:
            yield key, value


def _value(field: Field, text: str) -> Any:
    """A value of the command line: YAML, but text where the key takes text."""
    if text != "null" and takes_text(field.type):
        return text
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError:
        return text  # not a value of any other type either


def _build(schema: type[Config], values: dict[str, Any], prefix: str = "") -> Config:
    """The dataclass of values by dotted key. Raises `UserError` for a value of another type, or that it refuses."""
    valid = {f"{prefix}{key}": field.type for key, field in keys(schema)}
    nested: dict = {}
    for key, value in values.items():
        if isinstance(value, bool) and not takes_bool(valid[key]):  # pydantic takes true for Literal[1]
            raise _wrong(key, value, valid)
        *sections, name = key.removeprefix(prefix).split(".")
        part = nested
        for section in sections:
            part = part.setdefault(section, {})
        part[name] = value
    try:  # as JSON, where a list may be a tuple, but strictly: true is no 1, 1.5 no whole number, 8 no text
        return TypeAdapter(schema).validate_json(json.dumps(nested, default=str), strict=True)
    except ValidationError as error:
        place = [str(part) for part in error.errors()[0]["loc"]]
        ends = (prefix + ".".join(place[:length]) for length in range(len(place), 0, -1))
        key = next(end for end in ends if end in valid)
        raise _wrong(key, values[key], valid) from None


def _wrong(key: str, value: Any, kinds: dict[str, Any]) -> UserError:
    return UserError(f"{key} is {value}: it must be {in_words(kinds[key])}")
