"""Command lines from dataclasses: the keys of both stages over their recipes, and the options of the other commands."""

import argparse
import json
import os
import re
import sys
from dataclasses import is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import yaml

from configs.compare import to_dict
from configs.errors import UserError, nearest
from configs.keys import REQUIRED, fields_of, keys, require
from configs.log import say
from configs.recipes import RECIPES, check_values, load_recipe
from configs.values import Config, build, from_text, is_list, notation, word_types


class Parser(argparse.ArgumentParser):
    """Like its base, but keeps the lines of the description, and a mistake is a `UserError`: one line."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # so that -1e-3 is a value, as in Python 3.14
        self.add_argument("--local_rank", help=argparse.SUPPRESS)  # of DeepSpeed's launcher; RANK is read instead

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see --help)")

    def exit(self, status: int = 0, message: str | None = None) -> None:
        sys.stdout.flush()  # raises BrokenPipeError here, inside `run_main`
        super().exit(status, message)

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
        given, extra = self.parse_known_args(argv)
        if flag := next((word.partition("=")[0] for word in extra if word.startswith("--")), None):
            raise UserError(f"unknown key {flag} {nearest(flag, self._option_string_actions)}")
        if extra:
            self.error(f"unknown argument {extra[0]}")
        return given


def parse(
    schema: type[Config], recipe: str, about: str, choices: dict[str, dict[str, Any]], argv: list[str] | None = None
) -> Config:
    """Read a configuration: schema defaults, under a recipe (`--config`), under single keys (`--optim.lr 1e-3`).

    Args:
        schema: Pretrain or Finetune
        recipe: built-in recipe that is used without `--config`, like `pretrain/digits.yaml`
        about: description for `--help`
        choices: modules by name, for each section that is the `Settings` of one, like `{"objective": OBJECTIVES}`
        argv: default the process's; `--dry-run`, `--parameters`, `--restarts` and `--local_rank` are ignored
    Raises:
        UserError: an unknown key (with the nearest valid one), a wrong value, a recipe that cannot be read
    """
    built_in = os.path.relpath(RECIPES / recipe)
    first = Parser(add_help=False, argument_default=argparse.SUPPRESS)  # reads what decides which keys there are
    for name in ("config", *(f"{key}.name" for key in choices)):
        first.add_argument(f"--{name}")
    given = vars(first.parse_known_args(argv)[0])
    path, config = Path(given.get("config", built_in)), schema()
    values = load_recipe(path, schema.__name__.lower())
    for key, modules in choices.items():
        own = values.get(f"{key}.name", getattr(config, key).name)
        name = str(given.get(f"{key}.name", own))
        if "config" not in given and name != own:  # the built-in recipe is for another one
            values = {each: value for each, value in values.items() if not each.startswith(f"{key}.")}
        if name not in modules:
            raise UserError(f"{key}.name is {name}: there is no such {key} {nearest(name, modules)}")
        values = _of_choice(key, name, str(values.get(f"{key}.name", getattr(config, key).name)), modules, values, path)
        config = replace(config, **{key: modules[name].Settings(name=name)})

    parser = Parser(
        usage="%(prog)s [--config RECIPE.yaml] [--KEY VALUE ...] [--restarts N] [--dry-run [RANKS] [--parameters]]",
        description=f"{about}\nKeys marked * may change when a run is resumed.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--config", metavar="RECIPE.yaml", help=f"YAML file of the keys below, which these override; else {built_in}")
    plan = "only print the plan for this many ranks (default: this machine's): steps, parameter groups, memory"
    add("--dry-run", nargs="?", metavar="RANKS", help=plan)
    add("--parameters", action="store_true", help="with --dry-run: also shape, weight decay and rate of each parameter")
    add("--print_config", action="store_true", help="print the resulting configuration, itself a recipe")
    again = "restart up to N times from the newest checkpoint if a process or machine is lost or hangs (default 0)"
    add("--restarts", metavar="N", help=again)
    _add_keys(parser, config, {f"{key}.name": f"{{{','.join(modules)}}}" for key, modules in choices.items()})
    flags = vars(parser.parse_args(argv))
    check_values(path, values, dict(keys(config)))
    config = build(config, values | flags)
    if "print_config" in flags:
        print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
        parser.exit()
    if "config" not in flags:
        say(f"no --config: using the built-in recipe {built_in}")
    every_parameter(argv)  # raises
    restarts(argv)
    return config


def _of_choice(
    key: str, name: str, other: str, modules: dict[str, Any], values: dict[str, Any], path: Path
) -> dict[str, Any]:
    """A recipe's values without the keys of its choice `other` if the command line chooses another `name`."""
    if name == other or other not in modules:
        return values
    own = {f"{key}.{field.name}" for field in fields_of(modules[other].Settings)} - {f"{key}.name"}
    if dropped := sorted(own & values.keys()):
        say(f"{path}: {', '.join(dropped)} left out, because {key}.name is {name} instead of {other}")
    return {one: value for one, value in values.items() if one not in own}


