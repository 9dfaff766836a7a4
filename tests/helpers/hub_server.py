"""A Hugging Face Hub on loopback, in memory: what `huggingface_hub` 2.4 and `transformers` ask when they push and load.

    with HubServer() as hub:
        os.environ |= hub.environment  # before the client is imported, which reads these variables then
        hub.commit("user/rocks", {"rock_set.json": b"{}"})
        hub.cut("commit")  # the next commit loses its connection

It has model repositories with one branch, and takes large files by git LFS in one part. It has no Xet storage.
"""

import base64
import fnmatch
import hashlib
import json
import re
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "LoopbackToken" * 2
WRONG = "hf_" + "NotTheRightOne" * 2  # a token that this Hub does not accept
USER = "user"  # owner of the token, and the only namespace that may be written to
# The Hub stores files as LFS above 10 MB and by these patterns; a lower limit keeps tests fast.
LFS_BYTES = 2**20
LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.parquet")
MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"
# Kind of a request, as `cut` takes it -> its method and path.
ROUTES = {
    "create": "POST /api/repos/create",
    "validate": "POST /api/validate-yaml",
    "preupload": rf"POST {MODEL}/preupload/main",
    "commit": rf"POST {MODEL}/commit/main",
    "tree": rf"GET {MODEL}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?",
    "info": rf"GET {MODEL}(?:/revision/(?P<revision>[^/]+))?",
    "batch": r"POST /(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch",
    "upload": "PUT /lfs/(?P<oid>[0-9a-f]{64})",
    "head": "HEAD /(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
    "download": "GET /(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
}


class Commit(NamedTuple):
    """A state of a repository: `files` maps each path to its content."""

    oid: str
    message: str
    files: dict[str, bytes]


class Rejected(Exception):
    """An answer with an error status, as the Hub sends it."""

    def __init__(self, status: int, message: str, code: str = "", **content):
        super().__init__(message)
        self.status = status
        self.content = {"error": message} | content
        self.headers = {"X-Error-Message": message, "X-Error-Code": code}


