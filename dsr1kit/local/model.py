"""A model in this process as a Backend: tiny-r1, a folder, a hub id or a GGUF file, through transformers.

Loading and generating happen in one worker thread, one request after another, so the event loop stays live
and a request never shares the processor with the next. torch and transformers are imported when a model is
opened, not with this module. Knows nothing about channels, HTTP or scoring.
"""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from dsr1kit.errors import ModelError, UnknownName, UsageError
from dsr1kit.local.load import (
    DTYPES,
    QUANTIZATIONS,
    SMALL,
    LoadedModel,
    Quantization,
    load,
    locate,
    quiet,
    threads_for,
)
from dsr1kit.local.reading import Kind, Text, judged, read, timing_of
from dsr1kit.records import (
    R1_SAMPLING,
    Delta,
    Message,
    OnDelta,
    Outcome,
    Reply,
    Sampling,
    Timing,
    require_messages,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


class LocalModel:
    """A model in this process; use as `async with LocalModel("tiny-r1") as r1`.

    Args:
        source: `tiny-r1`, a folder, a hub id (`org/name`) or a `.gguf` file. Weights are safetensors or GGUF.
        quantization: `none`, `8bit` or `4bit` (NF4), by bitsandbytes.
        device: `auto` (CUDA where there is one, else CPU) or torch's name for one.
        dtype: `auto` (see `choose_dtype`), `float32`, `bfloat16` or `float16`.
        name: of the Backend in records; `local:<source>` when None.
        threads: torch's threads for this model; None: torch's choice, and one for single answers of a
            model below 50 million parameters.

    Raises:
        UnknownName, UsageError: an option or a source that cannot be meant.
        ModelError: on entering, when the model cannot be loaded.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        quantization: Quantization = "none",
        device: str = "auto",
        dtype: str = "auto",
        name: str | None = None,
        threads: int | None = None,
    ) -> None:
        if quantization not in QUANTIZATIONS:
            raise UnknownName("quantization", str(quantization), QUANTIZATIONS)
        if dtype not in DTYPES:
            raise UnknownName("dtype", str(dtype), DTYPES)
        if threads is not None and threads < 1:
            raise UsageError(f"threads must be at least 1 or None, not {threads}")
        self.source = str(source)
        self.name = name or f"local:{self.source}"
        self.quantization: Quantization = quantization
        self._device, self._dtype, self._threads = device, dtype, threads
        self._loaded: LoadedModel | None = None
        self._worker: ThreadPoolExecutor | None = None
        self._stops: set[threading.Event] = set()

    async def __aenter__(self) -> Self:
        if self._worker is not None:
            raise UsageError(f"{self.name} is open already; open a second LocalModel instead")
        locate(self.source)  # a wrong name fails before the seconds that imports take
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="dsr1kit-local")
        try:
            loop = asyncio.get_running_loop()
            self._loaded = await loop.run_in_executor(self._worker, self._load)
        except BaseException:
            self._worker.shutdown(wait=False)
            self._worker = None
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        worker, self._worker, self._loaded = self._worker, None, None
        for stop in self._stops:
            stop.set()
        if worker is not None:
            await asyncio.to_thread(worker.shutdown, cancel_futures=True)

    @property
    def loaded(self) -> LoadedModel:
        """The open model and its facts. Raises UsageError while it is not open."""
        if self._loaded is None:
            raise UsageError(f"{self.name} is not open: async with LocalModel({self.source!r}) as r1: ...")
        return self._loaded

    async def ask(
        self,
        messages: Sequence[Message],
        sampling: Sampling = R1_SAMPLING,
        *,
        on_delta: OnDelta | None = None,
        due: float | None = None,
    ) -> Reply:
        """Generate one answer, streamed; see `Backend.ask`. Requests are served one after another.

        Token counts leave out the think tags and the end mark. `max_tokens` is clamped to what the context
        leaves. When cancelled, generation ends after the token at hand, before a next request starts.

        Raises:
            UsageError: the model is not open, or the messages cannot be meant.
            ModelError: generation failed in a way that no other request would survive.
        """
        require_messages(messages)
        loaded = self.loaded
        loop = asyncio.get_running_loop()
        asked = loop.time()
        due = asked if due is None else due
        base = self._reply(Outcome.OK, due_at=time.time() - (asked - due))
        prompt, opened = self._prompt(messages)
        if refused := _too_long(len(prompt), loaded.context):
            at = loop.time() - due
            return replace(base, outcome=Outcome.BAD_REQUEST, detail=refused, timing=Timing(total_s=at))
        text, stop, started = Text(opened), threading.Event(), [asked]
        raised: list[Exception] = []
        limit = min(sampling.max_tokens, loaded.context - len(prompt))

        def show(kind: Kind, piece: str, at: float) -> None:
            text.pieces.append((kind, piece, at))
            if on_delta is not None:
                loop.call_soon_threadsafe(tell, Delta(kind, piece, at - due))

        def tell(delta: Delta) -> None:
            try:
                if on_delta is not None and not raised:
                    on_delta(delta)
            except Exception as error:  # the caller's own; it belongs to whoever awaits the reply
                raised.append(error)
                stop.set()

        def work() -> None:
            started[0] = loop.time()
            feed, finish = read(loaded, text, show, loop.time)
            self._generate([prompt], [_capped(sampling, opened)], [limit], stop, feed)
            finish()

        try:
            await self._in_worker(work, stop)
        except ModelError as error:
            if "out of memory" not in str(error):
                raise
            detail = f"{error}; ask for fewer max_tokens, or open the model with quantization='4bit'"
            return replace(base, outcome=Outcome.OVERLOADED, detail=detail, timing=Timing(total_s=loop.time() - due))
        await asyncio.sleep(0)  # pieces that wait in the loop are told before the reply
        if raised:
            raise raised[0]
        timing = timing_of(text, due, started[0], loop.time())
        if stop.is_set():  # closed meanwhile; a cancelled caller never gets here
            detail = f"{self.name} was closed before the answer was whole; keep it open while it is asked"
            base = replace(judged(base, text, len(prompt), limit, sampling), timing=timing)
            return replace(base, outcome=Outcome.CANCELLED, detail=detail)
        return replace(judged(base, text, len(prompt), limit, sampling), timing=timing)

    async def generate_many(
        self,
        conversations: Sequence[Sequence[Message]],
        samplings: Sequence[Sampling],
        *,
        batch_size: int = 32,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Reply]:
        """Answer many conversations in batches, for callers that need no latency; replies in input order.

        Rows of similar length share a left-padded batch. Every row is drawn by its own seed exactly as `ask`
        draws it, so a reply does not depend on its neighbours, save that batched products round differently
        and may, rarely, tip a near tie. Replies carry no timing.

        Args:
            conversations: one list of messages a row.
            samplings: how to draw, one a row.
            batch_size: rows generated at once.
            on_progress: called with (rows done, rows in all) after each batch.

        Raises:
            UsageError: lengths differ, or as for `ask`.
            ModelError: generation failed, out of memory included (then lower `batch_size`).
        """
        if len(conversations) != len(samplings) or batch_size < 1:
            raise UsageError(
                f"generate_many needs a Sampling a conversation and batch_size >= 1, not "
                f"{len(conversations)} conversations, {len(samplings)} samplings and batch_size {batch_size}"
            )
        loaded = self.loaded
        for messages in conversations:
            require_messages(messages)
        prompts = [self._prompt(messages) for messages in conversations]
        replies: list[Reply] = []
        for ids, _ in prompts:
            refused = _too_long(len(ids), loaded.context)
            outcome = Outcome.BAD_REQUEST if refused else Outcome.OK
            replies.append(self._reply(outcome, detail=refused, due_at=time.time()))
        todo = [row for row, reply in enumerate(replies) if reply.outcome is Outcome.OK]
        todo.sort(key=lambda row: len(prompts[row][0]))
        done = len(replies) - len(todo)
        for at in range(0, len(todo), batch_size):
            rows = todo[at : at + batch_size]
            stop = threading.Event()
            limits = [min(samplings[row].max_tokens, loaded.context - len(prompts[row][0])) for row in rows]
            draws = [_capped(samplings[row], prompts[row][1]) for row in rows]

            def work(
                rows: list[int] = rows,
                draws: list[Sampling] = draws,
                limits: list[int] = limits,
                stop: threading.Event = stop,
            ) -> list[list[int]]:
                return self._generate([prompts[row][0] for row in rows], draws, limits, stop)

            for row, limit, tokens in zip(rows, limits, await self._in_worker(work, stop), strict=True):
                text = Text(prompts[row][1])
                feed, finish = read(loaded, text, lambda *piece, to=text: to.pieces.append(piece), lambda: 0.0)
                for token in tokens:
                    feed(token)
                finish()
                replies[row] = judged(replies[row], text, len(prompts[row][0]), limit, samplings[row])
            done += len(rows)
            if on_progress is not None:
                on_progress(done, len(replies))
        return replies

    # --- in the worker thread ----------------------------------------------------------------------------

    def _generate(
        self,
        prompts: list[list[int]],
        samplings: list[Sampling],
        limits: list[int],
        stop: threading.Event,
        on_token: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        from dsr1kit.local.generate import generate_rows

        loaded = self.loaded
        # A single row of a small model is too little work to share: threads would only wait for each other.
        alone = loaded.parameters < SMALL and loaded.device == "cpu" and len(prompts) == 1
        try:
            with quiet(python_warnings=False), threads_for(1 if alone and self._threads is None else None):
                return generate_rows(
                    loaded.model,
                    loaded.marks,
                    prompts,
                    samplings,
                    limits=limits,
                    stop=stop,
                    on_token=on_token,
                )
        except (RuntimeError, ValueError) as error:
            kind = "out of memory" if "out of memory" in str(error).lower() else "failed"
            raise ModelError(f"{self.name} {kind} while generating: {error}") from error

    def _load(self) -> LoadedModel:
        return load(self.source, self.quantization, self._device, self._dtype, self._threads)

    # --- helpers -----------------------------------------------------------------------------------------

    async def _in_worker(self, work: Callable[[], Any], stop: threading.Event) -> Any:
        """Run `work` in the worker; when cancelled, set `stop` and wait until the worker is free again."""
        if self._worker is None:
            raise UsageError(f"{self.name} is not open")
        self._stops.add(stop)
        job = asyncio.wrap_future(submitted := self._worker.submit(work))
        try:
            return await asyncio.shield(job)
        except asyncio.CancelledError:
            stop.set()
            if not submitted.cancel():
                await asyncio.wait({job})
            raise
        finally:
            self._stops.discard(stop)

    def _prompt(self, messages: Sequence[Message]) -> tuple[list[int], bool]:
        """Token ids of the conversation, and whether the template has opened the thinking."""
        tokenizer = self.loaded.tokenizer
        text = str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [int(token) for token in ids], text.rstrip().endswith("<think>")

    def _reply(self, outcome: Outcome, *, detail: str = "", due_at: float) -> Reply:
        loaded = self.loaded
        facts = {"device": loaded.device, "dtype": loaded.dtype, "quantization": self.quantization}
        return Reply(
            outcome,
            detail,
            channel=self.name,
            model_requested=self.source,
            model_served=self.source,
            due_at=due_at,
            extra=facts,
        )


def _too_long(prompt_tokens: int, context: int) -> str:
    if prompt_tokens < context:
        return ""
    return f"the prompt has {prompt_tokens} tokens, the model's context is {context}; shorten the conversation"


def _capped(sampling: Sampling, opened: bool) -> Sampling:
    # A model whose thinking was never opened must not be handed a closing tag.
    return sampling if opened else replace(sampling, max_thinking_tokens=None)
