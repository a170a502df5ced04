"""List the files of a source: a folder, a zip, a tar (compressed or not), and archives inside them, one level deep.

Every file is an image, a file that may hold labels, or counted: nothing is left out without a word. Listing executes
and unpacks nothing, except compressed tars and archives in archives, which need random access.
"""

import bz2
import gzip
import lzma
import os
import posixpath
import re
import stat
import tarfile
import zipfile
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from shutil import copyfileobj
from typing import BinaryIO

from configs.errors import UserError, counted, printable, reason
from data.reading import HEAD_BYTES, sniff
from data.sources import READABLE, Item, open_zip
from data.tars import CHUNK_BYTES, check_end, member_end

TABLES = ("csv", "tsv", "jsonl", "ndjson", "parquet")  # files that may hold labels of many images
SIDECARS = ("cls", "json")  # of one image: WebDataset's
LABEL_FILES = (*TABLES, *SIDECARS, "txt", "mat", "xml", "yaml", "yml")
ARCHIVES = (".tar", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
HIDDEN = {
    "__macosx", "@eadir", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "#recycle", "lost+found",
    "system volume information", "__pycache__",
}  # fmt: skip
UNPACKERS = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}  # by the first bytes


@dataclass
class Listing:
    """The files of a source."""

    source: str  # as the user named it
    images: list[Item] = field(default_factory=list)
    label_files: dict[str, Item] = field(default_factory=dict)  # by name
    archives: list[Item] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)  # files of other types, by suffix
    hidden: set[str] = field(default_factory=set)
    repeats: list[tuple[str, str]] = field(default_factory=list)  # name of a link, name of the same file
    broken: list[str] = field(default_factory=list)  # links without a file
    shards: set[str] = field(default_factory=set)  # archives that are numbered parts, not classes
    sidecars: bool = False  # labels are from files beside the images

    def add(self, item: Item) -> bool:
        """Sort a file by its name. Returns whether it is an image."""
        parts = PurePosixPath(item.name).parts
        for i, part in enumerate(parts):
            if is_hidden(part):
                self.hidden.add("/".join(parts[: i + 1]))
                return False
        kind = suffix(item.name)
        if kind in READABLE or _is_dicom(item):
            self.images.append(item)
        elif kind in LABEL_FILES:
            self.label_files[item.name] = item
        elif item.name.lower().endswith(ARCHIVES):
            self.archives.append(item)
        else:
            self.ignored[f".{kind}" if kind else "without a suffix"] += 1
        return kind in READABLE

    def notes(self) -> Iterator[str]:
        """What is left out, a line each."""
        counts = self.ignored + Counter(f".{suffix(name)}" for name in self.label_files)
        if counts:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common())
            yield f"{counted(sum(counts.values()), 'file')} ignored: {kinds}"
        if self.hidden:
            names = sorted({posixpath.basename(path) for path in self.hidden})
            shown = f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            yield f"{counted(len(self.hidden), 'hidden file or folder', 'hidden files or folders')} skipped: {shown}"
        if self.repeats:
            link, same = self.repeats[0]
            yield f"{counted(len(self.repeats), 'link')} to files of the source, counted once, such as {link} = {same}"
        if self.broken:
            yield f"{counted(len(self.broken), 'link')} without a file skipped, such as {self.broken[0]}"
        doubles = [name for name, count in Counter(item.name for item in self.images).items() if count > 1]
        if doubles:
            yield f"{counted(len(doubles), 'name')} of several images, such as {doubles[0]}: all are used"
        if self.shards:
            first = min(self.shards)
            yield f"{counted(len(self.shards), 'archive')} such as {first} taken as numbered parts, not as classes"


def suffix(name: str) -> str:
    """Type of a file from its name, in lower case, without the dot; empty without one."""
    return posixpath.splitext(name)[1][1:].lower()


def _is_dicom(item: Item) -> bool:
    """Whether a file without a suffix, or with a number for one, is DICOM: scanners write 1.2.840.1 or IM0001."""
    kind = suffix(item.name)
    return (not kind or kind.isdigit()) and sniff(item.head(HEAD_BYTES)) == "dcm"


def is_hidden(part: str) -> bool:
    """Whether a file or folder belongs to a system or tool, by its name."""
    return (part.startswith(".") and part not in (".", "..")) or part.lower() in HIDDEN


