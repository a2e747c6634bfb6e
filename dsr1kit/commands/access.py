"""Commands that reach channels: list them, ask one, find out why it is busy."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsr1kit.commands.shared import (
    AsJson,
    ChannelFile,
    app,
    err,
    fail,
    print_json,
    print_paths,
    run_async,
    said,
    warn_of_retirement,
)
from dsr1kit.errors import UsageError
from dsr1kit.keys import redact

if TYPE_CHECKING:
    from dsr1kit.records import Reply


@app.command()
def channels(
    only_open: Annotated[bool, typer.Option("--open", help="Only those that could be used now.")] = False,
    channel_file: ChannelFile = None,
    as_json: AsJson = False,
) -> None:
    """List the catalogue: status, key, price now, context, retirement."""
    from dsr1kit.access.channels import load_channels
    from dsr1kit.access.overview import overview
    from dsr1kit.commands.show import channel_table

    rows = overview(load_channels(channel_file), only_open=only_open)
    if as_json:
        print_json({"channels": rows})
        return
    if only_open and not rows:
        print("dsr1kit: no channel is open to you now: set a key (dsr1kit channels names the variables), "
              "or run a server of your own", file=sys.stderr)  # fmt: skip
        return
    channel_table(rows)
    for row in rows:
        if row["warning"]:
            print(f"dsr1kit: {row['warning']}", file=sys.stderr)
        if not row["holidays_known"]:
            print(f"dsr1kit: {row['name']}: this year's public holidays are not in the data; on one of them its price "
                  "may be lower", file=sys.stderr)  # fmt: skip


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    channel: Annotated[str | None, typer.Option(help="A channel's name, or emulated:WEATHER.")] = None,
    local: Annotated[str | None, typer.Option(help="A model to run here: tiny-r1, a folder, a hub id, a GGUF.")] = None,
    channel_file: ChannelFile = None,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.6,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling mass.")] = 0.95,
    max_tokens: Annotated[int, typer.Option(help="Cap on reasoning and answer together.")] = 32768,
    max_thinking_tokens: Annotated[int | None, typer.Option(help="Close the thinking after so many tokens.")] = None,
    min_thinking_tokens: Annotated[
        int | None, typer.Option(help='Prolong the thinking by "Wait," up to so many tokens, with --local.')
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Repeatable draws, where honoured.")] = None,
    quantization: Annotated[str, typer.Option(help="none, 8bit, 4bit or auto, with --local.")] = "none",
    adapter: Annotated[Path | None, typer.Option(help="A LoRA adapter's folder, with --local.")] = None,
    first_token_s: Annotated[float, typer.Option(help="Longest wait for the first token, seconds.")] = 120.0,
    stall_s: Annotated[float, typer.Option(help="Longest silence between tokens, seconds.")] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Ask one question; shows the thinking dimmed, then the answer, then the timing (on stderr)."""
    from dsr1kit.access.channels import load_channels
    from dsr1kit.backends import open_backend
    from dsr1kit.identity import told
    from dsr1kit.live import LiveAnswer, reply_json, timing_line
    from dsr1kit.records import Sampling

    if not question.strip():
        raise UsageError("the question is empty")
    if channel is not None and local is not None:
        raise UsageError("give --channel or --local, not both")
    if channel == "" or local == "":
        raise UsageError(
            "--channel and --local need a name (dsr1kit channels lists them; --local tiny-r1 runs anywhere)"
        )
    if channel and (adapter or min_thinking_tokens):
        raise UsageError("--adapter and --min-thinking-tokens are for models that run here: give --local")
    name = channel or f"local:{local or 'tiny-r1'}"
    sampling = Sampling(
        temperature, top_p, max_tokens, seed, max_thinking_tokens, min_thinking_tokens=min_thinking_tokens
    )
    catalogue = load_channels(channel_file)
    warn_of_retirement([name], catalogue)
    backend = open_backend(
        name,
        catalogue,
        first_token_s=first_token_s,
        stall_s=stall_s,
        quantization=quantization,
        adapter=adapter,
    )
    shown = LiveAnswer()

    async def work() -> Reply:
        async with backend as r1:
            return await r1.ask(
                [{"role": "user", "content": question}], sampling, on_delta=None if as_json else shown.add
            )

    reply: Reply = run_async(work())
    if as_json:
        print_json(reply_json(reply))
    else:
        shown.end()
        err.print(redact(timing_line(reply)), style="dim", markup=False, emoji=False)
    if other := told(reply.model_requested, reply.model_served):
        print(f"dsr1kit: {redact(other)}", file=sys.stderr)
    if reply.outcome not in ("ok", "truncated"):
        raise SystemExit(said(f"{reply.outcome.value}: {reply.detail}"))
    if reply.outcome == "truncated" and not as_json:
        print(f"dsr1kit: {redact(reply.detail)}", file=sys.stderr)


