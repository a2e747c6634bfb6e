"""What the command line prints of channels and their examinations. Knows nothing about options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from dsr1kit.access.overview import price_text
from dsr1kit.keys import redact

if TYPE_CHECKING:
    from dsr1kit.access.findings import Diagnosis, Step
    from dsr1kit.access.probe import Check, Conformance

_SIGNS = {"pass": ("ok", "green"), "warn": ("look", "yellow"), "fail": ("FAIL", "bold red"), "skip": ("-", "dim"),
          "unknown": ("?", "yellow")}  # fmt: skip


def channel_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """The catalogue on stdout: one line a channel."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    titles = ("channel", "status", "key", "in/out per 1M now", "context", "retires", "region", "family", "model")
    cells = [
        (
            row["name"],
            row["status"],
            {None: "none needed", True: "set", False: "missing"}[row["key_present"]],
            price_text(row),
            "" if row["context"] is None else f"{row['context']:,}",
            f"{row['retires']:%Y-%m-%d}" if row["retires"] else "",
            row["region"],
            row["family"],
            row["model"],
        )
        for row in rows
    ]
    for number, title in enumerate(titles):
        # In a narrow window the model alone gives way: names, variables and prices are there to be copied.
        least = None if title == "model" else max([len(title), *(len(line[number]) for line in cells)])
        justify: Any = "right" if title == "context" else "left"
        table.add_column(title, no_wrap=True, overflow="ellipsis", min_width=least, justify=justify)
    for line in cells:
        table.add_row(*(Text(cell) for cell in line))
    _out(200).print(table)


def name_line(name: str) -> None:
    """Whose findings follow."""
    _out().print(Text(name), soft_wrap=True)


def step_line(step: Step) -> None:
    """One finding, as it is made."""
    _line(step.state, step.name, step.said, f"{step.seconds * 1e3:7.0f} ms" if step.seconds else " " * 10)


def check_line(check: Check) -> None:
    """One check, as it is settled."""
    _line(check.verdict, check.name, check.evidence)


def _line(state: str, name: str, said: str, seconds: str = "") -> None:
    sign, style = _SIGNS[state]
    text = Text.assemble(
        (f"{sign:<5}", style), f"{name:<15}", (f"{seconds:<12}" if seconds else "", "dim"), redact(said)
    )
    _out().print(text, soft_wrap=True)


def verdict_line(diagnosis: Diagnosis) -> None:
    """The examination's last line: usable or not, the outcome, what to do."""
    mark = " (emulated)" if diagnosis.emulated else ""
    cost = "" if not diagnosis.cost else f" (the question cost {diagnosis.cost:.2g} {diagnosis.currency})"
    word = "usable" if diagnosis.usable else f"not usable: {diagnosis.outcome.value}"
    style = "bold green" if diagnosis.usable else "bold red"
    said = Text.assemble(f"{diagnosis.channel}{mark}: ", (word, style), f". {diagnosis.detail}{cost}")
    _out().print(said, soft_wrap=True, end="\n\n")


def conformance_line(result: Conformance) -> None:
    """What the probe's checks cost."""
    cost = "price unknown" if result.cost is None else f"{result.cost:.4g} {result.currency}"
    mark = " (emulated)" if result.emulated else ""
    _out().print(Text(f"{result.channel}{mark}: {result.requests} requests, {cost}"), soft_wrap=True, end="\n\n")


class _Out(Console):
    def on_broken_pipe(self) -> None:
        """A reader that leaves early (head, less) is no bad answer; rich would exit with 1."""
        raise BrokenPipeError("the reader has left")


def month_table(summary: Mapping[str, Mapping[str, Any]], claims: Sequence[Mapping[str, str]]) -> None:
    """The rehearsed month: one line a policy, then the article's claims."""
    from rich.table import Table

    titles = ("policy", "answered %", "hours down a month", "p99 s", "calls a request", "USD per 1,000", "requests/min")
    table = Table(*titles, box=None, header_style="bold", pad_edge=False)
    for name, row in summary.items():
        spans = [
            f"{scale * row[key]['value']:{form}} ({scale * row[key]['low']:{form}}–{scale * row[key]['high']:{form}})"
            for key, scale, form in (
                ("availability", 100, ".2f"),
                ("hours_down", 1, ".2f"),
                ("total_s_p99", 1, ".0f"),
                ("amplification", 1, ".2f"),
                ("cost_per_1000", 1, ".2f"),
            )
        ]
        table.add_row(name, *spans, f"{row['throughput_per_minute']['value']:.0f}")
    out = _out(150)
    out.print(Text("Emulated providers on a virtual clock; intervals are 95 % over the months."))
    out.print(table)
    for claim in claims:
        out.print(Text(f"claim: {claim['claim']}: {claim['holds']}; measured: {claim['measured']}"), soft_wrap=True)


def _out(width: int | None = None) -> Console:
    out = _Out(highlight=False)
    if width is not None and not out.is_terminal:
        out.width = width
    return out
