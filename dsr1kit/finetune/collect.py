"""Distil from whoever still serves R1: ask a teacher, keep what is right, as training data.

The asking is a comparison with one channel: journalled, resumable, budgeted, graded. Knows runs and records;
nothing about models or training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsr1kit.compare.journal import read_records
from dsr1kit.compare.runner import Finished, run_comparison
from dsr1kit.compare.settings import OnProgress, RunSettings
from dsr1kit.compare.summary import Record
from dsr1kit.errors import RunError, UsageError
from dsr1kit.finetune.data import Example, example, write_file
from dsr1kit.records import Outcome

EXAMPLES = "examples.jsonl"


@dataclass(frozen=True, slots=True)
class Collected:
    """What a teacher gave.

    Attributes:
        examples: those kept; path: the file that holds them.
        asked: answers asked for; dropped: why others were not kept, with how many.
        questions: of those asked, how many have a kept answer; of `questions_asked`.
        cost, currency: what the asking cost so far; None where the price is not known.
        run: the comparison's folder and report.
    """

    examples: tuple[Example, ...]
    path: Path
    asked: int
    dropped: dict[str, int]
    questions: int
    questions_asked: int
    cost: float | None
    currency: str | None
    run: Finished

    def told(self) -> list[str]:
        """Lines for a person."""
        why = _counted(self.dropped)
        cost = "" if self.cost is None else f"; cost {self.currency} {self.cost:.4g}"
        kept = f"{len(self.examples):,} of {self.asked:,} answers kept" + (f" (dropped: {why})" if why else "")
        return [f"{kept}; {self.questions:,} of {self.questions_asked:,} questions have one{cost}"]


async def collect(
    settings: RunSettings,
    out: str | Path,
    *,
    most: int = 1,
    channel_file: str | Path | None = None,
    retry_failed: bool = False,
    client_check: bool = False,
    on_progress: OnProgress | None = None,
) -> Collected:
    """Ask a teacher, or go on asking, and write the answers that are right into `examples.jsonl`.

    Args:
        settings: of the asking; one channel, the teacher. `samples` answers a question give the harder ones more
            chances; `max_cost` ends the asking cleanly. Its task must be none that will be measured on: of the
            kit's own, `practice:KIND`.
        out: the run's folder; the same settings on it go on where a killed one was.
        most: answers kept of one question, the first right ones.
        channel_file, retry_failed, client_check, on_progress: as for `run_comparison`.

    Raises:
        UsageError: nothing is to be kept; and as `run_comparison`.
        RunError: nothing was right; says how the asking ended instead.
    """
    if most < 1:
        raise UsageError(f"most must be at least 1, not {most}: nothing would be kept of what is paid for")
    run = await run_comparison(
        settings, out, channel_file=channel_file, retry_failed=retry_failed, client_check=client_check,
        on_progress=on_progress,
    )  # fmt: skip
    records = read_records(run.records)
    kept, dropped = keep(records, most=most)
    if not kept:
        how = _counted(dict(Counter(r["outcome"] for r in records).most_common()))
        raise RunError(
            f"{settings.channels[0]} gave nothing to keep (ended: {how}; dropped: {_counted(dropped)}); see "
            f"{run.report}"
        )
    channel = run.summary["channels"][settings.channels[0]]
    return Collected(
        examples=tuple(kept),
        path=write_file(kept, Path(out) / EXAMPLES),
        asked=len(records),
        dropped=dict(dropped),
        questions=len({one.question for one in kept}),
        questions_asked=len({r["item"] for r in records}),
        cost=channel["cost_total"],
        currency=channel["currency"],
        run=run,
    )


def keep(records: Iterable[Record], *, most: int = 1) -> tuple[list[Example], Counter[str]]:
    """The answers of a run that are worth training on, in the order in which they were asked, and why not the others.

    Kept is what ended by itself, was judged right, and shows its reasoning; of one question at most `most`, no two
    alike.
    """
    kept: list[Example] = []
    dropped: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    for record in _in_order(records):
        reason = _reason(record)
        one = None if reason else _example(record)
        if one is not None and (one.id in seen or counts[record["item"]] >= most):
            reason = "more than enough"
        if reason or one is None:
            dropped[reason] += 1
            continue
        seen.add(one.id)
        counts[record["item"]] += 1
        kept.append(one)
    return kept, dropped


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {what}" for what, n in counts.items())


def _in_order(records: Iterable[Record]) -> list[Record]:
    return sorted(records, key=lambda r: (r["sample"], r["item"]))


def _reason(record: Record) -> str:
    if record["outcome"] != Outcome.OK.value:
        return str(record["outcome"])
    if record["verdict"] != "right":
        return str(record["verdict"])
    return "" if (record["reasoning"] or "").strip() else "no reasoning shown"


def _example(record: Record) -> Example:
    # What a generator's own scorer judges cannot be judged again from the gold alone.
    plain = record["scorer"] != "reasoning-gym"
    said: dict[str, Any] = {"gold": record["gold"], "scorer": record["scorer"]} if plain else {}
    return example(
        record["question"], record["reasoning"], record["answer"], kind=record["kind"], language=record["language"],
        source=_teacher(record), **said,
    )  # fmt: skip


def _teacher(record: Record) -> str:
    """The teacher's name for the data, without folders of this machine."""
    kind, colon, name = str(record["channel"]).partition(":")
    told = f"{kind}:{name.rpartition('/')[2]}" if colon else kind
    return f"{told} (emulated)" if record["emulated"] and kind != "emulated" else told
