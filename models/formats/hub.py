"""Download weights from a model hub, and push a folder to one, through huggingface_hub.

Downloads go to its cache. Tokens are those of `hf auth login` or HF_TOKEN; this project never reads them. HF_ENDPOINT
is the address of another hub. With HF_HUB_OFFLINE=1, only the cache is read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from configs.errors import UserError, few
from configs.hub import HubName, is_hub, parse_hub
from models.formats.containers import CONFIG, INDEX, PROCESSOR, SUFFIXES, TENSOR_FILES, digest_of, part_names

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
SHORT = 12  # digits of a commit


class Local(NamedTuple):
    """Weights on this machine; `remark` says which version of the hub's repository they are."""

    path: Path
    remark: str | None = None


@lru_cache(8)  # a branch may move between two reads
def localize(source: str | Path) -> Local:
    """A local path as it is; weights on a hub after download. Raises `UserError` if they are not there."""
    if not is_hub(source):
        return Local(Path(source))
    with hub_errors(str(source)):
        return _download(parse_hub(str(source)), str(source))


def digest(source: str | Path) -> str:
    """Short hash of a weight file, or of the files of a model folder that are read."""
    return digest_of(localize(source).path)


def _download(name: HubName, source: str) -> Local:
    """Download a file, or the files of a model folder in order of preference; all of one commit."""
    if name.file:
        path = _fetch(name.repo, name.file, name.revision)
        commit = _commit(path, name.file)
        _fetch_parts(name.repo, path, name.file, commit)
        return Local(path, f"commit {commit[:SHORT]}")
    files = _files(name)
    if files is None:  # offline
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name.repo, revision=name.revision, local_files_only=True))
        return Local(folder, f"commit {folder.name[:SHORT]} in the cache, as {_endpoint()} was not reached")
    commit, names = files
    candidates = [file for file in TENSOR_FILES if file in names or file + INDEX in names]
    others = [file for file in sorted(names) if file.endswith(SUFFIXES) and "/" not in file]
    if not candidates and len(others) != 1:
        options = f": name one, such as {source}/{others[0]} ({few(others)})" if others else ""
        raise UserError(f"{source} has no weights in its main folder{options or ': name a file of it'}")
    weights = (candidates or others)[0]
    weights = weights + INDEX if weights + INDEX in names else weights
    path = _fetch(name.repo, weights, name.revision)  # by its branch, which the cache then knows without a connection
    if _commit(path, weights) != commit:
        raise UserError(f"{source} has changed while it was read: run the same command again")
    for file in {CONFIG, PROCESSOR} & names:
        _fetch(name.repo, file, commit)
    _fetch_parts(name.repo, path, weights, commit)
    return Local(path.parent if candidates else path, f"commit {commit[:SHORT]}")


def _files(name: HubName) -> tuple[str, set[str]] | None:
    """(commit, names of files) of a repository; None if the hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        info = HfApi().model_info(name.repo, revision=name.revision)
    except HfHubHTTPError:
        raise  # the hub has answered
    except (HTTPError, OfflineModeIsEnabled, OSError):
        return None
    return info.sha or "", {file.rfilename for file in info.siblings or ()}


def _fetch(repo: str, file: str, revision: str | None) -> Path:
    """Path of a file in the cache, downloaded if it is not there."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, file, revision=revision))


def _fetch_parts(repo: str, path: Path, file: str, commit: str) -> None:
    """Download the files that an index lists, into its folder."""
    if path.name.endswith(INDEX):
        for part in part_names(path):
            _fetch(repo, (Path(file).parent / part).as_posix(), commit)


def _commit(path: Path, file: str) -> str:
    """Commit of a file in the cache, whose path is .../snapshots/COMMIT/FILE."""
    return path.parents[file.count("/")].name


def push(folder: Path, repo: str) -> str:
    """Upload a folder to a hub's repository, made private if it is new; returns the address of the commit.

    Raises `UserError` if it cannot be written. The folder is left as it is.
    """
    from huggingface_hub import HfApi

    try:
        with hub_errors(repo):
            api = HfApi()
            api.create_repo(repo, private=True, exist_ok=True)
            return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload weights").commit_url)
    except UserError as error:
        raise UserError(f"{error}; {folder} is written, so then run: hf upload {repo} {folder}") from None


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn the library's errors into one line without addresses, headers or tokens."""
    import huggingface_hub
    from huggingface_hub import errors

    huggingface_hub.utils.logging.set_verbosity_error()
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(f"{what} is gated: accept its conditions on its page, and {LOGIN}") from None
    except errors.RepositoryNotFoundError:  # the hub answers so for private ones too
        raise UserError(
            f"{what}: the hub has no such repository, or it is private: check the name, or {LOGIN}"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{what}: the repository has no such revision: check what follows @") from None
    except errors.LocalEntryNotFoundError:
        raise UserError(f"{what} is not in the cache, and {_endpoint()} was not reached: check the network") from None
    except errors.EntryNotFoundError:
        raise UserError(f"{what}: the repository has no such file: check the name") from None
    except errors.HFValidationError:
        raise UserError(f"{what} is no name of a repository: use USER/REPO") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        remedy = LOGIN if status in (401, 403) else "try again later"
        raise UserError(f"{what}: the hub answered with status {status}: {remedy}") from None
    except (errors.HTTPError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError):
        raise UserError(
            f"{what}: the connection to {_endpoint()} failed: check the network, or HF_HUB_OFFLINE"
        ) from None


def _endpoint() -> str:
    """The hub's address without user, password and query."""
    from urllib.parse import urlsplit

    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
