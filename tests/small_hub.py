"""A hub on loopback: the few addresses that `huggingface_hub` calls for a download."""

import hashlib
import http.server
import json
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants


class SmallHub:
    """Models by name and revision, served until `close`.

    Attributes:
      models: name -> revision -> {path: bytes}; "main" is the default revision.
      gated: names whose files need `TOKEN`; `refused` has those that TOKEN may not read either.
      broken: names whose address answers with status 500.
      fetched: paths of the files that were fetched, in order.
      asked: all addresses that were called.
    """

    TOKEN = "hf_" + "x" * 34

    def __init__(self):
        self.models, self.gated, self.refused, self.broken = {}, set(), set(), set()
        self.fetched, self.asked = [], []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name, files, revision="main") -> str:
        """Publishes files (path -> bytes, or a folder) and returns the commit."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir() if path.is_file()}
        self.models.setdefault(name, {})[revision] = files
        return commit_of(files)

    def find(self, name, revision):
        """The files of a branch or a commit, None if there are none."""
        revisions = self.models[name]
        by_commit = {commit_of(files): files for files in revisions.values()}
        return revisions.get(revision, by_commit.get(revision))


def commit_of(files) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: SmallHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 6:
            self._model("/".join(parts[2:4]), parts[4], "/".join(parts[5:]))
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._answer(404)

    def _model(self, name, what, revision):
        files = self._files(name, revision)
        if files is None:
            return
        if what == "revision":
            self._answer(200, json.dumps({"id": name, "sha": commit_of(files)}).encode())
            return
        tree = [
            {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
            for path, data in files.items()
        ]
        self._answer(200, json.dumps(tree).encode())

    def _file(self, name, revision, path):
        files = self._files(name, revision)
        if files is None:
            return
        token = f"Bearer {self.hub.TOKEN}" == self.headers.get("authorization")
        if name in self.hub.gated and (not token or name in self.hub.refused):
            self._answer(403 if token else 401, **{"X-Error-Code": "GatedRepo"})
        elif path not in files:
            self._answer(404, **{"X-Error-Code": "EntryNotFound"})
        else:
            if self.command == "GET":
                self.hub.fetched.append(path)
            facts = {"ETag": f'"{_blob(files[path])}"', "X-Repo-Commit": commit_of(files)}
            self._answer(200, files[path], **facts)

    def _files(self, name, revision):
        """The files, or None and an answer that says why not."""
        token = self.headers.get("authorization")
        if name in self.hub.broken:
            self._answer(500)
        elif token not in (None, f"Bearer {self.hub.TOKEN}"):
            self._answer(401, **{"X-Error-Message": "Invalid credentials in Authorization header"})
        elif name not in self.hub.models:
            # Strangers are not told whether a model is private or missing.
            said = {"X-Error-Code": "RepoNotFound"} if token else {}
            self._answer(404 if token else 401, **said)
        elif self.hub.find(name, revision) is None:
            self._answer(404, **{"X-Error-Code": "RevisionNotFound"})
        else:
            return self.hub.find(name, revision)
        return None

    def _answer(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _blob(data) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def use(monkeypatch: pytest.MonkeyPatch, home: Path, url: str, *, offline: bool = False) -> Path:
    """Points the library, which reads its environment once, to a cache and a hub.

    Returns:
      The folder of the cache.
    """
    values = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_XET_CACHE": str(home / "xet"),
        "HF_TOKEN_PATH": str(home / "token"),
        "AGENT_HARNESSES_PATH": str(home / "agents.json"),
        "HF_HUB_OFFLINE": offline,
    }
    for key, value in values.items():
        monkeypatch.setattr(constants, key, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return home / "hub"


def lay_out(cache: Path, name: str, files, *, revision: str = "main") -> Path:
    """A model in a cache as the library lays it: blobs, snapshots of links, and a reference."""
    folder, commit = cache / f"models--{name.replace('/', '--')}", commit_of(files)
    snapshot = folder / "snapshots" / commit
    for path in (folder / "blobs", folder / "refs", snapshot):
        path.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    for path, data in files.items():
        (folder / "blobs" / _blob(data)).write_bytes(data)
        (snapshot / path).symlink_to(f"../../blobs/{_blob(data)}")
    return snapshot
