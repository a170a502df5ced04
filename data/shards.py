"""The only owner of the byte format: WebDataset tar shards, with an index beside them.

    OUT/index.json                 splits, shards (file, samples, bytes, sha256), class names
    OUT/train-000000.tar           KEY.jpg (or .png, .webp, .gif, .npy), KEY.cls (label), KEY.json (original name)
    OUT/train-000000.idx.npy       a row a sample: offset, size and crc32 of its image, label (-1 = none)

The tars are plain WebDataset: `webdataset` reads ours, and tars made elsewhere are read here once they are indexed.
Nothing in a shard is ever executed or unpickled.
"""

import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import webdataset

from configs.errors import UserError, nearest
from configs.files import sha256, whole_file, write_whole
from data.place import check_folder
from data.remote import FETCHES, Remote
from data.sampler import WINDOW

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
    end, length = 0, tar.stat().st_size
    try:
        with tarfile.open(tar, "r:") as archive, tar.open("rb") as file:
            for member in archive:
                end = member_end(member)
                if member.size < 0 or (member.isreg() and member.offset_data + member.size > length):
                    raise UserError(f"{tar} is cut short or damaged inside {member.name}: fetch or write it again")
                if not member.isreg():
                    continue
                key, kind = split_name(member.name)
                if kind != "cls" and (kind not in IMAGE_TYPES or key in rows):
                    continue
                file.seek(member.offset_data)
                data = file.read(member.size)
                if kind == "cls":
                    labels[key] = label_of(data)
                    if labels[key] is None:
                        raise UserError(
                            f"{tar}: the label in {member.name} is {data[:20]!r}; "
                            "a .cls member must hold a whole number"
                        )
                else:
                    rows[key] = [member.offset_data, member.size, zlib.crc32(data)]
            check_end(file, end, length, tar)
    except (tarfile.TarError, ValueError, OverflowError) as error:  # the last two: a size beyond any file's
        raise UserError(f"{tar} is not a readable tar ({error}): fetch or write it again") from None
    return np.array([(*row, labels.get(key, -1)) for key, row in rows.items()], ROW)


def split_name(name: str) -> tuple[str, str]:
    """Key and type of a tar's member: its path up to the first dot of the file name; what follows, in lower case."""
    folder, slash, base = name.rpartition("/")
    key, _, kind = base.partition(".")
    return f"{folder}{slash}{key}", kind.lower()


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


def label_of(data: bytes) -> int | None:
    """The label that a `cls` member holds; None = it is no whole number."""
    return int(data) if data.strip().isdigit() and len(data) <= 9 else None


def index_bytes(shard: Shard) -> int:
    """The most bytes that a shard's index has: numpy's header, and a row a sample."""
    return 1024 + shard.samples * ROW.itemsize


def remedy(folder: Path | Remote) -> str:
    """How to mend a folder of shards: ours are written again, foreign ones indexed again, remote ones sent again."""
    if isinstance(folder, Remote):
        return "check the folder that was uploaded with `python data/prepare.py FOLDER --verify`, and upload it again"
    if (folder / "source.json").exists():
        return "delete that file and run the same data/prepare.py command again"
    return f"fetch it again, or run `python data/prepare.py {folder} --index`"


def index_tar(tar: Path) -> Shard:
    """Write the index of a finished tar beside it, and describe the shard."""
    rows = read_rows(tar)
    with whole_file(index_file(tar)) as file:
        np.save(file, rows, allow_pickle=False)
    return Shard(tar.name, len(rows), tar.stat().st_size, sha256(tar), sha256(index_file(tar)))


def flaw(folder: Path, shard: Shard, digests: bool = False) -> str | None:
    """What is wrong with a shard on disk, None = nothing: by its length or, with `digests`, by every byte.

    The text says what is wrong with which file, and leaves the way out to the caller.
    """
    tar = folder / shard.file
    try:
        size = tar.stat().st_size
    except FileNotFoundError:
        return f"{tar} is missing"
    if size != shard.bytes:
        return f"{tar} has {size} bytes, its index says {shard.bytes}"
    if not index_file(tar).exists():
        return f"{tar} has no .idx.npy"
    if digests:
        for path, digest in ((tar, shard.sha256), (index_file(tar), shard.index_sha256)):
            if sha256(path) != digest:
                return f"{path} is not what was indexed"
    return None


def write_index(folder: Path, index: Index) -> None:
    """Write index.json, the mark that a folder of shards is complete."""
    splits = {split: [asdict(shard) for shard in shards] for split, shards in index.splits.items()}
    content = {"format": FORMAT, "classes": index.classes, "splits": splits}
    write_whole(folder / "index.json", json.dumps(content, indent=1).encode())


