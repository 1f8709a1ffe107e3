"""A stand-in for the Hub on the loopback: what huggingface_hub asks of it to read and write models, in memory.

Big files go the way of LFS, small ones in one request and others in parts. Faults are asked for beforehand: a status,
or a connection that breaks, for the requests that a pattern matches.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

PART = 1 << 16  # bytes; files of more than four parts are sent in parts
USERS = {  # token: user, role
    "hf_write": ("ada", "write"),
    "hf_read": ("ada", "read"),
    "hf_narrow": ("ada", "fineGrained"),
    "hf_bob": ("bob", "write"),
}
MEMBERS = {"ada": {"mill": "write", "guests": "read"}, "bob": {}}


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_big(path: str) -> bool:
    return path.endswith(".safetensors")


@dataclass
class Repo:
    """Attributes: private; files of each commit; branches and tags, the commits that they mean."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        parent = self.branches.get(branch, "")
        seed = [parent, *(f"{name}:{git_oid(data)}" for name, data in sorted(files.items()))]
        sha = hashlib.sha1("\n".join(seed).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        found = self.branches.get(revision) or self.tags.get(revision)
        return found or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """For `times` requests that match `METHOD path`: a status, or 0 to break the connection."""

    pattern: str
    status: int
    times: int = 1


class Hub:
    """Attributes: repos; objects: big files by SHA-256; requests: seen; uploaded: bytes of big files; faults."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []
        self.uploaded: list[int] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.endpoint = ""

    def add(self, repo_id: str, files: dict[str, bytes], *, private: bool = False, branch: str = "main") -> str:
        """A repository as if it had been there; its commit."""
        repo = self.repos.setdefault(repo_id, Repo(private))
        self.objects |= {hashlib.sha256(data).hexdigest(): data for name, data in files.items() if is_big(name)}
        return repo.commit(branch, {".gitattributes": b"", **files})

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.commits[repo.branches[branch]]

    def fault(self, request: str) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None


class Refusal(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.query, self.quoted = parse_qs(url.query), url.path
        fault = self.hub.fault(f"{method} {path}")
        if fault is not None and fault.status == 0:  # half of what comes is read, then the line goes dead
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            self.connection.close()
            return
        self.body = self._read()
        try:
            if fault is not None:
                raise Refusal(fault.status, "as the test wants it")
            for pattern, action in ROUTES:
                if match := re.fullmatch(pattern, f"{method} {path}"):
                    action(self, *match.groups())
                    return
            raise Refusal(404, f"no route for {method} {path}")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self._send(refusal.status, json.dumps({"error": refusal.message}).encode(), headers)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, data: Any) -> None:
        self._send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    # Who asks, and what for.

    def _user(self) -> tuple[str, str] | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in USERS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return USERS.get(given)

    def _can_write(self, repo_id: str) -> None:
        user = self._user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        namespace = repo_id.split("/")[0]
        if user[1] != "write" or (namespace != user[0] and MEMBERS[user[0]].get(namespace) != "write"):
            raise Refusal(403, f"You don't have the rights to write to {repo_id}")

    def _repo(self, repo_id: str) -> Repo:
        user, repo = self._user(), self.hub.repos.get(repo_id)
        namespace = repo_id.split("/")[0]
        if repo is None or (repo.private and (user is None or namespace not in (user[0], *MEMBERS[user[0]]))):
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def _commit(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self._repo(repo_id)
        if (sha := repo.resolve(revision)) is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repo.commits[sha]

    # Answers.

    def whoami(self) -> None:
        user = self._user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        orgs = [{"name": name, "roleInOrg": role} for name, role in MEMBERS[user[0]].items()]
        token = {"accessToken": {"displayName": "test", "role": user[1]}}
        self._json({"type": "user", "name": user[0], "orgs": orgs, "auth": token})

    def create(self) -> None:
        asked = json.loads(self.body)
        user = self._user()
        repo_id = f"{asked.get('organization') or (user[0] if user else '')}/{asked['name']}"
        self._can_write(repo_id)
        if repo_id in self.hub.repos:
            url = f"{self.hub.endpoint}/{repo_id}"
            self._send(409, json.dumps({"error": "You already created this model repo", "url": url}).encode())
            return
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.hub.add(repo_id, {}, private=private)
        self._json({"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id, "id": "1"})

    def info(self, repo_id: str, revision: str | None = None) -> None:
        sha, files = self._commit(repo_id, revision or "main")
        names = [{"rfilename": name} for name in files]
        private = self.hub.repos[repo_id].private
        self._json({"id": repo_id, "modelId": repo_id, "sha": sha, "private": private, "tags": [], "siblings": names})

    def tree(self, repo_id: str, rest: str) -> None:
        revision, folder = self._split("/tree/")
        _, files = self._commit(repo_id, revision)
        inside = {name: data for name, data in files.items() if name.startswith(f"{folder}/") or not folder}
        if not inside:
            raise Refusal(404, f"{folder} is not there", "EntryNotFound")
        self._json([self._entry(name, data) for name, data in inside.items()])

    def _split(self, marker: str) -> tuple[str, str]:
        """Revision and path after a part of the address: slashes of the revision are quoted there."""
        revision, _, path = self.quoted.partition(marker)[2].partition("/")
        return unquote(revision), unquote(path)

    def _entry(self, name: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git_oid(data)}
        if is_big(name):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def refs(self, repo_id: str) -> None:
        repo = self._repo(repo_id)
        found = {
            kind: [{"name": name, "ref": name, "targetCommit": sha} for name, sha in refs.items()]
            for kind, refs in (("branches", repo.branches), ("tags", repo.tags))
        }
        self._json({**found, "converts": []})

    def branch(self, repo_id: str, name: str) -> None:
        self._can_write(repo_id)
        repo = self._repo(repo_id)
        if name in repo.branches:
            raise Refusal(409, "Reference already exists")
        repo.branches[name] = repo.branches["main"]
        self._json({})

    def may_write(self, repo_id: str) -> None:
        self._repo(repo_id)
        self._can_write(repo_id)
        self._json({})

    def valid_yaml(self) -> None:
        self._json({"warnings": [], "errors": []})

    def preupload(self, repo_id: str, revision: str) -> None:
        self._can_write(repo_id)
        _, files = self._commit(repo_id, revision)
        found = []
        for file in json.loads(self.body)["files"]:
            name, entry = file["path"], {"path": file["path"], "shouldIgnore": False}
            entry["uploadMode"] = "lfs" if is_big(name) else "regular"
            if name in files:
                data = files[name]
                entry["oid"] = hashlib.sha256(data).hexdigest() if is_big(name) else git_oid(data)
            found.append(entry)
        self._json({"files": found, "commitOid": self.hub.repos[repo_id].branches.get(revision)})

    def batch(self, repo_id: str) -> None:
        self._can_write(repo_id)
        found = []
        for asked in json.loads(self.body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            entry = {"oid": oid, "size": size, "authenticated": True}
            if oid not in self.hub.objects:
                url = f"{self.hub.endpoint}/lfs/{oid}"
                count = -(-size // PART)
                parts = {str(n + 1): f"{url}/{n + 1}" for n in range(count)}
                header = {"chunk_size": str(PART), **parts} if count > 4 else {}
                verify = {"href": f"{url}/verify"}
                href = f"{url}/whole" if header else url
                entry["actions"] = {"upload": {"href": href, "header": header}, "verify": verify}
            found.append(entry)
        self._json({"transfer": "basic", "objects": found})

    def put(self, oid: str) -> None:
        self._keep(oid, self.body)
        self._send(200, b"", {"ETag": f'"{oid}"'})

    def put_part(self, oid: str, number: str) -> None:
        self.hub.parts.setdefault(oid, {})[int(number)] = self.body
        self._send(200, b"", {"ETag": f'"{number}"'})

    def put_whole(self, oid: str) -> None:
        asked, parts = json.loads(self.body), self.hub.parts[oid]
        self._keep(oid, b"".join(parts[part["partNumber"]] for part in asked["parts"]))
        self._json({})

    def verify(self, oid: str) -> None:
        self._user()
        if len(self.hub.objects.get(oid, b"")) != json.loads(self.body)["size"]:
            raise Refusal(404, "not there")
        self._json({})

    def _keep(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400, "not what was announced")
        self.hub.objects[oid] = data
        self.hub.uploaded.append(len(data))

    def make_commit(self, repo_id: str, revision: str) -> None:
        self._can_write(repo_id)
        _, files = self._commit(repo_id, revision)
        files = dict(files)
        for line in filter(None, self.body.split(b"\n")):
            asked = json.loads(line)
            value = asked["value"]
            if asked["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif asked["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif asked["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.hub.repos[repo_id].commit(revision, files)
        self._json({"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{sha}", "commitOid": sha, "success": True})

    def resolve(self, repo_id: str, rest: str) -> None:
        revision, name = self._split("/resolve/")
        sha, files = self._commit(repo_id, revision)
        if name not in files:
            raise Refusal(404, f"{name} is not there", "EntryNotFound")
        data = files[name]
        etag = hashlib.sha256(data).hexdigest() if is_big(name) else git_oid(data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if is_big(name):
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        if (asked := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) is not None:
            start = int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._send(206, data[start:], headers)
        else:
            self._send(200, data, headers)


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, Any]] = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.valid_yaml),
    (rf"GET /api/models/{NAME}", Handler.info),
    (rf"GET /api/models/{NAME}/revision/(.+)", Handler.info),
    (rf"GET /api/models/{NAME}/tree/(.+)", Handler.tree),
    (rf"GET /api/models/{NAME}/refs", Handler.refs),
    (rf"POST /api/models/{NAME}/branch/(.+)", Handler.branch),
    (rf"GET /api/models/{NAME}/auth-check/write", Handler.may_write),
    (rf"POST /api/models/{NAME}/preupload/(.+)", Handler.preupload),
    (rf"POST /api/models/{NAME}/commit/(.+)", Handler.make_commit),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(\w+)", Handler.put),
    (r"PUT /lfs/(\w+)/(\d+)", Handler.put_part),
    (r"POST /lfs/(\w+)/whole", Handler.put_whole),
    (r"POST /lfs/(\w+)/verify", Handler.verify),
    (rf"(?:GET|HEAD) /{NAME}/resolve/(.+)", Handler.resolve),
]


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
