"""Read tensors and metadata, unchecked, from a weight file or model folder of any format. No code is executed."""

import argparse
import json
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from configs.errors import UserError, reason
from configs.files import sha256

TENSOR_KEYS = (  # keys of a checkpoint's tensors
    "model", "state_dict", "module", "model_state_dict", "model_state", "params", "net", "weights", "network",
)  # fmt: skip
EMA_KEYS = ("model_ema", "state_dict_ema", "ema_state_dict", "params_ema", "ema")  # and of their moving average
CONFIG, PROCESSOR, INDEX = "config.json", "preprocessor_config.json", "model.safetensors.index.json"


class Container(NamedTuple):
    """Unchecked content of a file or folder."""

    tensors: dict
    ema: dict | None
    metadata: dict
    remarks: tuple[str, ...] = ()


def read_container(path: Path) -> Container:
    """Read a file of `torch.save` or safetensors, or a folder with config.json.

    Raises `UserError` if it is missing, truncated, contains code, or is neither a weight file nor a model folder.
    """
    if path.is_dir():
        return _read_folder(path)
    content, header = _read_file(path)
    if path.suffix == ".safetensors":
        with suppress(KeyError, UserError):  # ours is JSON; other tools use this key for other values
            return Container(content, None, _read_json(path, header["config"]))
        return Container(content, None, {})
    tensors, ema = _inner(content, TENSOR_KEYS), _inner(content, EMA_KEYS)
    if tensors is None and ema is not None:
        return Container(ema, None, content, ("it has averaged weights only",))
    return Container(content if tensors is None else tensors, ema, content)


def _inner(content: dict, keys: tuple[str, ...]) -> dict | None:
    """The dict under the first of some keys, or one inside of it in the same way; None if there is none."""
    found = next((content[key] for key in keys if isinstance(content.get(key), dict) and content[key]), None)
    inner = _inner(found, TENSOR_KEYS) if found else None
    return found if inner is None else inner


def digest(path: str | Path) -> str:
    """Short hash of a weight file, or of the files of a model folder that `read_container` reads."""
    path, files = Path(path), [Path(path)]
    if path.is_dir():
        files = [file for file in (path / CONFIG, path / PROCESSOR) if file.is_file()] + _tensor_files(path)
    return "-".join(sha256(file)[:16] for file in files)


def _read_folder(path: Path) -> Container:
    if not (path / CONFIG).is_file():
        raise UserError(f"{path} is a folder without {CONFIG}: give a weight file, or a model folder")
    metadata = _read_json(path / CONFIG)
    if (path / PROCESSOR).is_file():
        metadata["preprocessor"] = _read_json(path / PROCESSOR)
    tensors = {name: tensor for file in _tensor_files(path) for name, tensor in _read_file(file)[0].items()}
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


def _read_file(path: Path) -> tuple[dict, dict[str, str]]:
    """(content of a file of `torch.save`, empty) or (tensors, header) of a safetensors file."""
    if not path.is_file():
        raise UserError(f"{path} {'is not a file' if path.exists() else 'does not exist'}: give a weight file")
    if path.suffix != ".safetensors":
        return _unpickle(path), {}
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({reason(error)}): copy it again") from None


def _unpickle(path: Path) -> dict:
    """Load a file of `torch.save` without executing code: tensors, plain values and `argparse.Namespace` only.

    Official checkpoints store their command line as a Namespace, which has no behaviour. Files of torch before 1.6 are
    no zips; torch reads them with the same restrictions.
    """
    with path.open("rb") as file:
        is_zip = zipfile.is_zipfile(file)
        if not is_zip and path.read_bytes()[:2] in (b"PK", b""):
            raise UserError(f"{path} is truncated: copy it again")
        if is_zip and _is_exported_program(file):
            raise UserError(f"{path} is an exported program, not weights: give the file that it was exported from")
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if not is_zip and "global" not in str(error).lower():
                raise UserError(f"{path} is truncated or not a weight file: copy it again") from None
            forbidden = ""
            with suppress(Exception):  # the pickle may be damaged as well
                forbidden = f" ({torch.serialization.get_unsafe_globals_in_checkpoint(path)[0]})"
            problem = f"contains code or objects besides tensors and plain values{forbidden}"
            raise UserError(f"{path} {problem}: refused, nothing was executed; save its state_dict alone") from None
        except Exception as error:  # damaged bytes can raise anything in the reader
            raise UserError(f"{path} is truncated or not a weight file ({reason(error)}): copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} contains a {type(content).__name__}, not a dict of tensors")
    return content


def _is_exported_program(file: BinaryIO) -> bool:
    """Whether a zip was written by torch.jit.save or torch.export.save."""
    with suppress(zipfile.BadZipFile, ValueError, OSError):  # damaged: torch.load reports it
        return any("/code/" in name or name.endswith("/archive_format") for name in zipfile.ZipFile(file).namelist())
    return False


def _read_json(path: Path, text: str | None = None) -> dict:
    """A JSON object: `text`, or else the content of the file."""
    try:
        content = json.loads(path.read_bytes() if text is None else text)
    except (ValueError, RecursionError) as error:  # ValueError: also invalid UTF-8 and overlong numbers
        raise UserError(f"{path} is not JSON ({reason(error)}): copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: copy it again")
    return content
