"""Before and after: what a tuning gained on its task, on held-out questions, and what was forgotten elsewhere.

The same questions to the model as it was and as it is, paired, with the comparison's own statistics and report; what
the token limit cut is counted apart. Knows local models, tasks and run folders; nothing about training.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsr1kit import about
from dsr1kit.access.prices import Price
from dsr1kit.compare.items import Item, digest, hashed
from dsr1kit.compare.journal import Journal
from dsr1kit.compare.judge import Judge
from dsr1kit.compare.record import to_record
from dsr1kit.compare.runner import finish
from dsr1kit.compare.settings import RunSettings
from dsr1kit.compare.slim import load_records
from dsr1kit.compare.stats import Interval, PairedDifference, clustered_share, holm, paired_difference
from dsr1kit.compare.summary import Record, judged
from dsr1kit.compare.tasks import load_task
from dsr1kit.errors import UsageError
from dsr1kit.local.adapters import WEIGHTS
from dsr1kit.local.identity import sha256_of
from dsr1kit.local.model import LocalModel
from dsr1kit.records import Outcome, Sampling

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

BEFORE = "before"
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GainSettings:
    """What is asked before and after.

    Attributes:
        model: as for `LocalModel`; `quantization` likewise.
        adapters: name to folder of what is held against the model as it is.
        task: what was tuned; others: tasks that were not, to see what was forgotten.
        items: questions of each task.
        samples: answers to each question.
        sampling: R1's, or greedy; one seed for both, so that only the weights differ.
        seed: of questions and draws.
        batch_size: questions answered at once.
    """

    model: str
    adapters: Mapping[str, Path]
    task: str
    others: tuple[str, ...] = ()
    items: int = 300
    samples: int = 1
    sampling: Sampling = field(default_factory=lambda: Sampling(max_tokens=2048))
    seed: int = 0
    batch_size: int = 64
    quantization: str = "none"

    def __post_init__(self) -> None:
        if not self.adapters or BEFORE in self.adapters:
            raise UsageError(f"name at least one adapter, and none {BEFORE!r}")
        if self.task in self.others:
            raise UsageError(f"{self.task} is the tuned task, and cannot be one of the others as well")
        for name in ("items", "samples", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Change:
    """How one task changed by one adapter.

    Attributes:
        tuned: whether it is what the tuning was for.
        before, after: share of right answers, with its interval.
        difference: after less before over the same questions.
        whole: the same with answers that the token limit cut left out; None where none is left.
        cut_before, cut_after: answers that it cut.
        differs: whether the interval excludes zero, after Holm's correction over all tasks of the adapter.
    """

    adapter: str
    task: str
    tuned: bool
    before: Interval
    after: Interval
    difference: PairedDifference
    whole: PairedDifference | None
    cut_before: int
    cut_after: int
    differs: bool


@dataclass(frozen=True, slots=True)
class Gain:
    """All changes, and the folder with the records and the report."""

    changes: tuple[Change, ...]
    folder: Path

    @property
    def report(self) -> Path:
        """The comparison's own report of the same records."""
        return self.folder / "report.html"

    def of(self, task: str, adapter: str | None = None) -> Change:
        """The change of one task. Raises UsageError where there is none."""
        for change in self.changes:
            if change.task == task and adapter in (None, change.adapter):
                return change
        raise UsageError(f"{task} was not asked")

    def verdict(self) -> list[str]:
        """A sentence a change; a difference is called one only where it is shown."""
        said = []
        for one in self.changes:
            low, high = 100 * one.difference.low, 100 * one.difference.high
            what = f"{one.adapter}: {one.task} from {_told(one.before)} to {_told(one.after)}"
            if not one.differs:
                shown = f"no change shown ({low:+.1f} to {high:+.1f} points)"
            elif low > 0:
                shown = f"{low:.1f} to {high:.1f} points better"
            else:
                shown = f"{-high:.1f} to {-low:.1f} points worse" + ("" if one.tuned else ": forgotten")
            cut = f"; cut by the token limit: {one.cut_before} before, {one.cut_after} after" if (
                one.cut_before or one.cut_after
            ) else ""  # fmt: skip
            said.append(f"{what}: {shown}{cut}.")
        return said

    def table(self) -> pd.DataFrame:
        """One row a change: percent right before and after, the difference in points, with 95 % intervals."""
        import pandas as pd

        rows = [
            {
                "adapter": one.adapter,
                "task": one.task,
                "tuned": "yes" if one.tuned else "no",
                "before %": _percent(one.before),
                "after %": _percent(one.after),
                "difference, points": _points(one.difference),
                "without cut answers": "" if one.whole is None else _points(one.whole),
                "cut": f"{one.cut_before} / {one.cut_after}",
                "a change": "yes" if one.differs else "not shown",
            }
            for one in self.changes
        ]
        columns = None if rows else ["adapter", "task"]
        return pd.DataFrame(rows, columns=columns).set_index(["adapter", "task"])

    def as_data(self) -> list[dict[str, Any]]:
        """The changes as plain data."""
        return [
            asdict(one)
            | {"before": one.before._asdict(), "after": one.after._asdict(), "difference": one.difference._asdict(),
               "whole": one.whole and one.whole._asdict()}
            for one in self.changes
        ]  # fmt: skip

    def figure(self) -> Figure:
        """Before and after of every task, joined by a line, with their 95 % intervals."""
        from matplotlib.figure import Figure

        from dsr1kit.compare.figures import COLOURS

        figure = Figure(figsize=(7.4, 1.5 + 0.5 * len(self.changes)), layout="constrained")
        axes = figure.subplots()
        rows = list(range(len(self.changes)))[::-1]
        for row, one in zip(rows, self.changes, strict=True):
            axes.plot([100 * one.before.value, 100 * one.after.value], [row, row], color="#999999", lw=1.4, zorder=1)
        for which, colour, marker, label in ((0, COLOURS[1], "s", "before"), (1, COLOURS[0], "o", "after")):
            shares = [(one.before, one.after)[which] for one in self.changes]
            value = [100 * share.value for share in shares]
            spread = [[100 * (s.value - s.low) for s in shares], [100 * (s.high - s.value) for s in shares]]
            at = [row + (0.09 if which else -0.09) for row in rows]
            axes.errorbar(value, at, xerr=spread, fmt=marker, color=colour, capsize=3, markersize=7, label=label)
        several = len({one.adapter for one in self.changes}) > 1
        names = [
            f"{one.task}{' (tuned)' if one.tuned else ''}" + (f"\n{one.adapter}" if several else "")
            for one in self.changes
        ]
        axes.set_yticks(rows, names)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlim(-3, 103)
        axes.set_xlabel("right answers (%), held-out questions, with 95 % intervals")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
        axes.tick_params(labelsize=9)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        return figure


