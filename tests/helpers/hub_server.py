"""A Hugging Face Hub on loopback, in memory: what `huggingface_hub` 2.4 and `transformers` ask when they push and load.

    with HubServer() as hub:  # hub.environment before the client is imported: it reads HF_ENDPOINT then
        hub.commit("user/rocks", {"rock_set.json": b"{}"})
        hub.cut("commit")  # the next commit's connection breaks in the middle of its body

`python -m tests.helpers.hub_server` prints that environment and serves until Ctrl-C. Large files go by git LFS in one
part: Xet storage, pull requests, branches and other users are not spoken.
"""

import base64
import contextlib
import fnmatch
import hashlib
import json
import re
import secrets
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "LoopbackToken" * 2
WRONG = "hf_" + "NotTheRightOne" * 2  # a token that the Hub refuses
# The Hub stores files as LFS above 10 MB, and by these patterns; a smaller bound keeps tests fast.
LFS_BYTES = 2**20
LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.parquet")
DATE = "2026-01-01T00:00:00.000Z"
REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"
# method, path, handler; the handlers' names are those that `cut` takes.
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", rf"{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"{REPO}/commit/(?P<revision>[^/]+)", "commit"),
    ("GET", rf"{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
    ("GET", rf"{REPO}(?:/revision/(?P<revision>[^/]+))?", "info"),
    ("POST", r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "upload"),
    (
        "GET",
        r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
        "download",
    ),
]
WRITES = ("create", "preupload", "commit", "batch")


class Blob(NamedTuple):
    """A file's content, and whether git LFS holds it."""

    content: bytes
    lfs: bool

    @property
    def etag(self) -> str:
        """The sha256 of an LFS file, the git hash of another: what the client compares its own file with."""
        return hashlib.sha256(self.content).hexdigest() if self.lfs else _git_hash(self.content)


class Commit(NamedTuple):
    """A state of a repository: `files` maps each path to its blob."""

    oid: str
    message: str
    files: dict[str, Blob]


class Cut(NamedTuple):
    """Which requests lose their connection: the `nth` of a kind and, with `always`, all after it."""

    kind: str
    nth: int
    always: bool
    point: str


class Refused(Exception):
    """An answer that is an error, as the Hub sends it."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class HubServer:
    """A Hub of one user on 127.0.0.1; as a context manager it serves in a thread from enter to exit.

    Args:
        token (`str`, *optional*): The one token that is accepted.
        user (`str`, *optional*, defaults to `"user"`): Its owner, and the only namespace that may be written to.
    """

    def __init__(self, token: str = TOKEN, *, user: str = "user"):
        self.token, self.user = token, user
        self.requests: list[tuple[str, str]] = []
        self.repos: dict[str, list[Commit]] = {}
        self.private: set[str] = set()
        self.lfs: dict[str, bytes] = {}
        self.signature = secrets.token_hex(8)  # in upload addresses, which take no token
        self._cuts: list[Cut] = []
        self._seen: dict[str, int] = {}
        self._lock = threading.RLock()
        self._open: set[socket.socket] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point the client here; it reads them when it is imported."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
        }

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving, and break the connections that clients keep open: the next request is refused."""
        self._server.shutdown()
        self._server.server_close()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def files(self, repo: str) -> dict[str, bytes]:
        """Return the files of a repository by path ("user/name", "datasets/user/name")."""
        with self._lock:
            return {path: blob.content for path, blob in self.repos[repo][-1].files.items()}

    def messages(self, repo: str) -> list[str]:
        """Return the messages of a repository's commits, the oldest first."""
        with self._lock:
            return [commit.message for commit in self.repos[repo]]

    def commit(self, repo: str, files: dict[str, bytes], message: str = "by hand") -> str:
        """Add files to a repository, which is made if it does not exist, and return the commit's id."""
        return self._add(
            repo, {path: Blob(content, is_lfs(path, len(content))) for path, content in files.items()}, message
        )

    def cut(self, kind: str, *, nth: int = 1, always: bool = False, point: str = "body") -> None:
        """Break the connection of the `nth` request of a kind from now on.

        Args:
            kind (`str`): A handler of `ROUTES`: "create", "upload" (an LFS file), "commit", "download", ..., or "head",
                which asks for a file's length and hash alone.
            nth (`int`, *optional*, defaults to 1): Which one, counted from this call.
            always (`bool`, *optional*, defaults to `False`): Also all after it.
            point (`str`, *optional*, defaults to `"body"`): In the middle of the body (of the answer for a GET), before
                anything is done; or `"answer"`: all is done and the answer is lost.
        """
        if kind not in {"head", *(name for _, _, name in ROUTES)} or point not in ("body", "answer"):
            raise ValueError(f"There is nothing to cut: {kind}, {point}.")
        with self._lock:
            self._cuts.append(Cut(kind, self._seen.get(kind, 0) + nth, always, point))

    def mend(self) -> None:
        """Forget every cut."""
        with self._lock:
            self._cuts.clear()

    def _cut_at(self, kind: str) -> str | None:
        with self._lock:
            self._seen[kind] = seen = self._seen.get(kind, 0) + 1
            for cut in self._cuts:
                if cut.kind == kind and (seen == cut.nth or (cut.always and seen > cut.nth)):
                    return cut.point
        return None

    def _add(self, repo: str, changes: dict[str, Blob | None], message: str) -> str:
        with self._lock:
            history = self.repos.setdefault(repo, [])
            if not history:  # as the Hub begins every repository
                attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
                first = {".gitattributes": Blob(attributes.encode(), False)}
                history.append(Commit(secrets.token_hex(20), "initial commit", first))
            files = {path: blob for path, blob in (history[-1].files | changes).items() if blob is not None}
            if changes:
                history.append(Commit(secrets.token_hex(20), message, files))
            return history[-1].oid


