"""A local Hugging Face Hub with datasets of one commit each, for `huggingface_hub` and `datasets`.

It implements what these libraries request when they read a data set: its information, the list of its files, and the
files with their headers, whole or in part. A revision is the commit or ``main``. Programs find it by `environment`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

_API = re.compile(r"/api/datasets/(?P<name>[^/]+/[^/]+)(?:/(?P<what>revision|tree|paths-info)/(?P<rest>.*))?")
_FILE = re.compile(r"/datasets/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class LocalHub:
    """Serves data sets until the block of `local_hub` ends; ``requests`` records the path of each request."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[str] = []
        self._datasets: dict[str, dict[str, bytes]] = {}

    def add_dataset(self, name: str, files: Mapping[str, bytes]) -> str:
        """Create a data set, or replace its files, and return its commit."""
        self._datasets[name] = dict(files)
        return _commit(files)

    def environment(self, home: Path) -> dict[str, str]:
        """The variables with which a program uses this Hub, with its cache in ``home``."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}

    def get(self, name: str, revision: str) -> dict[str, bytes] | None:
        """The files of a data set, or ``None`` if it does not have this revision."""
        files = self._datasets.get(name)
        return files if files is not None and revision in ("main", _commit(files)) else None


@contextmanager
def local_hub() -> Generator[LocalHub]:
    """Serve an empty Hub on a free port."""

    server = _Server()
    hub = server.hub
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


class _Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = LocalHub(f"http://127.0.0.1:{self.server_port}")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> LocalHub:
        assert isinstance(self.server, _Server)
        return self.server.hub

    def do_HEAD(self) -> None:
        self._respond()

    def do_GET(self) -> None:
        self._respond()

    def do_POST(self) -> None:
        self._respond(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def _respond(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(path)
        if found := _API.fullmatch(path):
            revision, _, folder = (found["rest"] or "main").partition("/")
            files = self.hub.get(found["name"], revision)
            if files is None:
                self._send_missing("RepoNotFound")
            elif found["what"] == "tree":
                recursive = "true" in [
                    value.lower() for value in parse_qs(urlsplit(self.path).query).get("recursive", [])
                ]
                self._send_json(_tree(files, folder, recursive=recursive))
            elif found["what"] == "paths-info":
                self._send_json(_entries(files, _requested_paths(body)))
            else:
                self._send_json(_about(found["name"], files))
        elif found := _FILE.fullmatch(path):
            files = self.hub.get(found["name"], found["revision"])
            if files is None:
                self._send_missing("RepoNotFound")
            elif found["path"] not in files:
                self._send_missing("EntryNotFound", commit=_commit(files))
            else:
                self._send_file(files[found["path"]], _commit(files))
        else:
            self._send_missing("RepoNotFound")

    def _send_file(self, content: bytes, commit: str) -> None:
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        wanted = _RANGE.fullmatch(self.headers.get("Range", ""))
        if wanted is None:
            self._send(200, content, headers)
            return
        first = int(wanted[1])
        part = content[first : int(wanted[2]) + 1 if wanted[2] else None]
        headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
        self._send(206, part, headers)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send_missing(self, code: str, *, commit: str = "") -> None:
        self._send(404, b"{}", {"X-Error-Code": code, "X-Error-Message": "not found", "X-Repo-Commit": commit})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _about(name: str, files: Mapping[str, bytes]) -> dict[str, object]:
    siblings = [{"rfilename": path} for path in sorted(files)]
    return {"_id": "0", "id": name, "sha": _commit(files), "siblings": siblings, "private": False, "tags": []}


def _tree(files: Mapping[str, bytes], folder: str, *, recursive: bool) -> list[dict[str, object]]:
    below = f"{folder}/" if folder else ""
    names = {path for path in (*files, *_folders(files)) if path.startswith(below)}
    return _entries(files, [path for path in sorted(names) if recursive or "/" not in path.removeprefix(below)])


def _entries(files: Mapping[str, bytes], paths: list[str]) -> list[dict[str, object]]:
    folders = _folders(files)
    entries: list[dict[str, object]] = []
    for path in paths:
        if path in files:
            entries.append({"type": "file", "path": path, "size": len(files[path]), "oid": _oid(files[path])})
        elif path in folders:
            entries.append({"type": "directory", "path": path, "oid": _oid(path.encode())})
    return entries


def _folders(files: Mapping[str, bytes]) -> set[str]:
    return {str(folder) for path in files for folder in Path(path).parents if folder != Path()}


def _requested_paths(body: bytes) -> list[str]:
    """The paths in the body of a request, which is JSON or a form."""
    text = body.decode()
    return json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])


def _commit(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha1(usedforsecurity=False)
    for path, content in sorted(files.items()):
        digest.update(f"{path} {_oid(content)}\n".encode())
    return digest.hexdigest()


def _oid(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
