"""Read tensors and metadata, unchecked, from a weight file or model folder of any format. No code is executed."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from configs.errors import UserError, few
from configs.files import sha256
from models.formats.files import read_file, read_json

TENSOR_KEYS = (  # keys of a checkpoint's tensors
    "model", "state_dict", "module", "model_state_dict", "model_state", "params", "net", "weights", "network",
)  # fmt: skip
EMA_KEYS = ("model_ema", "state_dict_ema", "ema_state_dict", "params_ema", "ema")  # and of their moving average
MAX_NESTING = 20  # dicts and lists inside of each other
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
INDEX = ".index.json"  # end of the name of a file that lists parts
TENSOR_FILES = (  # of model folders, in order of preference: each alone, or in parts with an index beside them
    "model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
    "pytorch_model.pth", "model.pth",
)  # fmt: skip
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")


class Container(NamedTuple):
    """Unchecked content of a file or folder."""

    tensors: dict
    ema: dict | None
    metadata: dict
    remarks: tuple[str, ...] = ()


def read_container(path: Path) -> Container:
    """Read a file of `torch.save` or safetensors, an index of parts, or a folder with one of them.

    Raises `UserError` if it is missing, truncated, contains code, or is neither a weight file nor a model folder.
    """
    if path.is_dir() or path.name.endswith(INDEX):
        return _read_folder(path)
    content, header = read_file(path)
    if header is not None:
        with suppress(KeyError, UserError):  # ours is JSON; other tools use this key for other values
            return Container(content, None, read_json(path, header["config"]))
        return Container(content, None, {})
    tensors, ema = _inner(content, TENSOR_KEYS), _inner(content, EMA_KEYS)
    if tensors is None and ema is not None:
        return Container(_flat(ema), None, content, ("it has averaged weights only",))
    return Container(_flat(content if tensors is None else tensors), ema if ema is None else _flat(ema), content)


def _inner(content: dict, keys: tuple[str, ...], depth: int = 0) -> dict | None:
    """The dict under the first of some keys, or one inside of it in the same way; None if there is none."""
    found = next((content[key] for key in keys if isinstance(content.get(key), dict) and content[key]), None)
    inner = _inner(found, TENSOR_KEYS, depth + 1) if found and depth < MAX_NESTING else None
    return found if inner is None else inner


def _flat(content: dict) -> dict:
    """Tensors of dicts and lists inside of each other, such as `{"encoder": {...}}`, under names like `encoder.x`."""
    if not any(isinstance(value, dict | list | tuple) for value in content.values()):
        return content
    return dict(_leaves(content, "", set()))


def _leaves(content: dict | list | tuple, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor); a dict or list that occurs several times, also inside of itself, is read once."""
    seen.add(id(content))
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen and prefix.count(".") < MAX_NESTING:
            yield from _leaves(value, f"{prefix}{key}.", seen)


def digest_of(path: Path) -> str:
    """Short hash of a weight file, or of the files of a model folder that `read_container` reads."""
    files = [path]
    if path.is_dir() or path.name.endswith(INDEX):
        folder = path if path.is_dir() else path.parent
        files = [file for file in (folder / CONFIG, folder / PROCESSOR) if file.is_file()] + _tensor_files(path)
    return "-".join(sha256(file)[:16] for file in files)


def _read_folder(path: Path) -> Container:
    """Read a folder, or the folder of an index."""
    folder, metadata = path if path.is_dir() else path.parent, {}
    if (folder / CONFIG).is_file():
        metadata = read_json(folder / CONFIG)
    if (folder / PROCESSOR).is_file():
        metadata["preprocessor"] = read_json(folder / PROCESSOR)
    parts = [read_container(file) for file in _tensor_files(path)]
    if len(parts) == 1:
        return parts[0]._replace(metadata=parts[0].metadata | metadata)
    return Container({name: tensor for part in parts for name, tensor in part.tensors.items()}, None, metadata)


def _tensor_files(path: Path) -> list[Path]:
    """Tensor files of an index, or of a model folder: the first of `TENSOR_FILES` in it, or its only weight file."""
    if not path.is_dir():
        return [path.parent / name for name in part_names(path)]
    for name in TENSOR_FILES:
        if (path / (name + INDEX)).is_file():
            return [path / part for part in part_names(path / (name + INDEX))]
        if (path / name).is_file():
            return [path / name]
    others = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if len(others) == 1:
        return others
    if others:
        raise UserError(f"{path} has several weight files: give one of them ({few(file.name for file in others)})")
    raise UserError(f"{path} contains no weights, such as {' or '.join(TENSOR_FILES[:2])}: give a weight file")


def part_names(index: Path) -> list[str]:
    """Names of the files that an index lists. Raises `UserError` unless they are plain names of weight files."""
    parts = read_json(index).get("weight_map")
    names = [*parts.values()] if isinstance(parts, dict) else []
    plain = all(isinstance(name, str) and name.endswith(SUFFIXES) and Path(name).name == name for name in names)
    if not names or not plain:
        raise UserError(f"{index} lists no files: copy it again")
    return sorted(set(names))