class _Handler(BaseHTTPRequestHandler):
    """Answers one connection; each handler returns (status, JSON or bytes, headers)."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    # Else the answer's two writes wait for the client's delayed acknowledgement, 40 ms each.
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        with self.hub._lock:
            self.hub._open.add(self.connection)

    def finish(self):
        with self.hub._lock:
            self.hub._open.discard(self.connection)
        with contextlib.suppress(OSError):  # a connection that was cut
            super().finish()

    def log_message(self, format, *args):
        """Nothing: `hub.requests` has them."""

    def do_GET(self):
        address = urlsplit(self.path)
        method = "GET" if self.command == "HEAD" else self.command
        with self.hub._lock:
            self.hub.requests.append((self.command, address.path))
        found = [(re.fullmatch(path, address.path), name) for verb, path, name in ROUTES if verb == method]
        match, name = next(((match, name) for match, name in found if match), (None, None))
        cut = self.hub._cut_at("head" if self.command == "HEAD" else name) if match else None
        body = self._read(half=cut == "body")
        if cut == "body" and method != "GET":
            self._hang_up()
            return
        try:
            if match is None:
                raise Refused(404, f"The server on loopback does not know {self.command} {address.path}")
            self._check_token(name)
            where = {key: value and unquote(value) for key, value in match.groupdict().items()}
            query = {key: values[0] for key, values in parse_qs(address.query).items()}
            with self.hub._lock:
                status, content, headers = getattr(self, f"_{name}")(body, query, **where)
        except Refused as error:
            status, content = error.status, {"error": error.message}
            headers = {"X-Error-Message": error.message, "X-Error-Code": error.code}
        if cut == "answer" or (cut and self.command == "HEAD"):
            self._hang_up()
            return
        self._answer(status, content, headers, half=cut == "body")

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _read(self, half: bool) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size // 2 if half else size))
                if half:
                    break
                self.rfile.readline()
            else:
                self.rfile.readline()
            return b"".join(chunks)
        length = int(self.headers.get("Content-Length", 0))
        return self.rfile.read(length // 2 if half else length)

    def _answer(self, status: int, content, headers: dict, half: bool) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json; charset=utf-8"
        given = {"Content-Type": kind, "Content-Length": len(data), "X-Request-Id": f"Root=1-{secrets.token_hex(6)}"}
        for key, value in (given | headers).items():
            if value is not None:
                self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if half else data)
            if half:
                self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _check_token(self, name: str) -> None:
        sent = self.headers.get("Authorization")
        if sent is not None and sent != f"Bearer {self.hub.token}":
            raise Refused(401, "Invalid credentials in Authorization header")
        if sent is None and name in (*WRITES, "whoami"):
            raise Refused(401, "Invalid username or password.")

    def _history(self, kind: str | None, repo: str, *, write: bool = False) -> tuple[str, list[Commit]]:
        key = repo if kind in (None, "models") else f"{kind}/{repo}"
        known = "Authorization" in self.headers
        if key not in self.hub.repos or (key in self.hub.private and not known):
            # Without a token the Hub does not say which of the two it is. The code is not the API's own: the client
            # tells this 401 by its address, and knows only https ones.
            status, message = (404, "Repository not found") if known else (401, "Invalid username or password.")
            raise Refused(status, message, "RepoNotFound")
        if write:
            self._check_namespace(repo.split("/")[0])
        return key, self.hub.repos[key]

    def _check_namespace(self, namespace: str) -> None:
        if namespace != self.hub.user:
            raise Refused(403, f'You don\'t have the rights to write under the namespace "{namespace}".')

    def _at(self, kind: str | None, repo: str, revision: str | None) -> Commit:
        _, history = self._history(kind, repo)
        for commit in history:
            if commit.oid == revision:
                return commit
        if revision not in (None, "main"):
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return history[-1]

    # The handlers

    def _whoami(self, body, query):
        role = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": "write"}}
        return 200, {"type": "user", "id": "1", "name": self.hub.user, "orgs": [], "auth": role}, {}

    def _create(self, body, query):
        asked = json.loads(body)
        repo = f"{asked.get('organization') or self.hub.user}/{asked['name']}"
        self._check_namespace(repo.split("/")[0])
        kind = asked.get("type", "model")
        key = repo if kind == "model" else f"{kind}s/{repo}"
        answer = {"url": f"{self.hub.url}/{key}", "name": repo, "id": "1"}
        if key in self.hub.repos:
            return 409, {"error": f"You already created this {kind} repo: {repo}"} | answer, {}
        self.hub._add(key, {}, "")
        if asked.get("visibility") == "private":
            self.hub.private.add(key)
        return 200, answer, {}

    def _validate(self, body, query):
        text = json.loads(body)["content"]
        front = re.match(r"---\r?\n(.*?)^---\s*$", text, re.DOTALL | re.MULTILINE)
        if front is None:
            return 200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}, {}
        try:
            yaml.safe_load(front[1])
        except yaml.YAMLError as error:
            return 400, {"errors": [{"message": f"{error}"}], "warnings": []}, {}
        return 200, {"errors": [], "warnings": []}, {}

    def _preupload(self, body, query, *, kind, repo, revision):
        self._history(kind, repo, write=True)
        commit = self._at(kind, repo, revision)
        files = []
        for file in json.loads(body)["files"]:
            there = commit.files.get(file["path"])
            mode = "lfs" if is_lfs(file["path"], file["size"]) else "regular"
            oid = there.etag if there is not None else None
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": files, "commitOid": commit.oid}, {}

    def _batch(self, body, query, *, kind, repo):
        self._history(kind, repo, write=True)
        objects = []
        for file in json.loads(body)["objects"]:
            answer = {"oid": file["oid"], "size": file["size"]}
            if file["oid"] not in self.hub.lfs:
                address = f"{self.hub.url}/lfs/{file['oid']}?signature={self.hub.signature}"
                answer |= {"authenticated": True, "actions": {"upload": {"href": address, "header": {}}}}
            objects.append(answer)
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _upload(self, body, query, *, oid):
        if query.get("signature") != self.hub.signature:
            raise Refused(403, "SignatureDoesNotMatch")
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "The content is not what its sha256 says")
        self.hub.lfs[oid] = body
        return 200, b"", {"ETag": f'"{oid}"'}

    def _commit(self, body, query, *, kind, repo, revision):
        key, history = self._history(kind, repo, write=True)
        if revision != "main" or "create_pr" in query:
            raise Refused(400, "The server on loopback knows only the branch main")
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, history[-1].oid):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        changes: dict[str, Blob | None] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise Refused(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                changes[value["path"]] = Blob(self.hub.lfs[value["oid"]], True)
            elif line["key"] in ("deletedFile", "deletedFolder"):
                changes |= {path: None for path in history[-1].files if f"{path}/".startswith(f"{value['path']}/")}
        oid = self.hub._add(key, changes, header["summary"])
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{key}/commit/{oid}"}, {}

    def _info(self, body, query, *, kind, repo, revision):
        commit = self._at(kind, repo, revision)
        key, _ = self._history(kind, repo)
        return (
            200,
            {
                "_id": "1",
                "id": repo,
                "modelId": repo,
                "author": repo.split("/")[0],
                "sha": commit.oid,
                "private": key in self.hub.private,
                "gated": False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "createdAt": DATE,
                "lastModified": DATE,
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            },
            {},
        )

    def _tree(self, body, query, *, kind, repo, revision, path):
        above = f"{path}/" if path else ""
        below = {name: blob for name, blob in self._at(kind, repo, revision).files.items() if name.startswith(above)}
        if path and not below:
            raise Refused(404, f"{path} does not exist on {revision}", "EntryNotFound")
        deep = query.get("recursive", "").lower() == "true"
        entries = {}
        for name, blob in sorted(below.items()):
            parts = name[len(above) :].split("/")
            for end in range(1, len(parts) if deep else min(len(parts), 2)):
                folder = above + "/".join(parts[:end])
                entries[folder] = {"type": "directory", "oid": _git_hash(folder.encode()), "size": 0, "path": folder}
            if deep or len(parts) == 1:
                entries[name] = _entry(name, blob)
        return 200, list(entries.values()), {}

    def _download(self, body, query, *, kind, repo, revision, path):
        commit = self._at(kind, repo, revision)
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Size": len(blob.content), "X-Linked-ETag": f'"{blob.etag}"'}
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, size = int(wanted[1]), len(blob.content)
            return 206, blob.content[start:], headers | {"Content-Range": f"bytes {start}-{size - 1}/{size}"}
        return 200, blob.content, headers


def is_lfs(path: str, size: int) -> bool:
    """Return whether the Hub would take a file as git LFS: by its name, or because it is large."""
    return size > LFS_BYTES or any(fnmatch.fnmatch(path.split("/")[-1], pattern) for pattern in LFS_PATTERNS)


def _entry(path: str, blob: Blob) -> dict:
    entry = {"type": "file", "oid": _git_hash(blob.content), "size": len(blob.content), "path": path}
    if blob.lfs:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{blob.etag}\nsize {len(blob.content)}\n"
        entry["oid"] = _git_hash(pointer.encode())
        entry["lfs"] = {"oid": blob.etag, "size": len(blob.content), "pointerSize": len(pointer)}
    return entry


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


if __name__ == "__main__":
    with HubServer() as served:
        print("\n".join(f"export {key}={value}" for key, value in served.environment.items()), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