@app.command()
def doctor(
    channel: Annotated[
        list[str] | None, typer.Argument(help="Channels, or emulated:WEATHER; none: all that are open to you.")
    ] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Is it R1 as its card says? Some 15 requests.")] = False,
    ceiling_tokens: Annotated[int, typer.Option(help="With --probe: how long an answer to ask for at most.")] = 4096,
    trace: Annotated[bool, typer.Option("--trace", help="Also the route, by mtr or traceroute; up to 30 s.")] = False,
    every: Annotated[str | None, typer.Option(help="Watch: a small question every so often, such as 10m.")] = None,
    for_: Annotated[str | None, typer.Option("--for", help="Watch: for how long, such as 24h.")] = None,
    out: Annotated[Path | None, typer.Option(help="Watch: the folder of records; the same command goes on.")] = None,
    first_token_s: Annotated[float, typer.Option(help="Longest wait for the first token, seconds.")] = 30.0,
    stall_s: Annotated[float, typer.Option(help="Longest silence between tokens, seconds.")] = 20.0,
    channel_file: ChannelFile = None,
    as_json: AsJson = False,
) -> None:
    """Why is it busy? Network, key, balance, model, quota, retirement, peak hour, one small question.

    Exit 0 when every channel named (without names: at least one) is usable.
    """
    from dsr1kit import doctoring
    from dsr1kit.access.channels import load_channels

    names = list(dict.fromkeys(channel or []))
    if (every, for_, out) != (None, None, None):
        if every is None or for_ is None or out is None or not names or probe or trace:
            raise UsageError("a watch takes channels, --every, --for and --out: "
                             "dsr1kit doctor C --every 10m --for 24h --out DIR")  # fmt: skip
        _watch(names, every, for_, out, first_token_s, stall_s, channel_file, as_json)
        return
    catalogue = load_channels(channel_file)
    clocks = {"first_token_s": first_token_s, "stall_s": stall_s}
    if probe:
        if not names or trace:
            raise UsageError("--probe takes the channels to examine, and no --trace: dsr1kit doctor C --probe")
        results = run_async(doctoring.probe_all(names, catalogue, ceiling_tokens, clocks, show=not as_json))
        if as_json:
            print_json({"channels": [r.to_json() for r in results]})
        verdicts = [{check.verdict for check in r.checks} for r in results]
        if any("fail" in told or "pass" not in told for told in verdicts):  # no pass: it did not answer at all
            raise SystemExit(1)
        return
    found = run_async(doctoring.diagnose_all(names, catalogue, clocks, trace=trace, show=not as_json))
    if as_json:
        print_json({"channels": [d.to_json() for d in found]})
    if not (all if names else any)(d.usable for d in found):
        raise SystemExit(1)


def _watch(
    names: Sequence[str], every: str, for_: str, out: Path, first_token_s: float, stall_s: float,
    channel_file: Path | None, as_json: bool,
) -> None:  # fmt: skip
    from dsr1kit.access.channels import load_channels
    from dsr1kit.compare.watch import WatchSettings, watch
    from dsr1kit.hours import duration_s

    spans = []
    for option, text in (("--every", every), ("--for", for_)):
        seconds = duration_s(text if not text.replace(".", "", 1).isdigit() else f"{text}s")
        if not seconds:
            raise UsageError(f"{option} takes a duration such as 30s, 10m or 24h, not {text!r}")
        spans.append(seconds)
    settings = WatchSettings(
        channels=tuple(names), every_s=spans[0], for_s=spans[1], first_token_s=first_token_s, stall_s=stall_s
    )

    def tell(number: int, count: int, replies: Mapping[str, Reply]) -> None:
        said = ", ".join(f"{name} {reply.outcome.value}" for name, reply in replies.items())
        err.print(redact(f"{number}/{count}  {said}"), style="dim", markup=False)

    try:
        done = run_async(watch(settings, out, channels=load_channels(channel_file), on_tick=tell))
    except KeyboardInterrupt:
        fail(f"stopped; the same command goes on with the watch in {out}", 130)
    paths = {"records": str(done.records), "summary": str(done.summary_path), "report": str(done.report)}
    if as_json:
        print_json({"paths": paths, **done.summary})
    else:
        print_paths(paths, done.summary["verdict"])
    if not any(c["availability"] and c["availability"]["value"] > 0 for c in done.summary["channels"].values()):
        raise SystemExit(1)


@app.command()
def nginx(
    channel_names: Annotated[str, typer.Option("--channels", help="Names, separated by commas.")],
    port: Annotated[int, typer.Option(help="Of the endpoint; the channels take the ports after it.")] = 8080,
    listen: Annotated[
        str, typer.Option(help="IP address of the endpoint; who reaches it spends your keys.")
    ] = "127.0.0.1",
    resolver: Annotated[str, typer.Option(help="A name server, to look names up while nginx runs.")] = "",
    trusted_certificate: Annotated[
        str, typer.Option(help="Authorities that certificates are checked against.")
    ] = "/etc/ssl/certs/ca-certificates.crt",
    read_timeout_s: Annotated[int, typer.Option(help="Longest silence between two reads, seconds.")] = 300,
    allow_different_models: Annotated[
        bool, typer.Option("--allow-different-models", help="Mix families: R1 or something else may answer.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="FILE.template to write; default: on stdout.")] = None,
    channel_file: ChannelFile = None,
) -> None:
    """Write a configuration for nginx: one local endpoint that spreads requests over channels.

    It is a template for envsubst and holds no key; its first lines say how it is used.
    """
    from dsr1kit.access.channels import load_channels
    from dsr1kit.access.nginx import nginx_config

    names = [name.strip() for name in channel_names.split(",") if name.strip()]
    if out is not None and out.suffix != ".template":
        raise UsageError(f"--out {out}: it is no configuration before envsubst, so name it {out.name}.template")
    catalogue = load_channels(channel_file)
    text = nginx_config(
        [catalogue[name] for name in names], port=port, listen=listen, resolver=resolver,
        trusted_certificate=trusted_certificate, read_timeout_s=read_timeout_s,
        allow_different_models=allow_different_models, name=out.stem if out else "r1.conf",
    )  # fmt: skip
    warn_of_retirement(names, catalogue)
    if out is None:
        print(text, end="")
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror or error}") from None
    print(f"dsr1kit: {out} is written; its first lines say how nginx is started with it", file=sys.stderr)
