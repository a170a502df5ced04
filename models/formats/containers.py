"""Read tensors and metadata, unchecked, from a weight file or model folder of any format. No code is executed."""

import json
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from configs.errors import UserError, reason
from configs.files import sha256
from models.weights import Tensors, load_file

TENSOR_KEYS = ("model", "state_dict", "module")  # keys of a checkpoint's tensors
EMA_KEYS = ("model_ema", "state_dict_ema")  # and of their moving average
CONFIG, PROCESSOR, INDEX = "config.json", "preprocessor_config.json", "model.safetensors.index.json"


class Container(NamedTuple):
    """Unchecked content of a file or folder."""

    tensors: dict
    ema: dict | None
    metadata: dict


def read_container(path: Path) -> Container:
    """Read a file of `torch.save` or safetensors, or a folder with config.json.

    Raises:
        UserError: the path is missing, truncated, contains code, or is neither a weight file nor a model folder
    """
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".safetensors":
        tensors, header = _read_safetensors(path)
        config = header.get("config")  # ours is JSON; other tools use this key for other values
        try:
            return Container(tensors, None, _parse_json(config, path) if config else {})
        except UserError:
            return Container(tensors, None, {})
    content = load_file(path)
    nested = (content[key] for key in TENSOR_KEYS if isinstance(content.get(key), dict) and content[key])
    ema = next((content[key] for key in EMA_KEYS if isinstance(content.get(key), dict)), None)
    return Container(next(nested, content), ema, content)


def digest(path: str | Path) -> str:
    """Short hash of a weight file, or of the files of a model folder that `read_container` reads."""
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = [path / CONFIG, *(file for file in (path / PROCESSOR,) if file.is_file()), *_tensor_files(path)]
    return "-".join(sha256(file)[:16] for file in files)


def _read_folder(path: Path) -> Container:
    if not (path / CONFIG).is_file():
        raise UserError(f"{path} is a folder without {CONFIG}: give a weight file, or a model folder")
    metadata = _read_json(path / CONFIG)
    if (path / PROCESSOR).is_file():
        metadata["preprocessor"] = _read_json(path / PROCESSOR)
    tensors: Tensors = {}
    for file in _tensor_files(path):
        tensors |= _read_safetensors(file)[0] if file.suffix == ".safetensors" else load_file(file)
    return Container(tensors, None, metadata)


def _tensor_files(path: Path) -> list[Path]:
    """Tensor files of a model folder: the parts listed in an index, model.safetensors, or else pytorch_model.bin."""
    if (path / INDEX).is_file():
        parts = _read_json(path / INDEX).get("weight_map")
        names = set(parts.values()) if isinstance(parts, dict) else ()
        if not names or not all(isinstance(name, str) and name.endswith(".safetensors") for name in names):
            raise UserError(f"{path / INDEX} lists no files: copy it again")
        return [path / Path(name).name for name in sorted(names)]
    files = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
    if not files:
        raise UserError(f"{path} contains neither model.safetensors nor pytorch_model.bin")
    return files[:1]


def _read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a weight file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({reason(error)}): copy it again") from None


def _read_json(path: Path) -> dict:
    return _parse_json(path.read_bytes(), path)


def _parse_json(text: str | bytes, path: Path) -> dict:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also invalid UTF-8 and overlong numbers
        raise UserError(f"{path} is not JSON ({reason(error)}): copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: copy it again")
    return content
