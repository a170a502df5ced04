"""A model hub on loopback: as much of its API as huggingface_hub needs to create, upload to and download from one."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote

from tests.loopback import Loopback

TOKEN = "hf_SECRETsecretSECRET"


class Repo:
    """A repository: private or not, files by commit, and branches."""

    def __init__(self, private: bool = False, gated: bool = False):
        self.private, self.gated = private, gated
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.commit({})

    def commit(self, files: dict[str, bytes]) -> str:
        """Add files to the main branch; the name of the commit."""
        whole = self.commits.get(self.branches.get("main", ""), {}) | files
        name = hashlib.sha1(repr((len(self.commits), sorted(whole))).encode()).hexdigest()
        self.commits[name], self.branches["main"] = whole, name
        return name


class Handler(BaseHTTPRequestHandler):
    """Answers; errors have the header X-Error-Code, as the library expects."""

    protocol_version = "HTTP/1.1"

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def answer(self, status: int, content: object = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def repo(self, name: str) -> Repo | None:
        """A repository that this request may read; otherwise the answer is sent."""
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self.authorized()):
            self.answer(401 if not self.authorized() else 404, b"", X_Error_Code="RepoNotFound")
            return None
        if repo.gated:
            self.answer(403, b"", X_Error_Code="GatedRepo")
            return None
        return repo

    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def files(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            self.answer(404, b"", X_Error_Code="RevisionNotFound")
            return None
        return commit, repo.commits[commit]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.requests.append((self.command, self.path))
        if self.server.broken:
            self.answer(self.server.broken)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/?]+))?(?:\?.*)?", self.path):
            if (repo := self.repo(match[1])) and (found := self.files(repo, match[2] or "main")):
                siblings = [{"rfilename": name} for name in sorted(found[1])]
                self.answer(200, {"id": match[1], "modelId": match[1], "sha": found[0], "siblings": siblings})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)", self.path):
            if (repo := self.repo(match[1])) and (found := self.files(repo, match[2])):
                self.send_file(found[0], found[1].get(unquote(match[3])))
        else:
            self.answer(404)

    def send_file(self, commit: str, data: bytes | None) -> None:
        if data is None:
            self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self.answer(200, data, ETag=etag, X_Repo_Commit=commit, Accept_Ranges="bytes")

    def do_PUT(self):
        self.server.blobs[self.path.rpartition("/")[2]] = self.body()
        self.answer(200)

    def do_POST(self):
        self.server.requests.append((self.command, self.path))
        body = self.body()
        if not self.authorized():
            self.answer(401, {"error": "Invalid username or password."})
        elif self.server.broken:
            self.answer(self.server.broken)
        elif self.path == "/api/repos/create":
            self.create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            self.answer(200, {"files": [upload_mode(file) for file in json.loads(body)["files"]]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [self.lfs(item) for item in json.loads(body)["objects"]]
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main(?:\?.*)?", self.path):
            self.commit(match[1], body)
        else:
            self.answer(404)

    def create(self, wish: dict) -> None:
        name = f"{wish.get('organization')}/{wish['name']}"
        if wish.get("organization") != "me":
            self.answer(403, {"error": "You don't have the rights"})
        elif name in self.server.repos:
            self.answer(409, {"url": f"{self.server.url}/{name}"})
        else:
            private = wish.get("private") or wish.get("visibility") == "private"
            self.server.repos[name] = Repo(private=bool(private))
            self.answer(200, {"url": f"{self.server.url}/{name}", "id": "1", "name": name})

    def lfs(self, item: dict) -> dict:
        return item | {"actions": {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}", "header": {}}}}

    def commit(self, name: str, body: bytes) -> None:
        files = {}
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.server.blobs[entry["value"]["oid"]]
        commit = self.server.repos[name].commit(files)
        url = f"{self.server.url}/{name}/commit/{commit}"
        self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def log_message(self, *_):
        pass


def upload_mode(file: dict) -> dict:
    """Weights are uploaded by the protocol of Git LFS."""
    mode = "lfs" if file["path"].endswith((".safetensors", ".bin", ".pt")) else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


class Hub(Loopback):
    """A hub until the `with` block ends. `broken` is a status that answers all further requests."""

    def __init__(self):
        super().__init__(Handler)
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.broken = 0
