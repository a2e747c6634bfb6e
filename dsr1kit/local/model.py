"""A model in this process as a Backend: tiny-r1, a folder, a hub id or a GGUF file, through transformers.

Loading and generating happen in one worker thread, so the event loop stays live; requests that come while others
run join them, up to `max_batch` at once. torch and transformers are imported when a model is opened, not with this
module. Knows nothing about channels, HTTP or scoring.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from dsr1kit.errors import ModelError, UnknownName, UsageError
from dsr1kit.local.bring import bring
from dsr1kit.local.desk import Desk, OutOfMemory, ended
from dsr1kit.local.hardware import SMALL
from dsr1kit.local.load import (
    DTYPES,
    QUANTIZATIONS,
    LoadedModel,
    Quantization,
    load,
    quiet,
    require_local,
)
from dsr1kit.local.places import is_here, locate
from dsr1kit.local.prompts import Prompt, prompt_of
from dsr1kit.local.reading import Kind, Text, judged, read, timing_of
from dsr1kit.local.release import give_back, give_back_freed
from dsr1kit.local.room import refuse_coming, refuse_here
from dsr1kit.local.rows import Row
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
    from collections.abc import Callable, Mapping, Sequence

    from dsr1kit.local.adapters import Adapters

T = TypeVar("T")


class LocalModel:
    """A model in this process; use as `async with LocalModel("tiny-r1") as r1`.

    Args:
        source: `tiny-r1`, a folder, a hub id (`org/name`, fetched as by `dsr1kit weights` where it is not here) or a
            `.gguf` file. Weights are safetensors or GGUF; a GGUF is dequantized on first use and kept
            (`dsr1kit.local.gguf`).
        quantization: `none`, `8bit`, `4bit` (NF4 with double quantization), by bitsandbytes, or `auto`: the
            planner's choice, 16 bits where they fit.
        device: `auto` (CUDA where there is one, else CPU) or torch's name for one.
        dtype: `auto` (see `choose_dtype`), `float32`, `bfloat16` or `float16`.
        name: of the Backend in records; `local:<source>` when None.
        threads: torch's threads for this model; None: torch's choice, and one while a model below 50 million
            parameters gives a single answer.
        max_batch: requests that run at once; more wait. Those that run share the machine, as on a server.
        adapters: LoRA adapters to load, name to folder; the first is in use.
        compiled: record decoding steps and replay them (CUDA graphs); None: on a GPU, unless in 8 bits, whose
            outliers need the processor at each step.

    Raises:
        UnknownName, UsageError: an option or a source that cannot be meant; on entering, a hub id that no hub knows.
        MissingKey: on entering, when the model is gated.
        ModelError: on entering, when the model cannot be loaded or does not fit; the message says what would.
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
        max_batch: int = 32,
        adapters: Mapping[str, str | Path] | None = None,
        compiled: bool | None = None,
    ) -> None:
        if quantization not in QUANTIZATIONS:
            raise UnknownName("quantization", str(quantization), QUANTIZATIONS)
        if dtype not in DTYPES:
            raise UnknownName("dtype", str(dtype), DTYPES)
        if threads is not None and threads < 1:
            raise UsageError(f"threads must be at least 1 or None, not {threads}")
        if max_batch < 1:
            raise UsageError(f"max_batch must be at least 1, not {max_batch}")
        self.source = str(source)
        self.name = name or f"local:{self.source}"
        self.quantization: Quantization = quantization
        self.max_batch = max_batch
        self._device, self._dtype, self._threads, self._compiled = device, dtype, threads, compiled
        self._wanted_adapters = {key: Path(path).expanduser() for key, path in (adapters or {}).items()}
        self._loaded: LoadedModel | None = None
        self._adapters: Adapters | None = None
        self._desk: Desk | None = None
        self._all_threads = 1

    async def __aenter__(self) -> Self:
        if self._desk is not None:
            raise UsageError(f"{self.name} is open already; open a second LocalModel instead")
        await self.fetch()
        self._desk = Desk(self.name, lambda: quiet(python_warnings=False), self._share_cores)
        try:
            self._loaded, self._adapters = await self._in_thread(partial(self._load, self._desk))
        except BaseException:  # cancelled, too: transformers does not load two models at a time
            desk, self._desk = self._desk, None
            await asyncio.to_thread(desk.close)
            raise
        return self

    async def fetch(self) -> None:
        """Have the model on this machine, as opening does first: a hub id is fetched, if it would fit and work here.

        Raises:
            ModelError: it would not fit here, cannot be fetched, or a path holds no model or adapter. UsageError: as
                `bring`.
        """
        if is_here(self.source):  # a wrong name fails before the seconds that imports take
            return
        from dsr1kit.local.adapters import adapter_config

        require_local()
        for folder in self._wanted_adapters.values():
            adapter_config(folder)
        await bring(self.source, on_plan=lambda coming: refuse_coming(self.source, coming, *self._chosen))

    async def require_room(self) -> None:
        """Raise ModelError, with what would fit, where the model, which is here, would not fit or work."""
        require_local()
        place, _ = locate(self.source)
        await asyncio.to_thread(refuse_here, self.source, place, *self._chosen)

    async def __aexit__(self, *_: object) -> None:
        on_gpu = self._loaded is not None and self._loaded.device.startswith("cuda")
        desk, self._desk, self._loaded, self._adapters = self._desk, None, None, None
        if desk is not None:
            await asyncio.to_thread(desk.close)
        if on_gpu:
            await asyncio.to_thread(give_back)  # another program's to use, such as an engine's

    @property
    def _chosen(self) -> tuple[str, str, str]:
        return self.quantization, self._device, self._dtype

    @property
    def loaded(self) -> LoadedModel:
        """The open model and its facts. Raises UsageError while it is not open."""
        if self._loaded is None:
            raise UsageError(f"{self.name} is not open: async with LocalModel({self.source!r}) as r1: ...")
        return self._loaded

    @property
    def adapter(self) -> str | None:
        """The adapter in use; None: the model as it is."""
        return self._adapters.active if self._adapters is not None else None

    async def load_adapter(self, folder: str | Path, name: str | None = None) -> str:
        """Load a LoRA adapter beside the model and use it, from the next request on; returns its name.

        Args:
            folder: as PEFT's `save_pretrained` writes it, with safetensors.
            name: to call it by; None: the folder's name.

        Raises:
            ModelError: no adapter there, or one for another model; the model stays as it was.
            MissingExtra: PEFT is not installed.
        """
        return await self._with_adapters(lambda adapters: adapters.add(Path(folder).expanduser(), name))

    async def use_adapter(self, name: str | None) -> None:
        """Switch to a loaded adapter, or with None to the model as it is, from the next request on.

        Raises:
            UnknownName: no such adapter is loaded.
        """
        await self._with_adapters(lambda adapters: adapters.use(name))

    async def _with_adapters(self, work: Callable[[Adapters], T]) -> T:
        adapters, desk = self._adapters if self.loaded else None, self._desk
        assert adapters is not None  # noqa: S101 - made with the model
        assert desk is not None  # noqa: S101 - as above

        def then_forget() -> T:
            try:
                return work(adapters)
            finally:
                assert desk.decoder is not None  # noqa: S101 - made with the model
                desk.decoder.clear()  # recorded steps are those of the adapter before

        return await self._in_thread(then_forget)

    async def ask(
        self,
        messages: Sequence[Message],
        sampling: Sampling = R1_SAMPLING,
        *,
        on_delta: OnDelta | None = None,
        due: float | None = None,
    ) -> Reply:
        """Generate one answer, streamed; see `Backend.ask`. Requests made meanwhile run beside it.

        Token counts leave out the think tags and the end mark. `max_tokens` is clamped to what the context
        leaves. When cancelled, generation ends after the token at hand and nothing more is told.

        Raises:
            UsageError: the model is not open, or the messages cannot be meant.
            ModelError: generation failed in a way that no other request would survive.
        """
        require_messages(messages)
        loaded, desk = self.loaded, self._desk
        assert desk is not None  # noqa: S101 - `loaded` has looked
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine of asyncio
        asked, cancels = loop.time(), task.cancelling()
        due = asked if due is None else due
        base = self._reply(Outcome.OK, due_at=time.time() - (asked - due))
        prompt = self._prompt(messages)
        if refused := _too_long(len(prompt.ids), loaded.context):
            at = loop.time() - due
            return replace(base, outcome=Outcome.BAD_REQUEST, detail=refused, timing=Timing(total_s=at))
        text, started, adapter = Text(prompt.opened), asked, self.adapter
        raised: list[Exception] = []

        def show(kind: Kind, piece: str, at: float) -> None:
            text.pieces.append((kind, piece, at))
            if on_delta is not None:
                try:
                    loop.call_soon_threadsafe(tell, Delta(kind, piece, at - due))
                except RuntimeError:  # the loop was closed without an end to its tasks: nobody waits any more
                    row.cancelled = True

        def tell(delta: Delta) -> None:
            if on_delta is None or raised or row.cancelled or task.cancelling() > cancels:
                return
            try:
                on_delta(delta)
            except Exception as error:  # the caller's own; it belongs to whoever awaits the reply
                raised.append(error)
                desk.cancel(row)

        def start() -> None:
            nonlocal started, adapter
            if not row.made:
                started, adapter = loop.time(), self.adapter

        feed, finish = read(loaded, text, show, loop.time, sampling.stop)
        row = self._row(prompt, sampling, feed)
        row.on_start = start
        desk.submit(row)
        short = ""
        try:
            await ended(desk, [row])
        except OutOfMemory as error:
            short = f"{error}. {await asyncio.to_thread(loaded.advice, len(prompt.ids) + row.limit)}"
        await asyncio.sleep(0)  # pieces that wait in the loop are told before the reply
        if raised:
            raise raised[0]
        finish()
        await asyncio.sleep(0)
        reply = _with_adapter(judged(base, text, len(prompt.ids), row.limit, sampling), adapter)
        if short:
            reply = replace(reply, outcome=Outcome.OVERLOADED, detail=short, finish_reason=None)
        return replace(reply, timing=timing_of(text, due, started, loop.time()))

    async def generate_many(
        self,
        conversations: Sequence[Sequence[Message]],
        samplings: Sequence[Sampling],
        *,
        batch_size: int = 64,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Reply]:
        """Answer many conversations at once; replies in their order, without timing (rows share it).

        Prompts are read in by length, those of like length together; as an answer ends, the next prompt takes
        its place.

        Args:
            conversations: one list of messages a row.
            samplings: how to draw, one a row.
            batch_size: rows generated at once.
            on_progress: called with (rows done, rows in all) as rows end.

        Raises:
            UsageError: lengths differ, or as for `ask`.
            ModelError: generation failed; out of memory only where a single row is too much.
        """
        if len(conversations) != len(samplings) or batch_size < 1:
            raise UsageError(
                f"generate_many needs a Sampling a conversation and batch_size >= 1, not "
                f"{len(conversations)} conversations, {len(samplings)} samplings and batch_size {batch_size}"
            )
        loaded, desk = self.loaded, self._desk
        assert desk is not None  # noqa: S101 - `loaded` has looked
        for messages in conversations:
            require_messages(messages)
        prompts = [self._prompt(messages) for messages in conversations]
        replies: list[Reply] = []
        for prompt in prompts:
            refused = _too_long(len(prompt.ids), loaded.context)
            outcome = Outcome.BAD_REQUEST if refused else Outcome.OK
            replies.append(self._reply(outcome, detail=refused, due_at=time.time()))
        todo = [at for at, reply in enumerate(replies) if reply.outcome is Outcome.OK]
        todo.sort(key=lambda at: len(prompts[at].ids))
        texts = {at: Text(prompts[at].opened) for at in todo}
        ends: dict[int, Callable[[], None]] = {}
        rows: list[Row] = []
        adapter = self.adapter

        def start() -> None:
            nonlocal adapter
            adapter = self.adapter

        for at in todo:
            text = texts[at]
            feed, ends[at] = read(
                loaded, text, lambda *piece, to=text: to.pieces.append(piece), lambda: 0.0, samplings[at].stop
            )
            rows.append(self._row(prompts[at], samplings[at], feed, batch_size))
            rows[-1].on_start = start
        done = len(replies) - len(todo)

        def count() -> None:
            nonlocal done
            done += 1
            if on_progress is not None:
                on_progress(done, len(replies))

        desk.submit(*rows)
        try:
            await ended(desk, rows, count)
        except OutOfMemory as error:
            longest = max(len(row.prompt) + row.limit for row in rows)
            raise ModelError(f"{error}. {await asyncio.to_thread(loaded.advice, longest)}") from None
        for at, row in zip(todo, rows, strict=True):
            ends[at]()
            reply = judged(replies[at], texts[at], len(row.prompt), row.limit, samplings[at])
            replies[at] = _with_adapter(reply, adapter)
        return replies

    # --- in the worker thread ----------------------------------------------------------------------------

    def _load(self, desk: Desk) -> tuple[LoadedModel, Adapters]:
        import torch

        from dsr1kit.local.adapters import Adapters
        from dsr1kit.local.decode import Decoder

        loaded = load(self.source, self.quantization, self._device, self._dtype, self._threads)
        self._all_threads = torch.get_num_threads()
        if loaded.device == "cpu" and loaded.quantization != "none":
            # bitsandbytes packs the weights at their first product: no request is to wait for that.
            with torch.inference_mode():
                loaded.model(torch.zeros((1, 1), dtype=torch.long))
            give_back_freed()
        adapters = Adapters(loaded, self.source)
        for name, folder in self._wanted_adapters.items():
            adapters.load(folder, name)
        if self._wanted_adapters:
            adapters.use(next(iter(self._wanted_adapters)))
        compiled = self._compiled
        if compiled is None:
            compiled = loaded.device.startswith("cuda") and loaded.quantization != "8bit"
        desk.decoder = Decoder(loaded.model, loaded.marks, loaded.context, compiled=compiled)
        return loaded, adapters

    def _share_cores(self, running: int) -> None:
        """A single row of a small model is too little work to share: threads would only wait for each other."""
        import torch

        loaded = self._loaded
        if self._threads is None and loaded is not None and loaded.device == "cpu" and loaded.parameters < SMALL:
            wanted = 1 if running == 1 else self._all_threads
            if torch.get_num_threads() != wanted:
                torch.set_num_threads(wanted)

    # --- helpers -----------------------------------------------------------------------------------------

    async def _in_thread(self, work: Callable[[], T]) -> T:
        assert self._desk is not None  # noqa: S101 - the callers have looked
        return await asyncio.shield(asyncio.wrap_future(self._desk.call(work)))

    def _prompt(self, messages: Sequence[Message]) -> Prompt:
        return prompt_of(self.loaded.tokenizer, self.loaded.marks, messages)

    def _row(
        self, prompt: Prompt, sampling: Sampling, on_token: Callable[[int], bool], width: int | None = None
    ) -> Row:
        limit = min(sampling.max_tokens, self.loaded.context - len(prompt.ids))
        return Row(prompt.ids, sampling, limit, prompt.opened, on_token, width=width or self.max_batch)

    def _reply(self, outcome: Outcome, *, detail: str = "", due_at: float) -> Reply:
        loaded = self.loaded
        facts = {"device": loaded.device, "dtype": loaded.dtype, "quantization": loaded.quantization}
        return Reply(
            outcome,
            detail,
            channel=self.name,
            model_requested=self.source,
            model_served=self.source,
            due_at=due_at,
            extra=facts,
        )


def _with_adapter(reply: Reply, adapter: str | None) -> Reply:
    return reply if adapter is None else replace(reply, extra={**reply.extra, "adapter": adapter})


def _too_long(prompt_tokens: int, context: int) -> str:
    if prompt_tokens < context:
        return ""
    return f"the prompt has {prompt_tokens} tokens, the model's context is {context}; shorten the conversation"
