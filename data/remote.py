"""Shards at a URL: fetched on first use, and verified.

Fetched files are in the cache (data/cache.py), which all ranks and loader processes of a host share. Free of torch.
"""

import errno
import json
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import fsspec
from fsspec.callbacks import NoOpCallback

from configs.errors import UserError, printable, reason
from configs.files import sha256
from configs.secrets import WAY_OUT, has_secret, without_secrets
from data.cache import POLL_SECONDS, Cache, RemoteUserError

PROTOCOLS = {  # supported protocols and their pip packages; none of them executes anything
    "http": "fsspec[http]",
    "https": "fsspec[http]",
    "s3": "s3fs",
    "gs": "gcsfs",
    "az": "adlfs",
    "hf": "huggingface_hub",
}
ATTEMPTS = 4
BACKOFF_SECONDS = 1.0  # before the second attempt; doubles with every further attempt
STALL_SECONDS, STALL_BYTES = 60.0, 1 << 16  # a transfer with fewer bytes in that time has stalled
MAX_INDEX_BYTES = 1 << 28  # of index.json
CONCURRENT_FETCHES = 4  # per process

# names of errors that another attempt gives again: wrong parameters, no credentials, an address without a host
CANNOT_HELP = {
    "ValueError", "TypeError", "LookupError", "AttributeError", "NotImplementedError", "ParamValidationError",
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound", "NoRegionError",
    "UnknownServiceError", "InvalidRegionError", "UnsupportedSignatureVersionError", "InvalidURL",
}  # fmt: skip

Result = TypeVar("Result")


class AttemptError(Exception):
    """An attempt failed; another one may succeed."""


def is_url(path: str) -> bool:
    """Whether `data.path` is not a local folder."""
    return "://" in path or "::" in path or path.startswith("pipe:")


def check_url(url: str, key: str = "data.path") -> str:
    """A folder's URL without trailing slashes. Raises `UserError` unless it is a plain URL of a supported protocol.

    Errors name `key` and leave out user info and query, which may contain a signature.
    """
    protocol, _, place = url.partition("://")
    shown = f"{key} {without_secrets(url)}"
    if has_secret(url.partition("?")[0]):
        raise UserError(f"{shown} has a user or a password in it: {WAY_OUT}")
    if protocol not in PROTOCOLS or "::" in url:
        raise UserError(f"{shown}: use a URL without :: that begins with {', '.join(PROTOCOLS)}")
    if not place.strip("/") or re.search(r"[\s?#*\[\]]", place):
        raise UserError(f"{shown} is not the URL of a folder: use {protocol}://... without spaces and ?#*[]")
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError:
        raise UserError(f"{shown} needs a package: pip install '{PROTOCOLS[protocol]}'") from None
    return url.rstrip("/")


def open_filesystem(url: str) -> fsspec.AbstractFileSystem:
    """A filesystem of this process for a URL's protocol."""
    options = {}
    if url.startswith("http"):
        import aiohttp

        # aiohttp's default limits a whole file to five minutes; trust_env: proxies and ~/.netrc
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL_SECONDS, sock_read=2 * STALL_SECONDS)
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
    return fsspec.url_to_fs(url, skip_instance_cache=True, **options)[0]


class _Progress(NoOpCallback):  # huggingface_hub streams only with this base class
    """Counts the bytes of a transfer in `value`, and aborts an abandoned transfer."""

    abandoned = False

    def call(self, *_, **__):
        if self.abandoned:
            raise ConnectionAbortedError("abandoned")


def retried(url: str, attempt: Callable[[], Result]) -> Result:
    """The result of `attempt()`. An `AttemptError` is logged and retried; the last one becomes a `RemoteUserError`."""
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except AttemptError as error:
            problem = error
        if number < ATTEMPTS:
            seconds = BACKOFF_SECONDS * 2 ** (number - 1)
            line = printable(f"{url}: {problem}; attempt {number + 1} of {ATTEMPTS} in {seconds:g} s")
            print(line, file=sys.stderr, flush=True)
            time.sleep(seconds)
    way_out = "check the network and the uploaded files, then run the same command again"
    raise RemoteUserError(f"{url}: {problem}; gave up after {ATTEMPTS} attempts: {way_out}")


def explain(error: Exception, url: str, part: Path | None = None, key: str = "data.path") -> Exception:
    """Classify a library's error: `AttemptError` if another attempt may help, `RemoteUserError` if it cannot.

    `part` is the local file that was written, `key` what the user has given.
    """
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or (part and isinstance(error, OSError) and error.filename == str(part)):
        return error  # an error of the cache, not of the server
    owners, names = (error, getattr(error, "response", None)), ("status", "status_code", "code")  # depends on library
    codes = [getattr(owner, name, None) for owner in owners for name in names]
    status = next((code for code in codes if isinstance(code, int)), None)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        upload = "upload the whole folder of shards, and " if key == "data.path" else ""
        return RemoteUserError(f"{url} does not exist: {upload}check {key}")
    if isinstance(error, PermissionError) or status in (401, 403):
        package = PROTOCOLS[url.partition("://")[0]]
        return RemoteUserError(f"{url}: no permission ({reason(error)}): configure credentials as {package} documents")
    if status in range(400, 500) and status not in (408, 425, 429):
        return RemoteUserError(f"{url} was refused ({reason(error)}): check {key}")
    if {kind.__name__ for kind in type(error).__mro__} & CANNOT_HELP:
        return RemoteUserError(f"{url} cannot be read ({reason(error)}): check {key} and the credentials")
    return AttemptError(reason(error))


