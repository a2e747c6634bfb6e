"""Ask every channel the same questions and write down what happens: the run behind `dsr1kit compare`.

Hosted and emulated channels share one interleaved order, so that drift over the run hits all alike; local
models come after, one request at a time, with nothing else being measured. Each reply becomes a record in
the journal as it ends; the same settings on the same folder continue a killed run.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from dsr1kit import about
from dsr1kit.access.channels import Channel, load_channels
from dsr1kit.access.prices import Price
from dsr1kit.backends import LOCAL, is_local, open_backend, price_of
from dsr1kit.compare import report
from dsr1kit.compare.asking import Asking, Question, in_order
from dsr1kit.compare.beforehand import expected_costs, in_words
from dsr1kit.compare.items import Item
from dsr1kit.compare.journal import Journal
from dsr1kit.compare.judge import Judge
from dsr1kit.compare.load import parse_slo
from dsr1kit.compare.selfwatch import ClientBias, measure_client
from dsr1kit.compare.settings import USUAL_ITEMS, OnProgress, RunSettings
from dsr1kit.compare.slim import load_records
from dsr1kit.compare.summary import summarize
from dsr1kit.compare.tasks import digest, endless, facts, load_task
from dsr1kit.errors import ModelError, RunError
from dsr1kit.keys import require_key
from dsr1kit.local.model import LocalModel
from dsr1kit.local.places import locate
from dsr1kit.records import Backend

__all__ = ["Finished", "OnProgress", "RunSettings", "finish", "run_comparison"]


class Finished(NamedTuple):
    """A finished run: its folder's files, and the summary as data."""

    folder: Path
    records: Path
    summary_path: Path
    report: Path
    summary: dict[str, Any]


