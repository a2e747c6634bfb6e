"""A hub of question sets on loopback: what the package datasets asks of the Hugging Face Hub, and no more."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class SetsHub:
    """Files by set, commit and path; sets that need a token; what was asked."""

    sets: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""


@contextlib.contextmanager
def serving() -> Iterator[SetsHub]:
    """A hub that runs in a thread of its own until the block ends."""
    hub = SetsHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the library's
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            self.answer(json.loads(body) if body.startswith("{") else body)

        def do_GET(self) -> None:
            self.answer(None)

        def answer(self, body: object) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            if parts[0] == "api":
                parts = parts[1:]
            name, (verb, commit, *rest) = "/".join(parts[1:3]), (*parts[3:5], *parts[5:]) or ("", "")
            files = hub.sets.get(name, {}).get(commit)
            gate = hub.tokens.get(name)
            if gate and verb == "resolve" and self.headers.get("Authorization") != f"Bearer {gate}":
                return self.send(b"", 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
            if files is None:
                return self.send(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
            if verb == "revision":
                siblings = [{"rfilename": one} for one in files]
                return self.send_json({"id": name, "sha": commit, "siblings": siblings, "tags": [], "private": False})
            if verb in ("tree", "paths-info"):
                return self.send_json(self.entries(files, "/".join(rest), body))
            content = files.get("/".join(rest))
            if verb != "resolve" or content is None:
                return self.send(b"", 404, {"X-Error-Code": "EntryNotFound"})
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self.send(content, 200, {"ETag": etag, "X-Repo-Commit": commit})

        def entries(self, files: dict[str, bytes], folder: str, body: object) -> list[dict[str, object]]:
            if isinstance(body, dict):  # about some paths
                chosen = {path.strip("/") for path in body["paths"]}
            else:  # what a folder holds: its own files and folders, or all below
                start = f"{folder}/" if folder else ""
                below = [path for path in files if path.startswith(start)]
                deep = "recursive=true" in self.path.lower()
                chosen = {path if deep else start + path[len(start) :].partition("/")[0] for path in below}
            return [
                {"type": "file", "path": one, "size": len(files[one]), "oid": hashlib.sha256(files[one]).hexdigest()}
                if one in files
                else {"type": "directory", "path": one, "oid": "0" * 40}
                for one in sorted(chosen)
                if any(path == one or path.startswith(f"{one}/") for path in files)
            ]

        def send_json(self, told: object) -> None:
            self.send(json.dumps(told).encode(), 200, {"Content-Type": "application/json"})

        def send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
