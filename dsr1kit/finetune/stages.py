"""A recipe in several stages, each measured: the same held-out questions to the model after every one.

Knows local models and statistics; nothing about how a stage is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsr1kit.compare.items import Item
from dsr1kit.compare.judge import Judge
from dsr1kit.compare.settings import RunSettings
from dsr1kit.compare.stats import Interval, PairedDifference, clustered_share, paired_difference
from dsr1kit.errors import UsageError
from dsr1kit.local.model import LocalModel
from dsr1kit.records import Outcome, Sampling

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Stage:
    """A model after one stage.

    Attributes:
        parameters: number of its weights.
        accuracy: share of right answers by task, with intervals.
        gained: by task, the difference to the stage before over the same questions; None for the first.
        cut: by task, answers that ran into the limit of tokens, which are mostly wrong for it.
        whole: as `accuracy`, of the others alone; a task whose answers were all cut is not in it.
    """

    name: str
    parameters: int
    accuracy: Mapping[str, Interval]
    gained: Mapping[str, PairedDifference | None]
    cut: Mapping[str, int]
    whole: Mapping[str, Interval]


async def measure_stages(
    models: Mapping[str, str | Path],
    asked: Mapping[str, Sequence[Item]],
    *,
    sampling: Sampling,
    seed: int = 0,
    batch_size: int = 64,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[Stage]:
    """Put the same questions to every model.

    Args:
        models: a source as for `LocalModel` by stage, in their order.
        asked: questions by task.
        sampling: for all; seed: of its draws.
        batch_size: questions answered at once.
        on_progress: called with (stage, answers so far, answers in all).

    Raises:
        UsageError: no stages or no questions.
        ModelError: a model cannot be loaded.
    """
    if not models or not any(asked.values()):
        raise UsageError("stages need at least one model and one question")
    drawn = RunSettings(channels=("stage",), seed=seed, sampling=sampling)
    right: dict[str, dict[str, dict[str, list[bool]]]] = {}
    sizes: dict[str, int] = {}
    cut: dict[str, dict[str, set[str]]] = {}
    async with Judge() as judge:
        for name, source in models.items():
            right[name], cut[name] = {}, {}
            async with LocalModel(source, name=name) as local:
                sizes[name] = local.loaded.parameters
                for task, items in asked.items():

                    def tell(done: int, total: int, stage: str = f"{name}, {task}") -> None:
                        if on_progress is not None:
                            on_progress(stage, done, total)

                    replies = await local.generate_many(
                        [item.messages() for item in items],
                        [drawn.sampling_for(item.id, 0) for item in items],
                        batch_size=batch_size,
                        on_progress=tell,
                    )
                    verdicts = [await judge.verdict(r, item) for r, item in zip(replies, items, strict=True)]
                    right[name][task] = {i.id: [v == "right"] for i, v in zip(items, verdicts, strict=True)}
                    cut[name][task] = {
                        i.id for i, r in zip(items, replies, strict=True) if r.outcome == Outcome.TRUNCATED
                    }
    found = []
    before: str | None = None
    for name in models:
        ended = {task: {i: v for i, v in right[name][task].items() if i not in cut[name][task]} for task in asked}
        gained = {
            task: None if before is None else paired_difference(right[name][task], right[before][task])
            for task in asked
        }
        counts = {task: len(ids) for task, ids in cut[name].items()}
        found.append(Stage(name, sizes[name], _shares(right[name]), gained, counts, _shares(ended)))
        before = name
    return found


def _shares(right: Mapping[str, Mapping[str, Sequence[bool]]]) -> dict[str, Interval]:
    """Share of right answers by task, where there are any answers."""
    return {task: share for task, answers in right.items() if (share := clustered_share(answers)) is not None}


def stages_table(stages: Sequence[Stage]) -> pd.DataFrame:
    """One row a stage: weights, percent right by task, and what the stage gained in points, with 95 % intervals.

    Where answers of a task were cut, so many, and the percent right without them.
    """
    import pandas as pd

    rows = {}
    cut_somewhere = {task for stage in stages for task, count in stage.cut.items() if count}
    for stage in stages:
        row: dict[str, object] = {"weights": f"{stage.parameters:,}"}
        for task, share in stage.accuracy.items():
            row[f"{task} %"] = f"{100 * share.value:.1f} ({100 * share.low:.1f} to {100 * share.high:.1f})"
            gap = stage.gained[task]
            row[f"{task}, gained"] = (
                "" if gap is None else f"{100 * gap.value:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})"
                + ("" if gap.excludes_zero else ", not shown")
            )  # fmt: skip
            if task in cut_somewhere:
                rest = stage.whole.get(task)
                row[f"{task}, cut"] = f"{stage.cut[task]}" + (
                    f"; {100 * rest.value:.1f} % without" if rest is not None and stage.cut[task] else ""
                )
        rows[stage.name] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def stages_figure(stages: Sequence[Stage]) -> Figure:
    """Accuracy by stage, a line a task, with 95 % intervals."""
    from matplotlib.figure import Figure

    from dsr1kit.compare.figures import COLOURS

    drawing = Figure(figsize=(7.4, 4.0), layout="constrained")
    axes = drawing.subplots()
    tasks = list(dict.fromkeys(task for stage in stages for task in stage.accuracy))
    for number, task in enumerate(tasks):
        at = [place + 0.06 * (number - (len(tasks) - 1) / 2) for place in range(len(stages))]
        shares = [stage.accuracy[task] for stage in stages]
        spread = [[100 * (s.value - s.low) for s in shares], [100 * (s.high - s.value) for s in shares]]
        axes.errorbar(at, [100 * s.value for s in shares], yerr=spread, fmt="os^D"[number % 4] + "-:"[number % 2],
                      color=COLOURS[number], capsize=3, markersize=7, linewidth=1.4, label=task)  # fmt: skip
    axes.set_xticks(range(len(stages)), [stage.name.replace(" ", "\n", 1) for stage in stages])
    axes.set_ylabel("right answers (%), held-out questions")
    axes.set_ylim(-3, 103)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.tick_params(labelsize=9)
    axes.legend(frameon=False, fontsize=9)
    return drawing
