"""Where shards are: a folder of this machine or a URL. Without torch, so that a wrong path is refused at once."""

from pathlib import Path

from configs.errors import UserError


def is_url(path: str) -> bool:
    """Whether `data.path` names something else than a folder of this machine."""
    return "://" in path or "::" in path or path.startswith("pipe:")


def check_folder(folder: Path) -> None:
    """Raise `UserError` where a folder has no index of shards."""
    if (folder / "index.json").exists():
        return
    if folder.is_dir() and any(folder.glob("*.tar")):
        raise UserError(f"{folder} has tars but no index.json: run `python data/prepare.py {folder} --index`")
    raise UserError(f"no shards at {folder}: make them with `python data/prepare.py SOURCE {folder}`")
