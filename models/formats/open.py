"""Opening a file or folder of any format, without executing anything: tensors, and what stands beside them."""

import json
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from configs.errors import UserError, reason
from configs.files import sha256
from models.weights import Tensors, load_file

CONTAINERS = ("model", "state_dict", "module")  # where a checkpoint keeps the tensors
AVERAGES = ("model_ema", "state_dict_ema")  # and their moving average
CONFIG, PROCESSOR, INDEX = "config.json", "preprocessor_config.json", "model.safetensors.index.json"


class Opened(NamedTuple):
    """A file's content; nothing in it has been checked."""

    tensors: dict
    average: dict | None
    beside: dict


def open_weights(path: Path) -> Opened:
    """Open what `torch.save` or safetensors wrote, or a folder with config.json.

    Raises:
        UserError: it does not exist, is truncated, holds code, or is of another kind
    """
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".safetensors":
        tensors, metadata = _open_safetensors(path)
        beside = metadata.get("config")  # ours; other tools keep other things there
        try:
            return Opened(tensors, None, _parse(beside, path) if beside else {})
        except UserError:
            return Opened(tensors, None, {})
    content = load_file(path)
    held = [content[key] for key in CONTAINERS if isinstance(content.get(key), dict) and content[key]]
    average = next((content[key] for key in AVERAGES if isinstance(content.get(key), dict)), None)
    return Opened(held[0] if held else content, average, content)


def digest(path: str | Path) -> str:
    """Short hash of a weight file's content, or of those files of a folder that are read."""
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = [path / CONFIG, *(file for file in (path / PROCESSOR,) if file.is_file()), *_tensor_files(path)]
    return "-".join(sha256(file)[:16] for file in files)


def _open_folder(path: Path) -> Opened:
    if not (path / CONFIG).is_file():
        raise UserError(f"{path} is a folder without {CONFIG}: give a weight file, or a model folder")
    beside = _read_json(path / CONFIG)
    if (path / PROCESSOR).is_file():
        beside["preprocessor"] = _read_json(path / PROCESSOR)
    tensors: Tensors = {}
    for file in _tensor_files(path):
        tensors |= _open_safetensors(file)[0] if file.suffix == ".safetensors" else load_file(file)
    return Opened(tensors, None, beside)


def _tensor_files(path: Path) -> list[Path]:
    """The files of a folder that hold tensors: several parts, one safetensors file, or the older pytorch_model.bin."""
    if (path / INDEX).is_file():
        parts = _read_json(path / INDEX).get("weight_map")
        names = set(parts.values()) if isinstance(parts, dict) else ()
        if not names or not all(isinstance(name, str) and name.endswith(".safetensors") for name in names):
            raise UserError(f"{path / INDEX} names no files: copy it again")
        return [path / Path(name).name for name in sorted(names)]
    files = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
    if not files:
        raise UserError(f"{path} holds neither model.safetensors nor pytorch_model.bin")
    return files[:1]


def _open_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a weight file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({reason(error)}): copy it again") from None


def _read_json(path: Path) -> dict:
    return _parse(path.read_bytes(), path)


def _parse(text: str | bytes, path: Path) -> dict:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also bytes that are not UTF-8, and endless numbers
        raise UserError(f"{path} is not JSON ({reason(error)}): copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: copy it again")
    return content
