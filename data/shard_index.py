"""index.json and the .idx.npy files of a folder of shards: written here, and believed only after a check.

Free of torch. `data/shards.py` describes both formats.
"""

import io
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, Strict, TypeAdapter, ValidationError

from configs.errors import UserError
from configs.files import write_atomic
from configs.shell import command, quote
from data.remote import Remote
from data.tars import BLOCK_BYTES, READABLE, ROW, TARGET_ROW

FORMAT = "convnext-fcmae-shards/1"
MAX_NUMBER = 1 << 50  # samples or bytes of a split
Count = Annotated[int, Strict(), Field(ge=0, le=MAX_NUMBER)]
Text = Annotated[str, Strict()]  # without pydantic's limits, which refuse bytes that are not UTF-8


@dataclass(frozen=True)
class Shard:
    """One tar of a split, as listed in index.json."""

    file: Text
    samples: Count
    bytes: Count
    sha256: Text
    index_sha256: Text


@dataclass(frozen=True)
class Targets:
    """What index.json says about targets of tasks other than classification."""

    kind: Literal["mask", "boxes", "labels", "numbers"]
    names: list[Text]
    ignore: Annotated[int, Strict(), Field(ge=0, le=65535)] | None = None  # masks
    pixels: list[Count] | None = None  # masks: of each class, and without one
    ids: list[Annotated[int, Strict()]] | None = None  # boxes: COCO's of each class


@dataclass(frozen=True)
class Found:
    """What is read of the survey that `data/prepare.py` writes."""

    preview: list[Text] | None = None


@dataclass(frozen=True)
class Index:
    """The content of index.json."""

    splits: Annotated[dict[Text, Annotated[list[Shard], Field(min_length=1)]], Field(min_length=1)]
    classes: Annotated[list[Text], Field(min_length=1)] | None
    survey: dict | None = None  # what data/prepare.py found in the source, see `Found`
    targets: dict | None = None  # of tasks other than classification, see `Targets`

    @property
    def shards(self) -> list[Shard]:
        """The shards of all splits."""
        return [shard for shards in self.splits.values() for shard in shards]


def index_file(tar: Path) -> Path:
    """Path of a tar's index."""
    return tar.with_name(tar.name.removesuffix(".tar") + ".idx.npy")


def max_index_bytes(shard: Shard) -> int:
    """Upper bound of the size of a shard's index: numpy's header, and one row per sample."""
    return 1024 + shard.samples * TARGET_ROW.itemsize


def repair_hint(folder: Path | Remote) -> str:
    """What the user can do about a damaged folder of shards."""
    if isinstance(folder, Remote):
        return "check the uploaded folder with `python data/prepare.py FOLDER --verify`, and upload it again"
    if (folder / "source.json").exists():
        return "delete that file and run the same data/prepare.py command again"
    return f"fetch it again, or run `python data/prepare.py {quote(str(folder))} --index`"


def write_index(folder: Path, index: Index) -> None:
    """Write index.json, which marks a folder of shards as complete."""
    splits = {split: [asdict(shard) for shard in shards] for split, shards in index.splits.items()}
    content = {"format": FORMAT, "classes": index.classes, "splits": splits}
    content |= {key: value for key in ("survey", "targets") if (value := getattr(index, key))}
    write_atomic(folder / "index.json", json.dumps(content, indent=1).encode())


def read_index(folder: Path | Remote) -> Index:
    """Read index.json, and check all of it. Raises `UserError` if it is missing, damaged or of another format."""
    path = folder / "index.json"
    if isinstance(folder, Path) and not path.exists():
        raise UserError(_no_index(folder))
    try:
        content = json.loads(path.read_bytes() if isinstance(folder, Path) else folder.fetch_index())
        if content["format"] != FORMAT:
            raise UserError(f"{path} has format {content['format']}, this version reads {FORMAT}: prepare it again")
        del content["format"]
        index = TypeAdapter(Index).validate_python(content)
        for key, kind in (("survey", Found), ("targets", Targets)):
            TypeAdapter(dict[str, kind | None]).validate_python({key: content.get(key)})
    except ValidationError as error:
        raise UserError(f"{path} is damaged: {_first_error(error)}: {repair_hint(folder)}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is damaged: {repair_hint(folder)}") from None
    _check_splits(index, path)
    if problem := _wrong_targets(index.targets or {}):
        raise UserError(f"{path} is damaged: targets.{problem}: {repair_hint(folder)}")
    return index