def read_index(folder: Path | Remote) -> Index:
    """Read index.json. Raises `UserError` where there is none, or it is not ours."""
    path = folder / "index.json"
    if isinstance(folder, Path):
        check_folder(folder)
    try:
        content = json.loads(path.read_bytes() if isinstance(folder, Path) else folder.read_index())
        if content["format"] != FORMAT:
            raise UserError(f"{path} has format {content['format']}, this version reads {FORMAT}: prepare it again")
        splits = {split: [Shard(**shard) for shard in shards] for split, shards in content["splits"].items()}
        for shard in (shard for shards in splits.values() for shard in shards):
            check_shard(shard, path)
        return Index(splits, content["classes"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: {remedy(folder)}") from None


def check_shard(shard: Shard, index: Path | str) -> None:
    """Raise `UserError` unless a shard's names stay in their folder: an index may come from anywhere."""
    if min(shard.samples, shard.bytes) < 0:
        raise ValueError
    if not re.fullmatch(r"[^./\\\0][^/\\\0]*", shard.file):
        raise UserError(f"{index} lists the file {shard.file!r}: only files beside it are read; make the index again")
    if not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in (shard.sha256, shard.index_sha256)):
        raise UserError(f"{index}: {shard.file} has no SHA-256 of 64 hexadecimal digits; make the index again")


class Split:
    """Random access to the samples of one split; ids run from 0 over its shards in order.

    Args:
        folder: where index.json is; shards of a `Remote` one are fetched when they are read
        name: the split
    Raises:
        UserError: no such folder or split, or a shard is missing or not as long as the index says
    """

    def __init__(self, folder: Path | Remote, name: str):
        index = read_index(folder)
        if name not in index.splits:
            raise UserError(f"{folder / 'index.json'} has no split {name} {nearest(name, index.splits)}")
        self.folder, self.name, self.classes, self.shards = folder, name, index.classes, index.splits[name]
        for shard in self.shards if isinstance(folder, Path) else ():  # a remote one is checked when it is fetched
            if wrong := flaw(folder, shard):
                raise UserError(f"{wrong}: {remedy(folder)}")
        self.counts = np.array([shard.samples for shard in self.shards], np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.counts)])  # id of each shard's first sample
        self._open: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()
        # an open file takes room even after the cache has removed it: keep what a window needs
        self._most_open = OPEN_SHARDS if isinstance(folder, Path) else WINDOW

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
        rows = self._rows(number)
        self._open[number] = self._tar(number), rows
        if len(self._open) > self._most_open:
            os.close(self._open.popitem(last=False)[1][0])
        return self._open[number]

    def _tar(self, number: int) -> int:
        shard = self.shards[number]
        if isinstance(self.folder, Remote):
            return self.folder.open(shard.file, shard.sha256, shard.bytes)
        return os.open(self.folder / shard.file, os.O_RDONLY)

    def _rows(self, number: int) -> np.ndarray:
        shard = self.shards[number]
        if isinstance(self.folder, Remote):
            name = index_file(Path(shard.file)).name
            return np.load(
                io.BytesIO(self.folder.read(name, shard.index_sha256, index_bytes(shard))), allow_pickle=False
            )
        path = index_file(self.folder / shard.file)
        if sha256(path) != shard.index_sha256:
            raise UserError(f"{path} disagrees with index.json: {remedy(self.folder)}")
        return np.load(path, allow_pickle=False)

    def fetch(self, number: int) -> None:
        """Bring a remote shard into the cache. Raises `UserError` if that fails."""
        self._rows(number)
        os.close(self._tar(number))

    def read(self, sample: int) -> tuple[bytes, int]:
        """Image bytes and label of a sample. Raises `UserError` if the bytes are not those that were indexed."""
        number = int(np.searchsorted(self.first, sample, "right")) - 1
        file, rows = self._shard(number)
        row = rows[sample - self.first[number]]
        data = os.pread(file, int(row["size"]), int(row["offset"]))
        if zlib.crc32(data) != row["crc"]:
            data = self._again(number, row)
        return data, int(row["label"])

    def _again(self, number: int, row: np.void) -> bytes:
        """Bytes that were not as indexed, read anew if only the cache's copy was damaged; else raises `UserError`."""
        shard, (file, rows) = self.shards[number], self._open[number]
        damage = f"{self.folder / shard.file} is damaged at byte {row['offset']} (checksum): {remedy(self.folder)}"
        if not isinstance(self.folder, Remote):
            raise UserError(f"{damage}; `python data/prepare.py {self.folder} --verify` lists all damage")
        if self.folder.dropped(file, shard.sha256):
            self._open[number] = self._tar(number), rows
            os.close(file)
        data = os.pread(self._open[number][0], int(row["size"]), int(row["offset"]))
        if zlib.crc32(data) != row["crc"]:
            raise UserError(damage)
        return data

    def labels(self) -> np.ndarray:
        """Label of every sample, -1 = none."""

        def of_shard(number: int) -> np.ndarray:
            return self._rows(number)["label"].copy()  # a view would keep the whole index

        with ThreadPoolExecutor(FETCHES) as pool:  # of the tars nothing is needed
            return np.concatenate(list(pool.map(of_shard, range(len(self.shards)))))

    def __getstate__(self) -> dict:  # open files stay behind when a loader process starts
        return {**self.__dict__, "_open": OrderedDict()}
