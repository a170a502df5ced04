"""What `--help` prints: every key by section, with its type, default and meaning; and types in words."""

import dataclasses
import json
import sys
import types
from collections.abc import Iterable, Mapping
from textwrap import fill
from typing import Any, Literal, Union, get_args, get_origin

from configs.keys import keys

WIDTH = 110
WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
USAGE = """\
usage: {program} [--config RECIPE.yaml] [--KEY VALUE ...] [--dry-run [RANKS]]

{about}

  --config RECIPE.yaml
      a YAML file of the keys below, which the command line overrides; by default {recipe}
  --dry-run [RANKS]
      only print the plan for so many ranks (default: this machine's): steps, parameter groups, memory
  --print_config
      print the resulting configuration, itself a recipe
  --help

Keys. Those marked * may change when a run is resumed.
"""


def help_text(schema: type, recipe: str, about: str, choices: Mapping[str, Iterable[str]]) -> str:
    """The text of `--help`; `choices` are the names that each section chosen by name can have."""
    text = [USAGE.format(program=sys.argv[0], about=about.rstrip(), recipe=recipe)]
    top = [field for field in dataclasses.fields(schema) if not dataclasses.is_dataclass(field.type)]
    text += [_entry(field.name, field) for field in top]
    for part in dataclasses.fields(schema):
        if dataclasses.is_dataclass(part.type):
            text.append(f"\n{part.name}: {part.metadata['help']}")
            for key, field in keys(part.type, f"{part.name}."):
                names = choices.get(part.name, ()) if field.name == "name" else ()
                text.append(_entry(key, field, " or ".join(names)))
    return "\n".join(text)


def _entry(key: str, field: dataclasses.Field, kind: str = "") -> str:
    mark = "*" if field.metadata["resume"] == "free" else " "
    head = f"{mark} --{key} ({kind or in_words(field.type)}; default {_shown(field.default)})"
    indent = " " * 6
    meaning = fill(
        field.metadata["help"], WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    return f"{head}\n{meaning}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def in_words(kind: Any) -> str:
    """A key's type in words, like `a whole number or null`."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        names = [str(value) for value in args]
        return f"{', '.join(names[:-1])} or {names[-1]}"
    if origin in (Union, types.UnionType):
        return " or ".join(in_words(arg) for arg in args)
    if origin is tuple:
        count = "" if args[-1] is Ellipsis else f"{len(args)} "
        return f"a list of {count}{'whole numbers' if args[0] is int else 'numbers'}"
    return "a mapping of names to numbers" if origin is dict else WORDS[kind]


def takes_text(kind: Any) -> bool:
    """Whether a key holds text only, so that its value on the command line is not to be read as YAML."""
    if get_origin(kind) in (Union, types.UnionType):
        return all(takes_text(arg) for arg in get_args(kind) if arg is not types.NoneType)
    return kind is str or (get_origin(kind) is Literal and all(isinstance(arg, str) for arg in get_args(kind)))


def takes_bool(kind: Any) -> bool:
    """Whether true and false are values of a key."""
    return kind is bool or bool in get_args(kind)
