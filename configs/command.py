"""The command line of both stages: recipe, dotted overrides, `--help`, `--print_config`, `--dry-run`."""

import dataclasses
import os
import re
import sys
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from configs.errors import UserError, nearest

RECIPES = Path(__file__).parent
Config = TypeVar("Config")


class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the description: they are commands."""


CONFIG_HELP = """recipe, a YAML file of the keys below; without it the built-in digits recipe, whose values
go before the defaults below"""
DRY_RUN_HELP = "only print the plan for so many ranks (default: this machine's): steps, parameter groups, memory"
USAGE = "%(prog)s [--config RECIPE.yaml] [--KEY VALUE ...] [--dry-run [RANKS]]"


def parse(schema: type[Config], recipe: str, about: str, argv: list[str] | None = None) -> Config:
    """Read a configuration: schema defaults, under a recipe (`--config`), under single keys (`--optim.lr 1e-3`).

    Args:
        schema: Pretrain or Finetune
        recipe: built-in recipe that is used without `--config`, like `pretrain/digits.yaml`
        about: description for `--help`
        argv: arguments; default the process's. DeepSpeed's `--local_rank` and `--dry-run` are dropped, `--resume` alone
            means `must`
    Raises:
        UserError: an unknown key (with the nearest valid one), a wrong value, a recipe that cannot be read
    """
    argv = _tidy(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(
        description=about,
        usage=USAGE,
        formatter_class=Formatter,
        exit_on_error=False,
        allow_abbrev=False,
        default_env=False,
    )
    parser.add_argument("--config", action="config", help=CONFIG_HELP)
    parser.add_argument("--dry-run", dest=SUPPRESS, default=SUPPRESS, nargs="?", metavar="RANKS", help=DRY_RUN_HELP)
    parser.add_class_arguments(schema, None)
    check_keys(schema, argv)
    if not any(arg == "--config" or arg.startswith("--config=") for arg in argv):
        built_in = RECIPES / recipe
        if not {"--help", "-h"} & set(argv) and not any(arg.startswith("--print_config") for arg in argv):
            say(f"no --config: using the built-in recipe {os.path.relpath(built_in)}")
        argv = ["--config", str(built_in), *argv]
    try:
        return _build(schema, parser.parse_args(argv))
    except ArgumentError as error:
        raise UserError(_explain(str(error))) from None


def dry_run(argv: list[str] | None = None) -> int | None:
    """Ranks that `--dry-run [RANKS]` asks a plan for: 0 = those of this machine; None = it was not given.

    Raises:
        UserError: not a number of ranks
    """
    _, ranks = _divide_dry_run(sys.argv[1:] if argv is None else argv)
    if not ranks:
        return None if ranks is None else 0
    if not (ranks.isdecimal() and int(ranks) > 0):
        raise UserError(f"--dry-run is {ranks}: it must be a number of ranks, like 64, or alone for this machine's")
    return int(ranks)


def say(message: str) -> None:
    """Print on the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def _divide_dry_run(argv: list[str]) -> tuple[list[str], str | None]:
    """Arguments without `--dry-run [RANKS]`, and its value: "" where it stands alone, None where it is not given."""
    rest, ranks = [], None
    for i, arg in enumerate(argv):
        name, _, value = arg.partition("=")
        if name == "--dry-run":
            ranks = value
        elif i and argv[i - 1] == "--dry-run" and not arg.startswith("--"):
            ranks = arg
        else:
            rest.append(arg)
    return rest, ranks


def _tidy(argv: list[str]) -> list[str]:
    argv = [arg for arg in _divide_dry_run(argv)[0] if not arg.startswith("--local_rank")]
    for i, arg in enumerate(argv):
        if arg == "--resume" and (i + 1 == len(argv) or argv[i + 1].startswith("--")):
            argv[i] = "--resume=must"
    return argv


def check_keys(schema: type, argv: list[str]) -> None:
    """Raise `UserError` for a key, of the command line or of a recipe, that the schema does not have."""
    valid = set(keys(schema))
    sections = {key.rsplit(".", 1)[0] for key in valid if "." in key}
    for i, arg in enumerate(argv):
        if not arg.startswith("--"):
            continue
        key, _, value = arg.removeprefix("--").partition("=")
        if key == "config":
            if not value and (i + 1 == len(argv) or argv[i + 1].startswith("--")):
                raise UserError(f"--config needs a file, like {os.path.relpath(RECIPES / 'pretrain/cifar10.yaml')}")
            path = Path(value or (argv[i + 1] if i + 1 < len(argv) else ""))
            for name in _recipe_keys(path):
                if name in sections:
                    raise UserError(f"{path}: section {name} holds no keys: give it some, or leave it out")
                if name not in valid:
                    raise UserError(f"{path}: unknown key {name} {nearest(name, valid)}")
        elif key not in valid | sections | {"help", "print_config"}:
            raise UserError(f"unknown key --{key} {nearest(key, valid | {'config', 'dry-run'})}")


def keys(schema: type) -> Iterator[str]:
    """Dotted names of all keys of a schema."""
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(field.type):
            yield from (f"{field.name}.{key}" for key in keys(field.type))
        else:
            yield field.name


def _load_recipe(path: Path) -> dict:
    """A recipe's YAML as nested dicts. Raises `UserError` if it cannot be read."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        known = sorted(str(p.relative_to(RECIPES.parent)) for p in RECIPES.rglob("*.yaml"))
        raise UserError(f"recipe {path}: {error.strerror.lower()} {nearest(str(path), known)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not YAML: {_one_line(str(error))}") from None
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} holds no keys: write lines like `optim:` and `  lr: 1e-3`")
    return content


def _recipe_keys(path: Path) -> Iterator[str]:
    def walk(prefix: str, node: dict) -> Iterator[str]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from walk(f"{prefix}{key}.", value)
            else:
                yield f"{prefix}{key}"

    return walk("", _load_recipe(path))


def _build(schema: type[Config], values: Namespace) -> Config:
    """The dataclass of parsed values; its own checks raise `UserError`."""
    fields = {}
    for field in dataclasses.fields(schema):
        value = getattr(values, field.name)
        fields[field.name] = _build(field.type, value) if dataclasses.is_dataclass(field.type) else value
    return schema(**fields)


def _explain(message: str) -> str:
    """jsonargparse's message about a wrong value, as one line: the key, the value, what it should be."""
    message = _one_line(message)
    key, value = re.search(r'Parser key "([^"]+)"', message), re.search(r"(?:Got value|Given value): (.*)$", message)
    kinds = re.findall(r"Expected an? (.+?)(?=\.? (?:- |Got|Given|Expected|$))", message)
    if not (key and value and kinds):
        return message
    names = [re.sub(r"<class '(\w+)'>|typing\.", r"\1", kind) for kind in kinds if "NoneType" not in kind]
    return f"{key[1]} is {value[1]}: it must be {' or '.join(names)}"


def _one_line(message: str) -> str:
    return re.sub(r"\s*\n\s*", " ", message.strip())


def to_dict(config: object) -> dict:
    """A configuration as nested dicts of plain values, for config.yaml and checkpoints."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(config))


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Keys whose values differ between two configurations, like `optim.lr 0.001 -> 0.002`."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key} {before} -> {after}")
    return found