def questions(settings: GainSettings) -> dict[str, list[Item]]:
    """The held-out questions of each task, the tuned one first; a finite task may have fewer than asked for.

    Raises:
        UnknownName, UsageError, RunError: as `load_task`.
    """
    from dsr1kit.compare.tasks import facts

    found = {}
    for name in (settings.task, *settings.others):
        size = facts(name).size
        found[name] = load_task(name, settings.items if size is None else min(size, settings.items), settings.seed)
    return found


async def measure_gain(
    settings: GainSettings,
    out: str | Path,
    *,
    asked: Mapping[str, Sequence[Item]] | None = None,
    on_progress: OnProgress | None = None,
) -> Gain:
    """Ask the model without and with each adapter, write a run's folder, and say what changed.

    The same settings on the same folder go on where a killed run was.

    Args:
        settings: what is asked.
        out: the folder; a run's files (`records.jsonl`, `summary.json`, `report.html`).
        asked: the questions by task, the tuned one first; None: `questions(settings)`.
        on_progress: called with (before or the adapter's name, answers so far, answers in all).

    Raises:
        UsageError: a folder of another run.
        ModelError: model or adapter cannot be loaded.
    """
    by_task = _named_apart(asked if asked is not None else questions(settings))
    every = _apart(by_task)
    names = (BEFORE, *settings.adapters)
    drawn = RunSettings(channels=names, seed=settings.seed, samples=settings.samples, sampling=settings.sampling)
    identity = {
        "channels": list(names), "task": settings.task, "others": list(settings.others), "items": len(every),
        "samples": settings.samples, "seed": settings.seed, "sampling": asdict(settings.sampling),
        "model": settings.model, "quantization": settings.quantization, "digest": digest(every), "concurrency": 1,
        "rate": None, "warm_up": 0, "adapters": {name: _known_by(path) for name, path in settings.adapters.items()},
    }  # fmt: skip
    folder = Path(out)
    with Journal(folder, identity, {"versions": about.versions(), "hardware": about.hardware()}) as journal:
        done = journal.done()
        keys = [(item, sample) for sample in range(settings.samples) for item in every]
        todo = {name: [key for key in keys if (name, key[0].id, key[1]) not in done] for name in names}
        if any(todo.values()):
            model = LocalModel(settings.model, quantization=settings.quantization, adapters=settings.adapters)  # type: ignore[arg-type]  # checked there
            async with model as local, Judge() as judge:
                for name in names:
                    if todo[name]:
                        await local.use_adapter(None if name == BEFORE else name)
                        await _ask(local, name, todo[name], drawn, settings.batch_size, journal, judge, on_progress)
        found = Gain(changes(load_records(journal.records_path), by_task, tuple(settings.adapters)), folder)
        journal.note(gain={"verdict": found.verdict(), "changes": found.as_data()})
    finish(folder)
    (folder / "gain.json").write_text(json.dumps(found.as_data(), indent=1) + "\n", encoding="utf-8")
    return found


