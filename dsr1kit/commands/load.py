"""The command that loads a channel until its service objective breaks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dsr1kit.commands.shared import AsJson, ChannelFile, app, err, fail, print_json, print_paths, run_async, said
from dsr1kit.errors import RunError, UsageError

_MOST_RATES = 40


@app.command()
def sweep(
    channel: Annotated[str, typer.Argument(help="A channel's name, or emulated:FILE.")],
    out: Annotated[Path, typer.Option(help="A new folder for sweep.json, sweep.jsonl and sweep.svg.")],
    slo: Annotated[
        str,
        typer.Option(
            help="The objective, seconds: first_token_s=2,total_s=60 (also first_answer_s, inter_token_s).",
        ),
    ],
    rates: Annotated[str, typer.Option(help="Requests a second, upwards, as 1,2,4,8.")] = "",
    start: Annotated[float, typer.Option("--from", help="Without --rates: the lowest rate.")] = 1.0,
    end: Annotated[float, typer.Option("--to", help="Without --rates: the highest, doubled up to.")] = 64.0,
    seconds: Annotated[float, typer.Option(help="At each rate; 60 and more show limits by the minute.")] = 20.0,
    share: Annotated[float, typer.Option(help="Of the requests, which must meet the objective.")] = 0.9,
    refine: Annotated[int, typer.Option(help="How often the gap around the knee is halved.")] = 2,
    task: Annotated[str, typer.Option(help="What is asked; as for compare.")] = "arithmetic",
    items: Annotated[int, typer.Option(help="Questions, asked in turn.")] = 50,
    warm_up: Annotated[int, typer.Option("--warm-up", help="Requests before, which do not count.")] = 2,
    seed: Annotated[int, typer.Option(help="Of items, moments and draws.")] = 0,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.6,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling mass.")] = 0.95,
    max_tokens: Annotated[int, typer.Option(help="Cap on reasoning and answer together.")] = 32768,
    max_cost: Annotated[float | None, typer.Option(help="Stop when this much is spent.")] = None,
    first_token_s: Annotated[float, typer.Option(help="Longest wait for the first token, seconds.")] = 120.0,
    stall_s: Annotated[float, typer.Option(help="Longest silence between tokens, seconds.")] = 60.0,
    deadline_s: Annotated[float, typer.Option(help="Longest time for a whole answer, seconds.")] = 120.0,
    channel_file: ChannelFile = None,
    client_check: Annotated[bool, typer.Option(help="Measure this client first, for some seconds.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar and no line a rate.")] = False,
    as_json: AsJson = False,
) -> None:
    """Ask a channel at rising rates until its objective breaks: the knee, and what it gives beyond."""
    from dsr1kit.compare.figures import to_svg
    from dsr1kit.compare.load import parse_slo
    from dsr1kit.compare.sweep import SweepSettings, run_sweep
    from dsr1kit.compare.sweep_figures import sweep_alt, sweep_figure
    from dsr1kit.progress import terminal_progress
    from dsr1kit.records import Sampling

    settings = SweepSettings(
        channel=channel, objective=parse_slo(slo), rates=_rates(rates, start, end), seconds=seconds, share=share,
        refine=refine, task=task, items=items, warm_up=warm_up, seed=seed,
        sampling=Sampling(temperature, top_p, max_tokens), max_cost=max_cost, first_token_s=first_token_s,
        stall_s=stall_s, deadline_s=deadline_s,
    )  # fmt: skip

    def note(line: str) -> None:
        if not quiet:
            err.print(line, markup=False)

    try:
        with terminal_progress(quiet=quiet) as tell:
            found = run_async(
                run_sweep(
                    settings, out, channel_file=channel_file, client_check=client_check, on_progress=tell, on_note=note
                )
            )
    except KeyboardInterrupt:
        fail(f"stopped; what was asked is in {out / 'sweep.jsonl'}", 130)
    told = asdict(found)
    paths = {"sweep": str(out / "sweep.json"), "records": str(out / "sweep.jsonl")}
    if found.steps:
        figure = out / "sweep.svg"
        try:
            figure.write_text(
                to_svg(sweep_figure(told), f"Requests and latency of {channel} by rate", sweep_alt(told)),
                encoding="utf-8",
            )
        except OSError as error:
            raise RunError(f"{figure} cannot be written ({error.strerror}); sweep.json is whole") from None
        paths["figure"] = str(figure)
    if as_json:
        print_json({"paths": paths, **told})
    else:
        print_paths(paths, found.verdict)
    if not found.answered:
        raise SystemExit(said(f"no request to {channel} was answered: {found.stopped}"))


def _rates(text: str, start: float, end: float) -> tuple[float, ...]:
    """The rates of `--rates`, or those doubled from one to the other, both included."""
    if text:
        try:
            return tuple(float(part) for part in text.split(","))
        except ValueError:
            raise UsageError(f"--rates takes numbers separated by commas, as 1,2,4,8, not {text!r}") from None
    if not 0 < start <= end:
        raise UsageError(f"--from must be above 0 and at most --to, not {start:g} and {end:g}")
    found = [start]
    while found[-1] * 2 < end:
        found.append(found[-1] * 2)
        if len(found) > _MOST_RATES:
            raise UsageError(f"from {start:g} to {end:g} there are too many doublings; name them with --rates")
    return tuple(found) if found[-1] == end else (*found, end)
