"""What a comparison asks, of whom and how.

Plain values, checked; knows nothing about tasks, channels or files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from dsr1kit.errors import UsageError
from dsr1kit.records import Sampling

#: What runs may report while they go: (stage, done, total); stages are `prepare`, `warm-up`, `hosted` and `local`.
OnProgress = Callable[[str, int, int], None]
#: Questions where none are counted; a set that has fewer is asked whole.
USUAL_ITEMS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What a comparison asks, of whom and how.

    Attributes:
        channels: catalogue names, `emulated:FILE`, `local:MODEL`.
        task, samples: how many draws of each question of which task; each draw is a request of its own, never
            cached or merged.
        items: questions; 0: all of a task that has an end; None: 50, or all of a task that has fewer.
        concurrency: requests in flight over all hosted channels together (closed loop).
        rate: requests per second in all, at random (Poisson) moments (open loop); None: closed loop.
        warm_up: requests to each channel, at every start, before those that count; they are kept apart in
            warm-up.jsonl, their cost counts.
        seed: of items, order, arrival times and draws.
        sampling: R1's by default; `max_tokens` here is a cap for tasks with short answers.
        max_cost: in a channel's own currency; when the sum in one currency reaches it, the rest of the
            run is recorded as `over_budget` and not asked, save of channels that charge nothing. The
            same run with more to spend asks that rest. Requests already in flight then still end, so that
            the sum may pass it by what `concurrency` requests cost.
        objective: a service objective such as `first_token_s=2,total_s=60`, in seconds; empty: none. It
            changes what is reported, not what is asked.
        first_token_s, stall_s, deadline_s: limits for hosted channels, in seconds.
    """

    channels: tuple[str, ...]
    task: str = "arithmetic"
    items: int | None = None
    samples: int = 1
    concurrency: int = 4
    rate: float | None = None
    warm_up: int = 0
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    max_cost: float | None = None
    objective: str = ""
    first_token_s: float = 120.0
    stall_s: float = 60.0
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        if not self.channels:
            raise UsageError("a comparison needs at least one channel")
        twice = [c for c in self.channels if self.channels.count(c) > 1]
        if twice:
            raise UsageError(f"channel {twice[0]!r} is named twice")
        for name, least in (("items", 0), ("samples", 1), ("concurrency", 1), ("warm_up", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} must be at least {least}, not {value}")
        for name in ("rate", "max_cost", "first_token_s", "stall_s", "deadline_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} must be above 0, not {value}")

    def sampling_for(self, item: str, sample: int) -> Sampling:
        """The sampling of one draw of an item; the run's seed counts where the sampling has none of its own.

        Each item has a seed of its own: with one for all, their draws would go together in a model that honours it,
        and intervals take items as independent.
        """
        seed = self.seed if self.sampling.seed is None else self.sampling.seed
        mixed = int.from_bytes(hashlib.sha256(f"{seed}/{item}".encode()).digest()[:4], "big") >> 1
        return replace(self.sampling, seed=mixed, sample=sample)
