"""Commands that run something: an emulated provider, a comparison, a notebook."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

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
    warn_of_retirement,
)
from dsr1kit.commands.show import month_table
from dsr1kit.errors import UsageError


@app.command()
def emulate(
    weather: Annotated[
        str,
        typer.Argument(help="A weather file (TOML), or a shipped one: calm, busy, peak, scripted, narrow, impostor."),
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

    run_async(work())


@app.command()
def compare(
    channel_names: Annotated[
        str, typer.Option("--channels", help="Names, emulated:FILE and local:MODEL, separated by commas.")
    ],
    out: Annotated[Path, typer.Option(help="The run's folder; the same command again continues it.")],
    task: Annotated[
        str,
        typer.Option(
            help="arithmetic, questions, aime24, aime25, math500, gpqa-diamond, gsm8k, ceval, any of them "
            "with :PART, reasoning-gym:NAME, or file:PATH (JSONL or CSV)."
        ),
    ] = "arithmetic",
    items: Annotated[
        int | None, typer.Option(help="Questions; 0: all.", show_default="50, or all of a task with fewer")
    ] = None,
    samples: Annotated[int, typer.Option(help="Independent draws of each question.")] = 1,
    concurrency: Annotated[int, typer.Option(help="Hosted requests in flight, all channels together.")] = 4,
    rate: Annotated[float | None, typer.Option(help="Requests a second at random moments instead.")] = None,
    warm_up: Annotated[int, typer.Option(help="Requests to each channel first, which do not count.")] = 0,
    slo: Annotated[str, typer.Option(help="Service objective, as first_token_s=2,total_s=60.")] = "",
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
    client_check: Annotated[
        bool, typer.Option("--client-check/--no-client-check", help="Measure the client itself first, for seconds.")
    ] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    as_json: AsJson = False,
) -> None:
    """Ask several channels the same questions and report quality, latency and cost."""
    from dsr1kit.access.channels import load_channels
    from dsr1kit.compare.journal import SOUND
    from dsr1kit.compare.runner import RunSettings, run_comparison
    from dsr1kit.progress import terminal_progress
    from dsr1kit.records import Outcome, Sampling

    settings = RunSettings(
        channels=tuple(name.strip() for name in channel_names.split(",") if name.strip()),
        task=task, items=items, samples=samples, concurrency=concurrency, rate=rate, warm_up=warm_up, seed=seed,
        sampling=Sampling(temperature, top_p, max_tokens), max_cost=max_cost, objective=slo,
        first_token_s=first_token_s, stall_s=stall_s, deadline_s=deadline_s,
    )  # fmt: skip
    warn_of_retirement(settings.channels, load_channels(channel_file))

    def note(line: str) -> None:
        if not quiet:
            err.print(f"expected cost: {line}", markup=False)

    try:
        with terminal_progress(quiet=quiet) as tell:
            done = run_async(
                run_comparison(
                    settings,
                    out,
                    channel_file=channel_file,
                    retry_failed=retry_failed,
                    client_check=client_check,
                    on_progress=tell,
                    on_note=note,
                )
            )
    except KeyboardInterrupt:
        fail(f"stopped; the same command continues the run in {out}", 130)
    paths = {"records": str(done.records), "summary": str(done.summary_path), "report": str(done.report)}
    if as_json:
        print_json({"paths": paths, **done.summary})
    else:
        print_paths(paths, done.summary["verdict"])
    ended = Counter[str]()
    for channel in done.summary["channels"].values():
        ended.update(channel["outcomes"])
    kept_back = ended[Outcome.OVER_BUDGET.value]
    failed = sum(n for outcome, n in ended.items() if outcome not in SOUND) - kept_back
    if not quiet and not as_json:
        if failed:
            err.print(f"dsr1kit: {_requests(failed)} failed; the same command with --retry-failed asks them again")
        if kept_back:
            err.print(f"dsr1kit: {_requests(kept_back)} kept back by --max-cost; the same command with more asks them")
    dead = [n for n, c in done.summary["channels"].items() if c["accuracy"] is None and c["n"]]
    if dead:
        _explain(dead, done.summary, done.records)
        raise SystemExit(1)


def _requests(n: int) -> str:
    return f"{n:,} request{'s' if n != 1 else ''}"


def _explain(dead: Sequence[str], summary: dict[str, Any], records: Path) -> None:
    from dsr1kit.compare.journal import read_records

    rows = read_records(records)
    for name in dead:
        first = next(r for r in rows if r["channel"] == name)
        count = summary["channels"][name]["n"]
        print(f"dsr1kit: none of {count} requests to {name} gave an answer to judge; {first['outcome']}: "
              f"{first['detail']}", file=sys.stderr)  # fmt: skip


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
        err.print(f"cell {number}/{count}  {first_line:.70}", style="dim", markup=False)

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
        print_json(
            {"status": done.status, "executed": str(done.executed), "sidecar": str(done.sidecar),
             "seconds": done.seconds, "error": done.error, "results": results}
        )  # fmt: skip
    elif done.status == "ok":
        verdict = results.pop("verdict", [])
        shown = {k: str(v) for k, v in results.items() if isinstance(v, str | int | float)}
        print_paths({"executed": str(done.executed), **shown}, verdict)
    done.raise_for_status()


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    print(installed("dsr1kit"))


@app.command()
def rehearse(
    requests: Annotated[int, typer.Option(help="For each policy, over all seeds together.")] = 100_000,
    seeds: Annotated[int, typer.Option(help="Months; intervals are taken over them.")] = 5,
    deadline_s: Annotated[float, typer.Option(help="A request counts as answered only within it, seconds.")] = 120.0,
    first_token_s: Annotated[float, typer.Option(help="The router's longest wait for a first token, seconds.")] = 30.0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    as_json: AsJson = False,
) -> None:
    """A month in a minute: four policies against the same emulated outages, on a virtual clock."""
    from dsr1kit.compare.month import MonthSettings, claims, rehearse_month
    from dsr1kit.progress import terminal_progress

    settings = MonthSettings(requests=requests, seeds=seeds, deadline_s=deadline_s, first_token_s=first_token_s)
    with terminal_progress(quiet=quiet) as tell:
        summary = rehearse_month(settings, tell)
    rows = claims(summary)
    if as_json:
        print_json({"emulated": True, "settings": asdict(settings), "policies": summary, "claims": rows})
        return
    month_table(summary, rows)
