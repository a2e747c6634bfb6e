"""One file from a hub onto the disk: resumed after every break, checked against its checksum, whole or not there.

A partial file is named after the content it is a part of, so that it is never continued with another's bytes.
Knows nothing about models, manifests or which files are wanted.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import io
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dsr1kit.errors import ModelError
from dsr1kit.local.hub import Hub, RemoteFile
from dsr1kit.local.patience import Persistence, Temporary

if TYPE_CHECKING:
    import aiohttp

T = TypeVar("T")
OnBytes = Callable[[int], None]

_CHUNK_BYTES = 1024 * 1024
_CORRUPT_ATTEMPTS = 3
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def staged_path(staging: Path, file: RemoteFile) -> Path:
    """Return where `file` lies once it is whole; until then with `.part` added."""
    # Two paths of one content must not share a partial file: they are fetched at the same time.
    where = hashlib.sha256(file.path.encode()).hexdigest()[:8]
    return staging / f"{file.digest.partition(':')[2]}-{where}"


def part_path(staging: Path, file: RemoteFile) -> Path:
    """Return where the bytes of `file` lie that have come so far."""
    whole = staged_path(staging, file)
    return whole.with_name(whole.name + ".part")


def digest_of(path: Path, kind: str, stop: threading.Event | None = None) -> str:
    """Return the checksum of a file, `sha256:HEX` or `git:HEX`; "" when `stop` was set meanwhile."""
    hasher = _hasher(kind, path.stat().st_size)
    with path.open("rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            if stop is not None and stop.is_set():
                return ""
            hasher.update(chunk)
    return f"{kind}:{hasher.hexdigest()}"


async def fetch_file(hub: Hub, model: str, file: RemoteFile, staging: Path, on_bytes: OnBytes | None = None) -> int:
    """Bring `file` whole and checked to `staged_path`; returns how many bytes came over the network.

    Args:
        on_bytes: called with the number of bytes gained; negative when some are thrown away.

    Raises:
        ModelError: the disk is full, the content is not what the hub's checksum says, or the hub gave up.
    """
    persistence, part, corrupt = Persistence(hub.patience), _Part(staging, file, on_bytes or (lambda _: None)), 0
    try:
        await part.open()
        async for attempt in persistence.attempts():
            with attempt:
                before = part.done
                try:
                    await _continue(hub, model, file, part)
                finally:
                    if part.done - before >= _CHUNK_BYTES:
                        persistence.progressed()
                if not part.sound():
                    corrupt += 1
                    await part.restart()
                    if corrupt >= _CORRUPT_ATTEMPTS:
                        raise ModelError(
                            f"{file.path} of {model} came {corrupt} times with another checksum than {hub.title} "
                            "states for it, and was thrown away: a proxy or a mirror changes it; take another "
                            "(HF_ENDPOINT, --source) and run the same command again"
                        )
                    raise Temporary("another checksum than stated")
        await part.finish()
    except Temporary as error:
        kept = "What came is kept, and the same command goes on from there"
        raise hub.given_up(f"{file.path} of {model}", error, kept) from None
    finally:
        part.close()
    return part.received


async def read_file(hub: Hub, model: str, file: RemoteFile) -> bytes:
    """The content of a small file, checked. Raises as `fetch_file`."""
    with tempfile.TemporaryDirectory(prefix="dsr1kit-") as scratch:
        await fetch_file(hub, model, file, Path(scratch))
        return staged_path(Path(scratch), file).read_bytes()


async def _continue(hub: Hub, model: str, file: RemoteFile, part: _Part) -> None:
    if part.done == file.size:
        return
    async with hub.open(hub.file_url(model, file), model, path=file.path, offset=part.done) as response:
        if response.status == 416 or (response.status == 206 and not _continues(response, part.done, file.size)):
            await part.restart()
            raise Temporary("the server answered with another part of the file than was asked for")
        if response.status == 200 and part.done:
            await part.restart()
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            if part.done + len(chunk) > file.size:
                await part.restart()
                raise Temporary(f"more came than the {file.size} bytes that are stated")
            await part.write(chunk)
    if part.done < file.size:
        raise Temporary(f"the connection ended at byte {part.done} of {file.size}")


def _continues(response: aiohttp.ClientResponse, offset: int, size: int) -> bool:
    unit, _, rest = response.headers.get("Content-Range", "").partition(" ")
    span, _, total = rest.partition("/")
    return unit == "bytes" and span.partition("-")[0] == str(offset) and total in (str(size), "*")


def _hasher(kind: str, size: int) -> hashlib._Hash:
    if kind == "sha256":
        return hashlib.sha256()
    # Git names content by its sha1; it guards against accidents here, as it does there.
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


class _Part:
    """The partial file: its bytes, and the checksum of all of them so far; disk work happens in threads."""

    def __init__(self, staging: Path, file: RemoteFile, on_bytes: OnBytes) -> None:
        self._file, self._on_bytes = file, on_bytes
        self._path, self._whole = part_path(staging, file), staged_path(staging, file)
        self._kind, _, self._wanted = file.digest.partition(":")
        self._hash = _hasher(self._kind, file.size)
        self._raw: io.FileIO | None = None
        self._stop = threading.Event()
        # A cancelled write goes on in its thread; the file is not closed under it.
        self._busy = threading.Lock()
        self.done = self.received = 0

    async def open(self) -> None:
        """Open it and take the checksum of what came in earlier runs."""
        self.done = await self._in_thread(self._open)
        self._on_bytes(self.done)

    async def write(self, chunk: bytes) -> None:
        """Append a chunk."""
        await self._in_thread(lambda: self._write(chunk))
        self.done += len(chunk)
        self.received += len(chunk)
        self._on_bytes(len(chunk))

    async def restart(self) -> None:
        """Throw away what came."""
        await self._in_thread(self._truncate)
        self._on_bytes(-self.done)
        self.done = 0

    def sound(self) -> bool:
        """Whether the bytes so far have the checksum that the whole file should have."""
        return self._hash.hexdigest() == self._wanted

    async def finish(self) -> None:
        """Have it on the disk for good, under its final name in the staging folder."""
        await self._in_thread(self._finish)

    def close(self) -> None:
        """Close it; bytes that came stay for the next run."""
        self._stop.set()
        with self._busy:
            if self._raw is not None:
                self._raw.close()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        def guarded() -> T:
            with self._busy:
                return work()

        try:
            return await asyncio.to_thread(guarded)
        except OSError as error:
            if error.errno in _FULL:
                there = self._path.stat().st_size if self._path.exists() else 0
                missing = self._file.size - there
                raise ModelError(
                    f"the disk of {self._path.parent} is full: {missing} bytes of "
                    f"{self._file.path} are missing. What came is kept: free space (or name another disk with --to "
                    "DIR) and run the same command again"
                ) from None
            raise ModelError(
                f"{self._path} cannot be written: {error.strerror or error}; name another --to DIR"
            ) from None

    def _open(self) -> int:
        self._raw = io.FileIO(self._path, "a+")
        size = self._raw.seek(0, os.SEEK_END)
        if size > self._file.size:
            self._truncate()
            return 0
        self._raw.seek(0)
        while (chunk := self._raw.read(_CHUNK_BYTES)) and not self._stop.is_set():
            self._hash.update(chunk)
        return size

    def _write(self, chunk: bytes) -> None:
        if self._raw is None or self._raw.closed:
            return
        rest = memoryview(chunk)
        while rest:  # a nearly full disk takes a part of a chunk
            rest = rest[self._raw.write(rest) :]
        self._hash.update(chunk)

    def _truncate(self) -> None:
        if self._raw is not None:
            self._raw.truncate(0)
        self._hash = _hasher(self._kind, self._file.size)

    def _finish(self) -> None:
        if self._raw is not None:
            os.fsync(self._raw.fileno())
        self._path.replace(self._whole)
