"""A loopback Hub: enough of the protocol of huggingface.co to push to it and load from it, on 127.0.0.1.

It is made for tests and checked against huggingface_hub 2.4 alone; that the public Hub behaves alike is not shown by
it. Repositories are model repositories, kept in memory. Large files come by Git LFS (`basic` transfer) or by Xet, where
the client stores them itself in a `local://` folder and the server sees only their hashes. Every request is recorded
whole. Faults are injected by request: a status, a connection that drops, or a delay.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from helpers.hub_client import TOKEN

DATE = "2025-01-01T00:00:00.000Z"
LARGE = ("*.safetensors", "*.bin", "*.png", "*.pt")  # as in the .gitattributes that the Hub gives a new repository
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE).encode()


@dataclass(frozen=True)
class File:
    """A file at a commit: `content` of a small one, `sha256` and `size` of a large one."""

    content: bytes | None = None
    sha256: str = ""
    size: int = 0

    @property
    def oid(self) -> str:
        """Git's name of the blob; of a large file that of its pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
        blob = self.content if self.content is not None else pointer.encode()
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()


@dataclass
class Repository:
    """Commits by name, each the whole tree; refs to them."""

    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, tree: dict[str, File], ref: str = "refs/heads/main") -> str:
        state = f"{self.refs.get(ref)} {len(self.commits)} {sorted((path, f.oid) for path, f in tree.items())}"
        name = hashlib.sha1(state.encode()).hexdigest()
        self.commits[name], self.refs[ref] = tree, name
        return name

    def find(self, revision: str) -> str | None:
        """The commit of a branch, tag, ref or commit."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.refs[ref]
        return revision if revision in self.commits else None


@dataclass
class Fault:
    """What happens to the next `times` requests whose method and path match `where`, such as `PUT /objects/`."""

    where: str
    status: int = 0
    message: str = "injected"
    drop: bool = False
    delay: float = 0.0
    times: int = 10**9


@dataclass(frozen=True)
class Seen:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Reply(Exception):
    """Ends a request with this answer."""

    def __init__(self, status: int, content: Any = b"", **headers: str):
        self.status, self.headers = status, {k.replace("_", "-"): v for k, v in headers.items()}
        self.body = content if isinstance(content, bytes) else json.dumps(content).encode()


def refusal(status: int, code: str, message: str) -> Reply:
    return Reply(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)


class Hub:
    """The state, the routes, and the running server; use `loopback_hub`."""

    def __init__(self, xet_folder: Path | None = None):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Seen] = []
        self.faults: list[Fault] = []
        self.xet_folder = xet_folder
        self.xet_hashes: dict[str, str] = {}  # by SHA-256; the real Hub reads them off what it stores
        self.on_commit: Callable[[dict[str, File]], None] = lambda tree: None  # may change what is stored
        self.lock = threading.RLock()
        self.url = ""

    def reset(self) -> None:
        """As new, at the same address."""
        for part in (self.repositories, self.objects, self.requests, self.faults, self.xet_hashes):
            part.clear()
        self.on_commit = lambda tree: None

    # What tests look at

    def files(self, repo_id: str, revision: str = "main") -> dict[str, File]:
        repository = self.repositories[repo_id]
        commit = repository.find(revision)
        return repository.commits[commit] if commit else {}

    def content(self, file: File) -> bytes:
        return file.content if file.content is not None else self.objects[file.sha256]

    def everything_published(self) -> bytes:
        """Names and contents of all files of all commits, and all stored objects."""
        trees = [tree for repository in self.repositories.values() for tree in repository.commits.values()]
        files = [f"{path}\n".encode() + (f.content or b"") for tree in trees for path, f in tree.items()]
        return b"\n".join([*files, *self.objects.values()])

    def everything_received(self) -> bytes:
        """All requests but for the header that is meant to carry the token; base64 contents decoded."""
        parts = []
        for seen in self.requests:
            headers = {name: value for name, value in seen.headers.items() if name.lower() != "authorization"}
            parts += [f"{seen.method} {seen.path} {headers}".encode(), seen.body]
            for encoded in re.findall(rb'"(?:content|sample)": ?"([A-Za-z0-9+/=]*)"', seen.body):
                parts.append(base64.b64decode(encoded))
        return b"\n".join(parts)

    # Routes

    def answer(self, seen: Seen) -> Reply:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.where, f"{seen.method} {seen.path}"):
                fault.times -= 1
                time.sleep(fault.delay)
                if fault.drop:
                    raise ConnectionAbortedError
                if fault.status:
                    return Reply(fault.status, {"error": fault.message}, X_Error_Message=fault.message)
        url = urlsplit(seen.path)
        for method, pattern, route in ROUTES:
            match = re.fullmatch(pattern, unquote(url.path))
            if method == seen.method.replace("HEAD", "GET") and match:
                try:
                    with self.lock:
                        return route(self, seen, **match.groupdict())
                except Reply as reply:
                    return reply
        return Reply(404, {"error": f"no route {seen.method} {url.path}"})

    def user(self, seen: Seen) -> None:
        if {k.lower(): v for k, v in seen.headers.items()}.get("authorization") != f"Bearer {TOKEN}":
            raise Reply(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials")

    def repository(self, seen: Seen, repo: str, write: bool = False) -> Repository:
        found = self.repositories.get(repo)
        if found is None:
            raise refusal(404, "RepoNotFound", "Repository not found")
        if write or found.private:
            self.user(seen)
        return found

    def commit(self, repository: Repository, revision: str) -> str:
        found = repository.find(revision)
        if found is None:
            raise refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def who(self, seen: Seen) -> Reply:
        self.user(seen)
        return Reply(200, {"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self, seen: Seen) -> Reply:
        self.user(seen)
        asked = json.loads(seen.body)
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if repo in self.repositories:
            return Reply(409, {"error": "exists", "url": f"{self.url}/{repo}"})
        self.repositories[repo] = Repository(private=asked.get("visibility") == "private")
        self.repositories[repo].commit({".gitattributes": File(GITATTRIBUTES)})
        return Reply(200, {"url": f"{self.url}/{repo}"})

    def validate(self, seen: Seen) -> Reply:
        content = json.loads(seen.body)["content"]
        try:
            data = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
            assert isinstance(data, dict)
            base = data.get("base_model")
            assert base is None or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base), '"base_model" must be a model id'
        except (yaml.YAMLError, AssertionError, IndexError) as error:
            return Reply(400, {"errors": [{"message": f"Invalid YAML: {error}"}], "warnings": []})
        return Reply(200, {"errors": [], "warnings": []})

    def preupload(self, seen: Seen, repo: str, rev: str) -> Reply:
        tree = self.repositories[repo].commits[self.commit(self.repository(seen, repo, write=True), rev)]

        def mode(file: dict[str, Any]) -> dict[str, Any]:
            there = tree.get(file["path"])
            large = any(fnmatch(file["path"], pattern) for pattern in LARGE) or file["size"] > 10**7
            oid = (there.oid if there.content is not None else there.sha256) if there else None
            return {
                "path": file["path"],
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": False,
                "oid": oid,
            }

        return Reply(200, {"files": [mode(file) for file in json.loads(seen.body)["files"]]})

    def batch(self, seen: Seen, repo: str) -> Reply:
        self.repository(seen, repo, write=True)

        def actions(oid: str) -> dict[str, Any]:
            if oid in self.objects:
                return {}
            upload = {"href": f"{self.url}/objects/{oid}?X-Amz-Signature=signed"}
            return {"actions": {"upload": upload, "verify": {"href": f"{self.url}/verify"}}}

        asked = json.loads(seen.body)["objects"]
        objects = [{"oid": o["oid"], "size": o["size"], **actions(o["oid"])} for o in asked]
        return Reply(200, {"transfer": "basic", "objects": objects})

    def put(self, seen: Seen, oid: str) -> Reply:
        if hashlib.sha256(seen.body).hexdigest() != oid:
            return Reply(400, {"error": "hash mismatch"})
        self.objects[oid] = seen.body
        return Reply(200)

    def get(self, seen: Seen, oid: str) -> Reply:
        return Reply(200, self.objects[oid]) if oid in self.objects else Reply(404)

    def verify(self, seen: Seen) -> Reply:
        return Reply(200 if json.loads(seen.body)["oid"] in self.objects else 404, {})

    def change(self, seen: Seen, repo: str, rev: str) -> Reply:
        repository = self.repository(seen, repo, write=True)
        tree = dict(repository.commits[self.commit(repository, rev)])
        for line in seen.body.splitlines():
            kind, value = (item := json.loads(line))["key"], item["value"]
            if kind == "file":
                tree[value["path"]] = File(base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                if value["oid"] not in self.objects and self.xet_folder is None:
                    return Reply(400, {"error": f"no object {value['oid']}"})
                tree[value["path"]] = File(None, value["oid"], value["size"])
            elif kind == "deletedFile":
                del tree[value["path"]]
        self.on_commit(tree)
        ref = rev if rev.startswith("refs/") else f"refs/heads/{rev}"
        oid = repository.commit(tree, ref)
        return Reply(200, {"commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}", "success": True})

    def xet_token(self, seen: Seen, repo: str, kind: str, rev: str) -> Reply:
        self.repository(seen, repo, write=kind == "write")
        if self.xet_folder is None:
            return Reply(404, {"error": "no Xet here"})
        expiry, address = str(int(time.time()) + 3600), f"local://{self.xet_folder}"
        return Reply(
            200,
            {"casUrl": address, "accessToken": "xet", "exp": int(expiry)},
            X_Xet_Cas_Url=address,
            X_Xet_Access_Token="xet",
            X_Xet_Token_Expiration=expiry,
        )

    def info(self, seen: Seen, repo: str, rev: str | None = None) -> Reply:
        repository = self.repository(seen, repo)
        commit = self.commit(repository, rev or "main")
        siblings = [
            {"rfilename": path, "size": f.size or len(f.content or b""), "blobId": f.oid}
            | ({"lfs": {"sha256": f.sha256, "size": f.size, "pointerSize": 130}} if f.content is None else {})
            for path, f in repository.commits[commit].items()
        ]
        return Reply(
            200,
            {
                "id": repo,
                "modelId": repo,
                "sha": commit,
                "private": repository.private,
                "siblings": siblings,
                "tags": [],
                "downloads": 0,
                "likes": 0,
            },
        )

    def entries(self, repository: Repository, commit: str) -> list[dict[str, Any]]:
        def entry(path: str, f: File) -> dict[str, Any]:
            plain = {"type": "file", "path": path, "size": f.size or len(f.content or b""), "oid": f.oid}
            if f.content is None:
                plain["lfs"] = {"oid": f.sha256, "size": f.size, "pointerSize": 130}
                if f.sha256 in self.xet_hashes:
                    plain["xetHash"] = self.xet_hashes[f.sha256]
            return plain

        return [entry(path, f) for path, f in repository.commits[commit].items()]

    def tree(self, seen: Seen, repo: str, rev: str, folder: str | None = None) -> Reply:
        repository = self.repository(seen, repo)
        entries = self.entries(repository, self.commit(repository, rev))
        if folder is not None:
            entries = [entry for entry in entries if entry["path"].startswith(f"{folder}/")]
            if not entries:
                raise refusal(404, "EntryNotFound", f"{folder} does not exist")
        return Reply(200, entries)

    def paths(self, seen: Seen, repo: str, rev: str) -> Reply:
        repository = self.repository(seen, repo)
        wanted = parse_qs(seen.body.decode())["paths"]
        return Reply(200, [e for e in self.entries(repository, self.commit(repository, rev)) if e["path"] in wanted])

    def resolve(self, seen: Seen, repo: str, rev: str, path: str) -> Reply:
        repository = self.repository(seen, repo)
        commit = self.commit(repository, rev)
        file = repository.commits[commit].get(path)
        if file is None:
            raise refusal(404, "EntryNotFound", f"{path} does not exist")
        if file.content is not None:
            return Reply(200, file.content, X_Repo_Commit=commit, ETag=f'"{file.oid}"')
        headers = {"X_Repo_Commit": commit, "X_Linked_Etag": f'"{file.sha256}"', "X_Linked_Size": str(file.size)}
        if file.sha256 in self.xet_hashes:
            headers |= {
                "X_Xet_Hash": self.xet_hashes[file.sha256],
                "X_Xet_Refresh_Route": f"{self.url}/api/models/{repo}/xet-read-token/{commit}",
            }
        elsewhere = self.url.replace("127.0.0.1", "localhost")
        return Reply(302, Location=f"{elsewhere}/objects/{file.sha256}?X-Amz-Signature=signed", **headers)

    def branch(self, seen: Seen, repo: str, name: str) -> Reply:
        repository = self.repository(seen, repo, write=True)
        if f"refs/heads/{name}" in repository.refs:
            return Reply(409, {"error": "exists"})
        repository.refs[f"refs/heads/{name}"] = repository.refs["refs/heads/main"]
        return Reply(201)

    def list_refs(self, seen: Seen, repo: str) -> Reply:
        refs = self.repository(seen, repo).refs
        kinds = {
            "branches": "refs/heads/",
            "converts": "refs/convert/",
            "tags": "refs/tags/",
            "pullRequests": "refs/pr/",
        }
        return Reply(
            200,
            {
                kind: [
                    {"name": ref.removeprefix(start), "ref": ref, "targetCommit": commit}
                    for ref, commit in refs.items()
                    if ref.startswith(start)
                ]
                for kind, start in kinds.items()
            },
        )

    def squash(self, seen: Seen, repo: str, name: str) -> Reply:
        """The branch gets a commit without parents; the old ones stay reachable by name, as on the Hub."""
        repository = self.repository(seen, repo, write=True)
        repository.commit(dict(self.files(repo, name)), f"refs/heads/{name}")
        return Reply(200, {})

    def lfs_files(self, seen: Seen, repo: str) -> Reply:
        repository = self.repository(seen, repo, write=True)
        found = {
            f.sha256: (path, f)
            for tree in repository.commits.values()
            for path, f in tree.items()
            if f.content is None and f.sha256 in self.objects
        }
        return Reply(
            200,
            [
                {"fileOid": f.sha256, "filename": path, "oid": f.oid, "pushedAt": DATE, "size": f.size}
                for path, f in found.values()
            ],
        )

    def delete_lfs_files(self, seen: Seen, repo: str) -> Reply:
        repository = self.repository(seen, repo, write=True)
        gone = set(json.loads(seen.body)["deletions"]["sha"])
        for sha256 in gone:
            self.objects.pop(sha256, None)
        for name, tree in repository.commits.items():  # rewriteHistory
            repository.commits[name] = {path: f for path, f in tree.items() if f.sha256 not in gone}
        return Reply(200, {})


REPO, REV = r"(?P<repo>[^/]+/[^/]+)", r"(?P<rev>.+)"
API = f"/api/models/{REPO}"
ROUTES: list[tuple[str, str, Callable[..., Reply]]] = [
    ("GET", "/api/whoami-v2", Hub.who),
    ("POST", "/api/repos/create", Hub.create),
    ("POST", "/api/validate-yaml", Hub.validate),
    ("POST", f"{API}/preupload/{REV}", Hub.preupload),
    ("POST", f"/{REPO}.git/info/lfs/objects/batch", Hub.batch),
    ("PUT", "/objects/(?P<oid>[0-9a-f]{64})", Hub.put),
    ("GET", "/objects/(?P<oid>[0-9a-f]{64})", Hub.get),
    ("POST", "/verify", Hub.verify),
    ("POST", f"{API}/commit/{REV}", Hub.change),
    ("GET", f"{API}/xet-(?P<kind>read|write)-token/{REV}", Hub.xet_token),
    ("GET", API, Hub.info),
    ("GET", f"{API}/revision/{REV}", Hub.info),
    ("GET", f"{API}/tree/(?P<rev>refs/[^/]+/[^/]+|[^/]+)(/(?P<folder>.+))?", Hub.tree),
    ("POST", f"{API}/paths-info/{REV}", Hub.paths),
    ("GET", f"{API}/refs", Hub.list_refs),
    ("POST", f"{API}/branch/(?P<name>.+)", Hub.branch),
    ("POST", f"{API}/super-squash/(?P<name>.+)", Hub.squash),
    ("GET", f"{API}/lfs-files", Hub.lfs_files),
    ("POST", f"{API}/lfs-files/batch", Hub.delete_lfs_files),
    ("GET", f"/{REPO}/resolve/(?P<rev>refs/[^/]+/[^/]+|[^/]+)/(?P<path>.+)", Hub.resolve),
]


class Handler(BaseHTTPRequestHandler):
    """HTTP for the server's `hub`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # 40 ms a call otherwise

    def respond(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        seen = Seen(self.command, self.path, dict(self.headers), self.read_body())
        hub.requests.append(seen)
        try:
            reply = hub.answer(seen)
        except ConnectionAbortedError:
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = respond

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def loopback_hub(xet_folder: Path | None = None) -> Iterator[Hub]:
    """A running Hub; it is stopped at the end."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub = Hub(xet_folder)  # type: ignore[attr-defined]
    server.hub.url = f"http://127.0.0.1:{server.server_address[1]}"  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
