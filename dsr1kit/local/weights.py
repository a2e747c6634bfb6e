"""Fetch a model's weights: choose the files, check the disk, download what is missing, swap the new state in.

Safetensors and GGUF alone; pickles and code are never downloaded. Knows nothing about running a model.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsr1kit.errors import ModelError, UsageError
from dsr1kit.local.choice import beside, select, size_text, sound
from dsr1kit.local.folder import (
    HUB_ID,
    WEIGHTS,
    Change,
    Kept,
    Manifest,
    check_weights,
    default_folder,
    locked,
    read_earlier,
    read_manifest,
    read_plan,
    safe_path,
    unfinished,
)
from dsr1kit.local.hub import Hub, Listing, RemoteFile, require_source
from dsr1kit.local.patience import Patience
from dsr1kit.local.transfer import digest_of, fetch_file, part_path, read_file, staged_path

__all__ = [
    "Coming", "Patience", "Weights", "WeightsFile", "config_on_hub", "default_folder", "fetch_beside", "fetch_weights",
    "unfinished",
]  # fmt: skip

OnProgress = Callable[[int, int], None]
OnNote = Callable[[str], None]

_AT_ONCE = 4
_SPARE_BYTES = 64 * 1024 * 1024  # for the manifest, and so that a disk is never filled to the last byte
_LOCK_POLL_S = 0.5
_MOST_CONFIG_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """A file of a model: path below the folder, size in bytes, digest, and whether it was fetched (or would be)."""

    path: str
    size: int
    digest: str
    fetched: bool


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's weights on this disk; with a dry run, what they would be.

    Attributes:
        folder: to open as `LocalModel(folder)`.
        commit: the hub's, which all files are of.
        licence: as the hub states it, "" where it does not.
        total_bytes: of all files together.
        downloaded_bytes: over the network now; for a dry run, what would come.
        reused_bytes: that were there already, whole files and parts of files.
        removed: files of the earlier state that the model no longer has.
        changed: whether anything in the folder was, or would be, changed.
    """

    model: str
    source: str
    revision: str
    commit: str
    licence: str
    folder: Path
    files: tuple[WeightsFile, ...]
    total_bytes: int
    downloaded_bytes: int
    reused_bytes: int
    removed: tuple[str, ...]
    changed: bool


@dataclass(frozen=True, slots=True)
class Coming:
    """What a download will bring, told before it begins.

    Attributes:
        files: paths of all files of the model, fetched and there already.
        weights_bytes: of its weights' files together.
        config: the content of config.json; None where the model has none, as GGUF files.
    """

    model: str
    licence: str
    folder: Path
    files: tuple[str, ...]
    weights_bytes: int
    config: Mapping[str, Any] | None


OnPlan = Callable[[Coming], None]


async def config_on_hub(
    model: str, *, source: str = "hub", revision: str | None = None, endpoint: str | None = None,
    patience: Patience | None = None,
) -> Mapping[str, Any] | None:  # fmt: skip
    """The content of a model's config.json, fetched alone; None where it has none. Arguments and errors as
    `fetch_weights`; a model of pickles alone is refused as well."""
    _require_id(model)
    async with Hub(source, endpoint, patience) as hub:
        files = (await hub.listing(model, revision)).files
        if not any(file.path.endswith(WEIGHTS) for file in files):
            select(model, files)
        return await _config(hub, model, files)


async def fetch_beside(model: str, folder: Path) -> None:
    """Fetch the small files of a hub's model into a folder, checked, without its weights: configurations, tokenizer,
    templates. Errors as `fetch_weights`."""
    _require_id(model)
    async with Hub("hub") as hub:
        for file in beside((await hub.listing(model)).files):
            if safe_path(file.path):
                (folder / file.path).write_bytes(await read_file(hub, model, file))


async def _config(hub: Hub, model: str, files: Sequence[RemoteFile]) -> Mapping[str, Any] | None:
    file = next((file for file in files if file.path == "config.json"), None)
    if file is None or file.size > _MOST_CONFIG_BYTES:
        return None
    try:
        told = json.loads(await read_file(hub, model, file))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"config.json of {model} is no JSON ({error}): take another repository of it") from None
    if not isinstance(told, dict):
        raise ModelError(f"config.json of {model} holds no JSON object: take another repository of it")
    return told


