"""How a key of a configuration is declared: its default, its help text, and whether it may change on resume.

A section is a frozen dataclass whose fields are `fixed` or `free`; a stage is one whose fields may also be a `section`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cache
from types import ModuleType
from typing import Any, get_type_hints

from configs.errors import UserError, nearest


def fixed(default: Any, text: str) -> Any:
    """A key that must be equal when a run is resumed: it affects the result. `text` is its line in `--help`."""
    return dataclasses.field(default=default, metadata={"help": text, "resume": "fixed"})


def free(default: Any, text: str) -> Any:
    """A key that may change when a run is resumed. `text` is its line in `--help`."""
    return dataclasses.field(default=default, metadata={"help": text, "resume": "free"})


def section(kind: type, text: str) -> Any:
    """A group of keys. `text` is its heading in `--help`."""
    return dataclasses.field(default_factory=kind, metadata={"help": text})


def require(ok: bool, key: str, value: object, rule: str) -> None:
    """Raise a `UserError` that names the key and its value unless `ok`."""
    if not ok:
        raise UserError(f"{key} is {value}: it must be {rule}")


@dataclasses.dataclass(frozen=True)
class Choice:
    """Base of a section chosen by name, such as `objective`; the other keys are the chosen module's settings."""

    name: str = fixed("", "which one")


@cache
def chosen(name: str, *settings: type) -> type:
    """The section of a choice: `name`, by default this one, and the keys of a dataclass of settings, if given."""
    key = ("name", str, fixed(name, "which one; its own keys follow"))
    for kind in settings:
        hints = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            field.type = hints[field.name]  # text where its module has `from __future__ import annotations`
    return dataclasses.make_dataclass(f"{name}_section", [key], bases=(*settings, Choice), frozen=True)


@cache
def with_section(schema: type, key: str, kind: type) -> type:
    """A subclass of a stage's schema whose section `key` is of another kind."""
    replaced = (key, kind, section(kind, _field(schema, key).metadata["help"]))
    return dataclasses.make_dataclass(schema.__name__, [replaced], bases=(schema,), frozen=True)


def choose(schema: type, key: str, name: str, modules: Mapping[str, ModuleType]) -> type:
    """The schema with section `key` as the module called `name` defines it (its `Settings`).

    Raises:
        UserError: no module has this name
    """
    if name not in modules:
        raise UserError(f"{key}.name is {name}: there is no such {key} {nearest(str(name), modules)}")
    return with_section(schema, key, chosen(name, modules[name].Settings))


def keys(schema: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Dotted name and field of every key of a schema, those of sections included."""
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(field.type):
            yield from keys(field.type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field


def free_keys(schema: type) -> frozenset[str]:
    """Dotted names of the keys that may change when a run is resumed."""
    return frozenset(name for name, field in keys(schema) if field.metadata["resume"] == "free")


def _field(schema: type, name: str) -> dataclasses.Field:
    return next(field for field in dataclasses.fields(schema) if field.name == name)
