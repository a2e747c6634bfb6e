"""Alarms for a reinforcement that learns nothing: no error tells that the gradient is zero.

Reads the trainer's metrics step by step. Knows numbers and words; nothing about torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Steps over which a share is looked at.
WINDOW = 5
CLIPPED, DEAD = 0.5, 0.8
#: Hours after which Colab ends a free session, whatever runs; its own documentation says "at most".
COLAB_HOURS = 12.0


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something is wrong, since which step, and what to do."""

    step: int
    name: str
    said: str


@dataclass(slots=True)
class Watch:
    """Looks at each step's metrics.

    Attributes:
        limit: most tokens of a completion, for the message.
        patience: steps in a row without any gradient after which `dead` is true.
        raised: the alarms so far, each kind once.
    """

    limit: int
    patience: int = 20
    raised: list[Alarm] = field(default_factory=list)
    silent: int = 0
    _clipped: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _even: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _rewards: deque[float | None] = field(default_factory=lambda: deque(maxlen=WINDOW))

    @property
    def dead(self) -> bool:
        """Whether so many steps in a row taught nothing that going on is a waste."""
        return self.silent >= self.patience

    def look(self, step: int, metrics: Mapping[str, Any]) -> list[Alarm]:
        """New alarms after a step, from TRL's names of its metrics."""
        if "frac_reward_zero_std" not in metrics:
            return []
        even = float(metrics["frac_reward_zero_std"])
        self._even.append(even)
        self._clipped.append(float(metrics.get("completions/clipped_ratio", 0.0)))
        right_now = metrics.get("rewards/right/mean", metrics.get("reward", 0.0))
        self._rewards.append(None if right_now is None else float(right_now))  # None: no gold could be read
        self.silent = self.silent + 1 if even >= 1.0 else 0
        if len(self._even) < min(WINDOW, self.patience):  # who has little patience is told why as well
            return []
        clipped, equal = (sum(values) / len(values) for values in (self._clipped, self._even))
        readable = [value for value in self._rewards if value is not None]
        right = sum(readable) / len(readable) if readable else None
        new: list[Alarm] = []
        if clipped > CLIPPED:
            new.append(
                Alarm(
                    step,
                    "clipped",
                    f"{clipped:.0%} of the completions reach {self.limit} tokens and are cut, so they "
                    "earn nothing: raise --max-tokens, or reward shorter ones (--length-reward 0.2)",
                )
            )
        if equal > DEAD:
            if right is None:
                why, mend = "no gold can be read", "mend the golds of the questions, or name the scorer that reads them"
            elif right < 0.05:
                why, mend = "all wrong", "take easier questions, or tune on examples first (finetune sft)"
            elif right > 0.95:
                why, mend = "all right", "take harder questions"
            else:
                why, mend = "alike", "raise --generations or --temperature"
            new.append(
                Alarm(
                    step,
                    "no spread",
                    f"in {equal:.0%} of the groups all completions earn the same ({why}), and such a "
                    f"group teaches nothing: {mend}",
                )
            )
        known = {alarm.name for alarm in self.raised}
        new = [alarm for alarm in new if alarm.name not in known]
        self.raised += new
        return new


def too_long(hours_left: float, *, colab: bool, save_every: int) -> str:
    """What to say where a run will outlast a Colab session; empty where it will not."""
    if not colab or hours_left <= COLAB_HOURS:
        return ""
    kept = (
        f"checkpoints every {save_every} steps let the same command go on, if --out is on a mounted Drive"
        if save_every
        else "set --save-every, and --out to a mounted Drive, so that it can go on"
    )
    return f"about {hours_left:.0f} hours left, and Colab ends a session after {COLAB_HOURS:.0f} at most: {kept}"
