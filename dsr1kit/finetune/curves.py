"""How a training went, step by step, from a trainer's log, and its figure. Knows nothing about trainers or models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Curve:
    """How a supervised training went, one entry a step.

    Attributes:
        steps: numbers, from 1.
        losses: mean cross-entropy of the tokens that count, in nats.
        learning_rates: of the step.
        grad_norms: before clipping.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    learning_rates: tuple[float, ...]
    grad_norms: tuple[float, ...]

    @classmethod
    def of(cls, history: Sequence[Mapping[str, Any]]) -> Curve:
        """From a trainer's log."""
        rows = [row for row in history if "loss" in row and "learning_rate" in row]
        return cls(
            _numbers(rows), _column(rows, "loss"), _column(rows, "learning_rate"), _column(rows, "grad_norm"),
        )  # fmt: skip

    def figure(self) -> Figure:
        """Loss by step above, the learning rate below."""
        drawing, above, below, colours = _two_panels(height=4.2, shares=(3, 1))
        span = max(1, len(self.losses) // 20)
        above.plot(self.steps, self.losses, color=colours[0], alpha=0.35, linewidth=1, label="each step")
        above.plot(
            self.steps, _smooth(self.losses, span), color=colours[0], linewidth=2, label=f"mean of {span + 1} steps"
        )
        above.set_ylabel("loss (nats a token)")
        above.set_ylim(bottom=0)
        above.legend(frameon=False, fontsize=9)
        below.plot(self.steps, self.learning_rates, color=colours[1], linewidth=2)
        below.set_ylabel("learning rate")
        return drawing


@dataclass(frozen=True, slots=True)
class RewardCurve:
    """How a reinforcement went, one entry a step.

    Attributes:
        steps: numbers, from 1.
        right: share of right completions; reward: the weighted sum of all rewards, mean.
        spread: share of groups in which the completions differ in reward, the only ones that teach.
        clipped: share of completions cut by the limit; tokens: their mean length.
        entropy: mean of the completions' tokens, in nats.
    """

    steps: tuple[int, ...]
    right: tuple[float, ...]
    reward: tuple[float, ...]
    spread: tuple[float, ...]
    clipped: tuple[float, ...]
    tokens: tuple[float, ...]
    entropy: tuple[float, ...]

    @classmethod
    def of(cls, history: Sequence[Mapping[str, Any]]) -> RewardCurve:
        """From a trainer's log."""
        rows = [row for row in history if "frac_reward_zero_std" in row]
        return cls(
            _numbers(rows), _column(rows, "rewards/right/mean"), _column(rows, "reward"),
            _column(rows, "frac_reward_zero_std", lambda even: 1 - even), _column(rows, "completions/clipped_ratio"),
            _column(rows, "completions/mean_length"), _column(rows, "entropy"),
        )  # fmt: skip

    def figure(self) -> Figure:
        """Share of right completions above; spread and clipped share below."""
        drawing, above, below, colours = _two_panels(height=5.0, shares=(3, 2))
        right, spread, clipped = ([100 * r for r in part] for part in (self.right, self.spread, self.clipped))
        span = max(1, len(right) // 12)
        above.plot(self.steps, right, color=colours[0], alpha=0.3, lw=1, label="each step")
        above.plot(self.steps, _smooth(right, span), color=colours[0], lw=2, label=f"mean of {span + 1} steps")
        above.set_ylabel("right completions (%)")
        below.plot(self.steps, _smooth(spread, span), color=colours[2], lw=2, label="groups that teach")
        below.plot(self.steps, _smooth(clipped, span), color=colours[1], lw=2, ls="--", label="cut by the limit")
        below.set_ylabel("share (%)")
        for axes in (above, below):
            axes.set_ylim(-3, 103)
            axes.legend(frameon=False, fontsize=9)
        return drawing


def _numbers(rows: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    return tuple(int(row["step"]) for row in rows)


def _column(rows: Sequence[Mapping[str, Any]], name: str, of: Callable[[float], float] = float) -> tuple[float, ...]:
    return tuple(of(float(row.get(name) or 0.0)) for row in rows)


def _smooth(values: Sequence[float], span: int) -> list[float]:
    """Means over each value and the `span` before it."""
    parts = [values[max(0, at - span) : at + 1] for at in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def _two_panels(*, height: float, shares: tuple[int, int]) -> tuple[Figure, Any, Any, Sequence[str]]:
    """A figure of two panels over the steps, and the kit's colours."""
    from matplotlib.figure import Figure

    from dsr1kit.compare.figures import COLOURS

    drawing = Figure(figsize=(7.4, height), layout="constrained")
    above, below = drawing.subplots(2, 1, sharex=True, height_ratios=shares)
    below.set_xlabel("step")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=9)
    return drawing, above, below, COLOURS
