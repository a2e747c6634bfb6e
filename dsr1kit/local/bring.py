"""Have a hub's model on this machine before it is opened: told what comes, refused where it would not fit, checked.

What is here is taken as it is, without asking anyone. Knows nothing about how models are loaded.
"""

from __future__ import annotations

import asyncio
import threading

from dsr1kit.errors import MissingKey, ModelError, UsageError
from dsr1kit.local.choice import size_text
from dsr1kit.local.hub import offline
from dsr1kit.local.places import is_here
from dsr1kit.local.weights import Coming, OnPlan, fetch_weights
from dsr1kit.progress import fetch_progress


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
    if offline():
        raise ModelError(
            f"{source} is not on this machine, and HF_HUB_OFFLINE is set, so nothing was asked for. Unset it, and the "
            f"model is fetched when it is opened, or before, by dsr1kit weights {source}"
        )
    refused: list[Exception] = []
    with fetch_progress(source) as (tell, note):

        def plan(coming: Coming) -> None:
            if on_plan is not None:
                try:
                    on_plan(coming)
                except Exception as error:
                    refused.append(error)
                    raise
            licence = coming.licence or "not stated, see its page"
            note(f"fetching {source} ({size_text(coming.missing_bytes)}, licence: {licence}) into {coming.folder}")

        try:
            await fetch_weights(source, on_plan=plan, on_progress=tell, on_note=note)
        except (UsageError, ModelError) as error:
            if error in refused or type(error) not in (UsageError, MissingKey, ModelError):
                raise
            raise type(error)(_told_here(source, str(error))) from None


def bring_now(source: str, *, on_plan: OnPlan | None = None) -> None:
    """`bring`, waited for: for code that is not asynchronous, inside of a running loop, too."""
    if is_here(source):
        return
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(bring(source, on_plan=on_plan), loop).result()
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


def _told_here(source: str, said: str) -> str:
    """What `dsr1kit weights` says of a failure, where another command asked it."""
    command = f"dsr1kit weights {source}"
    return said if command in said or "--" not in said else f"{said} (such options are those of {command})"
