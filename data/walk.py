"""List the files of a source: a folder, a zip, a tar (compressed or not), and archives inside them, one level deep.

A folder or an archive may be at a URL.

Listing executes and unpacks nothing, except compressed tars and archives in archives, which need random access.
"""

import os
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import UserError
from data.archives import by_suffix, list_archive, list_inner
from data.listing import ARCHIVES, Listing, is_hidden
from data.remote import is_url
from data.remote_files import check_source_url, list_url
from data.sources import Item
from data.tars import READABLE, DamagedArchive


@contextmanager
def list_source(source: str, scratch: Path | None) -> Iterator[Listing]:
    """List a folder, zip or tar; images are sorted by name. What has to be unpacked is in `scratch` until the end.

    With `scratch` None, what would have to be unpacked is refused.

    Raises `UserError` if the source does not exist, is of an unknown type, damaged, or without images.
    """
    remote = is_url(source)
    source = check_source_url(source) if remote else source
    path, listing, unpacked = Path(source), Listing(source), []
    if not remote and (path / "index.json").exists():
        raise UserError(f"{source} contains shards already: train on them, or give the original images")
    if not remote and not path.exists():
        raise UserError(f"{source} does not exist: give a folder, a zip, a tar, or `digits`")
    try:
        if remote and not source.lower().endswith(ARCHIVES):
            _list_remote_folder(source, listing)
        elif not remote and path.is_dir():
            _list_folder(path, listing)
        else:
            list_archive(source, source, listing, scratch, unpacked)
        archives, listing.archives = listing.archives, []
        if listing.images:  # an archive beside its own files would double them
            listing.ignored += by_suffix(archives)
        else:
            for archive in archives:
                try:
                    list_inner(archive, listing, scratch, unpacked)
                except DamagedArchive as error:  # the others are still useful
                    listing.damaged.append(str(error))
        if not listing.images:
            found = "".join(f"; {note}" for note in listing.notes())
            raise UserError(f"{source} has no image ({', '.join(READABLE)}){found}")
        listing.images.sort(key=lambda item: item.name)
        yield listing
    finally:
        for file in unpacked:
            if file.exists():  # checked first: on a read-only disk, removing a missing file is an error
                file.unlink()


def _list_folder(root: Path, listing: Listing) -> None:
    """Files below a folder. Links are followed after everything else, so that a file's own name is preferred."""
    folders, links, seen = deque(), deque(), {}

    def visit(entry: os.DirEntry | Path, path: str, name: str, is_link: bool) -> None:
        try:
            about = entry.stat()
        except OSError as error:
            gone = isinstance(error, (FileNotFoundError, NotADirectoryError))
            if not (gone or is_link):
                raise
            listing.broken.append(name if gone else f"{name} ({error.strerror.lower()})")  # such as a link to itself
            return
        identity = about.st_dev, about.st_ino
        if identity in seen:
            listing.repeats.append((name, seen[identity]))
        elif stat.S_ISDIR(about.st_mode):
            seen[identity] = name or "."
            folders.append((path, f"{name}/" if name else ""))
        elif not stat.S_ISREG(about.st_mode):
            listing.ignored["special"] += 1
        elif listing.add(Item(name, path, f"{about.st_size} {about.st_mtime_ns}")):
            seen[identity] = name

    visit(root, str(root), "", False)
    while folders or links:
        if not folders:
            visit(*links.popleft(), True)
            continue
        path, prefix = folders.popleft()
        with os.scandir(path) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        if prefix and not entries:
            listing.empty.append(prefix[:-1])
        for entry in entries:
            name = prefix + entry.name
            if is_hidden(entry.name):
                listing.hidden.add(name)
            elif entry.is_symlink():
                links.append((entry, entry.path, name))
            else:
                visit(entry, entry.path, name, False)


def _list_remote_folder(url: str, listing: Listing) -> None:
    """Files below a folder at a URL."""
    if url.startswith("http"):
        kinds = ", ".join(ARCHIVES)
        raise UserError(f"{url} is no archive ({kinds}), and servers do not list folders: give an archive's URL")
    found = list_url(url)
    if any(name == "index.json" for name, *_ in found):
        raise UserError(f"{url} contains shards already: train on them, or give the original images")
    for name, size, version in found:
        listing.add(Item(name, f"{url}/{name}", f"{size} {version}"))
