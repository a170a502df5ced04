"""Repair a folder of shards without its source: rewrite damaged indexes, keep the undamaged images of damaged tars.

    .SHARD.tar.salvaged, .SHARD.tar.salvaged.idx.npy    replacements of a damaged tar and of its index
    .SHARD.tar.salvaged.json                            record: both are complete; which images are lost
    lost.txt                                            one line per lost image: shard, number, key, byte

The replacements are renamed once all of them are complete; index.json is written last. So a repair that was killed at
any time is resumed by the same command.
"""

import json
import os
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import BinaryIO, NamedTuple

import numpy as np

from configs.errors import UserError, printable
from configs.files import sha256, sync_folder, write_atomic
from configs.log import say
from configs.shell import quote
from data.index import describe
from data.pool import Pool, add_progress, run_tasks
from data.reading import TOO_LARGE, ImageError
from data.shard_index import Index, Shard, index_file, read_index, read_index_rows, write_index
from data.shards import index_tar
from data.tars import IMAGE_TYPES, ROW, TARGET_ROW, Header, member_end, parse_label, split_member_name

LOST = "lost.txt"
TYPES = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp", b"GI": "gif", b"\x93N": "npy"}  # by an image's first bytes


class Member(NamedTuple):
    """A file in a tar: where its header, its content and the next header begin; key and type from its name."""

    start: int
    offset: int
    size: int
    end: int
    key: str
    kind: str


@dataclass(frozen=True)
class Repaired:
    """A repaired shard: its entry in index.json, None if no image is left, and a line for each lost image."""

    shard: Shard | None
    lost: list[str]


class Lenient(Header):
    """Long names have a pair of headers; if one of them is damaged, the other is treated as invalid."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.SubsequentHeaderError as error:
            archive.fileobj.seek(archive.offset + BLOCKSIZE)
            raise tarfile.InvalidHeaderError(str(error)) from None


def repair(folder: Path, pool: Pool) -> None:
    """Repair every shard that does not match index.json, print a summary, and list lost images in lost.txt.

    Raises `UserError` if there is no index.json, or no undamaged image.
    """
    index = read_index(folder)
    shards = index.shards
    samples = sum(shard.samples for shard in shards)
    results = run_tasks(partial(_repair_shard, folder=folder), shards, pool, samples, folder)
    repaired = {shard: result for shard, result in zip(shards, results, strict=True) if result}
    new = _updated(index, repaired)
    if repaired and new.splits:
        _install(folder, new, repaired)
    for file in folder.glob(".*.tar.salvaged*"):  # no longer needed, or left behind by a killed run
        file.unlink()
    if not repaired:
        say(f"{folder}: nothing is damaged in {len(shards):,} shards")
    elif not new.splits:
        raise UserError(f"{folder}: no undamaged image, nothing was changed: fetch or prepare the shards again")
    else:
        _report(folder, index, new, repaired)


def salvaged_shards(folder: Path) -> set[str]:
    """Names of the shards that lost images in a repair."""
    return {line.split(": ")[0] for line in _lost_lines(folder)}


def _lost_lines(folder: Path) -> list[str]:
    path = folder / LOST
    return path.read_bytes().decode().splitlines() if path.exists() else []


def _repair_shard(shard: Shard, folder: Path) -> Repaired | None:
    """Rewrite a damaged index, write the replacement of a damaged tar beside it. Returns None for an intact shard."""
    tar = folder / shard.file
    add_progress(shard.samples)
    indexed = _matches(index_file(tar), shard.index_sha256)
    if _matches(tar, shard.sha256):
        return None if indexed else Repaired(index_tar(tar), [])
    replacement = _replacement(tar)
    done = replacement.with_name(f"{replacement.name}.json")
    if done.exists():  # by a run that was killed, perhaps after it had renamed one of the two files
        record = json.loads(done.read_bytes())
        if (entry := record["shard"]) and all(
            _matches(new if new.exists() else old, digest)
            for (new, old), digest in zip(_renames(tar), (entry["sha256"], entry["index_sha256"]), strict=True)
        ):
            return Repaired(Shard(**entry), record["lost"])
    rows = None
    if indexed:
        with suppress(ValueError):  # written like that, so not by this project
            rows = read_index_rows(index_file(tar).read_bytes(), shard)
    repaired = _salvage(tar, shard, rows)
    write_atomic(done, json.dumps(asdict(repaired)).encode())
    return repaired


def _matches(path: Path, digest: str) -> bool:
    return path.exists() and sha256(path) == digest


def _replacement(tar: Path) -> Path:
    """Path of a tar's replacement: hidden, and not *.tar, which other commands look for."""
    return tar.with_name(f".{tar.name}.salvaged")


