"""What an examination finds: steps, a diagnosis, and far sides' words made fit to be shown.

Knows nothing about how it was found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dsr1kit.keys import redact
from dsr1kit.records import ANSWERED, Outcome, Reply

State = Literal["pass", "warn", "fail", "skip"]
LONGEST = 600  # characters of a finding: a far side may say megabytes


@dataclass(frozen=True, slots=True)
class Step:
    """One finding of an examination.

    Attributes:
        name: what was looked at: retirement, key, tariff, proxy, address, dns, tcp, tls, http, balance, model,
            route, question, identity, quota.
        state: pass; warn (works, but look at it); fail (the cause); skip (not to be had here).
        said: what was found, in a sentence.
        seconds: how long it took.
    """

    name: str
    state: State
    said: str
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What an examination found.

    Attributes:
        outcome: what asking this channel gives, or would give; `ok` and `truncated` mean that it works.
        detail: the cause, and what to do next.
        reply: that of the small question; None: it did not come to that.
        cost: of the small question, in `currency`; None: nothing asked, or price unknown.
        emulated: the kit's own emulator answered.
    """

    channel: str
    model: str
    outcome: Outcome
    detail: str
    steps: tuple[Step, ...]
    reply: Reply | None = None
    cost: float | None = None
    currency: str | None = None
    emulated: bool = False

    @property
    def usable(self) -> bool:
        """Whether the channel answers."""
        return self.outcome in ANSWERED

    def to_json(self) -> dict[str, Any]:
        """As one JSON object."""
        reply = self.reply
        return {
            "channel": self.channel,
            "model": self.model,
            "usable": self.usable,
            "outcome": self.outcome.value,
            "detail": self.detail,
            "steps": [{"name": s.name, "state": s.state, "said": s.said, "seconds": s.seconds} for s in self.steps],
            "model_served": None if reply is None or reply.model_served is None else plain(reply.model_served),
            "first_token_s": None if reply is None else reply.timing.first_token_s,
            "total_s": None if reply is None else reply.timing.total_s,
            "cost": self.cost,
            "currency": self.currency,
            "emulated": self.emulated,
        }


def plain(text: str, most: int = LONGEST, keep: str = "") -> str:
    """What can be shown of a text: no keys, no control characters or halves of one, not without end."""
    text = "".join(c if c.isprintable() or c in keep else " " for c in redact(text))
    return text if len(text) <= most else text[: most - 1] + "…"
