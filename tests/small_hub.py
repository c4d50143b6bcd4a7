"""A hub on this machine: its API, resolve URLs and the store of large files behind them, with the faults that life has."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "a" * 40
LARGE = ".safetensors"


@dataclass
class Repo:
    """One repository. gate: None, or the tokens whose accounts accepted its licence. readers: None for a public one."""

    files: dict[str, bytes]
    commit: str = COMMIT
    gate: tuple[str, ...] | None = None
    readers: tuple[str, ...] | None = None
    moved_to: str | None = None


@dataclass
class Fault:
    """Answer to the next `times` requests whose path fits: a status, or a connection closed after `keep` bytes."""

    pattern: str
    status: int = 0
    keep: int = -1
    times: int = 1
    method: str = ""
    headers: dict[str, str] = field(default_factory=dict)


class SmallHub:
    """Serves `repos` until `close`; `log` lists (method, path, range, bytes of the body that were sent)."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.spoilt: set[str] = set()
        self.log: list[tuple[str, str, str, int]] = []
        self.tokens: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            served = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.store = f"http://localhost:{self.server.server_port}"  # another host, which must see no token
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def serve(self, name: str, source: Path | dict[str, bytes], **about) -> Repo:
        if isinstance(source, Path):
            source = {file.relative_to(source).as_posix(): file.read_bytes() for file in source.rglob("*") if file.is_file()}
        self.repos[name] = Repo(source, **about)
        return self.repos[name]

    def fault_of(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method in ("", method) and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None

    def fetched(self) -> list[str]:
        """Names of files whose bytes were sent, each as often as it was."""
        stored = {_sha(content): name for repo in self.repos.values() for name, content in repo.files.items()}
        found = []
        for method, path, _, sent in self.log:
            if method == "GET" and sent and (at := re.search(r"/resolve/[0-9a-z]+/(.+)", path)):
                found.append(at.group(1))
            elif method == "GET" and sent and path.startswith("/store/"):
                found.append(stored[path.removeprefix("/store/")])
        return sorted(found)


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    served: SmallHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self._answer("HEAD")

    def do_GET(self):
        self._answer("GET")

    def _answer(self, method):
        path = self.path.partition("?")[0]
        self.served.tokens.append((path, self._token()))
        fault = self.served.fault_of(method, path)
        if fault is not None and fault.status:
            return self._send(fault.status, b"", fault.headers)
        keep = fault.keep if fault is not None else -1
        if path.startswith("/store/"):
            return self._store(path.removeprefix("/store/"), keep)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            return self._api(*found.groups())
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*found.groups(), keep)
        return self._refuse(404, "RepoNotFound")

    def _token(self):
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _repo(self, name, revision):
        """The repository, or None once it was refused or is elsewhere."""
        repo = self.served.repos.get(name)
        if repo is None or (repo.readers is not None and self._token() not in repo.readers):
            self._refuse(404 if self._token() else 401, "RepoNotFound")
        elif repo.moved_to is not None:
            self._send(307, b"", {"Location": self.path.replace(name, repo.moved_to, 1)})
        elif revision not in (None, "main", repo.commit):
            self._refuse(404, "RevisionNotFound")
        else:
            return repo
        return None

    def _api(self, name, kind, revision):
        repo = self._repo(name, revision)
        if repo is None:
            return None
        listed = []
        for path, content in sorted(repo.files.items()):
            one = {"type": "file", "path": path, "size": len(content), "oid": _git(content)}
            if path.endswith(LARGE):
                one["lfs"] = {"oid": _sha(content), "size": len(content), "pointerSize": 100}
            listed.append(one)
        body = listed
        if kind != "tree":
            siblings = [{"rfilename": one["path"]} for one in listed]
            body = {"id": name, "sha": repo.commit, "gated": bool(repo.gate), "private": False, "tags": [], "siblings": siblings}
        return self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _resolve(self, name, revision, file, keep):
        repo = self._repo(name, revision)
        if repo is None:
            return None
        if repo.gate is not None and self._token() not in repo.gate:
            return self._refuse(403 if self._token() else 401, "GatedRepo")
        about = {"X-Repo-Commit": repo.commit}
        if file not in repo.files:
            return self._refuse(404, "EntryNotFound", about)
        content = repo.files[file]
        if not file.endswith(LARGE):
            return self._send(200, content, {**about, "ETag": f'"{_git(content)}"'}, keep)
        linked = {"X-Linked-Etag": f'"{_sha(content)}"', "X-Linked-Size": str(len(content))}
        return self._send(302, b"", {**about, **linked, "Location": f"{self.served.store}/store/{_sha(content)}"})

    def _store(self, digest, keep):
        held = {_sha(content): (name, content) for repo in self.served.repos.values() for name, content in repo.files.items()}
        name, content = held[digest]
        if name in self.served.spoilt:
            content = bytes(len(content))
        begins = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if begins is None:
            return self._send(200, content, {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}, keep)
        start, all_of_it = int(begins.group(1)), len(content)
        span = f"bytes {start}-{all_of_it - 1}/{all_of_it}"
        return self._send(206, content[start:], {"ETag": f'"{digest}"', "Content-Range": span}, keep)

    def _refuse(self, status, code, headers=None):
        return self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": f"the hub says {code}", **(headers or {})})

    def _send(self, status, body, headers, keep=-1):
        sent = b"" if self.command == "HEAD" else body if keep < 0 else body[:keep]
        self.served.log.append((self.command, self.path.partition("?")[0], self.headers.get("Range") or "", len(sent)))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(sent)
        if len(sent) < len(body) and self.command != "HEAD":
            self.close_connection = True
