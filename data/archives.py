"""The files of zips and tars, and of archives inside them."""

import bz2
import gzip
import lzma
import os
import posixpath
import re
import stat
import tarfile
import zipfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from shutil import copyfileobj
from typing import BinaryIO

from configs.errors import UserError, printable, reason
from data.listing import ARCHIVES, SIDECARS, Listing, suffix
from data.sources import Item, open_zip
from data.tars import CHUNK_BYTES, check_end, member_end

UNPACKERS = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}  # by the first bytes


def by_suffix(archives: list[Item]) -> Counter[str]:
    """Numbers of archives of each type."""
    return Counter(next(kind for kind in ARCHIVES if item.name.lower().endswith(kind)) for item in archives)


def list_archive(path: Path, shown: str, listing: Listing, scratch: Path | None, unpacked: list[Path]) -> None:
    """Files of a zip or tar at `path`; a compressed tar is unpacked. `shown` is its name."""
    if not _is_tar(path):  # before zip: a tar whose last member is a zip looks like a zip
        if zipfile.is_zipfile(path):
            _list_zip(path, listing)
            return
        target = _unpack(path, shown, scratch, unpacked)
        if not _is_tar(target):
            raise UserError(f"{listing.source} unpacks to a single file, not to a tar: give a folder, a zip or a tar")
        path = target
    with path.open("rb") as file:
        _list_members(file, path, path.stat().st_size, listing)


def list_inner(archive: Item, listing: Listing, scratch: Path | None, unpacked: list[Path]) -> None:
    """Add the files of an archive in the source; its name without the suffix is their folder."""
    kind = next(kind for kind in ARCHIVES if archive.name.lower().endswith(kind))
    inner = Listing(f"{listing.source}/{archive.name}", archive.name[: -len(kind)], files=listing.files)
    path = Path(archive.container)
    if archive.offset is None:
        list_archive(path, archive.name, inner, scratch, unpacked)
    elif kind == ".tar" and not archive.zipped:  # in place
        with path.open("rb") as file:
            file.seek(archive.offset)
            _list_members(file, path, archive.offset + archive.size, inner)
    else:
        list_archive(_copy_out(archive, inner.source, scratch, unpacked), archive.name, inner, scratch, unpacked)
    if inner.archives and not inner.images:
        way_out = "give it as SOURCE, and other archives with --val or --test"
        raise UserError(f"{printable(inner.source)} contains archives itself, {_counted(inner.archives)}: {way_out}")
    if _is_shard(inner):
        listing.shards.add(inner.folder)
    listing.files = inner.files
    listing.images += inner.images
    listing.label_files |= inner.label_files
    listing.ignored += inner.ignored + by_suffix(inner.archives)
    listing.hidden |= inner.hidden
    listing.repeats += inner.repeats
    listing.broken += inner.broken


def _counted(archives: list[Item]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in by_suffix(archives).items())


def _is_shard(inner: Listing) -> bool:
    """Whether an archive is a numbered part of a data set, like 00012.tar or train-0001.tar, and not a class."""
    labelled = any(suffix(name) in SIDECARS for name in inner.label_files)
    return labelled or re.fullmatch(r"(.*[-_.])?\d{4,}", posixpath.basename(inner.folder)) is not None


def _list_zip(path: Path, listing: Listing) -> None:
    for entry in open_zip(str(path), os.getpid())[0].infolist():
        if entry.is_dir():
            continue
        name = entry.filename
        if not entry.flag_bits & 0x800:  # not marked as UTF-8: zipfile takes it for cp437, but it mostly is UTF-8
            with suppress(UnicodeEncodeError):  # its Unicode name is in an extra field
                name = name.encode("cp437").decode("utf-8", "surrogateescape")
        if "\\" in name and "/" not in name:  # written by a tool for Windows, against the standard
            name = name.replace("\\", "/")
        if stat.S_ISLNK(entry.external_attr >> 16):
            listing.broken.append(name)  # its content is a path
            continue
        listing.add_member(name, path, entry.header_offset, entry.file_size, entry.CRC)


