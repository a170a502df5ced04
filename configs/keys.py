"""How a key of a configuration or an option of a command is declared, once: its type, default and help text.

A section is a frozen dataclass of `fixed` and `free` keys, a stage also has sections; the options of a command are a
dataclass of `argument` and `option`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, get_type_hints

from pydantic import Field

from configs.errors import UserError

REQUIRED = dataclasses.MISSING  # default of an option that must be given
Share = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Ratio = Annotated[float, Field(gt=0, lt=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
RAY_HELP = "run on a Ray cluster, not only on this machine: HOST:PORT of its head; alone: the one that Ray finds"


def fixed(default: Any, text: str) -> Any:
    """A key that must be equal when a run is resumed: it affects the result. `text` is its line in `--help`."""
    return dataclasses.field(default=default, metadata={"help": text, "resume": "fixed"})


def free(default: Any, text: str, alone: str | None = None) -> Any:
    """A key that may change when a run is resumed. `alone` is what its flag means without a value."""
    return dataclasses.field(default=default, metadata={"help": text, "resume": "free", "alone": alone})


def section(kind: Any, text: str) -> Any:
    """A group of keys. `text` is its heading in `--help`."""
    return dataclasses.field(default_factory=kind, metadata={"help": text})


def argument(text: str, default: Any = REQUIRED) -> Any:
    """A positional argument of a command; a tuple of any length takes several words."""
    return dataclasses.field(default=default, kw_only=True, metadata={"help": text, "positional": True})


def option(default: Any, text: str, alone: str | None = None) -> Any:
    """An option of a command, `--its-name`; a bool takes no value, a tuple of any length takes several words.

    `alone` is what it means without a value.
    """
    return dataclasses.field(default=default, kw_only=True, metadata={"help": text, "alone": alone})


def require(ok: bool, key: str, value: object, rule: str) -> None:
    """Raise a `UserError` that names the key and its value unless `ok`."""
    if not ok:
        raise UserError(f"{key} is {value}: it must be {rule}")


@dataclasses.dataclass(frozen=True)
class Choice:
    """Base of a section that is chosen by name, such as `objective`. The module of this name adds its own keys."""

    name: str = fixed("", "its name; the keys below are its own")


def fields_of(schema: Any) -> tuple[dataclasses.Field, ...]:
    """Fields of a dataclass or of an instance; their types are types, also where a module postpones annotations."""
    kind = schema if isinstance(schema, type) else type(schema)
    hints, fields = get_type_hints(kind, include_extras=True), dataclasses.fields(kind)
    for field in fields:
        field.type = hints[field.name]
    return fields


def keys(schema: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Dotted name and field of every key of a configuration, those of its sections included."""
    for field in fields_of(schema):
        part = getattr(schema, field.name, None)
        if dataclasses.is_dataclass(part):
            yield from keys(part, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field


def free_keys(config: Any) -> frozenset[str]:
    """Dotted names of the keys that may change when a run is resumed."""
    return frozenset(name for name, field in keys(config) if field.metadata["resume"] == "free")


def defaults(config: Any) -> dict[str, Any]:
    """Defaults of all keys by dotted name, those of the chosen sections included."""
    return {name: field.default for name, field in keys(config) if field.default is not REQUIRED}
