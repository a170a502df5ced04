"""Weight files of other projects."""

from pathlib import Path

FORMATS = ("ours", "official", "official-sparse", "timm", "timm-features", "transformers", "mmpretrain", "torchvision")


def is_folder(path: Path, form: str) -> bool:
    """Whether a format is written as a model folder: transformers', and timm's if the name has no suffix."""
    return form == "transformers" or (form == "timm" and not path.suffix)
