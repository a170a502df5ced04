"""Command lines from dataclasses: the keys of both stages over their recipes, and the options of the other commands."""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import Field, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import yaml

from configs.compare import to_dict
from configs.errors import UserError, nearest
from configs.keys import REQUIRED, fields_of, keys
from configs.log import say
from configs.values import Config, Loader, build, checked, from_text, is_list, notation

RECIPES = Path(__file__).parent


class Parser(argparse.ArgumentParser):
    """Like its base, but keeps the lines of the description, and a mistake is a `UserError`: one line."""

    def __init__(self, **options: Any):
        more = {"allow_abbrev": False, "argument_default": argparse.SUPPRESS}
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **more, **options)
        self.add_argument("--local_rank", help=argparse.SUPPRESS)  # of DeepSpeed's launcher; RANK is read instead

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see --help)")

    def exit(self, status: int = 0, message: str | None = None) -> None:
        sys.stdout.flush()  # raises BrokenPipeError here, inside `run_main`
        super().exit(status, message)

    def read(self, schema: Any, argv: list[str] | None) -> dict[str, Any]:
        """Values by key, not yet checked. Raises `UserError` for unknown flags, with the nearest known one."""
        given, extra = self.parse_known_args(argv)
        if extra:
            word = next((word for word in extra if word.startswith("--")), extra[0]).partition("=")[0]
            hint = nearest(word, self._option_string_actions) if word.startswith("--") else "(see --help)"
            raise UserError(f"unknown {'key' if word.startswith('--') else 'argument'} {word} {hint}")
        values = vars(given)
        for key, field in keys(schema):
            if isinstance(text := values.get(key), str):
                values[key] = from_text(field.type, text)
        return values


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
        choices: modules by name for each section chosen by name, like `{"objective": OBJECTIVES}`; the section is the
            chosen module's `Settings`
        argv: arguments; default the process's. `--dry-run` and DeepSpeed's `--local_rank` are ignored
    Raises:
        UserError: an unknown key (with the nearest valid one), a wrong value, a recipe that cannot be read
    """
    built_in = os.path.relpath(RECIPES / recipe)
    first = Parser(add_help=False)  # what decides which keys there are
    for name in ("config", *(f"{key}.name" for key in choices)):
        first.add_argument(f"--{name}")
    given = vars(first.parse_known_args(argv)[0])
    path = Path(given.get("config", built_in))
    content, config = load_recipe(path), schema()
    for key, modules in choices.items():
        part = content.get(key)
        named = part.get("name") if isinstance(part, dict) else None
        name = str(given.get(f"{key}.name") or named or getattr(config, key).name)
        if name not in modules:
            raise UserError(f"{key}.name is {name}: there is no such {key} {nearest(name, modules)}")
        config = replace(config, **{key: modules[name].Settings(name=name)})

    parser = Parser(
        usage="%(prog)s [--config RECIPE.yaml] [--KEY VALUE ...] [--dry-run [RANKS]]",
        description=f"{about}\nKeys marked * may change when a run is resumed.",
    )
    add = parser.add_argument
    add("--config", metavar="RECIPE.yaml", help=f"YAML file of the keys below, which these override; else {built_in}")
    ranks = "only print the plan for so many ranks (default: this machine's): steps, parameter groups, memory"
    add("--dry-run", nargs="?", metavar="RANKS", help=ranks)
    add("--print_config", action="store_true", help="print the resulting configuration, itself a recipe")
    _add_keys(parser, config, choices)
    flags = parser.read(config, argv)
    config = build(config, _recipe_values(path, content, config) | flags)
    if "print_config" in flags:
        print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
        parser.exit()
    if "config" not in flags:
        say(f"no --config: using the built-in recipe {built_in}")
    return config


def parse_options(kind: type[Config], about: str, argv: list[str] | None = None, prog: str | None = None) -> Config:
    """The options of a command: a dataclass of `argument` and `option` fields. Raises `UserError` for a mistake."""
    parser = Parser(description=about, prog=prog)
    _add_keys(parser, kind)
    values = parser.read(kind, argv)
    options = {}
    for field in fields_of(kind):
        if field.name in values:
            flag, value = _flag(field.name, field), values[field.name]
            if is_list(field.type):
                element = get_args(field.type)[0]
                options[field.name] = tuple(checked(flag, element, from_text(element, text)) for text in value)
            else:
                options[field.name] = checked(flag, field.type, value)
    return kind(**options)


def dry_run(argv: list[str] | None = None) -> int | None:
    """Ranks to plan for with `--dry-run [RANKS]`: 0 = those of this machine; None = it was not given.

    Raises:
        UserError: not a number of ranks
    """
    parser = Parser(add_help=False)
    parser.add_argument("--dry-run", nargs="?", const=0, default=None)
    ranks = parser.parse_known_args(argv)[0].dry_run
    if isinstance(ranks, str) and not (ranks.isdecimal() and int(ranks) > 0):
        raise UserError(f"--dry-run is {ranks}: it must be a number of ranks, like 64, or alone for this machine's")
    return ranks if ranks is None else int(ranks)


def _add_keys(parser: Any, schema: Any, choices: Mapping[str, Iterable[str]] | None = None, prefix: str = "") -> None:
    """Add every key of a dataclass, or of an instance with its defaults; those of a section as a group."""
    for field in fields_of(schema):
        default = getattr(schema, field.name, field.default)
        key = f"{prefix}{field.name}"
        if is_dataclass(default):
            group = parser.add_argument_group(key, field.metadata["help"])
            _add_keys(group, default, choices, f"{key}.")
        else:
            names = (choices or {}).get(prefix[:-1]) if field.name == "name" else None
            _add_key(parser, key, field, default, f"{{{','.join(names)}}}" if names else notation(field.type))


def _add_key(parser: Any, key: str, field: Field, default: Any, metavar: str) -> None:
    about, of_stage, several = field.metadata, "resume" in field.metadata, is_list(field.type)
    words = {"dest": key, "metavar": metavar, "required": default is REQUIRED}
    shown = default if isinstance(default, str) else json.dumps(default, separators=(",", ":"), default=str)
    if not of_stage and several:
        words |= {"metavar": notation(get_args(field.type)[0]), "nargs": "*" if default == () else "+"}
        shown = "" if default in (REQUIRED, ()) else " ".join(map(str, default))
    elif not of_stage and field.type is bool:
        words, shown = {"dest": key, "action": "store_true"}, ""
    elif not of_stage and default in (REQUIRED, None):
        shown = ""
    if about.get("positional"):
        words = {"metavar": key.upper(), "nargs": words.get("nargs", None if default is REQUIRED else "?")}
    elif alone := about.get("alone"):
        words |= {"nargs": "?", "const": alone}
    text = f"{'* ' if about.get('resume') == 'free' else ''}{about['help']}{f' (default {shown})' if shown else ''}"
    parser.add_argument(_flag(key, field), help=text.replace("%", "%%"), **words)


def _flag(key: str, field: Field) -> str:
    if field.metadata.get("positional"):
        return key
    return f"--{key}" if "resume" in field.metadata else f"--{key.replace('_', '-')}"


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
    content, prefix = load_recipe(path), f"{section}."
    return build(kind(), _recipe_values(path, content.get(section, {}), kind(), prefix), prefix)


def _recipe_values(path: Path, content: dict, schema: Any, prefix: str = "") -> dict[str, Any]:
    """Values of a recipe by dotted key. Raises `UserError` for keys that the schema does not have."""
    valid = [f"{prefix}{key}" for key, _ in keys(schema)]
    values = dict(_flat(content, valid, prefix))
    for key in values.keys() - set(valid):
        if any(name.startswith(f"{key}.") for name in valid):
            raise UserError(f"{path}: section {key} holds no keys: give it some, or leave it out")
        raise UserError(f"{path}: unknown key {key} {nearest(key, valid)}")
    return values


def _flat(content: dict, valid: list[str], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value and key not in valid:
            yield from _flat(value, valid, f"{key}.")
        else:
            yield key, value
