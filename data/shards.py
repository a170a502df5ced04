"""The shard format: WebDataset tars, with an index beside them.

    OUT/index.json                 splits, shards (file, samples, bytes, sha256), class names
    OUT/train-000000.tar           KEY.jpg (or .png, .webp, .gif, .npy), KEY.cls (label), KEY.mask.png, KEY.json
    OUT/train-000000.idx.npy       one row per sample: offset, size, crc32 of its image, label (-1 = none), and target

KEY.json has the original name and the targets of tasks other than classification, except masks:

    {"name": "a.jpg", "labels": ["cloudy", "river"]}                    several labels; [] = none of them
    {"name": "a.jpg", "numbers": [3.5, null]}                           one for each of index.json's targets.names
    {"name": "a.jpg", "height": 480, "width": 640, "boxes": [           of the image as it is in the shard, upright
        {"class": "RBC", "box": [x, y, width, height], "crowd": false, "segmentation": COCO polygons or RLE}, ...]}

index.json has `targets`, if there are any: {"kind": "mask", "boxes", "labels" or "numbers", "names": of classes or
numbers}; for masks also "ignore", the value without a class, and "pixels" of each class, and without one, in the
masks that the preview looked at.

The tars are plain WebDataset: `webdataset` reads them, and tars of other tools can be read here once they are indexed.
Nothing in a shard is executed or unpickled. This module does not import torch.
"""

import hashlib
import os
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from configs.errors import UserError, nearest
from configs.files import atomic_file, sha256
from configs.schema import Data
from configs.shell import quote
from data.cache import Cache
from data.remote import CONCURRENT_FETCHES, Remote, is_url
from data.sampler import WINDOW
from data.shard_index import Shard, index_file, max_index_bytes, read_index, read_index_rows, repair_hint
from data.tars import ROW, TARGET_ROW, read_rows

MAX_OPEN_SHARDS = 64  # open files and index tables per reader


def index_tar(tar: Path) -> Shard:
    """Write the index of a finished tar beside it. Returns the shard's entry for index.json; errors as `read_rows`."""
    rows = read_rows(tar)
    with atomic_file(index_file(tar)) as file:
        np.save(file, rows, allow_pickle=False)
    return Shard(tar.name, len(rows), tar.stat().st_size, sha256(tar), sha256(index_file(tar)))


def find_damage(folder: Path, shard: Shard, digests: bool = False, classes: int | None = None) -> str | None:
    """Description of a local shard's damage, None if there is none. Checks its size or, with `digests`, every byte."""
    tar = folder / shard.file
    index = index_file(tar)
    if not tar.is_file():
        return f"{tar} is missing"
    if (size := tar.stat().st_size) != shard.bytes:
        return f"{tar} has {size} bytes, index.json lists {shard.bytes}"
    if not index.is_file():
        return f"{tar} has no .idx.npy"
    if not shard.samples * ROW.itemsize < (size := index.stat().st_size) <= max_index_bytes(shard):
        return f"{index} has {size} bytes, too few or too many for the {shard.samples:,} samples in index.json"
    for path, digest in ((tar, shard.sha256), (index, shard.index_sha256)) if digests else ():
        if sha256(path) != digest:
            return f"{path} does not match its SHA-256 in index.json"
    if digests:
        try:
            read_index_rows(index.read_bytes(), shard, classes)
        except ValueError as error:
            return f"{index} {error}"
    return None


