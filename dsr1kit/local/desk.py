"""The one thread in which a model loads and runs: requests come and go between steps, many at once.

Asyncio hands rows in; after each step of the decoder those that wait join, those that are cancelled leave. When
memory runs out, fewer run at once; what had been made is kept. Knows rows, decoder and threads; nothing about
text, messages or replies.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from dsr1kit.errors import ModelError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsr1kit.local.decode import Decoder
    from dsr1kit.local.rows import Row

_KEPT_BYTES = 64 * 2**20  # memory of slots that an idle model keeps
T = TypeVar("T")


class OutOfMemory(ModelError):
    """A single request needs more memory than there is."""


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
        self._waiting: deque[Row] = deque()
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._closing = False
        self._most: int | None = None  # rows at once since memory last ran out
        self._thread = threading.Thread(target=self._serve, name="dsr1kit-local", daemon=True)
        self._thread.start()

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` in the thread when no row runs; rows handed in later wait for it."""
        future: Future[T] = Future()
        self._put(lambda: self._jobs.append((work, future)))
        return future

    def submit(self, *rows: Row) -> None:
        """Hand in rows; each one's `ended` tells when it is done."""
        self._put(lambda: self._waiting.extend(rows))

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

    def _put(self, add: Callable[[], None]) -> None:
        with self._changed:
            if self._closing:
                raise UsageError(f"{self._name} is closed")
            add()
            self._changed.notify()

    # --- in the thread -----------------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not (self._closing or self._jobs or self._waiting):
                    self._changed.wait()
                if self._closing:
                    break
                job = self._jobs.popleft() if self._jobs else None
            if job is None:
                self._run_rows()
            else:
                _settle(job[1], job[0])
            del job  # its result must not live on here
        for work, future in self._jobs:
            del work
            future.cancel()
        self._end(self._waiting, UsageError(f"{self._name} was closed"))
        self.decoder = None

    def _run_rows(self) -> None:
        """Until nothing runs and nothing waits, or a job does."""
        decoder = self.decoder
        if decoder is None:
            self._end(self._waiting, UsageError(f"{self._name} is not loaded"))
            self._waiting.clear()
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
            for row in gone:
                self._waiting.remove(row)
        self._end(gone)

    def _next_rows(self, decoder: Decoder) -> list[Row]:
        """Those that wait, in their order, as far as each one's own width and memory allow."""
        rows: list[Row] = []
        with self._changed:
            while self._waiting and not self._jobs:
                width = self._waiting[0].width if self._most is None else min(self._waiting[0].width, self._most)
                if len(decoder.rows) + len(rows) >= width:
                    break
                rows.append(self._waiting.popleft())
        for row in rows:
            row.on_start()
        return rows

    def _failed(self, decoder: Decoder, added: list[Row], error: Exception) -> None:
        running = decoder.clear()
        rows = running + [row for row in added if row not in running]
        if not _is_shortage(error):
            self._end(rows, ModelError(f"{self._name} failed while generating: {error}"))
            return
        _free()
        if len(rows) == 1:
            short = str(error).strip().splitlines()[0]
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


def _settle(future: Future[T], work: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:  # it belongs to whoever waits for the result
        future.set_exception(error)
    else:
        future.set_result(result)


def _is_shortage(error: Exception) -> bool:
    words = str(error).lower()
    return isinstance(error, MemoryError) or any(
        told in words for told in ("out of memory", "can't allocate memory", "not enough memory")
    )


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