def _no_index(folder: Path) -> str:
    """What to do about a folder without index.json. One with images or folders in it is never advised as an output."""
    paths = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    tars = any(path.suffix == ".tar" for path in paths)
    if any(path.is_dir() or _is_image(path.name) for path in paths):
        make = f"make shards of it with `python data/prepare.py {quote(str(folder))} OUT`, in a new folder OUT"
        more = "; if its tars are shards, move them to a folder of their own" if tars else ""
        return f"{folder} has no index.json, so it is not a folder of shards: {make}{more}"
    if tars:
        return f"{folder} has tars but no index.json: run `python data/prepare.py {quote(str(folder))} --index`"
    return f"no shards at {folder}: make them with `{command('data/prepare.py', 'SOURCE', folder)}`"


def _is_image(name: str) -> bool:
    own = name == "preview.png" or name.endswith(".idx.npy")  # of shards whose index.json is not written yet
    return name.rpartition(".")[2].lower() in READABLE and not own


def _first_error(error: ValidationError) -> str:
    """The first wrong value, like `splits.train.0.samples: Input should be greater than or equal to 0`."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _check_splits(index: Index, path: Path | str) -> None:
    """Check the entries of shards, which may come from an untrusted source: files must be in the same folder."""
    files = set()
    for shard in index.shards:
        if not re.fullmatch(r"[^./\\\0][^/\\\0]*", shard.file):
            raise UserError(
                f"{path} lists the file {shard.file!r}: only files beside it are read; make the index again"
            )
        if shard.file in files:
            raise UserError(f"{path} lists {shard.file} twice; make the index again")
        if not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in (shard.sha256, shard.index_sha256)):
            raise UserError(f"{path}: {shard.file} has no SHA-256 of 64 hexadecimal digits; make the index again")
        if shard.samples * BLOCK_BYTES > shard.bytes:  # a tar has a header for each member
            room = f"{shard.bytes:,} bytes have no room for {shard.samples:,} samples"
            raise UserError(f"{path} is damaged: {shard.file}: {room}; make the index again")
        files.add(shard.file)
    for split, shards in index.splits.items():
        if max(sum(shard.samples for shard in shards), sum(shard.bytes for shard in shards)) > MAX_NUMBER:
            raise UserError(
                f"{path} is damaged: split {split} has more than {MAX_NUMBER:,} bytes; make the index again"
            )


def _wrong_targets(targets: dict[str, Any]) -> str:
    """The first key of `targets` that does not fit its names; empty if all do."""
    if not targets:
        return ""
    names = len(targets["names"])
    if targets["kind"] == "mask" and targets.get("ignore") is None:
        return "ignore is missing"
    lengths = {"pixels": (names, names + 1), "ids": (names,)}
    wrong = (key for key, fits in lengths.items() if targets.get(key) is not None and len(targets[key]) not in fits)
    return next((f"{key} has {len(targets[key])} numbers for {names} names" for key in wrong), "")


def read_index_rows(data: bytes, shard: Shard, classes: int | None = None) -> np.ndarray:
    """Rows [samples] of `ROW` or `TARGET_ROW` in an .idx.npy, checked against the shard's entry.

    Memory is allocated only for bytes that exist. `classes` is their number. Raises `ValueError`, which says what is
    wrong.
    """
    file = io.BytesIO(data)
    try:
        npy = np.lib.format
        shape, _, dtype = npy.read_array_header_1_0(file) if npy.read_magic(file) == (1, 0) else (None, 0, None)
    except Exception:  # damaged headers raise almost any exception in numpy
        raise ValueError("is not a readable .npy") from None
    if dtype not in (ROW, TARGET_ROW):
        raise ValueError("has other columns than an index")
    if shape != (shard.samples,) or len(data) - file.tell() != shard.samples * dtype.itemsize:
        raise ValueError(f"has another number of rows than the {shard.samples:,} samples in index.json")
    rows = np.frombuffer(data, dtype, offset=file.tell())
    for part in ("", "target_") if dtype == TARGET_ROW else ("",):
        if (rows[f"{part}size"] > shard.bytes).any() or (
            rows[f"{part}offset"] > shard.bytes - rows[f"{part}size"]
        ).any():
            raise ValueError(f"lists bytes beyond the {shard.bytes:,} of {shard.file}")
    if (rows["label"] < -1).any():
        raise ValueError("has a label below -1")
    if classes is not None and (rows["label"] >= classes).any():
        raise ValueError(f"has label {rows['label'].max()}, but index.json names {classes:,} classes")
    return rows
