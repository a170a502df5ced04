"""The only owner of the byte format: WebDataset tar shards, with an index beside them.

    OUT/index.json                 splits, shards (file, samples, bytes, sha256), class names
    OUT/train-000000.tar           KEY.jpg (or .png, .webp, .gif, .npy), KEY.cls (label), KEY.json (original name)
    OUT/train-000000.idx.npy       a row a sample: offset, size and crc32 of its image, label (-1 = none)

The tars are plain WebDataset: `webdataset` reads ours, and tars made elsewhere are read here once they are indexed.
Nothing in a shard is ever executed or unpickled.
"""

import hashlib
import json
import os
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import webdataset

from configs.errors import UserError, nearest
from configs.files import sha256, whole_file, write_whole

FORMAT = "convnext-fcmae-shards/1"
IMAGE_TYPES = ("jpg", "jpeg", "png", "webp", "gif", "npy")  # what the loader decodes
ROW = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc", "<u4"), ("label", "<i4")])
PIECE = 1 << 20  # bytes read at a time where a file may be large
OPEN_SHARDS = 64  # file handles and index tables a reader keeps


@dataclass(frozen=True)
class Shard:
    """One tar of a split, as index.json lists it."""

    file: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class Index:
    """What index.json holds."""

    splits: dict[str, list[Shard]]
    classes: list[str] | None


def index_file(tar: Path) -> Path:
    """The index that belongs to a tar."""
    return tar.with_name(tar.name.removesuffix(".tar") + ".idx.npy")


def write_tar(path: Path, samples: Iterator[dict[str, bytes | str]]) -> None:
    """Write WebDataset samples ({"__key__": ..., "jpg": ..., ...}, values bytes) to a tar, byte for byte repeatable."""
    with whole_file(path) as file, webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
        for sample in samples:
            tar.write(sample)


def read_rows(tar: Path) -> np.ndarray:
    """Find each sample of a WebDataset tar: its image's place and checksum, its label.

    A sample's key is its path up to the first dot of the file name. Its image is its first member of a type in
    `IMAGE_TYPES`; samples without one are left out. Its label is the number in its `cls` member, if any.

    Raises:
        UserError: the tar is cut or damaged, or a label is not a whole number
    """
    rows: dict[str, list[int]] = {}
    labels: dict[str, int] = {}
    end = 0
    try:
        with tarfile.open(tar, "r:") as archive, tar.open("rb") as file:
            for member in archive:
                end = member_end(member)
                if not member.isreg():
                    continue
                folder, _, name = member.name.rpartition("/")
                key, _, kind = name.partition(".")
                key, kind = f"{folder}/{key}", kind.lower()
                if kind != "cls" and (kind not in IMAGE_TYPES or key in rows):
                    continue
                file.seek(member.offset_data)
                data = file.read(member.size)
                if len(data) != member.size:
                    raise UserError(f"{tar} is cut short inside {member.name}: fetch or write it again")
                if kind == "cls":
                    labels[key] = _label(data, tar, member.name)
                else:
                    rows[key] = [member.offset_data, member.size, zlib.crc32(data)]
            check_end(file, end, tar.stat().st_size, tar)
    except tarfile.TarError as error:
        raise UserError(f"{tar} is not a readable tar ({error}): fetch or write it again") from None
    return np.array([(*row, labels.get(key, -1)) for key, row in rows.items()], ROW)


def member_end(member: tarfile.TarInfo) -> int:
    """Where the header after a tar's member begins."""
    return member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def check_end(file: BinaryIO, end: int, limit: int, tar: Path) -> None:
    """Raise `UserError` unless only zeros, two blocks or more, follow the last member of a tar.

    Python's tarfile stops without a word at a cut or zeroed header, and takes the rest for the end of the archive.
    """
    file.seek(end)
    whole = limit - end >= 2 * tarfile.BLOCKSIZE
    while whole and file.tell() < limit:  # in pieces: after damage the tail may be most of the archive
        piece = file.read(min(PIECE, limit - file.tell()))
        whole = len(piece) > 0 and not piece.strip(b"\0")
    if not whole:
        raise UserError(f"{tar} is cut short or damaged after byte {end}: fetch or write it again")


def _label(data: bytes, tar: Path, member: str) -> int:
    if not data.strip().isdigit() or len(data) > 9:
        raise UserError(f"{tar}: the label in {member} is {data[:20]!r}; a .cls member must hold a whole number")
    return int(data)


