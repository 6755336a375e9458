"""A local stand-in for the Hugging Face Hub: the endpoints that `huggingface_hub` calls to upload and download."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_StandInTokenThatIsNeverReal01"
_LARGE = (".safetensors", ".parquet")


class Hub:
    """Repositories by type and name.

    Attributes:
        repos: (type, name) → {"private": …, "files": name → bytes, "commits": number}.
        requests: method and path of every request, in order.
        fails: a pattern of paths that are answered with an error, and how often.
        cut: name of a file whose first download is cut short.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], dict[str, Any]] = {}
        self.requests: list[str] = []
        self.large: dict[str, bytes] = {}
        self.refuses: str | None = None
        self.cut: str | None = None
        self.url = ""

    def add(self, kind: str, name: str, files: dict[str, bytes], private: bool = True) -> None:
        self.repos[kind, name] = {"private": private, "files": dict(files), "commits": 1}

    def info(self, kind: str, name: str) -> dict[str, Any]:
        repo = self.repos[kind, name]
        siblings = []
        for file, data in repo["files"].items():
            lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            siblings.append({"rfilename": file, "size": len(data)} | ({"lfs": lfs} if file.endswith(_LARGE) else {}))
        return {"id": name, "modelId": name, "private": repo["private"], "sha": self.sha(repo), "siblings": siblings}

    @staticmethod
    def sha(repo: dict[str, Any]) -> str:
        return hashlib.sha1(str(repo["commits"]).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _send(self, status: int, body: Any = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", headers.pop("Content_Length", str(len(data))))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self) -> None:
        self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _handle(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        body = self._body()
        hub.requests.append(f"{self.command} {path}")
        if hub.refuses and re.search(hub.refuses, path):
            return self._send(403, {"error": f"Forbidden for {self.headers.get('Authorization')}"})
        if self.command in ("POST", "PUT") and not path.startswith(("/large", "/api/validate-yaml")):
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._send(401, {"error": "Invalid credentials"})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            hub.add(asked.get("type", "model"), name, {}, asked.get("visibility") == "private")
            return self._send(200, {"url": f"{hub.url}/{name}", "name": name})
        if found := re.fullmatch(r"/large/([0-9a-f]{64})", path):
            assert hashlib.sha256(body).hexdigest() == found[1]
            hub.large[found[1]] = body
            return self._send(200, b"")
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/large/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self._send(200, {"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(revision|preupload|commit)/[^/]+)?", path):
            kind, name, what = found.groups()
            repo = hub.repos.get((kind, name))
            if repo is None:
                return self._missing()
            if what == "preupload":
                files = json.loads(body)["files"]
                modes = [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs" if one["path"].endswith(_LARGE) else "regular",
                        "shouldIgnore": False,
                    }
                    for one in files
                ]
                return self._send(200, {"files": modes})
            if what == "commit":
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        repo["files"][value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        repo["files"][value["path"]] = hub.large[value["oid"]]
                repo["commits"] += 1
                sha = hub.sha(repo)
                return self._send(200, {"commitUrl": f"{hub.url}/{name}/commit/{sha}", "commitOid": sha})
            return self._send(200, hub.info(kind, name))
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self._file("dataset" if found[1] else "model", found[2], found[3])
        return self._missing()

    def _file(self, kind: str, name: str, file: str) -> None:
        repo = self.hub.repos.get((kind, name))
        if repo is None or file not in repo["files"]:
            return self._missing()
        data = repo["files"][file]
        tag = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{tag}"', "X_Repo_Commit": self.hub.sha(repo), "Accept_Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(wanted[1]) if wanted else 0
        if wanted:
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.hub.cut == file and self.command == "GET":
            self.hub.cut = None
            self._send(200, data[: len(data) // 2], Content_Length=str(len(data)), **headers)
            self.close_connection = True
            return None
        return self._send(206 if wanted else 200, data[start:], **headers)

    do_GET = do_HEAD = do_POST = do_PUT = _handle


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve a Hub on 127.0.0.1."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def hub_variables(hub: Hub, home: Path, token: str = TOKEN) -> dict[str, str]:
    """Return the variables of a process that uses the stand-in: no real Hub, no token of the user's."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "HF_TOKEN": token,
        "HF_TOKEN_PATH": str(home / "token"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
