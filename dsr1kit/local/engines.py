"""A model served by vLLM, llama.cpp or transformers in a process of its own, as a Backend.

Starts the engine that suits the hardware, waits until it has answered once, and stops it with everything it started.
What already runs (Ollama, SGLang, LM Studio, a vLLM of your own) is a channel of the catalogue and needs none of this.
Knows nothing about command lines, which are in `engine_commands`.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import os
import re
import secrets
import shutil
import tempfile
import textwrap
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from dsr1kit.access.channels import Channel, Family
from dsr1kit.access.prices import Price
from dsr1kit.errors import ModelError, RunError, UnknownName, UsageError
from dsr1kit.local import engine_commands as commands
from dsr1kit.local.bring import bring
from dsr1kit.local.engine_checks import (
    ENDED_BY_OTHERS,
    advice_for,
    cause_in,
    check_adapter,
    check_room,
    check_weights_of,
    gpus_for,
    made_up_in,
    own_context,
)
from dsr1kit.local.engine_process import HOST, Supervised, ending, free_port, opened, taken
from dsr1kit.local.engine_stage import splits_thinking, stage
from dsr1kit.local.hardware import Hardware, choose_dtype, look
from dsr1kit.local.places import locate
from dsr1kit.local.room import refuse_coming, refuse_large
from dsr1kit.records import ANSWERED, R1_SAMPLING, Message, OnDelta, Outcome, Reply, Sampling

if TYPE_CHECKING:
    from dsr1kit.access.client import ChannelClient
    from dsr1kit.local.weights import Coming

_HELLO: list[Message] = [{"role": "user", "content": "Hello"}]
_Given = TypeVar("_Given")
_Found = TypeVar("_Found")
_CUSTOM = "custom"
_SHOWN_LINES = 8  # of a log, behind what is said of a failure
_CAUSE_LINES = 1000  # of a log in which the cause of an end is looked for: vLLM's stands hundreds above its last line
# They would make the engine ask for a key that the channel does not send.
_KEYS_OF_ENGINES = ("VLLM_API_KEY", "LLAMA_API_KEY")


class Engine:
    """A served model; use as `async with Engine("tiny-r1") as r1`.

    Args:
        model: `tiny-r1`, a folder, a hub id (`org/name`, downloaded where it is not yet) or a `.gguf` file.
        engine: `auto` (by weights and hardware), `vllm`, `llama.cpp` or `transformers`.
        port: on 127.0.0.1; None or 0: any free one.
        context: most tokens of prompt and answer together; None: 36,864 on a GPU, 8,192 without, never more
            than the model's own.
        batch: requests answered at a time; None: 32 for vLLM, 4 for llama.cpp, 1 for transformers.
        quantization: `none`, `8bit` or `4bit` (NF4), while loading.
        adapter: a LoRA's folder (for llama.cpp a GGUF file) to serve on top.
        name: of the channel and in records.
        log_path: the engine's log, appended to; None: a temporary file, removed after an end in order.
        start_s: seconds until it must have answered; a download before it does not count.
        stop_s: seconds that the engine gets to end by itself.
        command: your own command line in place of the engine's; `{port}`, `{model}` and `{context}` are filled in.
        clocks: what `Channel.open()` takes (first_token_s, stall_s, deadline_s, connect_s).

    Attributes:
        channel: usable wherever a Channel is, while the engine is open.
        engine, reason: which engine it became (`custom` with a command of your own), and why.

    Raises:
        UnknownName, UsageError: an option or a model that cannot be meant, a port that is taken, a log that cannot
            be written, an engine that is not installed.
        ModelError: no such model, one with damaged files, or one whose weights do not fit.
        RunError (on entering): the engine ended, or did not answer in time; the message says why and names its log.
    """

    emulated = False

    def __init__(
        self,
        model: str | Path,
        *,
        engine: str = "auto",
        port: int | None = None,
        context: int | None = None,
        batch: int | None = None,
        quantization: commands.Quantization = "none",
        adapter: str | Path | None = None,
        name: str = "local-engine",
        log_path: str | Path | None = None,
        start_s: float = 600.0,
        stop_s: float = 10.0,
        command: Sequence[str] | None = None,
        **clocks: float | None,
    ) -> None:
        if engine not in ("auto", *commands.ENGINES):
            raise UnknownName("engine", engine, ("auto", *commands.ENGINES))
        if quantization not in commands.QUANTIZATIONS:
            raise UnknownName("quantization", str(quantization), commands.QUANTIZATIONS)
        if not 0 <= (port or 0) <= 65_535:
            raise UsageError(f"port must be from 1 to 65535, or 0 for a free one, not {port}")
        for option, value in (("context", context), ("batch", batch)):
            if value is not None and value < 1:
                raise UsageError(f"{option} must be at least 1, not {value}")
        self.source, self.name = str(model), name
        self._wanted, self.engine, self.reason = engine, engine, ""
        self._port, self._context, self._batch, self._quantization = port or 0, context, batch, quantization
        self._adapter = None if adapter is None else Path(adapter).expanduser()
        self._own_log, self._start_s, self._stop_s = log_path is None, start_s, stop_s
        self.log_path = Path(log_path).expanduser() if log_path else _log_path()
        self._command, self._clocks = command, clocks
        self._process: Supervised | None = None
        self._client: ChannelClient | None = None
        self._stage: Path | None = None
        self.channel = Channel(name=name, base_urls=(f"http://{HOST}:0/v1",), model=self.source)

    async def __aenter__(self) -> Self:
        if self._process is not None:
            raise UsageError(f"{self.name} is open already; open a second Engine instead")
        try:
            serving = await self._prepared()
            self.channel = self._channel(serving)
            self._opened()  # a wrong clock is told before the minutes that loading takes
            await self._started(serving)
            if self.engine == "llama.cpp":
                self.channel = self._channel(replace(serving, context=await self._slot_context(serving.context)))
            self._client = await self._opened().__aenter__()
        except BaseException:
            await self._stopped()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client is not None:
            await self._client.__aexit__(kind, error, trace)
            self._client = None
        fine = not self.died()
        await self._stopped()
        if self._own_log and fine:
            self.log_path.unlink(missing_ok=True)

    async def ask(
        self,
        messages: Sequence[Message],
        sampling: Sampling = R1_SAMPLING,
        *,
        on_delta: OnDelta | None = None,
        due: float | None = None,
    ) -> Reply:
        """Ask once; see `Backend.ask`. When the engine has died, the reply's detail tells how.

        `transformers serve` knows no cap of the thinking and refuses requests with one: it is left out for it.
        """
        if self._client is None or self._process is None:
            raise UsageError(f"{self.name} is not open: async with Engine({self.source!r}) as r1: ...")
        if self.engine == "transformers" and self._command is None:
            sampling = replace(sampling, max_thinking_tokens=None)
        reply = await self._client.ask(messages, sampling, on_delta=on_delta, due=due)
        # The connection breaks a moment before the process is known to have ended.
        if reply.outcome in (Outcome.UNREACHABLE, Outcome.CUT) and await self._process.ended(1.0):
            return replace(reply, detail=f"{self.died()}\n{reply.detail}")
        return reply

    def died(self) -> str:
        """How the engine ended, why by its log, and where that is; empty while it runs or after it was closed."""
        if self._process is None or self._process.code is None:
            return ""
        return self._ended(self._process)

    async def ended(self) -> str:
        """Wait until the engine ends by itself; returns what `died()` then says."""
        if self._process is not None:
            await self._process.ended()
        return self.died()

    # --- before it runs ----------------------------------------------------------------------------------------

    async def _prepared(self) -> commands.Serving:
        """Find the weights, choose the engine, and settle all that its command line says."""
        self._check_log()
        locate(self.source)  # a wrong name is told before anything else
        hardware = await asyncio.to_thread(look)
        if self._adapter is not None:
            check_adapter(self._adapter)
        port = self._port or free_port()
        if by := taken(port):
            raise UsageError(f"port {port} on {HOST} is taken{by}; free now: {free_port()} (0 takes any free one)")
        await bring(self.source, on_plan=lambda coming: self._suit(coming, hardware))
        place, gguf = locate(self.source)
        self._choose(hardware, gguf=gguf is not None)
        weights = Path(place) / gguf if gguf else Path(place)
        name = commands.served_name(self.source, weights, self._adapter)
        if gguf and self.engine == "transformers" and self._command is None:
            from dsr1kit.local.gguf import dequantized

            weights = await _aside(dequantized, weights)
        most = own_context(self.source, commands.read_json(weights / "config.json"), self._context)
        usual = commands.CONTEXT_GPU if hardware.gpus else commands.CONTEXT_CPU
        share: float | None = None
        folder, context, dtype, gpus = weights.is_dir(), self._context or min(usual, most or usual), "auto", 1
        if self._command is None:
            await asyncio.to_thread(check_weights_of, weights)
        if not folder and self._command is None:
            from dsr1kit.local.gguf import fitting_instead

            if instead := await asyncio.to_thread(fitting_instead, weights):
                raise ModelError(f"{self.source} does not fit. {instead}")
        if folder and self._command is None:
            dtype, bits = await asyncio.to_thread(_dtype, weights, hardware), self._quantization
            if self.engine == "vllm":
                gpus = gpus_for(weights, hardware, dtype=dtype, quantization=bits, context=context)
            used = replace(hardware, gpus=hardware.gpus[:gpus])
            share = commands.memory_share(used.gpus)
            check_room(self.source, commands.read_json(weights / "config.json"), used, dtype=dtype, quantization=bits)
        return commands.Serving(
            name=name, weights=weights, port=port, context=context,
            batch=self._batch or commands.BATCH.get(self.engine, 1), dtype=dtype, gpus=gpus,
            device="cuda:0" if hardware.gpus else "cpu", quantization=self._quantization, adapter=self._adapter,
            memory_share=share, thinks=folder and "<think>" in commands.chat_template(weights),
        )  # fmt: skip

    def _choose(self, hardware: Hardware, *, gguf: bool) -> None:
        """Choose the engine, and find it."""
        if self._command is not None and self._wanted == "auto":
            self.engine, self.reason = _CUSTOM, "a command line of your own"
            return
        self.engine, self.reason = commands.choose_engine(
            self._wanted, gguf=gguf, gpus=hardware.gpus, quantization=self._quantization
        )
        if self._command is None:
            commands.program(self.engine)

    def _suit(self, coming: Coming, hardware: Hardware) -> None:
        """A missing engine, and too little memory, are told before gigabytes are fetched."""
        self._choose(hardware, gguf=not any(file.endswith(".safetensors") for file in coming.files))
        config = coming.config or {}
        own_context(self.source, config, self._context)
        if self._command is not None:
            return
        if self.engine == "transformers":
            refuse_coming(self.source, coming, self._quantization, "auto", "auto")
            return
        if self.engine == "llama.cpp" or config.get("quantization_config"):
            refuse_large(self.source, coming.weights_bytes, hardware)
        if config and self.engine != "llama.cpp":
            check_room(self.source, config, hardware, dtype="bfloat16", quantization=self._quantization)

    def _check_log(self) -> None:
        if not self._own_log:
            try:
                opened(self.log_path).close()
            except OSError as error:
                raise UsageError(
                    f"the log {self.log_path} cannot be written ({error.strerror}): name a file in a folder that "
                    "exists and is yours to write to (--log)"
                ) from None

    def _channel(self, serving: commands.Serving) -> Channel:
        inline = self.engine == "transformers" and serving.thinks and not splits_thinking(serving.weights)
        return Channel(
            name=self.name,
            title=f"{serving.name} served by {self._called} on this machine",
            base_urls=(f"http://{HOST}:{serving.port}/v1",),
            # The revision is part of the name in transformers' replies.
            model=f"{serving.name}@main" if self.engine == "transformers" and self._command is None else serving.name,
            family=_family(serving.name),
            reasoning="inline" if inline else "auto",
            region="local",
            price=Price(0.0, 0.0),
            max_in_flight=serving.batch,
            context=serving.context,
            # Some room is the prompt's: vLLM refuses a request whose two parts together exceed the context.
            max_output=max(1, serving.context - min(serving.context // 4, 4096)),
            source=f"started here: {self.reason}",
            as_of=dt.datetime.now(dt.UTC).date(),
        )

    # --- while it runs -----------------------------------------------------------------------------------------

    async def _started(self, serving: commands.Serving) -> None:
        """Start it, and wait until it has answered a first request."""
        if self._command is not None:
            filled = {"{port}": str(serving.port), "{model}": serving.name, "{context}": str(serving.context)}
            command = [re.sub(r"\{(?:port|model|context)\}", lambda m: filled[m[0]], word) for word in self._command]
        else:
            command = commands.command(self.engine, serving)
        if self.engine == "transformers" and self._command is None:
            self._stage = Path(tempfile.mkdtemp(prefix="dsr1kit-stage-"))
            stage(serving, self._stage)
        environment = {k: v for k, v in os.environ.items() if k not in _KEYS_OF_ENGINES}
        # All weights are here: nothing is fetched, nothing is reported, and the log is written as it happens.
        environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self._process = Supervised(command, self.log_path, environment, folder=self._stage, stop_s=self._stop_s)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._start_s
        try:
            await self._process.start()
        except OSError as error:
            raise RunError(f"{self._called} could not be started: {error}") from None
        await self._healthy(self._process, deadline)
        left = max(1.0, deadline - loop.time())
        # Loading and compiling that wait for a first request happen now, and their failures are told now.
        async with self.channel.open(first_token_s=left, stall_s=left, deadline_s=left) as client:
            reply = await client.ask(_HELLO, Sampling(max_tokens=8))
        fine = reply.outcome in {*ANSWERED, Outcome.EMPTY}
        # It may be another's answer, who took the port while the engine was starting.
        if await self._process.ended(0.0 if fine else 1.0):
            raise RunError(self._ended(self._process))
        if not fine:
            raise RunError(
                f"{self._called} runs but does not answer ({reply.outcome.value}: {reply.detail}); the log says: "
                f"{(cause := self._cause(self._process)) or 'nothing'}. {advice_for(self.source, 0, cause)}"
                + self._log(self._process)
            )
        if self.engine == "transformers" and (lacking := made_up_in(self._process.tail(_CAUSE_LINES))):
            raise ModelError(
                f"{self.source} lacks weights, such as {lacking}, and would answer from random numbers in their place: "
                f"it is a part of a model; copy or fetch it again, whole. {self._log(self._process)}"
            )

    async def _healthy(self, process: Supervised, deadline: float) -> None:
        import aiohttp

        loop = asyncio.get_running_loop()
        url = self.channel.base_urls[0].removesuffix("/v1") + "/health"
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5.0)) as session:
            while loop.time() < deadline:
                if await process.ended(0.1):
                    raise RunError(self._ended(process))
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async with session.get(url) as response:
                        if response.status == 200:
                            return
        raise RunError(
            f"{self._called} was not ready after {self._start_s:g} s: give it longer (--start-s), or look why in its "
            f"log, which says: {self._cause(process) or 'nothing'}. {self._log(process)}"
        )

    async def _slot_context(self, asked: int) -> int:
        """What llama.cpp gives each request: no more than the model was trained for, which only it has read."""
        import aiohttp

        url, patience = self.channel.base_urls[0].removesuffix("/v1") + "/props", aiohttp.ClientTimeout(total=5.0)
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError):
            async with aiohttp.ClientSession(timeout=patience) as session, session.get(url) as response:
                told = json.loads(await response.read())["default_generation_settings"]["n_ctx"]
                return min(asked, int(told)) or asked
        return asked

    def _opened(self) -> ChannelClient:
        return self.channel.open(**self._clocks)  # type: ignore[arg-type]  # a dict of limits has one type

    async def _stopped(self) -> None:
        process, self._process = self._process, None
        folder, self._stage = self._stage, None
        try:
            if process is not None:
                await process.stop()
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    # --- what is said when it fails -----------------------------------------------------------------------------

    @property
    def _called(self) -> str:
        return "your command" if self.engine == _CUSTOM else self.engine

    def _ended(self, process: Supervised) -> str:
        code, cause = process.code or 0, self._cause(process)
        advice = advice_for(self.source, code, cause, process.tail())
        if not cause:
            return f"{self._called} {ending(code)}. {advice}{self._log(process)}"
        if code in ENDED_BY_OTHERS:
            return f"{self._called} {ending(code)}. {advice}Its log, {self.log_path}, ends: {cause}"
        return f"{self._called} {ending(code)}: {cause.rstrip('.')}. {advice}{self._log(process)}"

    def _cause(self, process: Supervised) -> str:
        # Who ended it by a signal did not write to the log: an error of hours ago is not the cause.
        return cause_in(process.tail(1 if process.code in ENDED_BY_OTHERS else _CAUSE_LINES))

    def _log(self, process: Supervised) -> str:
        if not (tail := process.tail(_SHOWN_LINES)):
            return f"It wrote nothing to {self.log_path}"
        return f"Its log: {self.log_path}, which ends:\n" + textwrap.indent(tail, "  ")


def channel_toml(channel: Channel) -> str:
    """A channel as an entry of a channel file, as `--channel-file` takes it."""
    bare = re.fullmatch(r"[A-Za-z0-9_-]+", channel.name)
    lines = [f"[channel.{channel.name if bare else json.dumps(channel.name, ensure_ascii=False)}]"]
    fields: dict[str, Any] = {
        "title": channel.title, "base_url": channel.base_urls[0], "model": channel.model, "family": channel.family,
        "reasoning": channel.reasoning, "region": channel.region, "max_in_flight": channel.max_in_flight,
        "context": channel.context, "max_output": channel.max_output, "source": channel.source,
    }  # fmt: skip
    # JSON's strings and numbers are TOML's too.
    lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items() if value]
    lines += ["price = {input = 0.0, output = 0.0}", f"as_of = {channel.as_of}"]
    return "\n".join(lines) + "\n"


def _log_path() -> Path:
    return Path(tempfile.gettempdir()) / f"dsr1kit-engine-{secrets.token_hex(6)}.log"


async def _aside(work: Callable[[_Given], _Found], given: _Given) -> _Found:
    """Run in a thread that nobody waits for once we are cancelled: a download may take an hour."""
    future: Future[_Found] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work(given))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(future)


def _dtype(weights: Path, hardware: Hardware) -> str:
    if hardware.gpus:
        return "bfloat16" if hardware.gpus[0].bf16 else "float16"
    size = sum(file.stat().st_size for file in weights.glob("*.safetensors"))
    return choose_dtype(size // 2, "cpu").value


def _family(name: str) -> Family:
    last = name.lower().rpartition("/")[2]
    if "r1-distill" in last or "r1-0528-qwen3" in last:
        return "r1-distill"
    return "r1" if re.fullmatch(r"deepseek-r1(-0528|-zero)?", last) else "other"
