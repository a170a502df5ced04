"""Configurations as plain values, and how two of them differ."""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict


def to_dict(config: object) -> dict:
    """A configuration as nested dicts of plain values, for config.yaml and checkpoints."""
    return json.loads(json.dumps(asdict(config)))  # a JSON list is no tuple, which YAML would tag


def own_settings(choice: object) -> dict:
    """The keys of a section that is chosen by name, without the name, as plain values: for weight files."""
    return {key: value for key, value in to_dict(choice).items() if key != "name"}


def with_defaults(config: dict, defaults: Mapping[str, object]) -> dict:
    """A copy of nested dicts in which keys that it lacks have their defaults, which are given by dotted name."""
    filled = copy.deepcopy(config)
    for key, default in defaults.items():
        *sections, last = key.split(".")
        section = filled
        for name in sections:
            section = section.setdefault(name, {})
        section.setdefault(last, json.loads(json.dumps(default)))
    return filled


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
