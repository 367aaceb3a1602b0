"""A stand-in of the Hugging Face hub on the loopback address: what its client asks of it to make a repository, commit
to it, list it and download from it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_of_the_tests"
LARGE = (".safetensors", ".onnx")
"""Files that the hub keeps by their SHA-256 (LFS)."""
Files = dict[str, bytes]


@dataclass
class Repository:
    """revisions: the files of each branch, tag or commit. gated: only its owner's token may read it."""

    revisions: dict[str, Files] = field(default_factory=lambda: {"main": {}})
    private: bool = False
    gated: bool = False
    messages: list[str] = field(default_factory=list)

    def commit(self, revision: str) -> str:
        """A digest of the files; a revision that is a commit is its own."""
        if len(revision) == 40:
            return revision
        parts = sorted(self.revisions[revision].items())
        return hashlib.sha1(repr(parts).encode()).hexdigest()

    def files(self, revision: str) -> Files | None:
        found = self.revisions.get(revision)
        if found is None:
            found = next((each for name, each in self.revisions.items() if self.commit(name) == revision), None)
        return found


@dataclass
class Hub:
    """asked: (method, path) of each request; cut_after: bytes of a file, after which the connection ends; once: whether
    only the next file is cut off."""

    url: str
    cache: Path
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    cut_after: int | None = None

    def add(self, name: str, files: Files, **options: bool) -> Repository:
        self.repositories[name] = Repository({"main": dict(files)}, **options)
        return self.repositories[name]


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._get(with_body=False)

    def do_GET(self) -> None:
        self._get(with_body=True)

    def do_POST(self) -> None:
        body = self._body()
        path = unquote(self.path.split("?")[0])
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization") or "me", asked["name"])))
            if not self._known():
                return self._refuse(401, "")
            assert name not in self.hub.repositories
            self.hub.repositories[name] = Repository(
                private=asked.get("private") or asked.get("visibility") == "private"
            )
            return self._json({"url": f"{self.hub.url}/{name}"})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        owner, name, verb, revision = path.removeprefix("/api/models/").split("/", 3)
        repository = self.hub.repositories[f"{owner}/{name}"]
        if not self._known():
            return self._refuse(401, "")
        if verb == "branch":
            repository.revisions.setdefault(revision, dict(repository.revisions["main"]))
            return self._json({})
        files = repository.revisions[revision]
        if verb == "preupload":
            names = [each["path"] for each in json.loads(body)["files"]]
            modes = [
                {"path": n, "uploadMode": _mode(n), "shouldIgnore": False, "oid": _git(files.get(n))} for n in names
            ]
            return self._json({"files": modes})
        assert verb == "commit", path
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(revision)
        return self._json({"commitUrl": f"{self.hub.url}/{owner}/{name}/commit/{commit}", "commitOid": commit})

    def do_PUT(self) -> None:
        self.hub.large[self.path.removeprefix("/lfs/")] = self._body()
        self._send(200, b"")

    def _get(self, with_body: bool) -> None:
        path = unquote(self.path.split("?")[0])
        self.hub.asked.append((self.command, path))
        if path == "/":
            return self._send(200, b"")
        api = path.startswith("/api/models/")
        owner, name, verb, rest = (*path.removeprefix("/api/models").strip("/").split("/", 3), "", "")[:4]
        repository = self.hub.repositories.get(f"{owner}/{name}")
        if repository is None or (repository.private and not self._known()):
            return self._refuse(401 if repository else 404, "RepoNotFound")
        if repository.gated and not self._known():
            return self._refuse(403, "GatedRepo")
        revision, _, file = rest.partition("/")
        files = repository.files(revision if verb in ("resolve", "revision") else "main")
        if files is None:
            return self._refuse(404, "RevisionNotFound")
        commit = repository.commit(revision or "main")
        if api:
            siblings = [{"rfilename": each} for each in files]
            facts = {"id": f"{owner}/{name}", "sha": commit, "private": repository.private, "siblings": siblings}
            return self._json(facts)
        headers = {"X-Repo-Commit": commit}
        if file not in files:
            return self._refuse(404, "EntryNotFound", headers)
        content = files[file]
        headers["ETag"] = f'"{hashlib.sha256(content).hexdigest() if _mode(file) == "lfs" else _git(content)}"'
        return self._send(200, content, headers, with_body, self.hub.cut_after if with_body else None)

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _body(self) -> bytes:
        self.hub.asked.append((self.command, unquote(self.path.split("?")[0])))
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"", {**(headers or {}), **({"X-Error-Code": code} if code else {})})

    def _json(self, document: Any) -> None:
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        with_body: bool = True,
        cut_after: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body[:cut_after])

    def log_message(self, *_: object) -> None:
        pass


def _mode(name: str) -> str:
    return "lfs" if name.endswith(LARGE) else "regular"


def _git(content: bytes | None) -> str | None:
    """Git's name of a file's content."""
    return None if content is None else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving(cache: Path) -> Iterator[Hub]:
    """An empty hub. cache: its client's."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.hub = Hub(f"http://127.0.0.1:{server.server_port}", cache)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield Handler.hub
    server.shutdown()
    server.server_close()
