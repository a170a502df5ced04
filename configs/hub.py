"""Names of weights on a model hub: hf://USER/REPO[/FILE][@REVISION]. Free of torch and of the hub's library."""

import re
from dataclasses import dataclass
from importlib.util import find_spec

from configs.errors import UserError

PREFIX = re.compile(r"hf://|hf[-_]hub:")  # the second is timm's
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
NAME = re.compile(rf"({REPO.pattern})(?:/([\w. /+=-]+))?(?:@(refs/[\w./-]+|[\w.-]+))?", re.ASCII)
SECRET = re.compile(r"hf_\w{6,}|[^/@\s]*:[^/@\s]*@|\?.*")  # a token, user:password, a query


@dataclass(frozen=True)
class HubName:
    """A repository of a hub, or a file in it; `revision` is a branch, tag or commit, None = its main branch."""

    repo: str
    file: str | None
    revision: str | None


def is_hub(source: object) -> bool:
    """Whether weights are on a hub, not on this machine."""
    return bool(PREFIX.match(str(source)))


def parse_hub(source: str) -> HubName:
    """Parse a name. Raises `UserError` if it is none; the message hides what may be a secret."""
    match = NAME.fullmatch(PREFIX.sub("", source, count=1))
    file = match[2] if match else None
    if not match or SECRET.search(match[0]) or any(part in ("", ".", "..") for part in (file or "x").split("/")):
        shown = SECRET.sub("...", source.removeprefix("hf://"))
        raise UserError(f"hf://{shown} is not a valid name on a hub: use hf://USER/REPO[/FILE][@REVISION]")
    return HubName(match[1], file, match[3])


def check_repo(repo: str, key: str) -> None:
    """Raise `UserError` unless `repo` is USER/REPO, or if the hub's library is not installed."""
    if not REPO.fullmatch(repo) or SECRET.search(repo):
        raise UserError(f"{key} is {SECRET.sub('...', repo)}: it must be USER/REPO")
    check_hub_library(key)


def check_hub_library(what: str) -> None:
    """Raise `UserError` if the hub's library is not installed."""
    if find_spec("huggingface_hub") is None:
        raise UserError(f"{what} needs a library: pip install huggingface_hub")
