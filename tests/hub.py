"""A small stand-in for the model hub, over real HTTP: repos are folders, doors are closed on request."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REVISION = "0123456789abcdef0123456789abcdef01234567"
SIGNED = "Expires=1700000000&X-Amz-Signature=0f1e2d3c4b5a69788796a5b4c3d2e1f0"  # as a store's addresses are


@dataclass(frozen=True)
class Repo:
    """`gate` maps a token (None: no token) to the status and error code that its bearer gets for files.

    A `private` one is there for those that have a token. `more` bytes come behind what was announced for a file, and
    `elsewhere` is where files are fetched from.
    """

    folder: Path
    gate: dict[str | None, tuple[int, str]] = field(default_factory=dict)
    private: bool = False
    more: int = 0
    elsewhere: str = ""


def download_into(folder: Path) -> Callable[..., str]:
    """snapshot_download into an empty `folder` instead of HF_HOME."""

    from huggingface_hub import snapshot_download  # reads HF_ENDPOINT once, which conftest sets first

    def call(cache_dir: Path = folder, **arguments: Any) -> str:
        return str(snapshot_download(cache_dir=cache_dir, **arguments))

    return call


class Hub:
    """Serves `repos` by name until closed; `requests` counts what was asked, `asked` has each with its token."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.down = False
        self.busy = 0  # of the next requests find it down
        self.requests = 0
        self.asked: list[tuple[str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.requests += 1
                hub.asked.append((self.path, self.headers.get("Authorization")))
                status, headers, body = hub.answer(self.path.partition("?")[0], self.headers.get("Authorization"))
                if self.command == "HEAD" or "Content-Length" not in headers:
                    headers = {"Content-Length": str(len(body)), **headers}
                else:
                    del headers["Content-Length"]  # it comes until the connection ends
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, authorization: str | None) -> tuple[int, dict[str, str], bytes]:
        token = authorization.removeprefix("Bearer ") if authorization else None
        if self.down or self.busy:
            self.busy = max(0, self.busy - 1)
            return 503, {}, b""
        if token == "hf_expired":
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b""
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name, rest = ("/".join(parts[2:4]), parts[4:]) if api else ("/".join(parts[:2]), parts[2:])
        if name == "someone/forbidden":
            return 403, {}, b""
        repo = self.repos.get(name)
        if repo is None or (repo.private and token is None):
            return 401 if token is None else 404, {"X-Error-Code": "RepoNotFound"}, b""
        if (not api or rest) and (len(rest) < 2 or rest[1] not in ("main", REVISION)):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = {str(file.relative_to(repo.folder)): file for file in repo.folder.rglob("*") if file.is_file()}
        if rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": p, "size": f.stat().st_size, "oid": _oid(f)} for p, f in files.items()]
            return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
        if api:
            body = {
                "id": name,
                "sha": REVISION,
                "private": repo.private,
                "siblings": [
                    {"rfilename": path, "size": file.stat().st_size, "blobId": _oid(file)}
                    for path, file in files.items()
                ],
            }
            return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()
        if token in repo.gate:
            status, code = repo.gate[token]
            return status, {"X-Error-Code": code}, b""
        file = files.get("/".join(rest[2:]))
        if file is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        headers = {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": REVISION}
        if repo.elsewhere:
            size = {"X-Linked-Size": str(file.stat().st_size), "Location": f"{repo.elsewhere}{path}?{SIGNED}"}
            return 302, {**headers, **size}, b""
        length = {"Content-Length": str(file.stat().st_size)} if repo.more else {}
        return 200, {**headers, **length}, file.read_bytes() + bytes(repo.more)


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