class Remote:
    """A folder of shards at a URL. `str()` and `/` give URLs. Raises `UserError` for URLs as `check_url`."""

    def __init__(self, url: str, cache: Cache):
        self.url, self.cache = check_url(url), cache
        self._filesystems: dict[int, fsspec.AbstractFileSystem] = {}  # by process: they do not survive a fork

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> str:
        return f"{self.url}/{quote(name) if self.url.startswith('http') else name}"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_filesystems": {}}

    def fetch_index(self) -> bytes:
        """Content of index.json; never cached. Raises `RemoteUserError` if it cannot be fetched."""
        url, key = self / "index.json", secrets.token_hex(32)

        def attempt() -> bytes:
            with self.cache.part(key, 0) as part:
                self._transfer(url, part, MAX_INDEX_BYTES)
                data = part.read_bytes()
                try:
                    json.loads(data)
                except ValueError:
                    raise AttemptError(f"its {len(data)} bytes are not JSON") from None
                return data

        with self.cache.disk_errors(), self.cache.fetching(key):
            return retried(url, attempt)

    def read_file(self, name: str, digest: str, max_bytes: int) -> bytes:
        """Content of a small file, see `open_file`; fetched again if the copy in the cache is damaged."""
        file = self.open_file(name, digest, max_bytes, exact=False)
        if self.drop_if_damaged(file, digest):
            os.close(file)
            file = self.open_file(name, digest, max_bytes, exact=False)
        with os.fdopen(file, "rb") as opened:
            return opened.read()

    def drop_if_damaged(self, file: int, digest: str) -> bool:
        """Remove a file from the cache if the open copy does not match its digest. Returns whether it was removed."""
        damaged = sha256(Path(f"/dev/fd/{file}")) != digest  # by descriptor: it may have been evicted meanwhile
        if damaged:
            print(f"{self.cache.folder / digest} was damaged: fetching it again", file=sys.stderr, flush=True)
            self.cache.drop(digest)
        return damaged

    def open_file(self, name: str, digest: str, size: int, exact: bool = True) -> int:
        """Descriptor of a file, to be closed by the caller; fetched first if it is not cached.

        `size`, in bytes, is an upper bound unless `exact`. Raises `RemoteUserError` if the file cannot be fetched, does
        not match its SHA-256 `digest`, or is larger than the cache.
        """
        url, expected = self / name, size if exact else None
        if size > self.cache.limit:
            raise RemoteUserError(
                f"data.cache_gb is {self.cache.limit / 1e9:g}, but {url} has {size / 1e9:g} GB: raise it"
            )

        def attempt() -> int:
            with self.cache.part(digest, size) as part:
                self._transfer(url, part, size)
                received, bytes_ = sha256(part), part.stat().st_size
                if exact and bytes_ != size:
                    raise AttemptError(f"received {bytes_} bytes, index.json lists {size}")
                if received != digest:
                    raise AttemptError(f"received SHA-256 {received[:16]}, index.json lists {digest[:16]}")
                return self.cache.keep(part, digest)

        with self.cache.disk_errors():
            if (file := self.cache.find(digest, expected)) is not None:
                return file
            with self.cache.fetching(digest):
                file = self.cache.find(digest, expected)  # another process may have fetched it in the meantime
                return retried(url, attempt) if file is None else file

    def _transfer(self, url: str, part: Path, max_bytes: int) -> None:
        """Download a file in a thread, which is abandoned if it stalls or receives more than `max_bytes`.

        Timeouts of the libraries do not cover every hang, and some libraries have none.
        """
        progress, errors = _Progress(), []

        def copy() -> None:
            options = {"max_concurrency": 1} if url.startswith("s3:") else {}  # else progress in steps of 50 MiB
            try:
                files = self._filesystem()
                files.get_file(files._strip_protocol(url), str(part), callback=progress, **options)
            except Exception as error:
                errors.append(explain(error, url, part))

        thread = threading.Thread(target=copy, daemon=True)
        thread.start()
        seen, since = 0, time.monotonic()
        try:
            while thread.is_alive():
                thread.join(POLL_SECONDS)
                size = part.stat().st_size
                if size > max_bytes:
                    raise AttemptError(f"sends more than the expected {max_bytes} bytes")
                if size + progress.value - seen >= STALL_BYTES:  # some libraries report progress, others only write
                    seen, since = size + progress.value, time.monotonic()
                elif thread.is_alive() and time.monotonic() - since > STALL_SECONDS:
                    raise AttemptError(f"stalled: no data for {STALL_SECONDS:g} s after {size} bytes")
        finally:
            progress.abandoned = True
        if errors:
            raise errors[0]

    def _filesystem(self) -> fsspec.AbstractFileSystem:
        process = os.getpid()
        if process not in self._filesystems:
            self._filesystems.setdefault(process, open_filesystem(self.url))
        return self._filesystems[process]
