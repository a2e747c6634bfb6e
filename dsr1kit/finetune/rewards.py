"""Rewards for reinforcement: the comparison's own scorers, the form of the reply, and its length.

Each is a number for one completion. None: the gold cannot be read, and the completion is worth nothing either way.
Knows texts and scorers; nothing about trainers.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

from dsr1kit.compare.scoring import last_boxed
from dsr1kit.errors import UsageError

CLOSE = "</think>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewards:
    """What each kind of reward weighs; 0: it is not counted.

    Attributes:
        right: the answer equals the gold (1) or not (0), by the question's scorer.
        form: the thinking is closed once, and an answer with one box follows (1), or not (0).
        length: from 0 for an empty completion down to -1 for one as long as the limit, counted for right answers
            alone, so that being wrong quickly pays nothing.
    """

    right: float = 1.0
    form: float = 0.1
    length: float = 0.0

    def __post_init__(self) -> None:
        if not self.right > 0:
            raise UsageError(
                f"the weight of right answers must be above 0, not {self.right}: nothing else teaches them"
            )
        if not (self.form >= 0 and self.length >= 0):
            raise UsageError("weights of rewards must be 0 or more")


def answer_of(completion: str, thinks: bool) -> str:
    """What stands behind the thinking; of a model that thinks, nothing where it is not closed."""
    _, closed, answer = completion.rpartition(CLOSE)
    return answer if closed or not thinks else ""


def cut_off(ids: Sequence[int], limit: int, ends: Container[int]) -> bool:
    """Whether a completion was cut by the limit: as long as that, without an end mark."""
    return len(ids) >= limit and ids[-1] not in ends


def form_of(completion: str, thinks: bool) -> float:
    """1 where the thinking is closed once and an answer with a box follows, else 0."""
    if thinks and completion.count(CLOSE) != 1:
        return 0.0
    answer = answer_of(completion, thinks)
    return 1.0 if answer.count("\\boxed{") == 1 and last_boxed(answer) else 0.0


def length_of(tokens: int, limit: int, right: float | None) -> float:
    """0 down to -1 as a right completion nears the limit; 0 for others."""
    return -min(1.0, tokens / limit) if right else 0.0