def _renames(tar: Path) -> list[tuple[Path, Path]]:
    """(replacement, final path) of a tar and of its index."""
    return [(_replacement(tar), tar), (index_file(_replacement(tar)), index_file(tar))]


def _salvage(tar: Path, shard: Shard, rows: np.ndarray | None) -> Repaired:
    """Write the undamaged samples of a tar to `_replacement(tar)`, with an index.

    `rows` [samples] is the tar's index; None = damaged as well, then images that can be decoded count as undamaged.
    """
    from data.writing import write_tar  # imports torch, which an undamaged folder does not need

    with (tar if tar.exists() else Path(os.devnull)).open("rb") as file:  # a missing tar is treated as an empty one
        members = list(_members(file))
        rows, intact = _decodable(file, members) if rows is None else (rows, _unchanged(file, rows))
        keys = _keys(rows, members)
        if intact.any():
            write_tar(_replacement(tar), _samples(file, members, rows, keys, np.flatnonzero(intact)))
    lost = [
        f"{tar.name}: image {i}, {f'key {keys[i]!r}' if keys[i] else 'key unknown'}, byte {rows['offset'][i]}"
        for i in np.flatnonzero(~intact)
    ]
    if shard.samples > len(rows):
        lost.append(f"{tar.name}: {shard.samples - len(rows)} images, keys and bytes unknown")
    return Repaired(replace(index_tar(_replacement(tar)), file=tar.name) if intact.any() else None, lost)


def _members(file: BinaryIO) -> Iterator[Member]:
    """Files of a tar with a readable header and complete content, including those after damage."""
    length = os.fstat(file.fileno()).st_size
    try:
        archive = tarfile.TarFile(fileobj=file, tarinfo=Lenient, ignore_zeros=True)  # continues after damage
        for member in archive:
            start, offset, size = member.offset, member.offset_data, member.size
            if size < 0:  # would send tarfile back, into an endless loop
                archive.offset = offset
            elif member.isreg() and not member.issparse() and offset + size <= length:
                yield Member(start, offset, size, member_end(member), *split_member_name(member.name))
    except (tarfile.TarError, ValueError, OverflowError):  # a member ends beyond the file: it is the last one
        return


def _read(file: BinaryIO, member: Member) -> bytes:
    return os.pread(file.fileno(), member.size, member.offset)


def _unchanged(file: BinaryIO, rows: np.ndarray) -> np.ndarray:
    """Bools [samples]: whether an image, and its target if it has one, still have their checksums in the index."""
    intact = np.ones(len(rows), bool)
    for part in ("", "target_") if rows.dtype == TARGET_ROW else ("",):
        places = rows[[f"{part}offset", f"{part}size", f"{part}crc"]].tolist()
        intact &= [zlib.crc32(os.pread(file.fileno(), size, offset)) == crc for offset, size, crc in places]
    return intact