async def _ask(
    local: LocalModel,
    name: str,
    keys: Sequence[tuple[Item, int]],
    settings: RunSettings,
    batch_size: int,
    journal: Journal,
    judge: Judge,
    on_progress: OnProgress | None,
) -> None:
    # So many at a time that a kill loses little, and the batch stays full most of the time.
    part = 8 * batch_size
    for at in range(0, len(keys), part):
        some = keys[at : at + part]

        def tell(done: int, _: int, before: int = at) -> None:
            if on_progress is not None:
                on_progress(name, before + done, len(keys))

        replies = await local.generate_many(
            [item.messages() for item, _ in some],
            [settings.sampling_for(item.id, sample) for item, sample in some],
            batch_size=batch_size,
            on_progress=tell,
        )
        for (item, sample), reply in zip(some, replies, strict=True):
            # A model here that ends without an answer has answered wrongly: no provider is to blame for it.
            own = replace(reply, outcome=Outcome.OK) if reply.outcome is Outcome.EMPTY else reply
            verdict = await judge.verdict(own, item)
            journal.append(to_record(reply, name, item, sample, Price(0.0, 0.0), verdict))


def _named_apart(by_task: Mapping[str, Sequence[Item]]) -> dict[str, list[Item]]:
    """The questions by task; two that are not the same get names of their own where files name them alike."""
    prompts: dict[str, set[str]] = {}
    for items in by_task.values():
        for item in items:
            prompts.setdefault(item.id, set()).add(item.prompt)
    return {
        task: [replace(i, id=f"{i.id}-{hashed(i.prompt)}") if len(prompts[i.id]) > 1 else i for i in items]
        for task, items in by_task.items()
    }


def _known_by(adapter: Path) -> str:
    """What tells an adapter from another, wherever it lies; its folder where its weights cannot be read."""
    weights = Path(adapter) / WEIGHTS
    return sha256_of(weights)[:16] if weights.is_file() else str(adapter)


def _apart(by_task: Mapping[str, Sequence[Item]]) -> list[Item]:
    """All questions; one of two tasks is asked once and counts in both."""
    return list({item.id: item for items in by_task.values() for item in items}.values())


def changes(
    records: Sequence[Record], by_task: Mapping[str, Sequence[Item]], adapters: Sequence[str]
) -> tuple[Change, ...]:
    """How each task changed by each adapter; the first task is the tuned one."""
    found: list[Change] = []
    for adapter in adapters:
        own: list[Change] = []
        for number, (task, items) in enumerate(by_task.items()):
            ids = {item.id for item in items}
            before, after = (
                [r for r in records if r["channel"] == name and r["item"] in ids] for name in (BEFORE, adapter)
            )
            shares = clustered_share(judged(before)), clustered_share(judged(after))
            difference = paired_difference(judged(after), judged(before))
            if difference is None or shares[0] is None or shares[1] is None:
                continue
            uncut = [[r for r in rs if r["outcome"] != Outcome.TRUNCATED.value] for rs in (before, after)]
            whole = paired_difference(judged(uncut[1]), judged(uncut[0]))
            cut = [Counter(r["outcome"] for r in rs)[Outcome.TRUNCATED.value] for rs in (before, after)]
            own.append(
                Change(
                    adapter,
                    task,
                    number == 0,
                    shares[0],
                    shares[1],
                    difference,
                    whole,
                    cut[0],
                    cut[1],
                    difference.excludes_zero,
                )
            )
        corrected = holm([one.difference.p for one in own])
        for one, p in zip(own, corrected, strict=True):
            found.append(replace(one, differs=one.differs and p < 0.05))
    return tuple(found)


def _percent(share: Interval) -> str:
    return f"{100 * share.value:.1f} ({100 * share.low:.1f} to {100 * share.high:.1f})"


def _told(share: Interval) -> str:
    return f"{share.value:.1%} ({100 * share.low:.1f} to {100 * share.high:.1f})"


def _points(difference: PairedDifference) -> str:
    return f"{100 * difference.value:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"


def size_figure(gain: Gain, sizes: Mapping[str, int]) -> Figure:
    """Accuracy on the tuned task against the number of examples that each adapter was trained on.

    Args:
        gain: with one adapter a size.
        sizes: the adapters' numbers of examples.
    """
    from matplotlib.figure import Figure

    from dsr1kit.compare.figures import COLOURS

    points = sorted(
        ((sizes[one.adapter], one) for one in gain.changes if one.tuned and one.adapter in sizes), key=lambda p: p[0]
    )
    drawing = Figure(figsize=(7.4, 3.8), layout="constrained")
    axes = drawing.subplots()
    shares = [one.after for _, one in points]
    spread = [[100 * (s.value - s.low) for s in shares], [100 * (s.high - s.value) for s in shares]]
    axes.errorbar([n for n, _ in points], [100 * s.value for s in shares], yerr=spread, fmt="o-", color=COLOURS[0],
                  capsize=3, markersize=7, label="after")  # fmt: skip
    if points:
        axes.axhline(100 * points[0][1].before.value, color=COLOURS[1], linestyle="--", label="before")
    axes.set_xscale("log")
    axes.set_xticks([n for n, _ in points], [f"{n:,}" for n, _ in points])
    axes.minorticks_off()
    axes.set_xlabel("examples trained on (log scale)")
    axes.set_ylabel("right answers (%)")
    axes.set_ylim(-3, 103)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    return drawing
