"""Facts about a run, for its log and report: when, on what and by which code it was made."""

import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from torch import nn

from data.shards import Split
from launch.training.summary import hardware, local_cores
from launch.training.world import World

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "torchvision", "timm", "deepspeed")
GIT_SECONDS = 20


def facts(model: str, counted: nn.Module, precision: str, world: World, train: Split, evaluated: Split | None) -> dict:
    """Plain values for `Trainer`: `model` is its name, `counted` has its parameters, `precision` is the one in use.

    Empty on ranks that do not write the log.
    """
    if not world.first:
        return {}
    images = {train.name: len(train)} | ({evaluated.name: len(evaluated)} if evaluated is not None else {})
    return {
        "model": model,
        "parameters": sum(p.numel() for p in counted.parameters()),
        "images": images,
        "classes": len(train.classes or ()),
        "precision": precision,
        "ranks": world.ranks,
        "hardware": hardware(world.device, world.ranks, local_cores()),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "commit": commit(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit(folder: Path = ROOT) -> str:
    """Commit of the code, with `-dirty` if tracked files differ from it; empty outside a git checkout."""
    words = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):  # no git, or a slow file system
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
