"""Fetched files in a folder of limited size, shared by all processes of a host.

    CACHE/DIGEST              a file, named by the SHA-256 of its content
    CACHE/DIGEST.lock         exists while a process fetches that file; held with flock, which ends with the process
    CACHE/DIGEST.BYTES.X.part a download under way, and the room kept for it; without its lock held it is a leftover
    CACHE/room.lock           held while room is made, and while a finished download gets its name

No file is fetched twice at a time. Whoever has opened a file may read on after another process has removed it.
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
    """A file cannot be fetched. Unlike damage in an image, this is no reason to go on without it."""


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock, among processes and threads; yields whether it is held. Its file goes with the last holder.

    A forked child shares the open file, and flock belongs to that: it is unlocked by word, not by closing alone.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(file), path.stat()):
                break
        except FileNotFoundError:
            pass  # the holder before took the file with it: begin again with a new one
        except BlockingIOError:
            os.close(file)
            yield False
            return
        except BaseException:
            os.close(file)
            raise
        os.close(file)
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        fcntl.flock(file, fcntl.LOCK_UN)
        os.close(file)


class Cache:
    """Files by their SHA-256; `limit` bytes at most, with all downloads under way: the least recently used go.

    Nothing in the folder is counted or removed but what bears one of the names above.

    Raises:
        UserError: the folder cannot be made or written
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder.expanduser().absolute(), limit
        with self.explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._room():
                self._contents()  # leftovers of killed processes go

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Make an `OSError` of the folder a `RemoteUserError`."""
        try:
            yield
        except OSError as error:
            raise RemoteUserError(
                f"data.cache {self.folder}: {(error.strerror or reason(error)).lower()}: free some space, lower "
                "data.cache_gb, or choose another folder"
            ) from None

    def find(self, digest: str, size: int | None) -> int | None:
        """Descriptor of a file, now marked as used; None where there is none of `size` bytes (null = any)."""
        try:
            file = os.open(self.folder / digest, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if size is not None and os.fstat(file).st_size != size:  # after a power cut
            os.close(file)
            self.drop(digest)
            return None
        self.touch(digest)
        return file

    def touch(self, digest: str) -> bool:
        """Mark a file as used. Returns whether it is there."""
        try:
            os.utime(self.folder / digest)
        except FileNotFoundError:
            return False
        return True

    def drop(self, digest: str) -> None:
        """Remove a file, if it is there."""
        (self.folder / digest).unlink(missing_ok=True)

    def fetching(self, digest: str):
        """The lock of a file, to be held while it is fetched."""
        return locked(self.folder / f"{digest}.lock")

    @contextmanager
    def part(self, digest: str, size: int) -> Iterator[Path]:
        """An empty file to fetch `size` bytes into, for the holder of the file's lock; in the end it is removed.

        Room is made for it. Where other downloads leave too little, this waits until they end.
        """
        # a name of its own: the thread of a stalled attempt may still have the one before
        path = self.folder / f"{digest}.{size}.{secrets.token_hex(8)}.part"
        while True:
            with self._room():
                files, used = self._contents(digest)
                for _, held, old in sorted(files):
                    if used + size <= self.limit:
                        break
                    old.unlink(missing_ok=True)
                    used -= held
                if used + size <= self.limit:
                    path.touch()
                    break
            time.sleep(POLL_SECONDS)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def keep(self, part: Path, digest: str) -> int:
        """Give a verified download its name. Opened first, so that nobody can remove it before it is read."""
        file = os.open(part, os.O_RDONLY)
        with self._room():
            part.replace(self.folder / digest)
        return file

    def _room(self):
        return locked(self.folder / "room.lock")

    def _contents(self, own: str = "") -> tuple[list[tuple[int, int, Path]], int]:
        """Files (time of last use, bytes, path), and the bytes of all, with those kept for downloads under way.

        Leftovers are removed: what nobody holds the lock of, and parts of `own`, whose lock the caller holds.
        """
        files, used = [], 0
        for path in [Path(entry) for entry in os.scandir(self.folder)]:
            name = NAME.fullmatch(path.name)
            if name is None:
                continue
            digest, reserved = name.groups()
            with suppress(FileNotFoundError):  # a download that ended just now
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
