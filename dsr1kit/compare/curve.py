"""What thinking buys: accuracy against the tokens that a model is allowed, or made, to think.

The same questions under several budgets: thinking closed after so many tokens, left alone, or prolonged by "Wait,"
(budget forcing, s1, arXiv 2501.19393). Knows items and a local model; nothing about how a budget is enforced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dsr1kit.compare.figures import COLOURS
from dsr1kit.compare.judge import verdict_of
from dsr1kit.compare.stats import Interval, PairedDifference, clustered_share, paired_difference
from dsr1kit.compare.tasks import Item
from dsr1kit.errors import UsageError
from dsr1kit.records import Sampling

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from dsr1kit.local.model import LocalModel

CAPS = (4, 8, 16, 32, 64)
FREE = "as it likes"


@dataclass(frozen=True, slots=True)
class Budget:
    """Tokens that a model may think at most, or must at least; neither: as many as it likes."""

    most: int | None = None
    least: int | None = None

    @property
    def label(self) -> str:
        """The budget in words, as `at most 16`."""
        if self.most is None:
            return FREE if self.least is None else f"at least {self.least}"
        return f"at most {self.most}" if self.least is None else f"{self.least} to {self.most}"

    def on(self, sampling: Sampling) -> Sampling:
        """The sampling with this budget. Raises UsageError for one that cannot be meant."""
        return replace(sampling, max_thinking_tokens=self.most, min_thinking_tokens=self.least)


@dataclass(frozen=True, slots=True)
class Point:
    """What came of one budget.

    Attributes:
        thinking_tokens: what was used, mean over the items.
        accuracy: share of right answers among all items; one that never came is not right.
        against_free: accuracy less that of free thinking on the same items; None for free thinking itself.
        answered: share of items whose answer came to its end.
    """

    budget: Budget
    thinking_tokens: float
    accuracy: Interval
    against_free: PairedDifference | None
    answered: float

    @property
    def differs(self) -> bool:
        """Whether the paired interval against free thinking excludes zero."""
        return self.against_free is not None and self.against_free.excludes_zero


async def thinking_curve(
    model: LocalModel,
    items: Sequence[Item],
    *,
    caps: Sequence[int] = CAPS,
    least: Sequence[int] = (),
    sampling: Sampling,
    batch_size: int = 64,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[Point]:
    """Put all items to a model under each budget; points from the tightest cap over free thinking to the longest.

    Args:
        model: open, and one that thinks in tags.
        items: the questions, the same for every budget.
        caps: most tokens of thinking, one point each.
        least: fewest tokens of thinking, one point each.
        sampling: for all of them; its own bounds on thinking are replaced.
        batch_size: questions answered at once.
        on_progress: called with (`thinking`, answers so far, answers in all).

    Raises:
        UsageError: no items, a budget that cannot be meant, or a model that has no think tags.
        ModelError: generation failed.
    """
    if not items:
        raise UsageError("a curve needs at least one item")
    if model.loaded.marks.end_think is None:
        raise UsageError(f"{model.name} has no think tags, so its thinking has no length to bound: take an R1 model")
    budgets = [*(Budget(most=n) for n in sorted(set(caps))), Budget(), *(Budget(least=n) for n in sorted(set(least)))]
    samplings = [budget.on(sampling) for budget in budgets]  # a wrong one is told before minutes of work
    right: dict[Budget, dict[str, list[bool]]] = {}
    used: dict[Budget, float] = {}
    ended: dict[Budget, float] = {}
    for number, (budget, drawn) in enumerate(zip(budgets, samplings, strict=True)):

        def tell(done: int, total: int, before: int = number) -> None:
            if on_progress is not None:
                on_progress("thinking", before * total + done, len(budgets) * total)

        tell(0, len(items))
        replies = await model.generate_many(
            [item.messages() for item in items], [drawn] * len(items), batch_size=batch_size, on_progress=tell
        )
        pairs = list(zip(items, replies, strict=True))
        right[budget] = {item.id: [verdict_of(reply, item) == "right"] for item, reply in pairs}
        used[budget] = sum(reply.usage.reasoning_tokens or 0 for reply in replies) / len(replies)
        ended[budget] = sum(reply.outcome == "ok" for reply in replies) / len(replies)
    return [_point(budget, right, used[budget], ended[budget]) for budget in budgets]


def _point(budget: Budget, right: Mapping[Budget, dict[str, list[bool]]], used: float, ended: float) -> Point:
    accuracy = clustered_share(right[budget])
    assert accuracy is not None  # noqa: S101 - there are items
    against = None if budget == Budget() else paired_difference(right[budget], right[Budget()])
    return Point(budget, used, accuracy, against, ended)


def curve_table(points: Sequence[Point]) -> pd.DataFrame:
    """One row a budget: tokens used, accuracy in percent and its difference to free thinking in points, with 95 %
    intervals; `items to settle` where the difference could be chance."""
    import pandas as pd

    rows = {}
    for point in points:
        gap = point.against_free
        rows[point.budget.label] = {
            "thinking tokens used": round(point.thinking_tokens, 1),
            "right %": percent(point.accuracy),
            "against free, points": "" if gap is None else percent(gap, sign="+"),
            "a difference": "" if gap is None else "yes" if point.differs else "not shown",
            "items to settle": "" if gap is None or gap.items_to_settle is None else f"{gap.items_to_settle:,}",
            "ended %": round(100 * point.answered, 1),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def percent(value: Interval | PairedDifference, sign: str = "") -> str:
    """A share or a difference with its interval, in percent or points; `sign` "+": zero and above get one."""
    return f"{100 * value.value:{sign}.1f} ({100 * value.low:{sign}.1f} to {100 * value.high:{sign}.1f})"


def figure(points: Sequence[Point]) -> Figure:
    """Accuracy with its 95 % interval over the mean thinking tokens used; capped, free and prolonged told apart by
    colour and shape."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7.4, 4.4), layout="constrained")
    axes = drawing.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    groups = (
        ("thinking closed after so many tokens", [p for p in points if p.budget.most is not None], "o", COLOURS[0]),
        ("as long as it likes", [p for p in points if p.budget == Budget()], "D", COLOURS[6]),
        ('prolonged by "Wait,"', [p for p in points if p.budget.least is not None], "s", COLOURS[1]),
    )
    ordered = [p for p in points if p.budget.least is None]
    prolonged = [p for p in points if p.budget.most is None]
    for line, colour, style in ((ordered, COLOURS[0], "-"), (prolonged, COLOURS[1], "--")):
        axes.plot([p.thinking_tokens for p in line], [100 * p.accuracy.value for p in line], style, color=colour, lw=1)
    for label, group, marker, colour in groups:
        if not group:
            continue
        value = [100 * p.accuracy.value for p in group]
        low = [100 * (p.accuracy.value - p.accuracy.low) for p in group]
        high = [100 * (p.accuracy.high - p.accuracy.value) for p in group]
        axes.errorbar([p.thinking_tokens for p in group], value, yerr=[low, high], fmt=marker, color=colour,
                      markersize=7, capsize=3, linewidth=1.4, label=label)  # fmt: skip
        for point in group:
            if bound := point.budget.most or point.budget.least:
                # Away from the line of its group: capped points rise to the right, prolonged ones begin there.
                sign, side, align = ("≤", -8, "right") if point.budget.most else ("≥", 8, "left")
                axes.annotate(f"{sign} {bound}", (point.thinking_tokens, 100 * point.accuracy.value), xytext=(side, 5),
                              textcoords="offset points", ha=align, fontsize=8, color=colour)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("thinking tokens used, mean over the questions (log scale)")
    axes.set_ylabel("right answers (%)")
    axes.set_ylim(-2, 102)
    axes.margins(x=0.1)
    axes.grid(alpha=0.25)
    drawing.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return drawing
