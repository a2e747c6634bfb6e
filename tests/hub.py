"""A hub on loopback that speaks the Hugging Face Hub's and ModelScope's endpoints, with faults on demand.

Large files are redirected to a second port, the content network, as on the Hub. It runs in a thread of its own, so
that tests and the processes they start reach it alike.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import struct
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

PIECE = 64 * 1024


def safetensors(size: int, seed: int = 0) -> bytes:
    """A valid safetensors file that holds `size` bytes of one tensor."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + noise(size, seed)


def noise(size: int, seed: int = 0) -> bytes:
    return hashlib.shake_128(str(seed).encode()).digest(size)


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Repo:
    """A model: its commits, oldest first, and who may read it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    licence: str = "mit"
    gated: bool = False
    token: str | None = None

    def at(self, revision: str) -> str | None:
        """The commit that a revision names."""
        if revision in ("main", "master"):
            return next(reversed(self.commits))
        commit = self.tags.get(revision, revision)
        return commit if commit in self.commits else None


@dataclass
class Asked:
    """A request that came: which server, path of the file ("" for descriptions), offset, headers, bytes sent back."""

    server: str
    path: str
    offset: int
    headers: dict[str, str]
    sent: int = 0


@dataclass
class Fault:
    """What goes wrong with one request.

    kind: cut (after `after` bytes), stall (silence after so many), corrupt, ignore_range, wrong_range, endless, status,
    location (redirected elsewhere), gate (nothing until four files are asked for at once, and then a while longer).
    """

    kind: str
    after: int = 0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)


class LoopbackHub:
    """The state that tests arrange, and what was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)
        self.asked: list[Asked] = []
        self.listing_extra: list[dict[str, Any]] = []
        self.url = self.cdn = ""
        self.in_flight = self.most_in_flight = 0
        #: Where partial files lie: a cut waits until what was sent is there, so that tests know how much is.
        self.folder: Path | None = None

    def push(self, model: str, files: dict[str, bytes], **options: Any) -> str:
        """A new commit of a model, which holds just these files; returns its id."""
        repo = self.repos.setdefault(model, Repo())
        for name, value in options.items():
            setattr(repo, name, value)
        commit = hashlib.sha1(os.urandom(8), usedforsecurity=False).hexdigest()
        repo.commits[commit] = dict(files)
        return commit

    def fault(self, path: str, *faults: Fault) -> None:
        """The next requests for a file (or for descriptions, ""), go wrong in these ways, one each."""
        self.faults[path].extend(faults)

    def of(self, path: str) -> list[Asked]:
        """The requests for the content of a file, in order."""
        return [one for one in self.asked if one.path == path and (one.server == "cdn" or not large(path))]

    def sent(self, path: str) -> int:
        """How many bytes of a file went out."""
        return sum(one.sent for one in self.of(path))

    def contents(self) -> list[Asked]:
        """All requests for files, no descriptions."""
        return [one for one in self.asked if one.path]

    # --- the Hugging Face Hub

    async def model_info(self, request: web.Request) -> web.StreamResponse:
        model = f"{request.match_info['org']}/{request.match_info['name']}"
        asked = self._note("hub", "", request)
        if (fault := self._next("")) is not None:
            return self._status(fault)
        repo = self.repos.get(model)
        if refused := self._may_not(repo, request, describing=True):
            return refused
        assert repo is not None
        commit = repo.at(request.match_info.get("revision", "main"))
        if commit is None:
            return web.json_response(
                {"error": "Invalid rev id"}, status=404,
                headers={"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"},
            )  # fmt: skip
        siblings: list[dict[str, Any]] = []
        for path, content in repo.commits[commit].items():
            entry: dict[str, Any] = {"rfilename": path}
            if request.query.get("blobs") == "true":
                entry |= {"size": len(content), "blobId": git_blob(content)}
                if large(path):
                    entry["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        told = {"id": model, "sha": commit, "siblings": [*siblings, *self.listing_extra]}
        told |= {"cardData": {"license": repo.licence}, "tags": [f"license:{repo.licence}"]}
        response = web.json_response(told)
        asked.sent = len(response.body or b"")  # type: ignore[arg-type]  # json_response's body is bytes
        return response

    async def tree(self, request: web.Request) -> web.StreamResponse:
        """The files of a commit, as the Hub's own client asks for them."""
        repo = self.repos.get(f"{request.match_info['org']}/{request.match_info['name']}")
        if refused := self._may_not(repo, request, describing=True):
            return refused
        assert repo is not None
        entries = []
        commit = repo.at(request.match_info["revision"])
        for path, content in (repo.commits[commit] if commit else {}).items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_blob(content)}
            if large(path):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return web.json_response(entries)

    async def resolve(self, request: web.Request) -> web.StreamResponse:
        path, model = request.match_info["path"], f"{request.match_info['org']}/{request.match_info['name']}"
        asked = self._note("hub", path, request)
        repo = self.repos.get(model)
        if refused := self._may_not(repo, request):
            return refused
        assert repo is not None
        commit = repo.at(request.match_info["revision"])
        content = repo.commits[commit].get(path) if commit else None
        if content is None:
            return web.Response(status=404, headers={"X-Error-Code": "EntryNotFound"})
        if large(path):
            etag = f'"{sha256(content)}"'
            headers = {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content)), "X-Repo-Commit": str(commit)}
            location = f"{self.cdn}/{model}/{commit}/{path}?X-Amz-Signature=do%2Fnot%2Bquote"
            fault = self.faults[path][0] if self.faults[path] else Fault("none")
            if fault.kind == "location":
                location = self.faults[path].popleft().headers["Location"]
            return web.Response(status=302, headers=headers | {"Location": location})
        headers = {"ETag": f'"{git_blob(content)}"', "X-Repo-Commit": str(commit)}
        return await self._send(request, asked, content, headers)

    async def content(self, request: web.Request) -> web.StreamResponse:
        asked = self._note("cdn", request.match_info["path"], request)
        if request.query.get("X-Amz-Signature") != "do/not+quote" or "%2F" not in request.raw_path:
            return web.Response(status=403)
        model = f"{request.match_info['org']}/{request.match_info['name']}"
        return await self._send(request, asked, self.repos[model].commits[request.match_info["commit"]][asked.path], {})

    # --- ModelScope

    async def about(self, request: web.Request) -> web.StreamResponse:
        self._note("hub", "", request)
        repo = self.repos.get(f"{request.match_info['org']}/{request.match_info['name']}")
        if repo is None or (repo.token and request.headers.get("Cookie") != f"m_session_id={repo.token}"):
            told = {"Code": 10010205001, "Success": False, "Message": "record not found"}
            return web.json_response(told, status=404)
        return web.json_response({"Code": 200, "Success": True, "Data": {"License": repo.licence}})

    async def repo_files(self, request: web.Request) -> web.StreamResponse:
        self._note("hub", "", request)
        repo = self.repos[f"{request.match_info['org']}/{request.match_info['name']}"]
        commit = repo.at(request.query["Revision"])
        if commit is None:
            return web.json_response({"Code": 10010205001, "Success": False, "Message": "no such revision"}, status=404)
        files = [
            {
                "Path": path, "Name": path.rpartition("/")[2], "Type": "blob", "Size": len(content),
                "Sha256": sha256(content), "IsLFS": large(path), "CommittedDate": 1, "Revision": commit,
            }
            for path, content in repo.commits[commit].items()
        ]  # fmt: skip
        files.append({"Path": "figures", "Name": "figures", "Type": "tree", "Size": 0, "Sha256": ""})
        return web.json_response(
            {"Code": 200, "Success": True, "Data": {"Files": files, "LatestCommitter": {"Id": ""}}}
        )

    async def repo_file(self, request: web.Request) -> web.StreamResponse:
        path = request.query["FilePath"]
        asked = self._note("cdn", path, request)
        repo = self.repos[f"{request.match_info['org']}/{request.match_info['name']}"]
        commit = repo.at(request.query["Revision"])
        if commit is None:
            return web.Response(status=404)
        return await self._send(request, asked, repo.commits[commit][path], {})

    # --- both

    def _note(self, server: str, path: str, request: web.Request) -> Asked:
        span = request.headers.get("Range", "bytes=0-").removeprefix("bytes=")
        asked = Asked(server, path, int(span.partition("-")[0] or 0), dict(request.headers))
        self.asked.append(asked)
        return asked

    def _next(self, path: str) -> Fault | None:
        return self.faults[path].popleft() if self.faults[path] else None

    def _status(self, fault: Fault) -> web.Response:
        return web.Response(status=fault.status, headers=fault.headers)

    def _may_not(self, repo: Repo | None, request: web.Request, *, describing: bool = False) -> web.Response | None:
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if bearer == "hf_revoked":
            return web.Response(status=401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
        if repo is None or (repo.token and not repo.gated and bearer != repo.token):
            told = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            return web.Response(status=404 if bearer else 401, headers=told)
        if repo.gated and not describing and bearer != repo.token:  # a gated model's description is public
            return web.Response(status=403 if bearer else 401, headers={"X-Error-Code": "GatedRepo"})
        return None

    async def _send(
        self, request: web.Request, asked: Asked, content: bytes, headers: dict[str, str]
    ) -> web.StreamResponse:
        fault = self._next(asked.path) or Fault("none")
        if fault.kind == "status":
            return self._status(fault)
        offset = 0 if fault.kind == "ignore_range" else asked.offset
        if offset >= len(content) > 0:
            return web.Response(status=416, headers={"Content-Range": f"bytes */{len(content)}"})
        body = content[offset:]
        if fault.kind == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        elif fault.kind == "wrong_range":
            offset = max(0, offset - 7)
        response = web.StreamResponse(status=206 if offset else 200, headers=headers)
        if offset:
            response.headers["Content-Range"] = f"bytes {offset}-{len(content) - 1}/{len(content)}"
        if fault.kind == "endless":
            response.enable_chunked_encoding()
        else:
            response.content_length = len(body)
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if fault.kind == "gate":
                while self.most_in_flight < 4:  # noqa: ASYNC110 - a count, not an event
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.3)  # a fifth would be there by now
            end = min(len(body), fault.after) if fault.kind in ("cut", "stall") else len(body)
            for at in range(0, end, PIECE):
                piece = body[at : min(end, at + PIECE)]
                await response.write(piece)
                asked.sent += len(piece)
            while fault.kind == "endless":  # until the other side leaves
                await response.write(bytes(PIECE))
            if fault.kind == "cut" and request.transport is not None:
                await self._taken(content, offset + end)
                request.transport.close()
            elif fault.kind == "stall":
                await asyncio.sleep(3600)  # until the other side leaves
        finally:
            self.in_flight -= 1
        return response

    async def _taken(self, content: bytes, size: int) -> None:
        """Wait until the first `size` bytes of a content lie in its partial file."""
        if self.folder is None:
            return
        async with asyncio.timeout(30):
            pattern = f"{sha256(content)}-*.part"
            while not any(_size(part) >= size for part in self.folder.rglob(pattern)):  # noqa: ASYNC110 - files tell nothing
                await asyncio.sleep(0.01)

    def apps(self) -> tuple[web.Application, web.Application]:
        """The hub and its content network."""
        hub, cdn = web.Application(), web.Application()
        model = "/{org:[^/]+}/{name:[^/]+}"
        hub.router.add_get(f"/api/models{model}/revision/{{revision:.+}}", self.model_info)
        hub.router.add_get(f"/api/models{model}/tree/{{revision:[^/]+}}", self.tree)
        hub.router.add_get(f"/api/models{model}", self.model_info)
        hub.router.add_get(f"{model}/resolve/{{revision:[^/]+}}/{{path:.+}}", self.resolve)
        hub.router.add_get(f"/api/v1/models{model}/repo/files", self.repo_files)
        hub.router.add_get(f"/api/v1/models{model}/repo", self.repo_file)
        hub.router.add_get(f"/api/v1/models{model}", self.about)
        cdn.router.add_get(f"{model}/{{commit:[^/]+}}/{{path:.+}}", self.content)
        return hub, cdn


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # renamed meanwhile
        return -1


def large(path: str) -> bool:
    """Whether a file is kept as a large one (LFS), on the content network."""
    return path.endswith((".safetensors", ".gguf", ".bin"))


@contextlib.contextmanager
def running() -> Iterator[LoopbackHub]:
    """A hub that runs in a thread of its own until the block ends."""
    hub, loop, ready = LoopbackHub(), asyncio.new_event_loop(), threading.Event()
    runners: list[web.AppRunner] = []

    async def begin() -> None:
        urls = []
        for app in hub.apps():
            runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            urls.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
            runners.append(runner)
        hub.url, hub.cdn = urls
        ready.set()

    async def end() -> None:
        for runner in runners:
            await runner.cleanup()

    def serve() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(begin())
        loop.run_forever()
        loop.run_until_complete(end())
        loop.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield hub
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