async def run_comparison(
    settings: RunSettings,
    out: str | Path,
    *,
    channel_file: str | Path | None = None,
    retry_failed: bool = False,
    client_check: bool = True,
    on_progress: OnProgress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Finished:
    """Run, or continue, a comparison in the folder `out`.

    Args:
        settings: what to ask.
        out: the run's folder; holds run.json, records.jsonl, summary.json and report.html.
        channel_file: the person's own catalogue; None: the one DSR1KIT_CHANNELS names.
        retry_failed: ask failed requests of an earlier start again.
        client_check: measure the client itself first, for a few seconds, against a scripted server of its own
            at this run's concurrency; its bias is in the report.
        on_progress: told of each finished request.
        on_note: told, before anything is asked, what each channel that charges is expected to cost.

    Raises:
        UsageError: unknown names, missing keys, a folder of another run; before anything is asked.
        ModelError: a local model that is not there and cannot be fetched, likewise.
        RunError: the folder can no longer be written.
    """
    catalogue = load_channels(channel_file)
    objective = parse_slo(settings.objective) if settings.objective else None
    tell = on_note or (lambda _: None)
    items = load_items(settings)
    clocks: dict[str, Any] = {k: getattr(settings, k) for k in ("first_token_s", "stall_s", "deadline_s")}
    backends = {name: open_backend(name, catalogue, **clocks) for name in settings.channels}
    for name in settings.channels:
        if name in catalogue and catalogue[name].api_key_env and not catalogue[name].retired_on():
            require_key(catalogue[name].api_key_env, name)
        if is_local(name):
            locate(name.removeprefix(LOCAL).partition("@")[0])
    prices = {name: price_of(name, catalogue) for name in settings.channels}
    identity = _identity(settings, items, catalogue, backends)
    hosted_ones = [catalogue[name] for name in settings.channels if name in catalogue]
    surroundings = {
        "versions": about.versions(),
        "hardware": about.hardware(),
        "promises": {c.name: c.availability for c in hosted_ones if c.availability is not None},
        "warnings": [w for c in hosted_ones if (w := c.retirement_warning())],
    }
    with Journal(Path(out), identity, surroundings) as journal:
        journal.note(objective=None if objective is None else asdict(objective))
        if retry_failed:
            journal.forget_failed()
        async with Judge() as judge:
            run = Asking(settings, journal, judge, prices, on_progress)
            if not run.budget_spent():
                journal.forget_unasked()
            open_ones = [q for q in in_order(settings, items) if q.key not in journal.done()]
            try:
                await _fetch(backends, dict.fromkeys(q.channel for q in open_ones))
            except BaseException:
                journal.forget_unused()
                raise
            hosted = [q for q in open_ones if not is_local(q.channel)]
            if hosted:
                warm_ups = list(_warm_ups(settings, items, hosted))
                said = _foretold(settings, [*warm_ups, *hosted], catalogue, backends, prices, journal, run.spent())
                if journal.noted("expected_cost") is None:
                    journal.note(expected_cost=said)
                for line in said:
                    tell(line)
                bias = await measure_client(settings.concurrency) if client_check else None
                await _hosted(run, backends, hosted, warm_ups, bias)
            for name in settings.channels:
                own = [q for q in open_ones if q.channel == name and is_local(name)]
                if own:
                    try:
                        async with backends[name] as backend:
                            await run.local(backend, [*_warm_ups(settings, items, own), *own])
                    except ModelError as error:
                        finish(Path(out))  # what the others answered is there to be read
                        raise ModelError(f"{error} (the other channels are in {Path(out) / 'report.html'})") from None
    return finish(Path(out))


async def _fetch(backends: Mapping[str, object], channels: Iterable[str]) -> None:
    """Have the local models among the channels on this machine, and room for each. Raises as `LocalModel.fetch`."""
    for name in channels:
        if isinstance(backend := backends[name], LocalModel):
            await backend.fetch()
            await backend.require_room()


def load_items(settings: RunSettings) -> list[Item]:
    """The questions of a run.

    Raises:
        UsageError: no such task, or fewer questions than asked for.
    """
    if settings.items is None:
        # How many a file or a part of a set holds is known when it is read; the first of all are those of fewer.
        few = USUAL_ITEMS if endless(settings.task) else 0
        return load_task(settings.task, few, settings.seed)[:USUAL_ITEMS]
    return load_task(settings.task, settings.items, settings.seed)


def _warm_ups(settings: RunSettings, items: Sequence[Item], to_come: Sequence[Question]) -> Iterator[Question]:
    for number in range(settings.warm_up):
        for name in dict.fromkeys(q.channel for q in to_come):
            yield Question(name, items[number % len(items)], -1 - number)


def _foretold(
    settings: RunSettings,
    questions: Sequence[Question],
    catalogue: Mapping[str, Channel],
    backends: Mapping[str, Any],
    prices: Mapping[str, Price | None],
    journal: Journal,
    spent: Mapping[str, float],
) -> list[str]:
    """What the hosted channels will cost, in words."""
    models, limits = {}, {}
    for name in settings.channels:
        known = catalogue.get(name)
        weather = getattr(backends[name], "weather", None)
        models[name] = known.model if known is not None else "" if weather is None else weather.served_model
        most = None if known is None else known.max_output
        limits[name] = min(settings.sampling.max_tokens, most or settings.sampling.max_tokens)
    now = dt.datetime.now(dt.UTC)
    found = expected_costs(questions, prices, models, limits, facts(settings.task), journal.read(), now)
    return list(in_words(found, settings.max_cost, spent))


async def _hosted(
    run: Asking,
    backends: Mapping[str, AbstractAsyncContextManager[Backend]],
    questions: Sequence[Question],
    warm_ups: Sequence[Question],
    bias: ClientBias | None,
) -> None:
    """Ask all hosted channels, opened for that long."""
    async with AsyncExitStack() as stack:
        opened: dict[str, Backend] = {}
        for name in dict.fromkeys(q.channel for q in questions):
            opened[name] = await stack.enter_async_context(backends[name])
        await run.prepare(opened, [*warm_ups, *questions])
        await run.hosted(opened, warm_ups)
        await run.hosted(opened, questions, bias)


def finish(folder: Path) -> Finished:
    """Write summary.json and report.html from what the folder holds.

    Raises:
        UsageError: a line of its records is none.
        RunError: they cannot be written.
    """
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    identity = run["identity"]
    records = load_records(folder / "records.jsonl")
    summary = summarize(records, identity["channels"], run.get("promises"), run=run) | {
        "run": run["run"],
        "task": identity["task"],
        "items": identity["items"],
        "samples": identity["samples"],
    }
    summary_path, report_path = folder / "summary.json", folder / "report.html"
    rendered = report.render(run, records, summary)
    try:
        summary_path.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        report_path.write_text(rendered, encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"{error.filename} cannot be written ({error.strerror}); the records in {folder} are whole"
        ) from None
    return Finished(folder, folder / "records.jsonl", summary_path, report_path, summary)


def _identity(
    settings: RunSettings, items: Sequence[Item], catalogue: Mapping[str, Channel], backends: Mapping[str, Any]
) -> dict[str, Any]:
    identity = asdict(settings) | {"channels": list(settings.channels), "items": len(items), "digest": digest(items)}
    # Raising the budget is how a run that hit it goes on; the objective is about what came, not what was asked.
    del identity["max_cost"], identity["objective"]
    known: dict[str, Any] = {}
    for name in settings.channels:
        if name in catalogue:
            c = catalogue[name]
            known[name] = {"base_urls": list(c.base_urls), "model": c.model, "reasoning": c.reasoning}
        elif hasattr(backends[name], "weather"):
            weather = json.loads(json.dumps(asdict(backends[name].weather), default=str))
            del weather["path"]
            known[name] = {"weather": weather}
    return identity | {"facts": known}