def _add_keys(parser: Any, config: Any, metavars: dict[str, str], prefix: str = "") -> None:
    """Add a flag for every key, with its default; those of a section as a group."""
    for field in fields_of(config):
        key, default, about = f"{prefix}{field.name}", getattr(config, field.name), field.metadata
        if is_dataclass(default):
            _add_keys(parser.add_argument_group(key, about["help"]), default, metavars, f"{key}.")
            continue
        shown = default if isinstance(default, str) else json.dumps(default, separators=(",", ":"))
        text = f"{'* ' if about['resume'] == 'free' else ''}{about['help']} (default {shown})".replace("%", "%%")
        alone = {"nargs": "?", "const": about["alone"]} if about.get("alone") else {}
        metavar = metavars.get(key) or notation(field.type)
        parser.add_argument(f"--{key}", type=partial(from_text, key, field.type), metavar=metavar, help=text, **alone)


def parse_options(kind: type[Config], about: str, argv: list[str] | None = None, prog: str | None = None) -> Config:
    """The options of a command: a dataclass of `argument` and `option` fields. Raises `UserError` for a mistake."""
    parser, fields = Parser(description=about, prog=prog), fields_of(kind)
    for field in fields:
        positional, required, several = "positional" in field.metadata, field.default is REQUIRED, is_list(field.type)
        name = field.name if positional else f"--{field.name.replace('_', '-')}"
        text = field.metadata["help"].replace("%", "%%")
        if field.type is bool:
            parser.add_argument(name, action="store_true", help=text)
            continue
        words = word_types(field.type)
        element = get_args(field.type)[0] if several else words[0] if words else field.type
        more = {"metavar": name.upper()} if positional else {"metavar": notation(element), "required": required}
        if words:
            more |= {"nargs": len(words), "metavar": (more["metavar"],) * len(words)}
        elif several:
            more["nargs"] = "*" if field.default == () else "+"
        elif positional and not required:
            more["nargs"] = "?"
        elif field.metadata.get("alone"):
            more |= {"nargs": "?", "const": field.metadata["alone"]}
        if field.default not in (REQUIRED, None, ()):
            text += f" (default {' '.join(map(str, field.default)) if several else field.default})"
        parser.add_argument(name, type=partial(from_text, name, element), default=field.default, help=text, **more)
    given = vars(parser.parse_args(argv))
    values = {field.name: given[field.name] for field in fields}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def given_recipe(default: str, argv: list[str] | None = None) -> Path:
    """The recipe of `--config`, else the built-in one, like `pretrain/digits.yaml`."""
    parser = Parser(add_help=False)
    parser.add_argument("--config", type=Path, default=Path(os.path.relpath(RECIPES / default)))
    return parser.parse_known_args(argv)[0].config


def every_parameter(argv: list[str] | None = None) -> bool:
    """Whether `--parameters` was given. Raises `UserError` without `--dry-run`, which it belongs to."""
    parser = Parser(add_help=False)
    parser.add_argument("--parameters", action="store_true")
    given = parser.parse_known_args(argv)[0].parameters
    require(not given or dry_run(argv) is not None, "--parameters", "given", "with --dry-run, or left out")
    return given


def dry_run(argv: list[str] | None = None) -> int | None:
    """Ranks of `--dry-run [RANKS]`: 0 = this machine's; None = not given. Raises `UserError` for no number of ranks."""
    parser = Parser(add_help=False)
    parser.add_argument("--dry-run", nargs="?", const=0)
    ranks = parser.parse_known_args(argv)[0].dry_run
    if not isinstance(ranks, str):
        return ranks
    valid = ranks.isdecimal() and int(ranks) > 0
    require(valid, "--dry-run", ranks, "a number of ranks, like 64, or alone for this machine's")
    return int(ranks)


def restarts(argv: list[str] | None = None) -> int:
    """N of `--restarts N`; 0 = not given. Raises `UserError` for no number."""
    parser = Parser(add_help=False)
    parser.add_argument("--restarts", default="0")
    number = parser.parse_known_args(argv)[0].restarts
    require(number.isdecimal(), "--restarts", number, "a number of restarts, like 10")
    return int(number)
