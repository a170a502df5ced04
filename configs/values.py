"""Values of keys and options: read from text, checked against their type; and types in words."""

import json
import re
import types
from contextlib import suppress
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import TypeAdapter

from configs.errors import UserError, reason
from configs.keys import fields_of

Config = TypeVar("Config")
NULL = types.NoneType
WORDS = {int: "a whole number", float: "a number", str: "text", Path: "a path", bool: "true or false", NULL: "null"}
SYMBOLS = {int: "N", float: "X", str: "TEXT", Path: "PATH", bool: "true|false"}
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most", "multiple_of": "a multiple of"}


class Loader(yaml.SafeLoader):
    """YAML 1.1, but 1e-3 is a number and a key that is written twice an error, as in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        first = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key.value, str) and key.value in first:
                lines = sorted({first[key.value], line})
                where = f"line{'s' * (len(lines) > 1)} {' and '.join(map(str, lines))}"
                raise yaml.YAMLError(f"{key.value} is written twice, in {where}")
            first[str(key.value)] = line
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str) -> Any:
    """A YAML document. Raises `yaml.YAMLError`, also for numbers, dates and depths that Python refuses."""
    try:
        return yaml.load(text, Loader)
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError(reason(error)) from None


def members(kind: Any) -> tuple:
    """The types of a union, or the one type."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def is_list(kind: Any) -> bool:
    """Whether a type is a tuple of any length."""
    return get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis


def word_types(kind: Any) -> tuple:
    """Types of the words of an option whose value is a tuple of fixed length, or null; () for other types."""
    parts = [part for part in members(kind) if part is not NULL]
    fixed_length = len(parts) == 1 and get_origin(parts[0]) is tuple and not is_list(parts[0])
    return get_args(parts[0]) if fixed_length else ()


def in_words(kind: Any) -> str:
    """A type in words, like `a whole number above 0 or null`."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(filter(None, (", ".join(map(str, args[:-1])), str(args[-1]))))
    if origin is Annotated:  # with pydantic's limits
        limits = [limit for mark in args[1:] for limit in getattr(mark, "metadata", [mark])]
        bounds = [f"{BOUNDS[name]} {value}" for limit in limits for name, value in asdict(limit).items()]
        return f"{in_words(args[0])} {' and '.join(bounds)}"
    if origin in (tuple, dict):
        numbers = in_words(args[origin is dict]).removeprefix("a ").replace("number", "numbers")
        count = "" if is_list(kind) else f"{len(args)} "
        return f"a mapping of names to {numbers}" if origin is dict else f"a list of {count}{numbers}"
    return WORDS[kind] if kind in WORDS else " or ".join(map(in_words, args))


def notation(kind: Any) -> str:
    """A type as `--help` shows it after a flag, like `N|[N,N]`."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"{{{','.join(map(str, args))}}}"
    if origin is tuple:
        return f"[{','.join('...' if arg is Ellipsis else notation(arg) for arg in args)}]"
    if origin is Annotated:
        return notation(args[0])
    if origin is dict:
        return "{NAME:X}"
    return SYMBOLS[kind] if kind in SYMBOLS else "|".join(notation(arg) for arg in args if arg is not NULL)


def from_text(name: str, kind: Any, text: str) -> Any:
    """A value of the command line: YAML, but text where the type is text. Raises `UserError` for another type's."""
    value, parts = text, members(kind)
    if not (str in parts or Path in parts) or (text == "null" and NULL in parts):
        with suppress(yaml.YAMLError):  # then the text is no value of any other type either
            value = read_yaml(text)
    if is_list(kind) and isinstance(value, str):
        value = value.split(",")  # the brackets may be left out
    return checked(name, kind, value)


def checked(name: str, kind: Any, value: Any) -> Any:
    """A value of a type; strictly: true is no 1, 1.5 no whole number, 8 no text. Raises `UserError` for another."""
    parts = members(kind)
    if isinstance(value, str) and (str in parts or Path in parts):  # not as JSON: names of files may be any bytes
        return value if str in parts else Path(value)
    try:
        if isinstance(value, bool) and bool not in parts:
            raise ValueError  # pydantic takes true for Literal[1]
        return TypeAdapter(kind).validate_json(json.dumps(value, default=str), strict=True)  # a JSON list is a tuple
    except ValueError:
        text = value
        if isinstance(value, str) and value != "":
            with suppress(yaml.YAMLError):
                text = value if isinstance(read_yaml(value), str) else f'the text "{value}", in quotes'
        raise UserError(f"{name} is {text}: it must be {in_words(kind)}") from None


def build(config: Config, values: dict[str, Any], prefix: str = "") -> Config:
    """A configuration with some values, by dotted key, in place of its own. Raises `UserError` for a wrong one."""
    changes = {}
    for field in fields_of(config):
        key, part = f"{prefix}{field.name}", getattr(config, field.name)
        if is_dataclass(part):
            changes[field.name] = build(part, values, f"{key}.")
        elif key in values:
            changes[field.name] = checked(key, field.type, values[key])
    return replace(config, **changes)
