"""Shards behind a URL: fetched when they are needed, and verified.

What is fetched lies in data/cache.py's folder, which all ranks and loader processes of a host share.
"""

import errno
import json
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import fsspec
from fsspec.callbacks import NoOpCallback

from configs.errors import UserError, reason
from configs.files import sha256
from data.cache import POLL_SECONDS, Cache, RemoteUserError

PROTOCOLS = {  # what is read, and the pip package that speaks it; none executes anything
    "http": "fsspec[http]",
    "https": "fsspec[http]",
    "s3": "s3fs",
    "gs": "gcsfs",
    "az": "adlfs",
    "hf": "huggingface_hub",
}
ATTEMPTS = 4
BACKOFF_SECONDS = 1.0  # before the second attempt; twice as long before each further one
STALL_SECONDS, STALL_BYTES = 60.0, 1 << 16  # a transfer that brings fewer bytes in that time has stalled
INDEX_BYTES = 1 << 28  # the longest index.json that is read
FETCHES = 4  # files that a process fetches at a time, where it may

Result = TypeVar("Result")


class AttemptError(Exception):
    """An attempt failed; another may do better."""


def check_url(url: str) -> str:
    """A folder's URL without its last slashes. Raises `UserError` for any but a plain one of a known protocol."""
    protocol, _, place = url.partition("://")
    if protocol not in PROTOCOLS or "::" in url:
        raise UserError(f"data.path {url} is not read: only URLs that begin with {', '.join(PROTOCOLS)} and have no ::")
    if not place.strip("/") or re.search(r"[\s?#*\[\]]", place):
        raise UserError(f"data.path {url} is not the URL of a folder: give {protocol}://... without spaces and ?#*[]")
    if protocol.startswith("http") and "@" in place.split("/")[0]:
        raise UserError("data.path has a password in it, which logs would show: put it into ~/.netrc")
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError:
        raise UserError(f"data.path {url} needs a package: pip install '{PROTOCOLS[protocol]}'") from None
    return url.rstrip("/")


class _Progress(NoOpCallback):  # this base, because huggingface_hub does not stream with others
    """Counts a transfer's bytes in `value`, and ends one that was given up."""

    given_up = False

    def call(self, *_, **__):
        if self.given_up:
            raise ConnectionAbortedError("given up")


def transfer(copy: Callable[[Path, NoOpCallback], None], part: Path, most: int) -> None:
    """Run `copy(part, progress)` in a thread of its own, which is left alone if it stalls or brings too many bytes.

    A library's own time limits do not cover every way of hanging, and some have none.
    """
    progress, errors = _Progress(), []

    def run() -> None:
        try:
            copy(part, progress)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    seen, since = 0, time.monotonic()
    try:
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            size = part.stat().st_size
            if size > most:
                raise AttemptError(f"sends more than the {most} bytes that are expected")
            if size + progress.value - seen >= STALL_BYTES:  # some libraries tell, some only write
                seen, since = size + progress.value, time.monotonic()
            elif thread.is_alive() and time.monotonic() - since > STALL_SECONDS:
                raise AttemptError(f"stalled: {size} bytes came, then none for {STALL_SECONDS:g} s")
    finally:
        progress.given_up = True
    if errors:
        raise errors[0]


def retried(url: str, attempt: Callable[[], Result]) -> Result:
    """The result of `attempt()`, tried again after `AttemptError`, which is said; at last a `RemoteUserError`."""
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except AttemptError as error:
            problem = error
        if number < ATTEMPTS:
            seconds = BACKOFF_SECONDS * 2 ** (number - 1)
            print(f"{url}: {problem}; attempt {number + 1} of {ATTEMPTS} in {seconds:g} s", file=sys.stderr, flush=True)
            time.sleep(seconds)
    raise RemoteUserError(
        f"{url}: {problem}; gave up after {ATTEMPTS} attempts: check the network and what is uploaded there, then run "
        "the same command again"
    )


def explain(error: Exception, url: str, part: Path) -> Exception:
    """What a library's error means: `AttemptError` if another attempt may help, `RemoteUserError` if it cannot."""
    if isinstance(error, AttemptError):
        return error
    if isinstance(error, OSError) and (error.errno in (errno.ENOSPC, errno.EDQUOT) or error.filename == str(part)):
        return error  # of the cache, not of the server
    status = next((n for n in _statuses(error) if isinstance(n, int)), None)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return RemoteUserError(
            f"{url} is not there: upload the whole folder that data/prepare.py made, and check data.path"
        )
    if isinstance(error, PermissionError) or status in (401, 403):
        package = PROTOCOLS[url.partition("://")[0]]
        return RemoteUserError(f"{url}: no permission ({reason(error)}): give credentials in the way of {package}")
    if status in range(400, 500) and status not in (408, 425, 429):
        return RemoteUserError(f"{url} is refused ({reason(error)}): check data.path")
    return AttemptError(reason(error))