def _decodable(file: BinaryIO, members: list[Member]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a tar without an index, and bools [samples]: whether an image can be decoded and has its label."""
    from data.decode import decode  # imports torch, which an undamaged folder does not need

    rows, labels, decodes = {}, {}, {}
    for member in members:
        if member.kind == "cls":
            labels[member.key] = parse_label(_read(file, member))
        elif member.kind in IMAGE_TYPES and member.key not in rows:
            data = _read(file, member)
            rows[member.key] = member.offset, member.size, zlib.crc32(data)
            try:
                decodes[member.key] = decode(data).numel() > 0
            except ImageError as error:
                decodes[member.key] = error.kind == TOO_LARGE  # perhaps prepared with a higher limit
    intact = [decodes[key] and (not labels or labels.get(key, -1) >= 0) for key in rows]
    return np.array([(*row, labels.get(key, -1)) for key, row in rows.items()], ROW), np.array(intact, bool)


def _keys(rows: np.ndarray, members: list[Member]) -> list[str | None]:
    """Key of each image, from its header or, if that is damaged, from an adjacent member without an image."""
    by_offset, by_end, by_start = ({getattr(m, at): m.key for m in members} for at in ("offset", "end", "start"))
    keys = [by_offset.get(offset) for offset in rows["offset"].tolist()]
    taken = {None, *keys}
    for i, (offset, size) in enumerate(rows[["offset", "size"]].tolist()):
        if keys[i] is None:
            end = offset + -(-size // BLOCKSIZE) * BLOCKSIZE
            adjacent = [key for key in (by_end.get(offset - BLOCKSIZE), by_start.get(end)) if key not in taken]
            keys[i] = adjacent[0] if adjacent else None
            taken.add(keys[i])
    return keys


def _samples(
    file: BinaryIO, members: list[Member], rows: np.ndarray, keys: list[str | None], kept: np.ndarray
) -> Iterator[dict[str, bytes | str]]:
    """The kept samples for `write_tar`: image, label, and all other members with their key."""
    types, groups = {member.offset: member.kind for member in members}, defaultdict(list)
    for member in members:
        groups[member.key].append(member)
    for i in kept:
        offset, size, crc, label = rows[list(ROW.names)][i].tolist()
        image = os.pread(file.fileno(), size, offset)
        kind = types.get(offset) or TYPES.get(image[:2], "jpg")
        sample = {}
        for member in groups.get(keys[i], ()):
            precedes = member.kind in IMAGE_TYPES and member.kind <= kind  # would become the image of the new sample
            if not precedes and member.kind not in ("", "cls"):
                sample.setdefault(member.kind, _read(file, member))
        sample |= {"__key__": keys[i] or f"salvaged-{offset}-{crc:08x}", kind: image}
        yield sample | ({"cls": str(label).encode()} if label >= 0 else {})


def _updated(index: Index, repaired: dict[Shard, Repaired]) -> Index:
    """The index with the new entries, without shards and splits that have no image left."""
    splits = {}
    for split, shards in index.splits.items():
        left = [repaired[shard].shard if shard in repaired else shard for shard in shards]
        if any(shard and shard.samples for shard in left):
            splits[split] = [shard for shard in left if shard]
    return replace(index, splits=splits)


def _install(folder: Path, new: Index, repaired: dict[Shard, Repaired]) -> None:
    """Rename the replacements, write lost.txt, and index.json last."""
    for shard in repaired:
        for replacement, path in _renames(folder / shard.file):
            if replacement.exists():
                replacement.replace(path)
    sync_folder(folder)
    lines = [line for result in repaired.values() for line in result.lost]
    if lines:
        lines = dict.fromkeys([*_lost_lines(folder), *lines])  # a killed run may have written them
        write_atomic(folder / LOST, "".join(f"{printable(line)}\n" for line in lines).encode())
    write_index(folder, new)


def _report(folder: Path, index: Index, new: Index, repaired: dict[Shard, Repaired]) -> None:
    """Print what was repaired, what is lost, and which splits have changed."""
    lost = 0
    for shard, result in repaired.items():
        entry = result.shard
        left = entry.samples if entry else 0
        lost += shard.samples - left
        same = entry and entry.sha256 == shard.sha256
        outcome = "repaired, byte for byte as it was" if same else f"{left:,} of {shard.samples:,} images kept"
        say(f"{folder / shard.file}: {outcome}{'' if entry else ', no longer listed in index.json'}")
    if lost:
        say(f"{lost:,} images are lost, listed in {folder / LOST}")
        if (folder / "source.json").exists():
            say(
                "to restore them from the original images: "
                f"`python data/prepare.py SOURCE {quote(str(folder))} --repair`"
            )
    for split, shards in index.splits.items():
        if [s.sha256 for s in shards] != [s.sha256 for s in new.splits.get(split, ())]:
            way_out = "runs trained on it cannot be resumed, use a new --run.name"
            say(f"the content of split {split} has changed: {way_out}")
    describe(folder)