def _list_members(file: BinaryIO, path: Path, limit: int, listing: Listing) -> None:
    """Files of the tar in `file` from its position to byte `limit`."""
    start = end = file.tell()
    links = []
    try:
        with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:  # offsets count from byte 0
            for member in tar:
                tar.members.clear()  # a million headers take gigabytes
                if member.size < 0:  # would send tarfile back, into an endless loop
                    raise UserError(f"{listing.source} is damaged at byte {member.offset}: fetch it again")
                end = member.offset_data
                if member.issparse():
                    listing.ignored["sparse"] += 1
                    end = tar.offset
                elif member.isreg():
                    end = member_end(member)
                    listing.add_member(member.name, path, member.offset_data, member.size)
                elif member.islnk() or member.issym():
                    links.append(member)
                elif not member.isdir():
                    listing.ignored["special"] += 1
        if links:
            _add_links(file, start, links, path, listing)
    except tarfile.TarError as error:
        raise UserError(f"{listing.source} is damaged ({error}): fetch it again") from None
    check_end(file, end, limit, Path(listing.source))


def _add_links(file: BinaryIO, start: int, links: list[tarfile.TarInfo], path: Path, listing: Listing) -> None:
    """Links in the tar that begins at byte `start` of `file`: each file counts once."""
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
        files = {posixpath.normpath(m.name): m for m in tar if m.isreg()}
    seen = {item.offset: item.name for item in listing.images}
    for link in links:
        parent = posixpath.dirname(link.name) if link.issym() else ""
        target = files.get(posixpath.normpath(posixpath.join(parent, link.linkname)))
        if target is None:
            listing.broken.append(link.name)
        elif target.offset_data in seen:
            listing.repeats.append((link.name, seen[target.offset_data]))
        elif listing.add_member(link.name, path, target.offset_data, target.size):
            seen[target.offset_data] = link.name


def _is_tar(path: Path) -> bool:
    """Whether a file is an uncompressed tar."""
    try:
        tarfile.open(path, "r:").close()
    except tarfile.TarError:
        return False
    return True


def _unpack(path: Path, shown: str, scratch: Path | None, unpacked: list[Path]) -> Path:
    """Decompress a gz, bz2 or xz file for random access."""
    with path.open("rb") as file:
        opener = UNPACKERS.get(file.read(2))
    if opener is None:
        raise UserError(f"{shown} is not a folder, a zip or a tar (plain, gz, bz2 or xz)")
    target = _reserve(shown, shown, scratch, unpacked)
    try:
        with opener(path) as packed, target.open("wb") as out:
            copyfileobj(packed, out, CHUNK_BYTES)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{shown} cannot be unpacked into {target.parent} ({error})") from None
    return target


def _copy_out(item: Item, shown: str, scratch: Path | None, unpacked: list[Path]) -> Path:
    """Copy an archive out of the zip or tar that contains it."""
    target = _reserve(item.name, shown, scratch, unpacked)
    try:
        with target.open("wb") as out:
            if item.zipped:
                archive, members = open_zip(item.container, os.getpid())
                with archive.open(members[item.offset]) as member:
                    copyfileobj(member, out, CHUNK_BYTES)
            else:
                with Path(item.container).open("rb") as file:
                    file.seek(item.offset)
                    for start in range(0, item.size, CHUNK_BYTES):
                        out.write(file.read(min(CHUNK_BYTES, item.size - start)))
    except (zipfile.BadZipFile, RuntimeError, EOFError) as error:
        raise UserError(f"{item.container}: {printable(item.name)} cannot be unpacked ({reason(error)})") from None
    return target


def _reserve(name: str, shown: str, scratch: Path | None, unpacked: list[Path]) -> Path:
    """The place for an unpacked archive; it is removed when the listing is closed, also after an error."""
    if scratch is None:
        way_out = f"unpack it, or prepare it with `python data/prepare.py {shown} OUT`"
        raise UserError(f"{shown} is compressed: {way_out}")
    unpacked.append(scratch / f".{len(unpacked)}.{posixpath.basename(name)}.unpacked")
    return unpacked[-1]
