"""A model in this process as a Backend: tiny-r1, a folder, a hub id or a GGUF file, through transformers.

Loading and generating happen in one worker thread, so the event loop stays live; requests that come while others
run join them, up to `max_batch` at once. torch and transformers are imported when a model is opened, not with this
module. Knows nothing about channels, HTTP or scoring.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from dsr1kit.errors import ModelError, UnknownName, UsageError
from dsr1kit.local.desk import Desk, OutOfMemory
from dsr1kit.local.hardware import SMALL
from dsr1kit.local.load import (
    DTYPES,
    QUANTIZATIONS,
    LoadedModel,
    Quantization,
    load,
    locate,
    quiet,
)
from dsr1kit.local.reading import Kind, Text, judged, read, timing_of
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


@dataclass(frozen=True, slots=True)
class _Prompt:
    """Token ids of a conversation, and whether they end inside the thinking."""

    ids: list[int]
    opened: bool


class LocalModel:
    """A model in this process; use as `async with LocalModel("tiny-r1") as r1`.

    Args:
        source: `tiny-r1`, a folder, a hub id (`org/name`) or a `.gguf` file. Weights are safetensors or GGUF; a
            GGUF is dequantized on first use and kept (`dsr1kit.local.gguf`).
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
        UnknownName, UsageError: an option or a source that cannot be meant.
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
        locate(self.source)  # a wrong name fails before the seconds that imports take
        self._desk = Desk(self.name, lambda: quiet(python_warnings=False), self._share_cores)
        try:
            self._loaded = await self._in_thread(self._load)
        except BaseException:
            desk, self._desk = self._desk, None
            await asyncio.to_thread(desk.close)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        desk, self._desk, self._loaded, self._adapters = self._desk, None, None, None
        if desk is not None:
            await asyncio.to_thread(desk.close)

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
        adapters = self._adapters if self.loaded else None
        assert adapters is not None  # noqa: S101 - it is made with the model
        return await self._in_thread(lambda: work(adapters))

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
        loop = asyncio.get_running_loop()
        asked = loop.time()
        due = asked if due is None else due
        base = self._reply(Outcome.OK, due_at=time.time() - (asked - due))
        prompt = self._prompt(messages)
        if refused := _too_long(len(prompt.ids), loaded.context):
            at = loop.time() - due
            return replace(base, outcome=Outcome.BAD_REQUEST, detail=refused, timing=Timing(total_s=at))
        text, started = Text(prompt.opened), [asked]
        raised: list[Exception] = []

        def show(kind: Kind, piece: str, at: float) -> None:
            text.pieces.append((kind, piece, at))
            if on_delta is not None:
                loop.call_soon_threadsafe(tell, Delta(kind, piece, at - due))

        def tell(delta: Delta) -> None:
            if on_delta is None or raised or row.cancelled:
                return
            try:
                on_delta(delta)
            except Exception as error:  # the caller's own; it belongs to whoever awaits the reply
                raised.append(error)
                desk.cancel(row)

        def start() -> None:
            if not row.made:
                started[0] = loop.time()

        feed, finish = read(loaded, text, show, loop.time, sampling.stop)
        row = self._row(prompt, sampling, feed)
        row.on_start = start
        desk.submit(row)
        try:
            await _ended(desk, [row])
        except OutOfMemory as error:
            detail = f"{error}. {await asyncio.to_thread(self._advice, len(prompt.ids) + row.limit, 1)}"
            return replace(base, outcome=Outcome.OVERLOADED, detail=detail, timing=Timing(total_s=loop.time() - due))
        await asyncio.sleep(0)  # pieces that wait in the loop are told before the reply
        if raised:
            raise raised[0]
        finish()
        await asyncio.sleep(0)
        reply = judged(base, text, len(prompt.ids), row.limit, sampling)
        return replace(reply, timing=timing_of(text, due, started[0], loop.time()))

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
        for at in todo:
            text = texts[at]
            feed, ends[at] = read(
                loaded, text, lambda *piece, to=text: to.pieces.append(piece), lambda: 0.0, samplings[at].stop
            )
            rows.append(self._row(prompts[at], samplings[at], feed, batch_size))
        done = len(replies) - len(todo)

        def count() -> None:
            nonlocal done
            done += 1
            if on_progress is not None:
                on_progress(done, len(replies))

        desk.submit(*rows)
        try:
            await _ended(desk, rows, count)
        except OutOfMemory as error:
            longest = max(len(row.prompt) + row.limit for row in rows)
            raise ModelError(f"{error}. {await asyncio.to_thread(self._advice, longest, 1)}") from None
        for at, row in zip(todo, rows, strict=True):
            ends[at]()
            replies[at] = judged(replies[at], texts[at], len(row.prompt), row.limit, samplings[at])
        return replies

    # --- in the worker thread ----------------------------------------------------------------------------

    def _load(self) -> LoadedModel:
        import torch

        from dsr1kit.local.adapters import Adapters
        from dsr1kit.local.decode import Decoder

        loaded = load(self.source, self.quantization, self._device, self._dtype, self._threads)
        self._all_threads = torch.get_num_threads()
        self._adapters = Adapters(loaded, self.source)
        for name, folder in self._wanted_adapters.items():
            self._adapters.load(folder, name)
        if self._wanted_adapters:
            self._adapters.use(next(iter(self._wanted_adapters)))
        compiled = self._compiled
        if compiled is None:
            compiled = loaded.device.startswith("cuda") and loaded.quantization != "8bit"
        assert self._desk is not None  # noqa: S101 - this runs in its thread
        self._desk.decoder = Decoder(loaded.model, loaded.marks, loaded.context, compiled=compiled)
        return loaded

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

    def _prompt(self, messages: Sequence[Message]) -> _Prompt:
        """The conversation by the model's own template, earlier thinking left out, the new one opened.

        R1's card asks for `<think>\\n` at the start of every answer; where a template does not put it there and
        the model has the tag, it is added.
        """
        tokenizer, marks = self.loaded.tokenizer, self.loaded.marks
        turns = [{**turn, "content": _without_thinking(turn)} for turn in messages]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        opened = text.rstrip().endswith("<think>")
        if not opened and marks.think is not None and marks.end_think is not None:
            text, opened = f"{text}<think>\n", True
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return _Prompt([int(token) for token in ids], opened)

    def _row(
        self, prompt: _Prompt, sampling: Sampling, on_token: Callable[[int], bool], width: int | None = None
    ) -> Row:
        limit = min(sampling.max_tokens, self.loaded.context - len(prompt.ids))
        return Row(prompt.ids, sampling, limit, prompt.opened, on_token, width=width or self.max_batch)

    def _advice(self, context: int, batch: int) -> str:
        from dsr1kit.local.fits import advise
        from dsr1kit.local.shapes import shape_of_config

        loaded = self.loaded
        try:
            shape = shape_of_config(loaded.model.config.to_dict())
            return advise(shape, precision=loaded.precision, context=context, batch=batch)
        except ModelError:
            return "Ask for fewer max_tokens, or open the model with quantization='4bit'."

    def _reply(self, outcome: Outcome, *, detail: str = "", due_at: float) -> Reply:
        loaded = self.loaded
        facts = {"device": loaded.device, "dtype": loaded.dtype, "quantization": loaded.quantization}
        if self.adapter is not None:
            facts["adapter"] = self.adapter
        return Reply(
            outcome,
            detail,
            channel=self.name,
            model_requested=self.source,
            model_served=self.source,
            due_at=due_at,
            extra=facts,
        )


async def _ended(desk: Desk, rows: Sequence[Row], on_end: Callable[[], None] | None = None) -> None:
    """Wait for all rows; when cancelled or one fails, end the others and wait until the thread has let go of them."""
    futures = [asyncio.wrap_future(row.ended) for row in rows]
    try:
        for future in asyncio.as_completed([asyncio.shield(future) for future in futures]):
            await future
            if on_end is not None:
                on_end()
    except BaseException:
        desk.cancel(*rows)
        await asyncio.wait(futures)
        raise


def _without_thinking(turn: Message) -> str:
    """An earlier answer without its reasoning, as R1's template does; some templates leave that to the caller."""
    if turn["role"] != "assistant" or "</think>" not in turn["content"]:
        return turn["content"]
    return turn["content"].rpartition("</think>")[2].lstrip("\n")


def _too_long(prompt_tokens: int, context: int) -> str:
    if prompt_tokens < context:
        return ""
    return f"the prompt has {prompt_tokens} tokens, the model's context is {context}; shorten the conversation"
