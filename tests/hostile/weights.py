"""Makers of hostile weight files: the words of models/convert.py for each."""

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from models.formats.write import to_form
from tests.hostile.images import Payload
from tests.models.formats.helpers import SMALL, classifier

TENSORS, _ = to_form(classifier(**SMALL), "timm")


def _words(name: str, write: Callable[[Path], None]) -> Callable[[Path], list]:
    def make(base: Path) -> list:
        write(base / "in" / name)
        return [base / "in" / name, base / "out.pt", "--to", "timm"]

    return make


def _trap(file: Path) -> Payload:
    return Payload(file.parents[1] / "ran/evil")


def _spoilt(value: float) -> dict:
    name = next(iter(TENSORS))
    return TENSORS | {name: torch.full_like(TENSORS[name], value)}


def _safetensors(header: bytes, length: int | None = None) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)


def _zip_of_records(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(_trap(file)))
        archive.writestr("x/../../../outside/evil", b"evil")
        archive.writestr("x/version", b"3\n")


def _entry(**more: object) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | more}).encode()


WEIGHTS = {
    "code in a checkpoint": _words("x.pt", lambda file: torch.save({"model": TENSORS, "args": _trap(file)}, file)),
    "code in an old checkpoint": _words(
        "x.pt", lambda file: torch.save({"a": _trap(file)}, file, _use_new_zipfile_serialization=False)
    ),
    "a bare pickle": _words("x.pth", lambda file: file.write_bytes(pickle.dumps(_trap(file)))),
    "records with paths": _words("x.pt", _zip_of_records),
    "NaN": _words("x.pt", lambda file: torch.save(_spoilt(float("nan")), file)),
    "infinity": _words("x.pt", lambda file: torch.save(_spoilt(float("inf")), file)),
    "empty": _words("x.pt", lambda file: file.write_bytes(b"")),
    "random": _words("x.pt", lambda file: file.write_bytes(os.urandom(5000))),
    "no tensors": _words("x.pt", lambda file: torch.save({"a": 1}, file)),
    "names with escapes": _words("x.pt", lambda file: torch.save({"\x1b[2J": torch.ones(3)}, file)),
    "huge header of safetensors": _words("x.safetensors", _safetensors(b"{}", 1 << 62)),
    "header that is no JSON": _words("x.safetensors", _safetensors(b"[" * 5000)),
    "tensor of an exabyte": _words("x.safetensors", _safetensors(_entry(shape=[1 << 58], data_offsets=[0, 1 << 60]))),
    "offsets backwards": _words("x.safetensors", _safetensors(_entry(data_offsets=[8, 0]))),
    "negative shape": _words("x.safetensors", _safetensors(_entry(shape=[-1]))),
}
