"""The one thread in which a model loads and runs: requests come and go between steps, many at once.

Asyncio hands rows in; after each step of the decoder those that wait join, those that are cancelled leave. When
memory runs out, fewer run at once; what had been made is kept. Knows rows, decoder and threads; nothing about
text, messages or replies.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from dsr1kit.errors import ModelError, UsageError
from dsr1kit.local.release import give_back

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dsr1kit.local.decode import Decoder
    from dsr1kit.local.rows import Row

_KEPT_BYTES = 64 * 2**20  # memory of slots that an idle model keeps
T = TypeVar("T")


class OutOfMemory(ModelError):
    """A single request needs more memory than there is."""


@dataclass(eq=False, slots=True)
class _Job:
    """Work that waits among the rows."""

    work: Callable[[], Any]
    ended: Future[Any]
    cancelled: bool = False


class Desk:
    """A worker thread for one model.

    Args:
        name: of the model, for messages.
        while_busy: a context entered in the thread while rows run.
        before_step: called in the thread with the number of running rows before each step.
    """

    def __init__(
        self,
        name: str,
        while_busy: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        before_step: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.decoder: Decoder | None = None
        self._name, self._while_busy, self._before_step = name, while_busy, before_step
        self._changed = threading.Condition()
        self._waiting: deque[Row | _Job] = deque()
        self._closing = False
        self._most: int | None = None  # rows at once since memory last ran out
        self._thread = threading.Thread(target=self._serve, name="dsr1kit-local", daemon=True)
        self._thread.start()

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` in the thread after all rows handed in before; those handed in later wait for it."""
        future: Future[T] = Future()
        self._put(_Job(work, future))
        return future

    def submit(self, *rows: Row) -> None:
        """Hand in rows; each one's `ended` tells when it is done."""
        self._put(*rows)

    def cancel(self, *rows: Row) -> None:
        """End rows before their next token."""
        for row in rows:
            row.cancelled = True
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """End all rows before their next token, and the thread; waits for it."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _put(self, *added: Row | _Job) -> None:
        with self._changed:
            if self._closing:
                raise UsageError(f"{self._name} is closed")
            self._waiting.extend(added)
            self._changed.notify()

    # --- in the thread -----------------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not (self._closing or self._waiting):
                    self._changed.wait()
                if self._closing:
                    break
                first = self._waiting[0]
                if isinstance(first, _Job):
                    self._waiting.popleft()
            if isinstance(first, _Job):
                _settle(first)
            else:
                self._run_rows()
            del first  # its result must not live on here
        self._end(self._waiting, UsageError(f"{self._name} was closed"))
        self._waiting.clear()
        self.decoder = None

    def _run_rows(self) -> None:
        """Until nothing runs, and nothing waits or a job is next."""
        decoder = self.decoder
        if decoder is None:
            with self._changed:
                rows, self._waiting = self._waiting, deque()
            self._end(rows, UsageError(f"{self._name} is not loaded"))
            return
        with self._while_busy():
            while not self._closing:
                failure: Exception | None = None
                added: list[Row] = []
                try:
                    self._drop_cancelled(decoder)
                    added = self._next_rows(decoder)
                    if not decoder.rows and not added:
                        break
                    self._before_step(len(decoder.rows) + len(added))
                    if added:
                        self._end(decoder.admit(added))
                        added = []
                    if decoder.rows:
                        self._end(decoder.step())
                except Exception as error:  # whatever a library raises, the rows must hear of it
                    failure = error.with_traceback(None)  # its frames hold tensors
                if failure is not None:
                    self._failed(decoder, added, failure)
            self._end(decoder.clear(_KEPT_BYTES), UsageError(f"{self._name} was closed"))
        self._most = None

    def _drop_cancelled(self, decoder: Decoder) -> None:
        for row in [row for row in decoder.rows if row.cancelled]:
            decoder.remove(row)
            self._end([row])
        with self._changed:
            gone = [row for row in self._waiting if row.cancelled]
            if gone:
                self._waiting = deque(row for row in self._waiting if not row.cancelled)
        self._end(gone)

    def _next_rows(self, decoder: Decoder) -> list[Row]:
        """Those that wait, in their order, as far as each one's own width and memory allow."""
        rows: list[Row] = []
        with self._changed:
            while self._waiting and not isinstance(row := self._waiting[0], _Job):
                width = row.width if self._most is None else min(row.width, self._most)
                if len(decoder.rows) + len(rows) >= width:
                    break
                self._waiting.popleft()
                rows.append(row)
        for row in rows:
            row.on_start()
        return rows

    def _failed(self, decoder: Decoder, added: list[Row], error: Exception) -> None:
        running = decoder.clear()
        rows = running + [row for row in added if row not in running]
        if not _is_shortage(error):
            self._end(rows, ModelError(f"{self._name} failed while generating: {error}"))
            return
        give_back()
        if len(rows) == 1:
            short = (str(error).strip().splitlines() or ["nothing more could be allocated"])[0]
            self._end(rows, OutOfMemory(f"{self._name} is out of memory: {short}"))
            return
        self._most = max(1, len(rows) // 2)
        with self._changed:
            self._waiting.extendleft(reversed(rows))

    @staticmethod
    def _end(rows: Any, error: Exception | None = None) -> None:
        for row in rows:
            if row.ended.done():
                continue
            if error is None or row.cancelled:
                row.ended.set_result(None)
            else:
                row.ended.set_exception(error)


async def ended(desk: Desk, rows: Sequence[Row], on_end: Callable[[], None] | None = None) -> None:
    """Wait for all rows; when cancelled or one fails, end the others and wait until the thread has let go of them."""
    futures = [asyncio.wrap_future(row.ended) for row in rows]
    shields = [asyncio.shield(future) for future in futures]
    try:
        for future in asyncio.as_completed(shields):
            await future
            if on_end is not None:
                on_end()
    except BaseException:
        desk.cancel(*rows)
        await asyncio.wait(futures)
        for shield in shields:
            shield.cancelled() or shield.exception()  # one error is told; asyncio would log the others
        raise


def _settle(job: _Job) -> None:
    if not job.ended.set_running_or_notify_cancel():
        return
    try:
        result = job.work()
    except BaseException as error:  # it belongs to whoever waits for the result
        job.ended.set_exception(error)
    else:
        job.ended.set_result(result)


def _is_shortage(error: Exception) -> bool:
    words = str(error).lower()
    return isinstance(error, MemoryError) or any(
        told in words
        for told in ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "alloc_failed")
    )