@contextmanager
def list_source(source: str, scratch: Path | None) -> Iterator[Listing]:
    """List a folder, zip or tar; images are sorted by name. What has to be unpacked is in `scratch` until the end.

    With `scratch` None, archives in a folder are not read, compressed ones refused.

    Raises `UserError` if the source does not exist, is of an unknown type, damaged, or without images.
    """
    path, listing, unpacked = Path(source), Listing(source), []
    if (path / "index.json").exists():
        raise UserError(f"{source} contains shards already: train on them, or give the original images")
    if not path.exists():
        raise UserError(f"{source} does not exist: give a folder, a zip, a tar, or `digits`")
    try:
        if path.is_dir():
            _list_folder(path, listing)
        else:
            _list_archive(path, source, listing, scratch, unpacked)
        archives, listing.archives = listing.archives, []
        if listing.images or scratch is None:  # an archive beside its own files would double them
            listing.ignored += _by_suffix(archives)
        else:
            for archive in archives:
                _list_inner(archive, listing, scratch, unpacked)
        if not listing.images:
            found = "".join(f"; {note}" for note in listing.notes())
            raise UserError(f"{source} has no image ({', '.join(READABLE)}){found}")
        listing.images.sort(key=lambda item: item.name)
        yield listing
    finally:
        for file in unpacked:
            if file.exists():  # checked first: on a read-only disk, removing a missing file is an error
                file.unlink()


def _by_suffix(archives: list[Item]) -> Counter[str]:
    return Counter(next(kind for kind in ARCHIVES if item.name.lower().endswith(kind)) for item in archives)


def _list_folder(root: Path, listing: Listing) -> None:
    """Files below a folder. Links are followed after everything else, so that a file's own name is preferred."""
    folders, links = deque([(root, "")]), deque()
    seen_folders, seen_files = {}, {}
    while folders or links:
        path, name = folders.popleft() if folders else links.popleft()
        if name and is_hidden(posixpath.basename(name)):
            listing.hidden.add(name)
            continue
        try:
            about = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            listing.broken.append(name)
            continue
        except OSError as error:
            if not path.is_symlink():
                raise
            listing.broken.append(f"{name} ({error.strerror.lower()})")  # such as a link to itself
            continue
        identity, is_folder = (about.st_dev, about.st_ino), stat.S_ISDIR(about.st_mode)
        seen = seen_folders if is_folder else seen_files
        if identity in seen:
            listing.repeats.append((name, seen[identity]))
            continue
        if is_folder:
            seen[identity] = name or "."
            with os.scandir(path) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    queue = links if entry.is_symlink() else folders
                    queue.append((Path(entry.path), f"{name}/{entry.name}".removeprefix("/")))
        elif stat.S_ISREG(about.st_mode):
            if listing.add(Item(name, str(path), f"{about.st_size} {about.st_mtime_ns}")):
                seen[identity] = name
        else:
            listing.ignored["special"] += 1


def _list_archive(path: Path, shown: str, listing: Listing, scratch: Path | None, unpacked: list[Path]) -> None:
    """Files of a zip or tar at `path`; a compressed tar is unpacked. `shown` is its name."""
    if _is_tar(path):  # before zip: a tar whose last member is a zip looks like a zip
        with path.open("rb") as file:
            _list_members(file, path, path.stat().st_size, "", listing)
    elif zipfile.is_zipfile(path):
        _list_zip(path, "", listing)
    elif scratch is None:
        raise UserError(f"{shown} is compressed: unpack it, or prepare it with `python data/prepare.py {shown} OUT`")
    else:
        target = scratch / f".{len(unpacked)}.{posixpath.basename(shown)}.unpacked"
        unpacked.append(target)
        _unpack(path, target, shown)
        if not _is_tar(target):
            raise UserError(f"{listing.source} unpacks to a single file, not to a tar: give a folder, a zip or a tar")
        with target.open("rb") as file:
            _list_members(file, target, target.stat().st_size, "", listing)