async def fetch_weights(
    model: str,
    *,
    source: str = "hub",
    revision: str | None = None,
    files: Sequence[str] = (),
    to: str | Path | None = None,
    sync: bool = False,
    dry_run: bool = False,
    endpoint: str | None = None,
    on_progress: OnProgress | None = None,
    on_note: OnNote | None = None,
    on_plan: OnPlan | None = None,
    patience: Patience | None = None,
) -> Weights:
    """Bring a model's weights to this disk, whole and checked, or finish what was begun.

    Every file is compared with the checksum that the hub states. A folder that is whole is returned as it is,
    without asking the hub, unless `sync` is set: then what changed there is fetched, the old state staying usable
    until the new one is complete.

    Args:
        model: `org/name`.
        source: `hub` (Hugging Face, or a mirror by `HF_ENDPOINT`) or `modelscope`.
        revision: branch, tag or commit; None: the main branch.
        files: patterns of the weights to take, such as `*Q4_K_M*`; small files beside them always come.
        to: the folder; None: `~/.cache/dsr1kit/models/SOURCE/ORG/NAME`.
        dry_run: only say what would be done; nothing is written.
        endpoint: base URL in place of the environment's.
        on_progress: called with (bytes there, bytes in all).
        on_note: called with a sentence before anything is fetched, and when it has to wait for another download of
            the same folder.
        on_plan: called, in a thread, with what is coming before any of it is fetched or a folder is made; what it
            raises ends the download.

    Raises:
        UsageError: no such model, revision or file; several GGUF files and none chosen; the folder is another
            model's; `HF_HUB_OFFLINE` is set. MissingKey: the model is gated.
        ModelError: the hub cannot be reached, the disk is full, or what came is not what the hub states.
    """
    _require_id(model)
    require_source(source)
    folder = _folder(to, model, source)
    before = _require_own(folder, model, source)
    revision = revision or (before.revision if before else None)  # a sync goes on with the branch of last time
    if not sync and not dry_run and (there := _whole(folder, revision, files)):
        return there
    try:
        async with Hub(source, endpoint, patience) as hub:
            listing = await hub.listing(model, revision)
            first = _Fetch(hub, model, revision, files, folder, listing)  # what cannot be meant leaves no folder behind
            if on_plan is not None:
                await asyncio.to_thread(on_plan, await first.coming())
            if dry_run:
                return await first.planned()
            _make(folder)
            async with _alone(folder, on_note):
                return await _Fetch(hub, model, revision, files, folder, listing).done(on_progress, on_note)
    except OSError as error:  # the network's are told by the hub: these are the disk's
        where = error.filename2 or error.filename or folder
        raise ModelError(
            f"{where} cannot be read or written ({error.strerror}): mend that, and the same command finishes it"
        ) from None