class HubServer:
    """A Hub of one user on 127.0.0.1, which serves in a thread until `close` or the end of a `with` block."""

    def __init__(self):
        self.repos: dict[str, list[Commit]] = {}
        self.private: set[str] = set()
        self.lfs: dict[str, bytes] = {}
        self.cuts: dict[str, tuple[str, bool]] = {}
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # Variables with which the client comes here; it reads them when it is imported.
        self.environment = {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        self.environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> "HubServer":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving: the next connection is refused."""
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo: str) -> dict[str, bytes]:
        """Return the files of a repository ("user/name") by path; empty if there is no such repository."""
        return self.repos[repo][-1].files if repo in self.repos else {}

    def messages(self, repo: str) -> list[str]:
        """Return the messages of a repository's commits, the oldest first."""
        return [commit.message for commit in self.repos[repo]]

    def commit(self, repo: str, files: dict[str, bytes], message: str = "by hand") -> str:
        """Add files to a repository, which is created if it does not exist, and return the commit's id."""
        with self.lock:
            if repo not in self.repos:  # the Hub begins every repository with this commit
                attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
                first = Commit(secrets.token_hex(20), "initial commit", {".gitattributes": attributes.encode()})
                self.repos[repo] = [first]
            history = self.repos[repo]
            if files:
                history.append(Commit(secrets.token_hex(20), message, history[-1].files | files))
            return history[-1].oid

    def cut(self, kind: str, point: str = "request", *, always: bool = False) -> None:
        """Break the connection of the next request of a kind in `ROUTES`, or `always` until `mend`.

        A request that is cut at "request" has no effect, and half of a download arrives. One that is cut at "answer"
        has its effect, but its answer is lost.
        """
        self.cuts[kind] = (point, always)

    def mend(self) -> None:
        """Break no more connections."""
        self.cuts.clear()


class _Handler(BaseHTTPRequestHandler):
    """Answers one request; in HTTP/1.0 each has its own connection, which closes when `do_GET` returns.

    There is a method for each kind in `ROUTES`. It returns JSON or bytes, and may add headers to `sent`.
    """

    hub: HubServer

    def log_message(self, *args) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        request = f"{self.command} {urlsplit(self.path).path}"
        found = [(kind, match) for kind, route in ROUTES.items() if (match := re.fullmatch(route, request))]
        if not found:
            self.send_error(404, f"The Hub on loopback does not know {request}")
            return
        kind, match = found[0]
        where = {name: unquote(value or "") for name, value in match.groupdict().items()}
        self.sent: dict[str, str | int] = {"X-Request-Id": f"Root=1-{secrets.token_hex(6)}"}
        with self.hub.lock:
            point, always = self.hub.cuts.get(kind, ("", False))
            if point and not always:
                del self.hub.cuts[kind]
        if point == "request" and kind != "download":
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status = 200
        try:
            self._check_token(kind)
            with self.hub.lock:
                content = getattr(self, f"_{kind}")(body, **where)
        except Rejected as error:
            status = error.status
            content = error.content
            self.sent |= error.headers
        if point != "answer":
            self._answer(status, content, share=2 if point else 1)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self, status: int, content: dict | list | bytes, share: int) -> None:
        """Send an answer, of which only a part (one in `share`) arrives."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(206 if "Content-Range" in self.sent else status)
        for key, value in (self.sent | {"Content-Type": kind, "Content-Length": len(data)}).items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // share])

    def _check_token(self, kind: str) -> None:
        sent = self.headers.get("Authorization")
        if sent is None and kind in ("create", "preupload", "commit", "batch"):
            raise Rejected(401, "Invalid username or password.")
        if sent not in (None, f"Bearer {TOKEN}"):
            raise Rejected(401, "Invalid credentials in Authorization header")

    def _at(self, repo: str, revision: str = "main") -> Commit:
        known = "Authorization" in self.headers
        if repo not in self.hub.repos or (repo in self.hub.private and not known):
            # Without a token the Hub does not say which of the two it is. The code is not what the API sends: the
            # client recognises this 401 by its address, and only by one that begins with https.
            status = 404 if known else 401
            message = "Repository not found" if known else "Invalid username or password."
            raise Rejected(status, message, "RepoNotFound")
        commits = {commit.oid: commit for commit in self.hub.repos[repo]}
        return commits.get(revision, self.hub.repos[repo][-1])

    def _create(self, body):
        asked = json.loads(body)
        owner = asked.get("organization") or USER
        repo = f"{owner}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{repo}", "name": repo, "id": "1"}
        if owner != USER:
            raise Rejected(403, f'You don\'t have the rights to write under the namespace "{owner}".')
        if repo in self.hub.repos:
            raise Rejected(409, f"You already created this model repo: {repo}", **answer)
        self.hub.commit(repo, {})
        if asked.get("visibility") == "private":
            self.hub.private.add(repo)
        return answer

    def _validate(self, body):
        return {"errors": [], "warnings": []}

    def _preupload(self, body, repo):
        commit = self._at(repo)
        files = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            oid = etag(path, commit.files[path]) if path in commit.files else None
            mode = "lfs" if is_lfs(path, file["size"]) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files, "commitOid": commit.oid}

    def _batch(self, body, repo):
        objects = json.loads(body)["objects"]
        for file in objects:
            file["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{file['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def _upload(self, body, oid):
        self.hub.lfs[oid] = body
        return b""

    def _commit(self, body, repo):
        lines = [json.loads(line) for line in body.splitlines()]
        values = {kind: [line["value"] for line in lines if line["key"] == kind] for kind in ("file", "lfsFile")}
        files = {value["path"]: base64.b64decode(value["content"]) for value in values["file"]}
        files |= {value["path"]: self.hub.lfs[value["oid"]] for value in values["lfsFile"]}
        oid = self.hub.commit(repo, files, lines[0]["value"]["summary"])
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"}

    def _info(self, body, repo, revision):
        return {"id": repo, "sha": self._at(repo, revision).oid, "private": repo in self.hub.private, "siblings": []}

    def _tree(self, body, repo, revision, path):
        below = {name: data for name, data in self._at(repo, revision).files.items() if name.startswith(path)}
        if not below:
            raise Rejected(404, f"{path} does not exist on {revision}", "EntryNotFound")
        return [
            {"type": "file", "oid": etag(name, data), "size": len(data), "path": name} for name, data in below.items()
        ]

    def _download(self, body, repo, revision, path):
        commit = self._at(repo, revision)
        if path not in commit.files:
            raise Rejected(404, "Entry not found", "EntryNotFound")
        content = commit.files[path]
        self.sent |= {"X-Repo-Commit": commit.oid, "ETag": f'"{etag(path, content)}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted:  # the rest of a download that was cut
            self.sent["Content-Range"] = f"bytes {wanted[1]}-{len(content) - 1}/{len(content)}"
            content = content[int(wanted[1]) :]
        return content

    _head = _download


def is_lfs(path: str, size: int) -> bool:
    """Return whether the Hub stores a file by git LFS: because of its name, or because it is large."""
    return size > LFS_BYTES or any(fnmatch.fnmatch(path.split("/")[-1], pattern) for pattern in LFS_PATTERNS)


def etag(path: str, content: bytes) -> str:
    """Return the hash with which the client compares its own file: sha256 for an LFS file, otherwise git's."""
    if is_lfs(path, len(content)):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
