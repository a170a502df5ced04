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
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path
from shutil import disk_usage
from typing import BinaryIO

from configs.errors import UserError, printable, reason
from configs.shell import quote
from data.listing import ARCHIVES, SIDECARS, Listing, suffix
from data.remote_files import SMALL_BLOCK_BYTES, open_binary
from data.sources import Item, open_zip
from data.tars import DamagedArchive, check_end, member_end, open_tar

FREE_SHARE = 0.9  # of the disk's free space, that an unpacked archive may take
UNPACKED_BYTES = 1 << 12  # read at a time: compressed zeros may unpack to more than a thousand times as much
UNPACKERS = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}  # by the first bytes


def by_suffix(archives: list[Item]) -> Counter[str]:
    """Numbers of archives of each type."""
    return Counter(next(kind for kind in ARCHIVES if item.name.lower().endswith(kind)) for item in archives)


def list_archive(path: str, shown: str, listing: Listing, scratch: Path | None, unpacked: list[Path]) -> None:
    """Files of a zip or tar at `path`; a compressed tar is unpacked. `shown` is its name."""
    if not _is_tar(path):  # before zip: a tar whose last member is a zip looks like a zip
        if _is_zip(path):
            _list_zip(path, listing)
            return
        target = str(_unpack(path, shown, scratch, unpacked))
        if not _is_tar(target):
            raise UserError(f"{listing.source} unpacks to a single file, not to a tar: give a folder, a zip or a tar")
        path = target
    with open_binary(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        _list_members(file, path, size, listing)


def list_inner(archive: Item, listing: Listing, scratch: Path | None, unpacked: list[Path]) -> None:
    """Add the files of an archive in the source; its name without the suffix is their folder."""
    kind = next(kind for kind in ARCHIVES if archive.name.lower().endswith(kind))
    inner = Listing(f"{listing.source}/{archive.name}", archive.name[: -len(kind)], files=listing.files)
    path = archive.container
    if archive.offset is None:
        list_archive(path, archive.name, inner, scratch, unpacked)
    elif kind == ".tar" and not archive.zipped:  # in place
        with open_binary(path) as file:
            file.seek(archive.offset)
            _list_members(file, path, archive.offset + archive.size, inner)
    else:
        path = str(_copy_out(archive, inner.source, scratch, unpacked))
        list_archive(path, archive.name, inner, scratch, unpacked)
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


def _list_zip(path: str, listing: Listing) -> None:
    for entry in open_zip(path, os.getpid())[0].infolist():
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


def _list_members(file: BinaryIO, path: str, limit: int, listing: Listing) -> None:
    """Files of the tar in `file` from its position to byte `limit`."""
    start = end = file.tell()
    links = []
    try:
        with open_tar(file) as tar:  # offsets count from byte 0
            for member in tar:
                tar.members.clear()  # a million headers take gigabytes
                beyond = not member.issparse() and member.offset_data + member.size > limit
                if member.size < 0 or beyond:  # would send tarfile back, into an endless loop, or where no file is
                    raise DamagedArchive(
                        f"{listing.source} is damaged or cut short at byte {member.offset}: fetch it again"
                    )
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
        raise DamagedArchive(f"{listing.source} is damaged ({error}): fetch it again") from None
    check_end(file, end, limit, listing.source)


def _add_links(file: BinaryIO, start: int, links: list[tarfile.TarInfo], path: str, listing: Listing) -> None:
    """Links in the tar that begins at byte `start` of `file`: each file counts once."""
    file.seek(start)
    with open_tar(file) as tar:
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


def _is_tar(path: str) -> bool:
    """Whether a file is an uncompressed tar."""
    with open_binary(path, SMALL_BLOCK_BYTES) as file:
        try:
            open_tar(file).close()
        except tarfile.TarError:
            return False
        return True


def _is_zip(path: str) -> bool:
    with open_binary(path, SMALL_BLOCK_BYTES) as file:
        return zipfile.is_zipfile(file)


def _unpack(path: str, shown: str, scratch: Path | None, unpacked: list[Path]) -> Path:
    """Decompress a gz, bz2 or xz file for random access."""
    with open_binary(path) as file:
        start = file.read(2)
    opener = UNPACKERS.get(start)
    if start == b"PK":
        raise DamagedArchive(f"{shown} is a damaged or cut zip: fetch it again")
    if opener is None:
        raise DamagedArchive(f"{shown} is not a folder, a zip or a tar (plain, gz, bz2 or xz)")
    target = _reserve(shown, scratch, unpacked)
    try:
        with open_binary(path) as file, opener(file) as packed:
            _copy(packed, target, shown)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"{shown} cannot be unpacked into {target.parent} ({error.strerror.lower()})") from None
        raise DamagedArchive(f"{shown} is damaged or cut short: fetch it again") from None
    return target


def _copy_out(item: Item, shown: str, scratch: Path | None, unpacked: list[Path]) -> Path:
    """Copy an archive out of the zip or tar that contains it."""
    target = _reserve(shown, scratch, unpacked)
    try:
        if item.zipped:
            archive, members = open_zip(item.container, os.getpid())
            with archive.open(members[item.offset]) as member:
                _copy(member, target, shown, members[item.offset].file_size)
        else:
            with item.open() as member:
                _copy(member, target, shown, item.size)
    except (UserError, OSError):
        raise
    except Exception as error:  # damaged members of zips raise almost any exception
        raise DamagedArchive(f"{item.container}: {printable(item.name)} cannot be unpacked ({reason(error)})") from None
    return target


def _copy(packed: BinaryIO, target: Path, shown: str, size: int = 0) -> None:
    """Write an unpacked file. Raises `UserError` before it takes most of the free space; `size` is known, or 0."""
    room = int(FREE_SHARE * disk_usage(target.parent).free)
    with target.open("wb") as out:
        while size <= room and (block := packed.read(UNPACKED_BYTES)):
            out.write(block)
            size = max(size, out.tell())
    if size > room:
        target.unlink()
        problem = f"unpacks to more than {room / 1e9:.3g} GB, {FREE_SHARE:.0%} of the free space of {target.parent}"
        raise UserError(f"{printable(shown)} {problem}: free some, or give an OUT on a larger disk")


def _reserve(shown: str, scratch: Path | None, unpacked: list[Path]) -> Path:
    """The place for an unpacked archive; it is removed when the listing is closed, also after an error."""
    if scratch is None:
        way_out = f"unpack it, or prepare it with `python data/prepare.py {quote(shown)} OUT`"
        raise UserError(f"{shown} is compressed: {way_out}")
    unpacked.append(scratch / f".{len(unpacked)}.unpacked")
    return unpacked[-1]
