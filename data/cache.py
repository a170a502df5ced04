"""Fetched files in a folder of limited size, shared by all processes of a host.

    CACHE/DIGEST              a file, named by the SHA-256 of its content
    CACHE/DIGEST.lock         flock of the process that fetches the file; the kernel releases it when the process ends
    CACHE/DIGEST.BYTES.X.part a download in progress, which reserves BYTES; if nobody holds its lock, it is a leftover
    CACHE/room.lock           flock that serialises eviction and the renaming of finished downloads

No file is fetched twice at the same time. An open file stays readable after another process has evicted it.
"""

import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from configs.errors import UserError, reason

POLL_SECONDS = 0.1
NAME = re.compile(r"([0-9a-f]{64})(?:\.(\d+)\.[0-9a-f]+\.part|\.lock)?")


class RemoteUserError(UserError):
    """A file cannot be fetched. Unlike a damaged image, it is not replaced by another: the run ends."""


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Lock a file against other processes and threads; yields whether it is locked, always True with `wait`.

    The file is removed afterwards. The lock is released explicitly: forked children share the descriptor, so that
    closing it would not be enough.
    """
    while True:
        with path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    continue
            except FileNotFoundError:
                continue  # the previous holder removed the file: retry with a new one
            except BlockingIOError:
                yield False
                return
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
                fcntl.flock(file, fcntl.LOCK_UN)
            return


class Cache:
    """Files by their SHA-256, up to `limit` bytes including downloads in progress; evicts the least recently used.

    Only files with the names above are counted and removed. Raises `UserError` if the folder cannot be written.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder.expanduser().absolute(), limit
        with self.disk_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._room():
                self._contents()  # removes leftovers of killed processes

    @contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Turn an `OSError` of the folder into a `RemoteUserError` that names it."""
        try:
            yield
        except OSError as error:
            problem = (error.strerror or reason(error)).lower()
            way_out = "free some space, lower data.cache_gb, or choose another folder"
            raise RemoteUserError(f"data.cache {self.folder}: {problem}: {way_out}") from None

    def find(self, digest: str, size: int | None) -> int | None:
        """Open a file of `size` bytes (None = any), and mark it as used. Returns its descriptor, None if not cached."""
        try:
            file = os.open(self.folder / digest, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if size is not None and os.fstat(file).st_size != size:  # damaged by a power failure
            os.close(file)
            self.drop(digest)
            return None
        self.touch(digest)
        return file

    def touch(self, digest: str) -> bool:
        """Mark a file as used. Returns whether it is cached."""
        with suppress(FileNotFoundError):
            os.utime(self.folder / digest)
            return True
        return False

    def drop(self, digest: str) -> None:
        (self.folder / digest).unlink(missing_ok=True)

    def fetching(self, digest: str):
        """Context manager: the lock that is required to fetch a file."""
        return locked(self.folder / f"{digest}.lock")

    @contextmanager
    def part(self, digest: str, size: int) -> Iterator[Path]:
        """An empty file to download `size` bytes into; removed at the end. The caller holds the file's lock.

        Evicts other files to make room. If other downloads leave too little room, this waits until they end.
        """
        # random name: the thread of a stalled attempt may still write to the previous file
        path = self.folder / f"{digest}.{size}.{secrets.token_hex(8)}.part"
        while True:
            with self._room():
                files, used = self._contents(digest)
                for _, bytes_, old in sorted(files):
                    if used + size > self.limit:
                        old.unlink(missing_ok=True)
                        used -= bytes_
                if used + size <= self.limit:
                    path.touch()
                    break
            time.sleep(POLL_SECONDS)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def keep(self, part: Path, digest: str) -> int:
        """Rename a verified download. Returns its descriptor, opened before other processes can evict the file."""
        file = os.open(part, os.O_RDONLY)
        with self._room():
            part.replace(self.folder / digest)
        return file

    def _room(self):
        return locked(self.folder / "room.lock")

    def _contents(self, own: str = "") -> tuple[list[tuple[int, int, Path]], int]:
        """Files (time of last use, bytes, path), and the total of bytes including downloads in progress.

        Removes leftovers: parts and locks that nobody holds, and parts of `own`, whose lock the caller holds.
        """
        files, used = [], 0
        for path in list(self.folder.iterdir()):
            if not (name := NAME.fullmatch(path.name)):
                continue
            digest, reserved = name.groups()
            with suppress(FileNotFoundError):  # a download ended just now
                state = path.stat()
                if path.name == digest:
                    files.append((state.st_mtime_ns, state.st_size, path))
                    used += state.st_size
                elif digest != own:
                    with locked(self.folder / f"{digest}.lock", wait=False) as stale:
                        if stale:
                            path.unlink()
                        elif reserved:
                            used += max(int(reserved), state.st_size)
                elif reserved:
                    path.unlink()
        return files, used
