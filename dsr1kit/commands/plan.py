"""The command that plans a comparison: questions, money and time, before anything is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsr1kit.commands.shared import AsJson, ChannelFile, app, print_json, warn_of_retirement

if TYPE_CHECKING:
    from dsr1kit.compare.detection import Need
    from dsr1kit.compare.money import Estimate
    from dsr1kit.compare.plan import ChannelPlan, ComparisonPlan


@app.command()
def plan(
    channel_names: Annotated[
        str, typer.Option("--channels", help="Names, emulated:FILE and local:MODEL, separated by commas.")
    ],
    task: Annotated[str, typer.Option(help="As in compare.")] = "arithmetic",
    items: Annotated[int | None, typer.Option(help="Questions; none: as many as the difference needs.")] = None,
    samples: Annotated[int | None, typer.Option(help="Answers to each; none: as the difference needs.")] = None,
    difference: Annotated[float, typer.Option(help="To be told apart, in points of accuracy.")] = 3.0,
    power: Annotated[float, typer.Option(help="Chance of telling it apart, if it is there.")] = 0.8,
    like: Annotated[Path | None, typer.Option(help="Folder of an earlier run of the task, to learn from.")] = None,
    concurrency: Annotated[int, typer.Option(help="Hosted requests in flight, all channels together.")] = 4,
    rate: Annotated[float | None, typer.Option(help="Requests a second at random moments instead.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Cap on reasoning and answer together.")] = 32768,
    seed: Annotated[int, typer.Option(help="Of the items.")] = 0,
    channel_file: ChannelFile = None,
    as_json: AsJson = False,
) -> None:
    """How many questions, how much money, how long: planned before anything is asked.

    Prices and limits are the catalogue's. What nobody has measured is told as unknown, with its upper bound; a small
    run of the same task, named by --like, fills it in.
    """
    from dsr1kit.access.channels import load_channels
    from dsr1kit.compare.plan import PlanSettings, plan_comparison

    settings = PlanSettings(
        channels=tuple(name.strip() for name in channel_names.split(",") if name.strip()),
        task=task, items=items, samples=samples, difference=difference / 100, power=power, like=like,
        concurrency=concurrency, rate=rate, max_tokens=max_tokens, seed=seed,
    )  # fmt: skip
    warn_of_retirement(settings.channels, load_channels(channel_file))
    found = plan_comparison(settings, channel_file=channel_file)
    if as_json:
        print_json(asdict(found))
    else:
        _show(found)


def _show(found: ComparisonPlan) -> None:
    from rich.table import Table
    from rich.text import Text

    from dsr1kit.commands.show import _out
    from dsr1kit.compare.plan import spoken

    out = _out(130)
    if found.needs:
        many = f", {found.comparisons} pairs at once" if found.comparisons > 1 else ""
        title = f"To tell {100 * found.difference:g} points apart in {found.power:.0%} of cases{many}:"
        out.print(Text(title), soft_wrap=True)
        counts = list(dict.fromkeys(need.samples for need in found.needs))
        table = Table("questions, with answers to each:", *map(str, counts), box=None, header_style="bold",
                      pad_edge=False)  # fmt: skip
        for basis in dict.fromkeys(need.basis for need in found.needs):
            table.add_row(Text(basis), *(_needed(need) for need in found.needs if need.basis == basis))
        out.print(table)
    size = f"{found.items:,} questions of {found.facts.name}, {found.samples:,} answer(s) to each"
    out.print(Text(f"\nPlanned: {size}."), soft_wrap=True)
    table = Table("channel", "requests", "tokens in", "tokens out", "cost expected", "cost at most", "a request takes",
                  box=None, header_style="bold", pad_edge=False)  # fmt: skip
    for channel in found.channels:
        e = channel.estimate
        in_tokens, out_tokens = (
            "?" if tokens is None else f"{tokens:,.0f}" for tokens in (e.prompt_tokens, e.completion_tokens)
        )
        each = "?" if channel.each_s is None else f"{channel.each_s:.3g} s"
        table.add_row(Text(channel.channel), f"{e.requests:,}", in_tokens, out_tokens,
                      Text(_expected(e)), Text(_money(e.bound, e.currency)), each)  # fmt: skip
    out.print(table)
    if found.seconds is not None:
        out.print(Text(f"It takes about {spoken(found.seconds)}."))
    elif found.least_seconds:
        out.print(Text(f"It takes at least {spoken(found.least_seconds)}."))
    for note in found.notes:
        out.print(Text(f"- {note}"), soft_wrap=True)
    for note, names in _by_note(found.channels).items():
        out.print(Text(f"- {', '.join(names)}: {note}"), soft_wrap=True)


def _by_note(channels: Sequence[ChannelPlan]) -> dict[str, list[str]]:
    """What is to be said, each once, with the channels that it holds for."""
    names: dict[str, list[str]] = {}
    for channel in channels:
        source = channel.estimate.tokens_source
        for note in (*([f"tokens as in {source}"] if source else []), *channel.estimate.notes, *channel.notes):
            names.setdefault(note, []).append(channel.channel)
    return names


def _needed(need: Need) -> str:
    return f"{need.items:,}" + (" (too few)" if need.enough is False else "")


def _expected(estimate: Estimate) -> str:
    said = _money(estimate.expected, estimate.currency)
    if estimate.low is None or estimate.high is None or estimate.high == 0:
        return said
    return f"{said} ({_amount(estimate.low)} to {_amount(estimate.high)})"


def _money(amount: float | None, currency: str | None) -> str:
    if amount is None:
        return "?"
    return "no fee" if amount == 0 else f"{_amount(amount)} {currency}"


def _amount(amount: float) -> str:
    return f"{amount:,.0f}" if amount >= 100 else f"{amount:.3g}"
