"""Mending a folder of shards without its source: damaged indexes are written again, of damaged tars whole images kept.

    .SHARD.tar.salvaged, .SHARD.tar.salvaged.idx.npy    what takes the place of a damaged tar and of its index
    .SHARD.tar.salvaged.json                            says that these two are complete, and what is lost
    lost.txt                                            an image a line: shard, number, key, byte

Only when all of this is there do the new files take their places; index.json follows last. Killed anywhere, the same
command goes on.
"""

import json
import os
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import BinaryIO, NamedTuple

import numpy as np

from configs.errors import UserError
from configs.files import sha256, sync_folder, write_whole
from data.index import describe
from data.pool import count, run_tasks
from data.shards import (
    IMAGE_TYPES,
    ROW,
    Index,
    Shard,
    index_file,
    index_tar,
    label_of,
    member_end,
    read_index,
    split_name,
    write_index,
    write_tar,
)
from data.transforms import decode

LOST = "lost.txt"
TYPES = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp", b"GI": "gif", b"\x93N": "npy"}  # an image's first bytes


class Member(NamedTuple):
    """A file in a tar: where header, content and the next header begin, and what its name says."""

    start: int
    offset: int
    size: int
    end: int
    key: str
    kind: str


class Header(tarfile.TarInfo):
    """Of a pair of headers (a long name has a second one) of which one is damaged, the other is no valid header."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.SubsequentHeaderError as error:
            archive.fileobj.seek(archive.offset + BLOCKSIZE)
            raise tarfile.InvalidHeaderError(str(error)) from None


def repair(folder: Path, workers: int) -> None:
    """Mend every shard that is not what index.json says; print what was done, and list in lost.txt what is lost.

    Raises:
        UserError: no index.json, or not one image is whole
    """
    index = read_index(folder)
    shards = [shard for shards in index.splits.values() for shard in shards]
    found = run_tasks(partial(_mend, folder=folder), shards, workers, sum(shard.samples for shard in shards))
    mended = {shard.file: record for shard, record in zip(shards, found, strict=True) if record}
    if mended:
        new = _updated(index, mended)
        if new.splits:
            _replace(folder, new, mended)
    for file in folder.glob(".*.tar.salvaged*"):  # no longer needed, or left by a call that was killed
        file.unlink()
    if not mended:
        print(f"{folder}: nothing is damaged; {len(shards):,} shards, every byte as indexed")
    elif not new.splits:
        raise UserError(f"{folder}: not one image is whole, nothing was changed: fetch or prepare the shards again")
    else:
        _report(folder, index, new, mended)


def salvaged(folder: Path) -> set[str]:
    """Names of the shards that have lost images to `repair`."""
    return {line.split(": ")[0] for line in _lost(folder)}


def _lost(folder: Path) -> list[str]:
    path = folder / LOST
    return path.read_bytes().decode().splitlines() if path.exists() else []


def _mend(shard: Shard, folder: Path) -> dict | None:
    """None for a whole shard, else {"shard": its new entry in index.json, None = nothing is left, "lost": lines}.

    A damaged index is written again where it is. What takes the place of a damaged tar is left beside it.
    """
    tar = folder / shard.file
    count(shard.samples)
    indexed = _is(index_file(tar), shard.index_sha256)
    if _is(tar, shard.sha256):
        return None if indexed else {"shard": asdict(index_tar(tar)), "lost": []}
    staged = _staged(tar)
    done = staged.with_name(f"{staged.name}.json")
    if done.exists():  # by a call that was killed, perhaps when it had put one of the two into its place
        record = json.loads(done.read_bytes())
        if (entry := record["shard"]) and all(
            _is(new if new.exists() else old, digest)
            for (new, old), digest in zip(_places(tar), (entry["sha256"], entry["index_sha256"]), strict=True)
        ):
            return record
    record = _salvage(tar, shard, np.load(index_file(tar), allow_pickle=False) if indexed else None)
    write_whole(done, json.dumps(record).encode())
    return record


def _is(path: Path, digest: str) -> bool:
    return path.exists() and sha256(path) == digest


def _staged(tar: Path) -> Path:
    """Where the new tar is written: hidden, and not *.tar, which other commands look for."""
    return tar.with_name(f".{tar.name}.salvaged")


def _places(tar: Path) -> list[tuple[Path, Path]]:
    """The new tar and its index, each with its place."""
    return [(_staged(tar), tar), (index_file(_staged(tar)), index_file(tar))]


def _salvage(tar: Path, shard: Shard, rows: np.ndarray | None) -> dict:
    """Write what is whole of a damaged tar to `_staged(tar)`, with an index. Returns a record as `_mend` does.

    `rows` is the tar's index; None = damaged as well: then an image is taken for whole if it can be decoded.
    """
    with (tar if tar.exists() else Path(os.devnull)).open("rb") as file:  # a missing tar is as good as an empty one
        members = list(_members(file))
        rows, whole = _decodable(file, members) if rows is None else (rows, _unchanged(file, rows))
        keys = _keys(rows, members)
        if whole.any():
            write_tar(_staged(tar), _samples(file, members, rows, keys, np.flatnonzero(whole)))
    lost = [
        f"{tar.name}: image {i}, {f'key {keys[i]!r}' if keys[i] else 'key unknown'}, byte {rows['offset'][i]}"
        for i in np.flatnonzero(~whole)
    ]
    if shard.samples > len(rows):
        lost.append(f"{tar.name}: {shard.samples - len(rows)} images, keys and bytes unknown")
    entry = asdict(replace(index_tar(_staged(tar)), file=tar.name)) if whole.any() else None
    return {"shard": entry, "lost": lost}


def _members(file: BinaryIO) -> Iterator[Member]:
    """Files in a tar that have a readable header and all their bytes, those after damage too."""
    length = os.fstat(file.fileno()).st_size
    try:
        archive = tarfile.TarFile(fileobj=file, tarinfo=Header, ignore_zeros=True)  # goes on at the next valid header
        for member in archive:
            if member.size < 0:  # which would lead back, and round in circles
                archive.offset = member.offset_data
            elif member.isreg() and not member.issparse() and member.offset_data + member.size <= length:
                place = member.offset, member.offset_data, member.size, member_end(member)
                yield Member(*place, *split_name(member.name))
    except (tarfile.TarError, ValueError, OverflowError):  # a member ends beyond the file: it was the last
        return


def _read(file: BinaryIO, member: Member) -> bytes:
    return os.pread(file.fileno(), member.size, member.offset)


def _unchanged(file: BinaryIO, rows: np.ndarray) -> np.ndarray:
    """Of each row of an index whether the image is still what was indexed."""
    return np.array([zlib.crc32(os.pread(file.fileno(), size, at)) == crc for at, size, crc, _ in rows.tolist()], bool)


def _decodable(file: BinaryIO, members: list[Member]) -> tuple[np.ndarray, np.ndarray]:
    """Rows for the images of a tar without an index, and of each whether it can be decoded and has its label."""
    rows, labels, fine = {}, {}, {}
    for member in members:
        if member.kind == "cls":
            label = label_of(_read(file, member))
            labels[member.key] = -1 if label is None else label
        elif member.kind in IMAGE_TYPES and member.key not in rows:
            data = _read(file, member)
            rows[member.key] = member.offset, member.size, zlib.crc32(data)
            try:
                fine[member.key] = decode(data).numel() > 0
            except UserError:
                fine[member.key] = False
    whole = [fine[key] and (not labels or labels.get(key, -1) >= 0) for key in rows]
    return np.array([(*row, labels.get(key, -1)) for key, row in rows.items()], ROW), np.array(whole, bool)


def _keys(rows: np.ndarray, members: list[Member]) -> list[str | None]:
    """The key of each image: from its header; where that is damaged, of a member beside it that has no other image."""
    own, ends, starts = ({getattr(m, at): m.key for m in members} for at in ("offset", "end", "start"))
    keys = [own.get(offset) for offset in rows["offset"].tolist()]
    taken = {None, *keys}
    for i, (offset, size) in enumerate(rows[["offset", "size"]].tolist()):
        if keys[i] is None:
            end = offset + -(-size // BLOCKSIZE) * BLOCKSIZE
            beside = [key for key in (ends.get(offset - BLOCKSIZE), starts.get(end)) if key not in taken]
            keys[i] = beside[0] if beside else None
            taken.add(keys[i])
    return keys


def _samples(
    file: BinaryIO, members: list[Member], rows: np.ndarray, keys: list[str | None], kept: np.ndarray
) -> Iterator[dict[str, bytes | str]]:
    """The kept samples for `write_tar`: image, label, and whatever else has their key."""
    types, groups = {member.offset: member.kind for member in members}, defaultdict(list)
    for member in members:
        groups[member.key].append(member)
    for i in kept:
        offset, size, crc, label = rows[i].tolist()
        image = os.pread(file.fileno(), size, offset)
        kind = types.get(offset) or TYPES.get(image[:2], "jpg")
        sample = {}
        for member in groups.get(keys[i], ()):
            before = member.kind in IMAGE_TYPES and member.kind <= kind  # would take the image's place in the new tar
            if not before and member.kind not in ("", "cls"):
                sample.setdefault(member.kind, _read(file, member))
        sample |= {"__key__": keys[i] or f"salvaged-{offset}-{crc:08x}", kind: image}
        yield sample | ({"cls": str(label).encode()} if label >= 0 else {})


def _updated(index: Index, mended: dict[str, dict]) -> Index:
    """The index with the new entries, without the shards of which nothing is left."""
    splits = {}
    for split, shards in index.splits.items():
        entries = [mended[shard.file]["shard"] if shard.file in mended else asdict(shard) for shard in shards]
        splits[split] = [Shard(**entry) for entry in entries if entry]
    return replace(index, splits={split: shards for split, shards in splits.items() if any(s.samples for s in shards)})


def _replace(folder: Path, new: Index, mended: dict[str, dict]) -> None:
    """Put everything into its place, index.json last."""
    for file in mended:
        for staged, place in _places(folder / file):
            if staged.exists():
                staged.replace(place)
    sync_folder(folder)
    lines = [line for record in mended.values() for line in record["lost"]]
    if lines:
        lines = dict.fromkeys([*_lost(folder), *lines])  # a call that was killed may have written them
        write_whole(folder / LOST, "".join(f"{line}\n" for line in lines).encode())
    write_index(folder, new)


def _report(folder: Path, index: Index, new: Index, mended: dict[str, dict]) -> None:
    """Say what was mended, what is lost, and which splits are no longer the same."""
    lost = 0
    for shard in (shard for shards in index.splits.values() for shard in shards if shard.file in mended):
        entry = mended[shard.file]["shard"]
        left = entry["samples"] if entry else 0
        lost += shard.samples - left
        same = entry and entry["sha256"] == shard.sha256
        said = "mended, byte for byte as it was" if same else f"{left:,} of {shard.samples:,} images kept"
        print(f"{folder / shard.file}: {said}{'' if entry else ', no longer listed in index.json'}")
    if lost:
        print(f"{lost:,} images are lost, listed in {folder / LOST}")
        if (folder / "source.json").exists():
            print(f"from the original images nothing is lost: `python data/prepare.py SOURCE {folder} --repair`")
    for split, shards in index.splits.items():
        if [s.sha256 for s in shards] != [s.sha256 for s in new.splits.get(split, ())]:
            print(f"the content of split {split} has changed: a run trained on it does not go on, give --run.name anew")
    describe(folder)
