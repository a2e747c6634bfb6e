"""The command line. Exit 0: well; 1: it ran and the answer is bad; 2: usage. Data on stdout, talk on stderr.

Each command parses, calls one function of the package and prints; nothing is decided here.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from dsr1kit.errors import Dsr1kitError, UsageError
from dsr1kit.keys import redact, redact_texts

if TYPE_CHECKING:
    from dsr1kit.access.channels import Channel
    from dsr1kit.records import Reply

app = typer.Typer(
    name="dsr1kit",
    help="Which way to DeepSeek R1 works for you: reach it, run it, compare hosted against local.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_err = Console(stderr=True, highlight=False, soft_wrap=True)

ChannelFile = Annotated[
    Path | None, typer.Option("--channel-file", help="Your own channels (TOML); default: $DSR1KIT_CHANNELS.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def main() -> None:
    """Entry point: runs the command and turns the kit's errors into a message and an exit code."""
    # Read when torch is loaded: threads that wait without spinning, since cores are usually shared here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app(args=_pairs_joined(sys.argv[1:]))
    except UsageError as error:
        _fail(str(error), 2)
    except Dsr1kitError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("stopped; what was finished is kept", 130)
    except BrokenPipeError:
        # The reader (head, less) has left; the interpreter must not complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def _pairs_joined(arguments: list[str]) -> list[str]:
    """`-p NAME VALUE` as `-p NAME=VALUE`: typer has no option of two values that may be repeated."""
    out: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        out.append(argument)
        if argument in ("-p", "--parameter") and arguments[0] == "run":
            name = next(rest, None)
            if name is None:
                break
            value = next(rest, None) if name.isidentifier() else None
            out.append(name if value is None else f"{name}={value}")
    return out


def _fail(message: str, code: int) -> NoReturn:
    print(f"dsr1kit: {redact(message)}", file=sys.stderr)
    raise SystemExit(code)


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def _print_json(value: object) -> None:
    plain = json.loads(json.dumps(value, default=str))
    text = json.dumps(redact_texts(plain), ensure_ascii=False)
    print(text.encode("utf-8", "replace").decode())  # half an emoji from a far side cannot be printed


@app.command()
def channels(
    only_open: Annotated[bool, typer.Option("--open", help="Only those that could be used now.")] = False,
    channel_file: ChannelFile = None,
    as_json: AsJson = False,
) -> None:
    """List the catalogue: status, key, price now, context, retirement."""
    from dsr1kit.access.channels import load_channels
    from dsr1kit.access.overview import overview
    from dsr1kit.cli_show import channel_table

    rows = overview(load_channels(channel_file), only_open=only_open)
    if as_json:
        _print_json({"channels": rows})
        return
    if only_open and not rows:
        print("dsr1kit: no channel is open to you now: set a key (dsr1kit channels names the variables), "
              "or run a server of your own", file=sys.stderr)  # fmt: skip
        return
    channel_table(rows)
    for row in rows:
        if row["warning"]:
            print(f"dsr1kit: {row['warning']}", file=sys.stderr)


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
    seed: Annotated[int | None, typer.Option(help="Repeatable draws, where honoured.")] = None,
    quantization: Annotated[str, typer.Option(help="none, 8bit or 4bit, with --local.")] = "none",
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
    if channel and local:
        raise UsageError("give --channel or --local, not both")
    name = channel or f"local:{local or 'tiny-r1'}"
    sampling = Sampling(temperature, top_p, max_tokens, seed, max_thinking_tokens)
    catalogue = load_channels(channel_file)
    _warn_of_retirement([name], catalogue)
    backend = open_backend(
        name,
        catalogue,
        first_token_s=first_token_s,
        stall_s=stall_s,
        quantization=quantization,
    )
    shown = LiveAnswer()

    async def work() -> Reply:
        async with backend as r1:
            return await r1.ask(
                [{"role": "user", "content": question}], sampling, on_delta=None if as_json else shown.add
            )

    reply: Reply = _run(work())
    if as_json:
        _print_json(reply_json(reply))
    else:
        shown.end()
        _err.print(redact(timing_line(reply)), style="dim", markup=False, emoji=False)
    if other := told(reply.model_requested, reply.model_served):
        print(f"dsr1kit: {redact(other)}", file=sys.stderr)
    if reply.outcome not in ("ok", "truncated"):
        raise SystemExit(_said(f"{reply.outcome.value}: {reply.detail}"))
    if reply.outcome == "truncated" and not as_json:
        print(f"dsr1kit: {redact(reply.detail)}", file=sys.stderr)