class Split:
    """Random access to the samples of one split; ids run from 0 over its shards in order.

    Shards of a `Remote` folder are fetched on first use. Raises `UserError` if there is no such folder or split, or a
    local shard is missing or has the wrong size; of several ranks on a machine, each looks at its part of the shards.
    """

    def __init__(self, folder: Path | Remote, name: str):
        index = read_index(folder)
        if name not in index.splits:
            raise UserError(f"{folder / 'index.json'} has no split {name} {nearest(name, index.splits)}")
        self.folder, self.name, self.classes, self.shards = folder, name, index.classes, index.splits[name]
        self.targets = index.targets
        # the ranks of a machine share the shards, whose files may be many on a slow file system
        rank, ranks = (int(os.environ.get(name, one)) for name, one in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
        for shard in self.shards[rank::ranks] if isinstance(folder, Path) else ():  # remote ones: when fetched
            if damage := find_damage(folder, shard):
                raise UserError(f"{damage}: {repair_hint(folder)}")
        self.counts = np.array([shard.samples for shard in self.shards], np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.counts)])  # id of each shard's first sample
        self._open_shards: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()
        # an open file takes disk space even after the cache has removed it, so keep no more than a window needs
        self._max_open = MAX_OPEN_SHARDS if isinstance(folder, Path) else WINDOW

    def __len__(self) -> int:
        return int(self.first[-1])

    @property
    def digest(self) -> str:
        """Digest of the split's content, compared on resume."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()[:16]

    def read(self, sample: int) -> tuple[bytes, int]:
        """Image bytes and label. Raises `UserError` for a wrong checksum, or if the shard cannot be fetched."""
        row = self._row(sample)
        return self._bytes(sample, row["offset"], row["size"], row["crc"]), int(row["label"])

    def read_target(self, sample: int) -> bytes:
        """Content of the sample's mask, or of its json with other targets; empty without. Errors as `read`."""
        row = self._row(sample)
        if row.dtype != TARGET_ROW or not row["target_size"]:
            return b""
        return self._bytes(sample, row["target_offset"], row["target_size"], row["target_crc"])

    def _row(self, sample: int) -> np.void:
        number = self._shard_of(sample)
        return self._open_shard(number)[1][sample - self.first[number]]

    def _shard_of(self, sample: int) -> int:
        return int(np.searchsorted(self.first, sample, "right")) - 1

    def _bytes(self, sample: int, offset: int, size: int, crc: int) -> bytes:
        """A member of the sample's tar."""
        number = self._shard_of(sample)
        file, shard = self._open_shard(number)[0], self.shards[number]
        data = os.pread(file, size, offset)
        if zlib.crc32(data) != crc and isinstance(self.folder, Remote):  # only the copy in the cache may be damaged
            if self.folder.drop_if_damaged(file, shard.sha256):
                os.close(self._open_shards.pop(number)[0])
            data = os.pread(self._open_shard(number)[0], size, offset)
        if zlib.crc32(data) != crc:
            hint = repair_hint(self.folder)
            if isinstance(self.folder, Path):
                hint += f"; `python data/prepare.py {quote(str(self.folder))} --verify` lists all damage"
            raise UserError(f"{self.folder / shard.file} is damaged at byte {offset} (checksum): {hint}")
        return data

    def place(self, sample: int) -> str:
        """Where a sample is, for messages."""
        return f"{self.folder}, split {self.name}, sample {sample}"

    def labels(self) -> np.ndarray:
        """Label of every sample, -1 = none. Reads the indexes only, not the tars."""
        with ThreadPoolExecutor(CONCURRENT_FETCHES) as pool:
            indexes = pool.map(self._load_rows, range(len(self.shards)))
            return np.concatenate([rows["label"].copy() for rows in indexes])  # views would keep the indexes in memory

    def without_target(self) -> int:
        """Number of samples without a target. Reads the indexes only."""
        found = 0
        for number, count in enumerate(self.counts.tolist()):
            rows = self._load_rows(number)
            found += int((rows["target_size"] == 0).sum()) if rows.dtype == TARGET_ROW else count
        return found

    def open_tar(self, number: int) -> int:
        """File descriptor of a shard's tar, to be closed by the caller; a remote one is fetched first."""
        shard = self.shards[number]
        if isinstance(self.folder, Remote):
            return self.folder.open_file(shard.file, shard.sha256, shard.bytes)
        return os.open(self.folder / shard.file, os.O_RDONLY)

    def fetch_shard(self, number: int) -> None:
        """Fetch a remote shard into the cache. Raises `UserError` if that fails."""
        self._load_rows(number)
        os.close(self.open_tar(number))

    def _open_shard(self, number: int) -> tuple[int, np.ndarray]:
        """File descriptor and index of a shard; closes the least recently used one if too many are open."""
        if number in self._open_shards:
            self._open_shards.move_to_end(number)
            return self._open_shards[number]
        rows = self._load_rows(number)
        self._open_shards[number] = self.open_tar(number), rows
        if len(self._open_shards) > self._max_open:
            os.close(self._open_shards.popitem(last=False)[1][0])
        return self._open_shards[number]

    def _load_rows(self, number: int) -> np.ndarray:
        shard = self.shards[number]
        if isinstance(self.folder, Remote):
            name = index_file(Path(shard.file)).name
            path, data = name, self.folder.read_file(name, shard.index_sha256, max_index_bytes(shard))
        else:
            path = index_file(self.folder / shard.file)
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != shard.index_sha256:
                raise UserError(f"{path} disagrees with index.json: {repair_hint(self.folder)}")
        try:
            return read_index_rows(data, shard, len(self.classes) if self.classes else None)
        except ValueError as error:
            raise UserError(f"{path} {error}: {repair_hint(self.folder)}") from None

    def __getstate__(self) -> dict:  # each loader process opens files of its own
        return {**self.__dict__, "_open_shards": OrderedDict()}


def open_folder(data: Data) -> Path | Remote:
    """The folder of shards at `data.path`, which may be a URL."""
    if not is_url(data.path):
        return Path(data.path)
    return Remote(data.path, Cache(Path(data.cache), int(data.cache_gb * 1e9)))


def open_split(data: Data, name: str | None = None) -> Split:
    """Open a split of the shards at `data.path`, by default `data.split`.

    Raises `UserError` if it does not exist, or data.cache_gb is too small for the shards that are in use at a time.
    """
    split = Split(open_folder(data), name or data.split)
    if isinstance(split.folder, Path):
        return split
    largest = sorted((shard.bytes + max_index_bytes(shard) for shard in split.shards), reverse=True)
    required = sum(largest[: 2 * WINDOW])  # a window that is read, and the next one
    if required > split.folder.cache.limit:
        raise UserError(
            f"data.cache_gb is {data.cache_gb:g}, but training reads {2 * WINDOW} shards at a time, and those of "
            f"{data.path}, split {split.name}, have {required / 1e9:.3g} GB: raise it, or prepare smaller shards"
        )
    return split
