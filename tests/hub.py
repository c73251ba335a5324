"""A stand-in for the hub: the few endpoints that fetching a base uses, over HTTP on this machine (HF_ENDPOINT)."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

GOOD_TOKEN = "hf_good"
BAD_TOKEN = "hf_bad"


@dataclass
class Repository:
    files: dict[str, bytes]
    gated: bool = False
    """Files need a token that has access; the listing does not, as on the real hub."""
    branches: dict[str, str] = field(default_factory=dict)
    breaks: dict[str, int] = field(default_factory=dict)
    """File name to how many more of its downloads end half way."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Sizes that the listing claims, where they are not the real ones."""

    @property
    def commit(self) -> str:
        return hashlib.sha1(b"".join(name.encode() + body for name, body in sorted(self.files.items()))).hexdigest()

    def resolve(self, revision: str) -> str | None:
        known = {"main": self.commit, self.commit: self.commit, **self.branches}
        return known.get(revision)


@dataclass
class Hub:
    url: str
    repositories: dict[str, Repository]
    requests: list[tuple[str, str, str | None]]
    """Method, path and Range header of every request, in order."""


def repository_of(folder: Path, **options: Any) -> Repository:
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return Repository(files=files, **options)


@contextmanager
def running_hub(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """A hub that serves `repositories` (name to content) until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(url=f"http://127.0.0.1:{server.server_port}", repositories=repositories, requests=[])
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: pytest shows what matters."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path = urllib.parse.unquote(self.path.partition("?")[0])
        hub.requests.append((self.command, path, self.headers.get("Range")))
        if (self.headers.get("Authorization") or "").endswith(BAD_TOKEN):
            return self._refuse(401, None, "Invalid credentials in Authorization header")
        if match := re.fullmatch(r"/api/models/(.+?)/tree/([^/]+)(/.*)?", path):
            found = self._find(match[1], match[2])
            return None if found is None else self._send_json(_tree(*found))
        if match := re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path):
            found = self._find(match[1], match[2] or "main")
            return None if found is None else self._send_json(_info(match[1], *found))
        if match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            found = self._find(match[1], match[2])
            return None if found is None else self._send_file(*found, match[3])
        return self._refuse(404, "EntryNotFound", "no such page")

    def _find(self, name: str, revision: str) -> tuple[Repository, str] | None:
        repository = self.server.hub.repositories.get(name)  # type: ignore[attr-defined]
        if repository is None:
            self._refuse(401, "RepoNotFound", "Repository not found")
            return None
        commit = repository.resolve(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound", "Invalid rev id")
            return None
        return repository, commit

    def _send_file(self, repository: Repository, commit: str, name: str) -> None:
        authorization = self.headers.get("Authorization") or ""
        if repository.gated and not authorization.endswith(GOOD_TOKEN):
            return self._refuse(403 if authorization else 401, "GatedRepo", "Access to this model is restricted")
        body = repository.files.get(name)
        if body is None:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        start = 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(match[1])
        rest = body[start:]
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(rest)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if repository.breaks.get(name, 0) > 0:
            repository.breaks[name] -= 1
            self.wfile.write(rest[: len(rest) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(rest)

    def _send_json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str | None, message: str) -> None:
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _entry(repository: Repository, name: str) -> dict[str, Any]:
    body = repository.files[name]
    entry: dict[str, Any] = {
        "size": repository.sizes.get(name, len(body)),
        "oid": hashlib.sha1(body).hexdigest(),
    }
    if name.endswith((".safetensors", ".bin")):
        entry["lfs"] = {
            "oid": hashlib.sha256(body).hexdigest(),
            "sha256": hashlib.sha256(body).hexdigest(),
            "size": entry["size"],
            "pointerSize": 134,
        }
    return entry


def _tree(repository: Repository, commit: str) -> list[dict[str, Any]]:
    del commit
    return [{"type": "file", "path": name, **_entry(repository, name)} for name in sorted(repository.files)]


def _info(name: str, repository: Repository, commit: str) -> dict[str, Any]:
    siblings = []
    for file in sorted(repository.files):
        entry = _entry(repository, file)
        entry["blobId"] = entry.pop("oid")
        siblings.append({"rfilename": file, **entry})
    return {
        "_id": "1",
        "id": name,
        "modelId": name,
        "sha": commit,
        "private": False,
        "gated": "auto" if repository.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": siblings,
    }
