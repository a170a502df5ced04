"""Cheap checks of paths, before torch is imported. All raise `UserError`."""

import os
from pathlib import Path

from configs.errors import UserError
from configs.hub import check_hub_library, is_hub, parse_hub


def check_exists(path: str | Path, wanted: str = "a weight file") -> None:
    """Check that a file or folder exists."""
    if not Path(path).exists():
        raise UserError(f"{path} does not exist: give {wanted}")


def check_weights(path: str, wanted: str = "a weight file") -> None:
    """Check that a weight file or model folder exists; of a name on a hub, the syntax and the library."""
    if is_hub(path):
        parse_hub(path)
        check_hub_library(path)
    else:
        check_exists(path, wanted)


def check_new(path: Path) -> None:
    """Check that a file to be written does not exist, but its folder does."""
    if path.exists():
        raise UserError(f"{path} exists: choose another name, or remove it")
    check_parent(path)


def check_png(path: Path) -> None:
    """Check that a picture to be written is named as a PNG, and that its folder exists."""
    if path.suffix.lower() != ".png":
        raise UserError(f"{path} is to be a PNG picture: end its name with .png")
    check_parent(path)


def check_parent(path: str | Path) -> None:
    """Check that a file can be written: its folder exists and is writable, and it is no folder itself."""
    folder = Path(path).parent
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: create it first")
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder: give the name of a file in it")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} is not writable: choose another folder")
