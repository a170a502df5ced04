"""Files at URLs other than shards: sources of data/prepare.py are read in parts, its output is uploaded.

Reads are retried like those of shards (`data/remote.py`); nothing is cached on disk. Free of torch.
"""

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, TypeVar

from configs.errors import UserError
from data.cache import RemoteUserError
from data.remote import PROTOCOLS, AttemptError, check_url, explain, is_url, open_filesystem, retried
from data.shard_index import Shard, index_file

BLOCK_BYTES = 1 << 23  # read at a time while an archive is listed
REGION_BYTES = 1 << 20  # of a huge image that is cut into tiles
SMALL_BLOCK_BYTES = 1 << 16  # for members of a zip, which are read in any order
WRITABLE = ("s3", "gs", "az")  # whose files appear at once, when they are complete
STATE = ("source.json", "index.json", "skipped.txt", "lost.txt", "preview.png")

Result = TypeVar("Result")


@lru_cache(8)
def _files(protocol: str, process: int):
    return open_filesystem(f"{protocol}://")


def _call(url: str, key: str, call: Callable[..., Result]) -> Result:
    """`call(filesystem, path)`, retried; errors name `key`."""

    def attempt() -> Result:
        files = _files(url.partition("://")[0], os.getpid())  # filesystems do not survive a fork
        try:
            return call(files, files._strip_protocol(url))
        except UserError:
            raise
        except Exception as error:
            raise explain(error, url, key=key) from None

    return retried(url, attempt)


def read_url(url: str, start: int | None = None, size: int | None = None) -> bytes:
    """Content of a file, or `size` bytes from byte `start`. Raises `RemoteUserError` if they cannot be read."""

    def read(files, path: str) -> bytes:
        data = files.cat_file(path) if size is None else files.cat_file(path, start=start, end=start + size)
        if size is not None and len(data) > size:
            raise RemoteUserError(f"{url}: its server sends whole files only: download it, and give the local file")
        if size is not None and len(data) < size:
            raise AttemptError(f"sent {len(data)} instead of {size} bytes")
        return data

    return b"" if size == 0 else _call(url, "SOURCE", read)


def open_binary(place: str, block: int = BLOCK_BYTES, first: int = 0, size: int | None = None) -> BinaryIO:
    """Open a local file, or one at a URL, which is read in blocks of `block` bytes.

    Of one at a URL, `size` bytes from byte `first` can be a file.
    """
    return io.BufferedReader(_RemoteFile(place, block, first, size)) if is_url(place) else Path(place).open("rb")


class _RemoteFile(io.RawIOBase):
    def __init__(self, url: str, block: int, first: int, size: int | None):
        self.url, self.block, self.first, self.size = url, block, first, size
        self.position, self.start, self.data = 0, 0, b""
        if size is not None:
            return
        self.size = _call(url, "SOURCE", lambda files, path: files.info(path)["size"])
        if self.size is None:
            raise RemoteUserError(f"{url}: its server does not report the size: download the file, and give its path")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: memoryview) -> int:
        wanted = max(0, min(len(buffer), self.size - self.position))
        if wanted and not self.start <= self.position < self.start + len(self.data):
            self.start = self.position
            size = min(max(wanted, self.block), self.size - self.start)
            self.data = read_url(self.url, self.first + self.start, size)
        found = self.data[self.position - self.start :][:wanted] if wanted else b""
        buffer[: len(found)] = found
        self.position += len(found)
        return len(found)


def list_url(url: str) -> list[tuple[str, int, str]]:
    """Name below the folder, size in bytes, and version of every file of a folder. Raises `RemoteUserError`."""

    def find(files, path: str) -> list[tuple[str, int, str]]:
        files.invalidate_cache()
        found = files.find(path, detail=True)
        root = path.rstrip("/") + "/"
        versions = ("ETag", "etag", "md5Hash", "content_settings", "blob_id", "LastModified", "last_modified")
        return [
            (name.removeprefix(root), info["size"], str(next((info[key] for key in versions if info.get(key)), "")))
            for name, info in sorted(found.items())
            if name.startswith(root)
        ]

    return _call(url, "SOURCE", find)


def check_source_url(url: str) -> str:
    """The URL of a source without trailing slashes. Raises `UserError` unless prepare can read it."""
    return check_url(url, "SOURCE")


def check_out_url(url: str) -> str:
    """The URL of a folder to write to, without trailing slashes. Raises `UserError` unless it can be written."""
    protocol = url.partition("://")[0]
    if protocol not in WRITABLE and protocol in PROTOCOLS:
        raise UserError(f"OUT is a URL of {protocol}: shards can be written to {', '.join(WRITABLE)}, or to a folder")
    return check_url(url, "OUT")


@dataclass(frozen=True)
class Upload:
    """A folder at a URL that shards are uploaded to; a local folder has its small files while they are written."""

    url: str

    def sizes(self) -> dict[str, int]:
        """Size in bytes of each file in the folder itself."""

        def find(files, path: str) -> dict[str, int]:
            files.invalidate_cache()
            try:
                found = files.ls(path, detail=True)
            except FileNotFoundError:
                return {}
            return {info["name"].rsplit("/", 1)[1]: info["size"] for info in found if info["type"] == "file"}

        return _call(self.url, "OUT", find)

    def pull(self, folder: Path) -> None:
        """Fetch what an earlier run has recorded. Raises `UserError` if the folder has other content."""
        sizes = self.sizes()
        if sizes and "source.json" not in sizes:
            raise UserError(f"{self.url} is not empty and was not made by this command: choose another folder")
        for name in sizes:
            if name in STATE or name.endswith(".record.json"):
                (folder / name).write_bytes(read_url(f"{self.url}/{name}"))

    def push(self, *paths: Path) -> None:
        """Upload files, in this order; each appears when it is complete."""
        for path in paths:
            target = f"{self.url}/{path.name}"
            _call(target, "OUT", lambda files, remote, path=path: files.put_file(str(path), remote))

    def delete(self, paths: list[Path]) -> None:
        """Delete the files of these names; missing ones are no error."""
        present = self.sizes()
        for path in paths:
            if path.name in present:
                _call(f"{self.url}/{path.name}", "OUT", lambda files, remote: files.rm_file(remote))

    def damage(self, shards: list[Shard]) -> list[str | None]:
        """Description of each shard whose files are missing or have another size, else None."""
        sizes, found = self.sizes(), []
        for shard in shards:
            tar, index = f"{self.url}/{shard.file}", index_file(Path(shard.file)).name
            size = sizes.get(shard.file)
            wrong = f"{tar} is missing" if size is None else f"{tar} has {size} bytes, {shard.bytes} were written"
            intact = size == shard.bytes and index in sizes
            found.append(None if intact else f"{tar} has no .idx.npy" if size == shard.bytes else wrong)
        return found
