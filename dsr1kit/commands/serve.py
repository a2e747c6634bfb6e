"""The command that serves a model on this machine with the engine that suits it."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from dsr1kit.commands.shared import AsJson, app, fail, run_async
from dsr1kit.errors import RunError, UsageError
from dsr1kit.keys import redact


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="tiny-r1, a folder, a hub id org/name, or a .gguf file.")],
    engine: Annotated[str, typer.Option(help="auto, vllm, llama.cpp or transformers.")] = "auto",
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; 0: any free one.")] = 0,
    context: Annotated[
        int | None, typer.Option(help="Most tokens of prompt and answer; default: 36864 on a GPU, else 8192.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Requests at a time; default: 32 (vLLM), 4 (llama.cpp), 1 (transformers).")
    ] = None,
    quantization: Annotated[str, typer.Option(help="none, 8bit or 4bit, while loading.")] = "none",
    adapter: Annotated[Path | None, typer.Option(help="A LoRA's folder (llama.cpp: a GGUF) on top.")] = None,
    start_s: Annotated[float, typer.Option(help="Longest wait until it has answered, seconds.")] = 600.0,
    log: Annotated[Path | None, typer.Option(help="The engine's log; default: a temporary file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write its channel here, for --channel-file (TOML).")] = None,
    as_json: AsJson = False,
) -> None:
    """Serve a model on loopback; the first line of output is {"url": ..., "model": ..., "engine": ...}.

    GGUF files go to llama.cpp, everything else to vLLM where it and a GPU of compute capability 7.0 or more are, else
    to transformers. It ends on Ctrl-C. Ollama, SGLang and LM Studio that run already are channels: dsr1kit channels
    lists them, and dsr1kit ask --channel ollama asks one.
    """
    from dsr1kit.local.engines import Engine, channel_toml

    if out is not None and (out.suffix != ".toml" or not out.parent.is_dir()):
        raise UsageError(f"--out {out}: name a .toml file in a folder that exists")
    served = Engine(
        model, engine=engine, port=port, context=context, batch=batch, quantization=quantization,  # type: ignore[arg-type]  # checked there
        adapter=adapter, start_s=start_s, log_path=log,
    )  # fmt: skip
    ready = False

    async def work() -> None:
        nonlocal ready
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine that runs has one
        ends = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it: the terminal may go
            ends.append(signal.SIGHUP)
        for name in ends:
            asyncio.get_running_loop().add_signal_handler(name, task.cancel)
        async with served as r1:
            ready = True
            channel = r1.channel
            if out is not None:
                out.write_text(channel_toml(channel), encoding="utf-8")
            told = {
                "url": channel.base_urls[0], "model": channel.model, "engine": r1.engine, "reason": r1.reason,
                "log": str(r1.log_path), "channel_file": None if out is None else str(out),
            }  # fmt: skip
            print(json.dumps(told, ensure_ascii=False), flush=True)
            if not as_json:
                how = "" if out is None else f"; ask it: dsr1kit ask --channel-file {out} --channel {channel.name} '…'"
                print(f"dsr1kit: {r1.engine} ({redact(r1.reason)}){how}; Ctrl-C ends it", file=sys.stderr)
            raise RunError(await r1.ended())

    try:
        run_async(work())
    except asyncio.CancelledError:
        if not ready:
            fail("stopped before it was ready", 130)