def remedy(folder: Path) -> str:
    """How to mend a folder of shards: ours are written again, foreign ones indexed again."""
    if (folder / "source.json").exists():
        return "delete that file and run the same data/prepare.py command again"
    return f"fetch it again, or run `python data/prepare.py {folder} --index`"


def index_tar(tar: Path) -> Shard:
    """Write the index of a finished tar beside it, and describe the shard."""
    rows = read_rows(tar)
    with whole_file(index_file(tar)) as file:
        np.save(file, rows, allow_pickle=False)
    return Shard(tar.name, len(rows), tar.stat().st_size, sha256(tar), sha256(index_file(tar)))


def write_index(folder: Path, index: Index) -> None:
    """Write index.json, the mark that a folder of shards is complete."""
    splits = {split: [asdict(shard) for shard in shards] for split, shards in index.splits.items()}
    content = {"format": FORMAT, "classes": index.classes, "splits": splits}
    write_whole(folder / "index.json", json.dumps(content, indent=1).encode())


def read_index(folder: Path) -> Index:
    """Read index.json. Raises `UserError` where there is none, or it is not ours."""
    path = folder / "index.json"
    if not path.exists():
        if folder.is_dir() and any(folder.glob("*.tar")):
            raise UserError(f"{folder} has tars but no index.json: run `python data/prepare.py {folder} --index`")
        raise UserError(f"no shards at {folder}: make them with `python data/prepare.py SOURCE {folder}`")
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise UserError(f"{path} has format {content['format']}, this version reads {FORMAT}: prepare it again")
        splits = {split: [Shard(**shard) for shard in shards] for split, shards in content["splits"].items()}
        return Index(splits, content["classes"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: {remedy(folder)}") from None


class Split:
    """Random access to the samples of one split; ids run from 0 over its shards in order.

    Args:
        folder: where index.json is
        name: the split
    Raises:
        UserError: no such folder or split, or a shard is missing or not as long as the index says
    """

    def __init__(self, folder: Path, name: str):
        index = read_index(folder)
        if name not in index.splits:
            raise UserError(f"{folder / 'index.json'} has no split {name} {nearest(name, index.splits)}")
        self.folder, self.name, self.classes, self.shards = folder, name, index.classes, index.splits[name]
        for shard in self.shards:
            size = (folder / shard.file).stat().st_size if (folder / shard.file).exists() else None
            if size != shard.bytes or not index_file(folder / shard.file).exists():
                found = "is missing" if size is None else f"has {size} bytes, its index says {shard.bytes}"
                found = "has no .idx.npy" if size == shard.bytes else found
                raise UserError(f"{folder / shard.file} {found}: {remedy(folder)}")
        self.counts = np.array([shard.samples for shard in self.shards], np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.counts)])  # id of each shard's first sample
        self._open: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()

    def __len__(self) -> int:
        return int(self.first[-1])

    @property
    def digest(self) -> str:
        """Identity of the split's content, for checks on resume."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()[:16]

    def _shard(self, number: int) -> tuple[int, np.ndarray]:
        """File descriptor and index of a shard; the least recently used are closed."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self.shards[number]
        path = self.folder / shard.file
        if sha256(index_file(path)) != shard.index_sha256:
            raise UserError(f"{index_file(path)} disagrees with index.json: {remedy(self.folder)}")
        rows = np.load(index_file(path), allow_pickle=False)
        self._open[number] = os.open(path, os.O_RDONLY), rows
        if len(self._open) > OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1][0])
        return self._open[number]

    def read(self, sample: int) -> tuple[bytes, int]:
        """Image bytes and label of a sample. Raises `UserError` if the bytes are not those that were indexed."""
        number = int(np.searchsorted(self.first, sample, "right")) - 1
        file, rows = self._shard(number)
        row = rows[sample - self.first[number]]
        data = os.pread(file, int(row["size"]), int(row["offset"]))
        if zlib.crc32(data) != row["crc"]:
            raise UserError(
                f"{self.folder / self.shards[number].file} is damaged at byte {row['offset']} (checksum): "
                f"{remedy(self.folder)}; `python data/prepare.py {self.folder} --verify` lists all damage"
            )
        return data, int(row["label"])

    def labels(self) -> np.ndarray:
        """Label of every sample, -1 = none."""
        return np.concatenate([self._shard(number)[1]["label"] for number in range(len(self.shards))])

    def __getstate__(self) -> dict:  # open files stay behind when a loader process starts
        return {**self.__dict__, "_open": OrderedDict()}
