"""Have a hub's model on this machine before it is opened: told what comes, refused where it would not fit, checked.

What is here is taken as it is, without asking anyone. Knows nothing about how models are loaded.
"""

from __future__ import annotations

import asyncio
import atexit
import shutil
import tempfile
import threading
from collections.abc import Coroutine, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from dsr1kit.errors import MissingKey, ModelError, UsageError
from dsr1kit.local.hub import offline
from dsr1kit.local.places import is_here, locate, read_object
from dsr1kit.local.weights import Coming, OnPlan, config_on_hub, fetch_beside, fetch_weights
from dsr1kit.progress import fetch_progress

T = TypeVar("T")


async def bring(source: str, *, on_plan: OnPlan | None = None) -> None:
    """Fetch the model of a hub id into the kit's folder of models, where `locate` finds it; nothing where it is here.

    Shows its size, licence and progress, in a terminal or a notebook. What came of a download that broke off is kept.

    Args:
        source: as `locate` takes it.
        on_plan: as for `fetch_weights`: may refuse what is coming.

    Raises:
        ModelError: it cannot be fetched, or is not here while `HF_HUB_OFFLINE` is set.
        UsageError, MissingKey: as `fetch_weights`; also what `on_plan` raises, and what `locate` does.
    """
    if is_here(source):
        return
    _require_online(source)
    refused: list[Exception] = []

    def plan(coming: Coming) -> None:
        try:
            if on_plan is not None:
                on_plan(coming)
        except Exception as error:
            refused.append(error)
            raise

    with fetch_progress(source) as (tell, note):
        try:
            await fetch_weights(source, on_plan=plan, on_progress=tell, on_note=note)
        except (UsageError, ModelError) as error:
            if error in refused or type(error) not in (UsageError, MissingKey, ModelError):
                raise
            raise type(error)(_told_here(source, str(error))) from None


def bring_now(source: str, *, on_plan: OnPlan | None = None) -> None:
    """`bring`, waited for: for code that is not asynchronous, inside of a running loop, too."""
    if not is_here(source):
        _waited_for(bring(source, on_plan=on_plan))


def config_of(source: str) -> Mapping[str, Any] | None:
    """The content of a model's config.json, of a hub id that is not here from the hub, alone; None where it has none,
    as GGUF files. Waited for, as `bring_now` is.

    Raises:
        ModelError: it cannot be read or fetched. UsageError: as `fetch_weights`.
    """
    place, gguf = locate(source)
    if gguf is not None:
        return None
    if not Path(place).is_dir():
        _require_online(source)
        return _waited_for(config_on_hub(source))
    return read_object(Path(place) / "config.json")


@cache
def small_files_of(source: str) -> Path:
    """A folder with the small files of a hub id that is not here, its tokenizer among them, kept until the process
    ends. Waited for, as `bring_now` is; raises as `fetch_weights`."""
    _require_online(source)
    folder = Path(tempfile.mkdtemp(prefix="dsr1kit-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _waited_for(fetch_beside(source, folder))
    return folder


def _waited_for(work: Coroutine[Any, Any, T]) -> T:
    """What the coroutine returns, run in a thread of its own: the calling one may have a loop that runs."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        return asyncio.run_coroutine_threadsafe(work, loop).result()
    finally:
        asyncio.run_coroutine_threadsafe(_ended(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _ended() -> None:
    """End the other tasks of this loop, those of a wait that was broken off, and its threads."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_default_executor()


def _require_online(source: str) -> None:
    if named := offline():
        raise ModelError(
            f"{source} is not on this machine, and {named} is set, so nothing was asked for. Unset it, and the model "
            f"is fetched when it is opened, or before, by dsr1kit weights {source}"
        )


def _told_here(source: str, said: str) -> str:
    """What `dsr1kit weights` says of a failure, where another command asked it."""
    command = f"dsr1kit weights {source}"
    if command in said or "--" not in said:
        return said
    moved = "; XDG_CACHE_HOME=/ELSEWHERE moves all models of the kit" if "--to" in said else ""
    return f"{said} (such options are those of {command}{moved})"