class _Fetch:
    """One run: what is wanted, what of it is there, and the way from here to there."""

    def __init__(
        self, hub: Hub, model: str, revision: str | None, patterns: Sequence[str], folder: Path, listing: Listing
    ) -> None:
        self._hub, self._model, self._folder, self._listing = hub, model, folder, listing
        self._earlier = read_earlier(folder)
        # Without --file the choice of last time holds, so that a nightly sync needs no memory of its own.
        before = self._earlier or (None if patterns else read_plan(folder))
        chosen = tuple(dict.fromkeys((*(before.patterns if before else ()), *patterns)))
        listed = {file.path: file for file in listing.files}
        wanted = {file.path: file for file in select(model, listing.files, chosen)}
        held = self._earlier.files if self._earlier else {}
        wanted |= {path: listed[path] for path in held if path in listed}
        self._wanted = sound(wanted, len(listed), listing, hub.title)
        self._gone = {path for path in held if path not in listed}
        self._manifest = Manifest(
            model, hub.source, hub.branch(revision), listing.commit, listing.licence, chosen,
            {file.path: Kept(file.size, file.digest, 0) for file in self._wanted},
        )  # fmt: skip

    async def coming(self) -> Coming:
        """Say what a download would bring, and of which configuration."""
        config = await _config(self._hub, self._model, self._wanted)
        files = tuple(file.path for file in self._wanted)
        size = sum(file.size for file in self._wanted if file.path.endswith(WEIGHTS))
        return Coming(self._model, self._listing.licence, self._folder, files, size, config)

    async def planned(self) -> Weights:
        """Say what would be done."""
        missing = await self._missing()
        self._require_space(missing)
        return self._weights(missing, sum(file.size - self._begun(file) for file in missing))

    async def done(self, on_progress: OnProgress | None, on_note: OnNote | None) -> Weights:
        """Do it."""
        missing = await self._missing()
        change = Change(self._folder, self._manifest)
        downloaded = 0
        if missing:
            self._require_space(missing)
            if on_note is not None:
                size = size_text(sum(file.size - self._begun(file) for file in missing))
                licence = self._listing.licence or "not stated, see its page"
                on_note(f"fetching {self._model} ({size}, licence: {licence}) into {self._folder}")
            names = {
                path.name for f in missing for path in (staged_path(change.staging, f), part_path(change.staging, f))
            }
            change.begin(names)
            downloaded = await self._download(missing, change.staging, on_progress)
        arrived = {file.path: staged_path(change.staging, file) for file in missing}
        here = {file.path: arrived.get(file.path, self._folder / file.path) for file in self._wanted}
        await asyncio.to_thread(check_weights, here)
        now = read_manifest(self._folder)
        if missing or self._gone or now is None or self._differs(now):
            change.commit(arrived, self._gone, self._earlier)
        return self._weights(missing, downloaded)

    async def _missing(self) -> list[RemoteFile]:
        """Return the wanted files whose content is not in the folder, smallest first."""
        stop = threading.Event()
        held = self._earlier.files if self._earlier else {}

        def there(file: RemoteFile) -> bool:
            path = self._folder / file.path
            if not path.is_file() or path.stat().st_size != file.size:
                return False
            kept = held.get(file.path)
            kind = file.digest.partition(":")[0]
            if kept is not None and kept.untouched(path) and kept.digest.startswith(kind):
                return kept.digest == file.digest
            return digest_of(path, kind, stop) == file.digest

        try:
            missing = [file for file in self._wanted if not await asyncio.to_thread(there, file)]
        finally:
            stop.set()
        return sorted(missing, key=lambda file: file.size)

    def _begun(self, file: RemoteFile) -> int:
        """How many bytes of a missing file an earlier run has left in the staging folder."""
        staging = Change(self._folder, self._manifest).staging
        for path in (staged_path(staging, file), part_path(staging, file)):
            with contextlib.suppress(OSError):
                return min(path.stat().st_size, file.size)
        return 0

    def _require_space(self, missing: Sequence[RemoteFile]) -> None:
        needed = sum(file.size - self._begun(file) for file in missing)
        existing = next(place for place in (self._folder, *self._folder.absolute().parents) if place.is_dir())
        free = shutil.disk_usage(existing).free
        if needed + _SPARE_BYTES > free:
            raise ModelError(
                f"{self._model} needs {size_text(needed)} more in {self._folder}, where {size_text(free)} are free: "
                f"free {size_text(needed + _SPARE_BYTES - free)}, or name a folder on another disk with --to DIR"
            )

    async def _download(self, missing: Sequence[RemoteFile], staging: Path, on_progress: OnProgress | None) -> int:
        total = sum(file.size for file in self._wanted)
        there = total - sum(file.size for file in missing)

        def gained(count: int) -> None:
            nonlocal there
            there += count
            if on_progress is not None:
                on_progress(there, total)

        gained(0)
        turns = asyncio.Semaphore(_AT_ONCE)

        async def one(file: RemoteFile) -> int:
            async with turns:
                whole = staged_path(staging, file)
                if whole.is_file() and whole.stat().st_size == file.size:  # checked by the run that named it so
                    gained(file.size)
                    return 0
                return await fetch_file(self._hub, self._model, file, staging, gained)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(file)) for file in missing]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None  # the others were cancelled, or say the same of another file
        return sum(task.result() for task in tasks)

    def _differs(self, now: Manifest) -> bool:
        def shape(manifest: Manifest) -> object:
            contents = {name: (kept.size, kept.digest) for name, kept in manifest.files.items()}
            return manifest.revision, manifest.commit, manifest.licence, manifest.patterns, contents

        return shape(now) != shape(self._manifest)

    def _weights(self, missing: Sequence[RemoteFile], downloaded: int) -> Weights:
        fetched = {file.path for file in missing}
        total = sum(file.size for file in self._wanted)
        told = self._manifest
        return Weights(
            told.model, told.source, told.revision, told.commit, told.licence, self._folder,
            tuple(WeightsFile(f.path, f.size, f.digest, f.path in fetched) for f in self._wanted),
            total, downloaded, max(0, total - downloaded), tuple(sorted(self._gone)), bool(missing or self._gone),
        )  # fmt: skip


def _require_id(model: str) -> None:
    if not HUB_ID.fullmatch(model):
        raise UsageError(f"{model!r} is no hub id: name it org/name, such as deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B")


def _folder(to: str | Path | None, model: str, source: str) -> Path:
    return Path(to).expanduser() if to else default_folder(model, source)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be made ({error.strerror}); name another with --to DIR") from None


def _require_own(folder: Path, model: str, source: str) -> Manifest | None:
    """Return what the folder's last download was for. Raises UsageError where that was another model."""
    there = read_earlier(folder) or read_plan(folder)
    if there is not None and (there.model, there.source) != (model, source):
        raise UsageError(f"{folder} holds {there.model} from {there.source}: name another folder with --to for {model}")
    return there


def _whole(folder: Path, revision: str | None, patterns: Sequence[str]) -> Weights | None:
    """Return what is in the folder if it is whole and holds what is asked for."""
    there = read_manifest(folder)
    if there is None or unfinished(folder) or not set(patterns) <= set(there.patterns):
        return None
    if (revision or there.revision) not in (there.revision, there.commit):
        return None
    total = sum(kept.size for kept in there.files.values())
    files = tuple(WeightsFile(name, kept.size, kept.digest, False) for name, kept in sorted(there.files.items()))
    return Weights(
        there.model,
        there.source,
        there.revision,
        there.commit,
        there.licence,
        folder,
        files,
        total,
        0,
        total,
        (),
        False,
    )


@contextlib.asynccontextmanager
async def _alone(folder: Path, on_note: OnNote | None) -> AsyncIterator[None]:
    """Wait until no other process downloads into the folder; a thread blocked on the lock could not be stopped."""
    told = False
    while True:
        with locked(folder) as mine:
            if mine:
                yield
                return
        if not told and on_note is not None:
            on_note(f"another download into {folder} is going on; waiting for it to end")
        told = True
        await asyncio.sleep(_LOCK_POLL_S)
