"""A model hub on this machine, as far as huggingface_hub talks to one: create, commit, list, download."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What the server holds: files by repository, and every request as (method, path, token)."""

    def __init__(self, token: str) -> None:
        self.token, self.address = token, ""
        self.files: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str, str | None]] = []


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_POST(self) -> None:
        path, body = self._begin()
        if self._denied():
            return
        if path == "/api/repos/create":
            value = json.loads(body)
            name = f"{value['organization']}/{value['name']}" if value.get("organization") else value["name"]
            self.hub.files.setdefault(name, {})
            self._json({"url": f"{self.hub.address}/{name}", "id": name})
        elif path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self._json(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
                    ]
                }
            )
        elif path.endswith("/commit/main"):
            name = path.removeprefix("/api/models/").removesuffix("/commit/main")
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.hub.files[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            url = f"{self.hub.address}/{name}/commit/{SHA}"
            self._json({"success": True, "commitOid": SHA, "commitUrl": url, "hookOutput": ""})
        else:
            self._json({"valid": True})

    def do_GET(self) -> None:
        path, _ = self._begin()
        if "/resolve/" in path:
            self._file(path)
            return
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if name not in self.hub.files:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        files = self.hub.files[name]
        if "/tree/" in path:
            self._json(
                [{"type": "file", "path": f, "size": len(b), "oid": _oid(b)} for f, b in files.items()]
            )
        else:
            self._json(
                {"id": name, "modelId": name, "sha": SHA, "siblings": [{"rfilename": f} for f in files]}
            )

    do_HEAD = do_GET  # noqa: N815

    def _file(self, path: str) -> None:
        name, _, rest = path.lstrip("/").partition("/resolve/")
        data = self.hub.files.get(name, {}).get(rest.partition("/")[2])
        if data is None:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        self._send(data, "application/octet-stream", 200, {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": SHA})

    def _begin(self) -> tuple[str, bytes]:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path, self.headers.get("Authorization")))
        return path, self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _denied(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {self.hub.token}":
            return False
        self._json({"error": "Invalid credentials"}, 401)
        return True

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), "application/json", status, headers)

    def _send(self, data: bytes, kind: str, status: int, headers: dict[str, str] | None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serve(token: str) -> Iterator[Hub]:
    """A hub that answers at ``hub.address`` and takes writes with this token alone."""
    hub = Hub(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