def _warn_of_retirement(names: Sequence[str], catalogue: Mapping[str, Channel]) -> None:
    for name in names:
        if name in catalogue and (warning := catalogue[name].retirement_warning()):
            print(f"dsr1kit: {warning}", file=sys.stderr)


def _said(message: str) -> int:
    print(f"dsr1kit: {redact(message)}", file=sys.stderr)
    return 1


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
        results = _run(doctoring.probe_all(names, catalogue, ceiling_tokens, clocks, show=not as_json))
        if as_json:
            _print_json({"channels": [r.to_json() for r in results]})
        verdicts = [{check.verdict for check in r.checks} for r in results]
        if any("fail" in told or "pass" not in told for told in verdicts):  # no pass: it did not answer at all
            raise SystemExit(1)
        return
    found = _run(doctoring.diagnose_all(names, catalogue, clocks, trace=trace, show=not as_json))
    if as_json:
        _print_json({"channels": [d.to_json() for d in found]})
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
        _err.print(redact(f"{number}/{count}  {said}"), style="dim", markup=False)

    try:
        done = _run(watch(settings, out, channels=load_channels(channel_file), on_tick=tell))
    except KeyboardInterrupt:
        _fail(f"stopped; the same command goes on with the watch in {out}", 130)
    paths = {"records": str(done.records), "summary": str(done.summary_path), "report": str(done.report)}
    if as_json:
        _print_json({"paths": paths, **done.summary})
    else:
        _print_paths(paths, done.summary["verdict"])
    if not any(c["availability"] and c["availability"]["value"] > 0 for c in done.summary["channels"].values()):
        raise SystemExit(1)


@app.command()
def emulate(
    weather: Annotated[
        str, typer.Argument(help="A weather file (TOML), or a shipped one: calm, busy, peak, scripted, impostor.")
    ],
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; 0: any free one.")] = 0,
    with_parent: Annotated[bool, typer.Option("--with-parent", hidden=True)] = False,
) -> None:
    """Serve an emulated provider on loopback; the first line of output is {"url": ...}."""
    from dsr1kit.emulator.server import Emulator
    from dsr1kit.emulator.weather import load_weather

    if not 0 <= port <= 65535:
        raise UsageError(f"--port must be from 0 to 65535, not {port}")
    emulator = Emulator(load_weather(weather))

    async def work() -> None:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        import signal

        for name in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(name, stop.set)
        if with_parent:
            # Its end closes this pipe, however it ends; an emulator must not outlive who started it.
            loop.add_reader(sys.stdin.fileno(), lambda: None if sys.stdin.buffer.raw.read(64) else stop.set())  # type: ignore[union-attr]  # raw is there for pipes
        async with emulator.listen(port) as url:
            print(json.dumps({"url": url}), flush=True)
            await stop.wait()

    _run(work())