def _statuses(error: Exception) -> Iterable[object]:
    """Where the libraries keep an HTTP status."""
    for owner in (error, getattr(error, "response", None)):
        for name in ("status", "status_code", "code"):
            yield getattr(owner, name, None)


class Remote:
    """A folder of shards behind a URL, as far as a reader needs it. `str()` and `/` give URLs.

    Args:
        url: of the folder with index.json
        cache: where files are kept
    Raises:
        UserError: not such a URL, or its protocol's package is not installed
    """

    def __init__(self, url: str, cache: Cache):
        self.url, self.cache = check_url(url), cache
        self._filesystems: dict[int, fsspec.AbstractFileSystem] = {}  # by process: none works on after a fork

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> str:
        return f"{self.url}/{quote(name) if self.url.startswith('http') else name}"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_filesystems": {}}

    def read_index(self) -> bytes:
        """Content of index.json, fetched anew. Raises `RemoteUserError` if that fails."""
        url, key = self / "index.json", secrets.token_hex(32)

        def attempt() -> bytes:
            with self.cache.part(key, 0) as part:
                self._transfer(url, part, INDEX_BYTES)
                data = part.read_bytes()
                try:
                    json.loads(data)
                except ValueError:
                    raise AttemptError(f"has {len(data)} bytes that are not JSON") from None
                return data

        with self.cache.explained(), self.cache.fetching(key):
            return retried(url, attempt)

    def read(self, name: str, digest: str, most: int) -> bytes:
        """Content of a small file, as `open` gives it; fetched again if the cache's copy has been damaged."""
        file = self.open(name, digest, most, exact=False)
        if self.dropped(file, digest):
            os.close(file)
            file = self.open(name, digest, most, exact=False)
        with os.fdopen(file, "rb") as opened:
            return opened.read()

    def dropped(self, file: int, digest: str) -> bool:
        """Whether the open copy of a file was not what its digest says; it is then out of the cache."""
        wrong = sha256(Path(f"/dev/fd/{file}")) != digest  # it need not have a name any more
        if wrong:
            print(f"{self.cache.folder / digest} was damaged: fetching it again", file=sys.stderr, flush=True)
            self.cache.drop(digest)
        return wrong

    def open(self, name: str, digest: str, size: int, exact: bool = True) -> int:
        """A file's descriptor, to be closed by the caller; fetched first if the cache has not got it.

        Args:
            name: of the file, in the folder
            digest: SHA-256 of its content
            size: its bytes; the most it may have, unless `exact`
        Raises:
            RemoteUserError: it cannot be fetched, is not what the digest says, or the cache has no room
        """
        url, wanted = self / name, size if exact else None
        if size > self.cache.limit:
            raise RemoteUserError(f"data.cache_gb is {self.cache.limit / 1e9:g}, {url} has {size / 1e9:g}: raise it")

        def attempt() -> int:
            with self.cache.part(digest, size) as part:
                self._transfer(url, part, size)
                found, bytes_ = sha256(part), part.stat().st_size
                if exact and bytes_ != size:
                    raise AttemptError(f"came with {bytes_} bytes, index.json says {size}")
                if found != digest:
                    raise AttemptError(f"came with SHA-256 {found[:16]}, index.json says {digest[:16]}")
                return self.cache.keep(part, digest)

        with self.cache.explained():
            file = self.cache.find(digest, wanted)
            if file is None:
                with self.cache.fetching(digest):
                    file = self.cache.find(digest, wanted)  # another process may have fetched it meanwhile
                    file = retried(url, attempt) if file is None else file
        return file

    def _transfer(self, url: str, part: Path, most: int) -> None:
        def copy(part: Path, progress: NoOpCallback) -> None:
            files = self._filesystem()
            options = {"max_concurrency": 1} if url.startswith("s3:") else {}  # else it tells 50 MiB at a time
            files.get_file(files._strip_protocol(url), str(part), callback=progress, **options)

        try:
            transfer(copy, part, most)
        except Exception as error:
            raise explain(error, url, part) from None

    def _filesystem(self) -> fsspec.AbstractFileSystem:
        process = os.getpid()
        if process not in self._filesystems:
            options = {}
            if self.url.startswith("http"):
                import aiohttp

                # aiohttp's own limit is five minutes for a whole file; trust_env: proxies and ~/.netrc
                times = aiohttp.ClientTimeout(total=None, sock_connect=STALL_SECONDS, sock_read=2 * STALL_SECONDS)
                options["client_kwargs"] = {"timeout": times, "trust_env": True}
            files, _ = fsspec.url_to_fs(self.url, skip_instance_cache=True, **options)
            self._filesystems.setdefault(process, files)
        return self._filesystems[process]
