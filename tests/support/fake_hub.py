"""A Hugging Face hub on this machine, of folders: enough of its interface for downloads by transformers and datasets.

``HF_ENDPOINT`` leads the libraries here. Every request is kept, so that a test can say who asked for what.
Source: huggingface_hub's calls, https://huggingface.co/docs/hub/api.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

KINDS = {"models": "", "datasets": "datasets/"}


class Hub:
    """Repositories by kind and name; ``requests``: ``"GET /path"`` of all that were made."""

    def __init__(self, models: Mapping[str, Path], datasets: Mapping[str, Path]) -> None:
        self.folders = {"models": dict(models), "datasets": dict(datasets)}
        self.requests: list[str] = []
        self.url = ""

    def environment(self, cache: Path) -> dict[str, str]:
        """What sends a program here, with a cache of its own."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}

    @staticmethod
    def commit(folder: Path) -> str:
        return hashlib.sha1(str(folder).encode()).hexdigest()

    @staticmethod
    def entries(folder: Path) -> list[dict[str, Any]]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return [
            {
                "type": "file",
                "path": str(path.relative_to(folder)),
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            }
            for path in files
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *given: Any) -> None:
        self.hub = hub
        super().__init__(*given)

    def log_message(self, format: str, *given: Any) -> None:
        """Nothing on the screen."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _answer(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append(f"{self.command} {path}")
        if path.startswith("api/"):
            self._about(path.removeprefix("api/"), body)
        else:
            self._file(path)

    def _find(self, kind: str, path: str) -> tuple[str, Path, str] | None:
        for name, folder in self.hub.folders[kind].items():
            if path == name or path.startswith(f"{name}/"):
                return name, folder, path.removeprefix(name).strip("/")
        return None

    def _unknown(self) -> None:
        self._send(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    def _about(self, path: str, body: bytes) -> None:
        kind, _, rest = path.partition("/")
        found = self._find(kind, rest) if kind in KINDS else None
        if found is None:
            return self._unknown()
        name, folder, what = found
        entries = self.hub.entries(folder)
        answer: Any
        if what.startswith("tree/"):
            answer = entries
        elif what.startswith("paths-info/"):
            wanted = json.loads(body)["paths"]
            answer = [entry for entry in entries if entry["path"] in wanted]
        else:
            siblings = [{"rfilename": entry["path"]} for entry in entries]
            answer = {"id": name, "sha": self.hub.commit(folder), "private": False, "gated": False, "tags": []}
            answer |= {"siblings": siblings, "downloads": 0, "likes": 0}
        return self._send(200, json.dumps(answer).encode(), Content_Type="application/json")

    def _file(self, path: str) -> None:
        kind = "datasets" if path.startswith("datasets/") else "models"
        found = self._find(kind, path.removeprefix(KINDS[kind]))
        if found is None:
            return self._unknown()
        _, folder, rest = found
        _, _, file = rest.removeprefix("resolve/").partition("/")
        target = folder / file
        if not target.is_file():
            return self._send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=self.hub.commit(folder))
        content = target.read_bytes()
        mark = f'"{hashlib.sha1(content).hexdigest()}"'
        return self._send(200, content, ETag=mark, X_Repo_Commit=self.hub.commit(folder))


@contextlib.contextmanager
def serving(models: Mapping[str, Path], datasets: Mapping[str, Path]) -> Iterator[Hub]:
    """A hub of these folders while the block runs, on a free port."""
    hub = Hub(models, datasets)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
