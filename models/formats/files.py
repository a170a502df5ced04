"""Read one file of tensors or JSON without executing anything. What the bytes are decides, not the file's name."""

import argparse
import json
import pickle
import re
import zipfile
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from configs.errors import UserError, reason

OTHER_FILE = "copy it again, or give a file of torch.save or safetensors"
HEAD_BYTES = 512  # enough to recognise a file
OTHERS = {  # how other files begin, in lower case; what they are and the remedy
    b"version https://git-lfs": "is a Git LFS pointer, not the weights: run `git lfs pull`",
    b"<!doctype html": "is a web page, not weights: download the file itself",
    b"<html": "is a web page, not weights: download the file itself",
    b"\x89hdf": "is an HDF5 file (Keras): save the weights with torch or safetensors",
    b"gguf": "is a GGUF file: save the weights with torch or safetensors",
    b"\x93numpy": "is a NumPy array: save the weights with torch or safetensors",
    b"\x1f\x8b": "is compressed with gzip: unpack it first",
    b"\xfd7zxz": "is compressed with xz: unpack it first",
    b"bzh": "is compressed with bzip2: unpack it first",
    b"(\xb5/\xfd": "is compressed with zstd: unpack it first",
}


def read_file(path: Path) -> tuple[dict, dict[str, str] | None]:
    """(content of a file of `torch.save`, None) or (tensors, header) of a safetensors file.

    Raises `UserError` if it is missing, truncated, contains code, or is of another kind.
    """
    if not path.is_file():
        raise UserError(f"{path} {'is not a file' if path.exists() else 'does not exist'}: give a weight file")
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if other := next((what for start, what in OTHERS.items() if head.lower().startswith(start)), None):
        raise UserError(f"{path} {other}")
    named = path.suffix.lower() == ".safetensors" and head[:2] != b"PK"
    if not named and not _is_safetensors(head, path.stat().st_size):
        return _unpickle(path, head), None
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({reason(error)}): copy it again") from None


def _is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file begins with the length of a JSON header that fits into it, and the header."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size


def _unpickle(path: Path, head: bytes) -> dict:
    """Load a file of `torch.save` without executing code: tensors, plain values and `argparse.Namespace` only.

    Official checkpoints store their command line as a Namespace, which has no behaviour. Files of torch before 1.6 are
    no zips; torch reads them with the same restrictions. A list or tuple becomes a dict.
    """
    is_zip = zipfile.is_zipfile(path)
    if not is_zip and head[:2] in (b"PK", b""):
        raise UserError(f"{path} is truncated: copy it again")
    if is_zip:
        _check_zip(path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            with path.open("rb") as file:  # by its name, torch would take it for safetensors
                content = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if not is_zip and "global" not in str(error).lower():
                raise UserError(f"{path} is truncated or not a weight file: {OTHER_FILE}") from None
            forbidden = ""
            with suppress(Exception), path.open("rb") as file:  # the pickle may be damaged as well
                forbidden = f" ({torch.serialization.get_unsafe_globals_in_checkpoint(file)[0]})"
            problem = f"contains code or objects besides tensors and plain values{forbidden}"
            raise UserError(f"{path} {problem}: refused, nothing was executed; save its state_dict alone") from None
        except Exception as error:  # damaged bytes can raise anything in the reader
            why = f" ({reason(error)})" if re.search("[a-z]", reason(error)) else ""  # that of a KeyError is a number
            raise UserError(f"{path} is truncated or not a weight file{why}: {OTHER_FILE}") from None
    if isinstance(content, list | tuple):  # such as (model, optimizer)
        content = {str(i): value for i, value in enumerate(content)}
    if not isinstance(content, dict):
        raise UserError(f"{path} contains a {type(content).__name__}, not a dict of tensors")
    return content


def _check_zip(path: Path) -> None:
    """Raise `UserError` for a zip that torch.save has not written, if its list of members can be read."""
    names = []
    with suppress(zipfile.BadZipFile, ValueError, OSError, NotImplementedError):  # damaged: torch.load reports it
        names = zipfile.ZipFile(path).namelist()
    if any("/code/" in name or name.endswith("/archive_format") for name in names):  # torch.jit.save, torch.export.save
        raise UserError(f"{path} is an exported program, not weights: give the file that it was exported from")
    if names and all(name.endswith(".npy") for name in names):
        raise UserError(f"{path} is a NumPy archive: save the weights with torch or safetensors")
    if names and not any(name.endswith("data.pkl") for name in names):
        raise UserError(f"{path} is a zip without a file of torch.save: unpack it, and give the weight file")


def read_json(path: Path, text: str | None = None) -> dict:
    """A JSON object: `text`, or else the content of the file. Raises `UserError` if it is none."""
    try:
        content = json.loads(path.read_bytes() if text is None else text)
    except (ValueError, RecursionError) as error:  # ValueError: also invalid UTF-8 and overlong numbers
        raise UserError(f"{path} is not JSON ({reason(error)}): copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: copy it again")
    return content