def _list_inner(archive: Item, listing: Listing, scratch: Path, unpacked: list[Path]) -> None:
    """Add the files of an archive in the source; its name without the suffix is their folder."""
    kind = next(kind for kind in ARCHIVES if archive.name.lower().endswith(kind))
    folder, inner = archive.name[: -len(kind)], Listing(f"{listing.source}/{archive.name}")
    if archive.offset is not None and not archive.zipped and kind == ".tar":  # in place
        with Path(archive.container).open("rb") as file:
            file.seek(archive.offset)
            _list_members(file, Path(archive.container), archive.offset + archive.size, folder, inner)
    else:
        path = Path(archive.container)
        if archive.offset is not None:
            path = scratch / f".{len(unpacked)}.{posixpath.basename(archive.name)}"
            unpacked.append(path)
            _copy_out(archive, path)
        outer = Listing(inner.source)
        _list_archive(path, archive.name, outer, scratch, unpacked)
        for item in (*outer.images, *outer.label_files.values(), *outer.archives):
            inner.add(replace(item, name=f"{folder}/{item.name.removeprefix('./')}"))
        inner.ignored, inner.repeats, inner.broken = outer.ignored, outer.repeats, outer.broken
        inner.hidden |= {f"{folder}/{path}" for path in outer.hidden}
    if inner.archives and not inner.images:
        way_out = "give it as SOURCE, and other archives with --val or --test"
        raise UserError(f"{printable(inner.source)} contains archives itself, {_counted(inner.archives)}: {way_out}")
    if _is_shard(folder, inner):
        listing.shards.add(folder)
    listing.images += inner.images
    listing.label_files |= inner.label_files
    listing.ignored += inner.ignored + _by_suffix(inner.archives)
    listing.hidden |= inner.hidden
    listing.repeats += inner.repeats
    listing.broken += inner.broken


def _counted(archives: list[Item]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in _by_suffix(archives).items())


def _is_shard(folder: str, inner: Listing) -> bool:
    """Whether an archive is a numbered part of a data set, like 00012.tar or train-0001.tar, and not a class."""
    labelled = any(suffix(name) in SIDECARS for name in inner.label_files)
    return labelled or re.fullmatch(r"(.*[-_.])?\d{4,}", posixpath.basename(folder)) is not None


def _copy_out(item: Item, target: Path) -> None:
    """Copy an archive out of the zip or tar that contains it."""
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


def _list_zip(path: Path, folder: str, listing: Listing) -> None:
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
        listing.add(Item(name, str(path), f"{entry.CRC}", entry.header_offset, entry.file_size, zipped=True))


def _list_members(file: BinaryIO, path: Path, limit: int, folder: str, listing: Listing) -> None:
    """Files of the tar in `file` from its position to byte `limit`; `folder` is put before their names."""
    end, links, seen = file.tell(), [], {}

    def add(name: str, offset: int, size: int) -> None:
        name = name.removeprefix("./")
        if offset in seen:
            listing.repeats.append((name, seen[offset]))
        elif listing.add(Item(f"{folder}/{name}" if folder else name, str(path), f"{offset} {size}", offset, size)):
            seen[offset] = name

    try:
        with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:  # offsets count from byte 0
            for member in tar:
                if member.size < 0:  # would send tarfile back, into an endless loop
                    raise UserError(f"{listing.source} is damaged at byte {member.offset}: fetch it again")
                if member.issparse():
                    listing.ignored["sparse"] += 1
                    end = tar.offset
                elif member.isreg():
                    end = member_end(member)
                    add(member.name, member.offset_data, member.size)
                else:
                    end = member.offset_data
                    if member.islnk() or member.issym():
                        links.append(member)
                    elif not member.isdir():
                        listing.ignored["special"] += 1
            files = {posixpath.normpath(m.name): m for m in tar.getmembers() if m.isreg()} if links else {}
    except tarfile.TarError as error:
        raise UserError(f"{listing.source} is damaged ({error}): fetch it again") from None
    for link in links:
        parent = posixpath.dirname(link.name) if link.issym() else ""
        target = files.get(posixpath.normpath(posixpath.join(parent, link.linkname)))
        if target is None:
            listing.broken.append(link.name)
        else:
            add(link.name, target.offset_data, target.size)
    check_end(file, end, limit, Path(listing.source))


def _is_tar(path: Path) -> bool:
    """Whether a file is an uncompressed tar."""
    try:
        tarfile.open(path, "r:").close()
    except tarfile.TarError:
        return False
    return True


def _unpack(path: Path, target: Path, shown: str) -> None:
    """Decompress a gz, bz2 or xz file for random access. The caller removes `target`, also after an error."""
    with path.open("rb") as file:
        opener = UNPACKERS.get(file.read(2))
    if opener is None:
        raise UserError(f"{shown} is not a folder, a zip or a tar (plain, gz, bz2 or xz)")
    try:
        with opener(path) as packed, target.open("wb") as out:
            copyfileobj(packed, out, CHUNK_BYTES)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{shown} cannot be unpacked into {target.parent} ({error})") from None