@app.command()
def compare(
    channel_names: Annotated[
        str, typer.Option("--channels", help="Names, emulated:FILE and local:MODEL, separated by commas.")
    ],
    out: Annotated[Path, typer.Option(help="The run's folder; the same command again continues it.")],
    task: Annotated[str, typer.Option(help="arithmetic, or arithmetic:KIND.")] = "arithmetic",
    items: Annotated[int, typer.Option(help="Questions.")] = 50,
    samples: Annotated[int, typer.Option(help="Independent draws of each question.")] = 1,
    concurrency: Annotated[int, typer.Option(help="Hosted requests in flight, all channels together.")] = 4,
    rate: Annotated[float | None, typer.Option(help="Requests a second at random moments instead.")] = None,
    seed: Annotated[int, typer.Option(help="Of items, order, arrivals and draws.")] = 0,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.6,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling mass.")] = 0.95,
    max_tokens: Annotated[int, typer.Option(help="Cap on reasoning and answer together.")] = 32768,
    max_cost: Annotated[float | None, typer.Option(help="Stop asking when this much is spent in one currency.")] = None,
    first_token_s: Annotated[float, typer.Option(help="Longest wait for the first token, seconds.")] = 120.0,
    stall_s: Annotated[float, typer.Option(help="Longest silence between tokens, seconds.")] = 60.0,
    deadline_s: Annotated[float | None, typer.Option(help="Longest time for a whole answer, seconds.")] = None,
    channel_file: ChannelFile = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Ask failed requests again.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    as_json: AsJson = False,
) -> None:
    """Ask several channels the same questions and report quality, latency and cost."""
    from dsr1kit.access.channels import load_channels
    from dsr1kit.compare.journal import SOUND
    from dsr1kit.compare.runner import RunSettings, run_comparison
    from dsr1kit.progress import terminal_progress
    from dsr1kit.records import Sampling

    settings = RunSettings(
        channels=tuple(name.strip() for name in channel_names.split(",") if name.strip()),
        task=task, items=items, samples=samples, concurrency=concurrency, rate=rate, seed=seed,
        sampling=Sampling(temperature, top_p, max_tokens), max_cost=max_cost, first_token_s=first_token_s,
        stall_s=stall_s, deadline_s=deadline_s,
    )  # fmt: skip
    _warn_of_retirement(settings.channels, load_channels(channel_file))
    try:
        with terminal_progress(quiet=quiet) as tell:
            done = _run(
                run_comparison(settings, out, channel_file=channel_file, retry_failed=retry_failed, on_progress=tell)
            )
    except KeyboardInterrupt:
        _fail(f"stopped; the same command continues the run in {out}", 130)
    paths = {"records": str(done.records), "summary": str(done.summary_path), "report": str(done.report)}
    if as_json:
        _print_json({"paths": paths, **done.summary})
    else:
        _print_paths(paths, done.summary["verdict"])
    failed = sum(n for c in done.summary["channels"].values() for o, n in c["outcomes"].items() if o not in SOUND)
    if failed and not quiet and not as_json:
        print(
            f"dsr1kit: {failed} requests failed; the same command with --retry-failed asks them again", file=sys.stderr
        )
    dead = [n for n, c in done.summary["channels"].items() if c["accuracy"] is None and c["n"]]
    if dead:
        _explain(dead, done.summary, done.records)
        raise SystemExit(1)


def _explain(dead: Sequence[str], summary: dict[str, Any], records: Path) -> None:
    from dsr1kit.compare.journal import read_records

    rows = read_records(records)
    for name in dead:
        first = next(r for r in rows if r["channel"] == name)
        count = summary["channels"][name]["n"]
        print(f"dsr1kit: none of {count} requests to {name} gave an answer to judge; {first['outcome']}: "
              f"{first['detail']}", file=sys.stderr)  # fmt: skip


def _print_paths(paths: dict[str, str], verdict: Sequence[str]) -> None:
    for name, path in paths.items():
        print(f"{name + ':':<10}{path}")
    print()
    for line in verdict:
        print(line)


@app.command()
def run(
    notebook: Annotated[str, typer.Argument(help="A path, or the name of a shipped notebook.")],
    parameter: Annotated[
        list[str] | None, typer.Option("-p", "--parameter", metavar="NAME VALUE", help="May be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the executed copy and of what the notebook writes.")] = Path(
        "runs"
    ),
    cell_timeout_s: Annotated[float | None, typer.Option(help="Limit for a cell, seconds.")] = None,
    timeout_s: Annotated[float | None, typer.Option(help="Limit for the whole, seconds.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Do not tell which cell runs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Execute a notebook headless, with checked parameters, into --out."""
    from dsr1kit.notebooks import run_notebook

    def tell(number: int, count: int, first_line: str) -> None:
        _err.print(f"cell {number}/{count}  {first_line:.70}", style="dim", markup=False)

    given: dict[str, str] = {}
    for pair in parameter or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"-p takes a name and a value: -p NAME VALUE, not -p {pair}")
        if name in given:
            raise UsageError(f"parameter {name!r} is given twice")
        given[name] = value
    done = run_notebook(
        notebook, given, out_dir=out, cell_timeout_s=cell_timeout_s, total_timeout_s=timeout_s,
        on_progress=None if quiet else tell,
    )  # fmt: skip
    results = dict(done.results)
    if as_json:
        _print_json(
            {"status": done.status, "executed": str(done.executed), "sidecar": str(done.sidecar),
             "seconds": done.seconds, "error": done.error, "results": results}
        )  # fmt: skip
    elif done.status == "ok":
        verdict = results.pop("verdict", [])
        shown = {k: str(v) for k, v in results.items() if isinstance(v, str | int | float)}
        _print_paths({"executed": str(done.executed), **shown}, verdict)
    done.raise_for_status()


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    print(installed("dsr1kit"))
