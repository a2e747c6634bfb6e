"""Is what this channel serves R1 as its card describes it? A handful of small experiments, with their evidence.

Seven questions, some fifteen requests: does it think, also on easy prompts; is the temperature honoured; is a
system prompt taken; how long may an answer be; are reasoning tokens counted; does it stream. Each is answered
pass, fail or unknown, never by what the provider says about itself alone. Knows nothing about printing.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, takewhile
from typing import Any, Literal

from dsr1kit.access.channels import Channel
from dsr1kit.access.client import ChannelClient
from dsr1kit.access.findings import plain
from dsr1kit.access.stream import estimate_tokens
from dsr1kit.errors import UsageError
from dsr1kit.records import ANSWERED, Message, Outcome, Reply, Sampling

Verdict = Literal["pass", "fail", "unknown"]

_HARD = "What is 17 * 23 - 46? Think it through, then give the number."
_EASY = ("Hi!", "What is 1 + 1?", "Say yes.", "Which colour is the sky on a clear day?")
_OPEN = "Write one short sentence about the sea."
_SYSTEM = 'End your answer with the word "KIWI".'
_LONG = "Write the numbers from 1 to 5000 in words, separated by commas. Do not stop early and do not abbreviate."
_FAR_TOO_MANY = 10_000_000  # tokens; what refuses it usually says how many it takes
_DRAWS = 3
_SHORT_TOKENS, _THINKING_TOKENS = 96, 512


@dataclass(frozen=True, slots=True)
class Check:
    """One question about the channel, and what answers it.

    Attributes:
        name: thinks, easy_prompts, temperature, system_prompt, output_ceiling, usage, streaming.
        verdict: pass, fail, or unknown where the evidence does not settle it.
        evidence: what was seen, in a sentence.
    """

    name: str
    verdict: Verdict
    evidence: str


@dataclass(frozen=True, slots=True)
class Conformance:
    """All checks of one channel, and what they cost.

    Attributes:
        requests: how many questions were asked.
        cost: in `currency`; None: the price is unknown.
    """

    channel: str
    model: str
    checks: tuple[Check, ...]
    requests: int
    cost: float | None
    currency: str | None
    emulated: bool

    def to_json(self) -> dict[str, Any]:
        """As one JSON object."""
        return {
            "channel": self.channel,
            "model": self.model,
            "checks": [{"name": c.name, "verdict": c.verdict, "evidence": c.evidence} for c in self.checks],
            "requests": self.requests,
            "cost": self.cost,
            "currency": self.currency,
            "emulated": self.emulated,
        }


async def probe(
    channel: Channel,
    *,
    ceiling_tokens: int = 4096,
    first_token_s: float = 60.0,
    stall_s: float = 30.0,
    on_check: Callable[[Check], None] | None = None,
) -> Conformance:
    """Examine how a channel serves R1; its own limits on requests are kept.

    Args:
        ceiling_tokens: how long an answer the output ceiling is sought up to; most of the cost is in it.
        first_token_s, stall_s: limits of each request, in seconds.
        on_check: told of each check as it is settled.

    Raises:
        UsageError: the channel cannot be opened (see `Channel.open`), or no token is asked for.
    """
    if ceiling_tokens < 1:
        raise UsageError(f"ceiling_tokens must be at least 1, not {ceiling_tokens}")
    # Its stated ceiling would clamp what is asked for, and so hide the real one.
    opened = replace(channel, max_output=None).open(first_token_s=first_token_s, stall_s=stall_s)
    async with opened as client:
        examiner = _Examiner(client, channel, on_check)
        await examiner.run(ceiling_tokens)
    costs = examiner.costs
    return Conformance(
        channel.name,
        channel.model,
        tuple(examiner.checks),
        examiner.requests,
        None if channel.price is None or None in costs else sum(c for c in costs if c is not None),
        None if channel.price is None else channel.price.currency,
        channel.emulated or examiner.emulated,
    )


@dataclass
class _Examiner:
    client: ChannelClient
    channel: Channel
    on_check: Callable[[Check], None] | None
    checks: list[Check] = field(default_factory=list)
    costs: list[float | None] = field(default_factory=list)
    requests: int = 0
    emulated: bool = False

    async def run(self, ceiling_tokens: int) -> None:
        hard = await self._ask(_HARD, max_tokens=2048)
        if hard.outcome not in ANSWERED:
            why = f"the first question ended as {hard.outcome.value}: {hard.detail}"
            for name in (
                "thinks",
                "easy_prompts",
                "temperature",
                "system_prompt",
                "output_ceiling",
                "usage",
                "streaming",
            ):
                self._settle(name, "unknown", why)
            return
        self._thinks(hard)
        await self._easy(_thought(hard))
        await self._temperature()
        await self._system()
        long = await self._ceiling(ceiling_tokens)
        self._usage(hard)
        self._streaming(long if long is not None and long.extra["chunks"] > hard.extra["chunks"] else hard)

    async def _ask(self, text: str, *, system: str = "", **sampling: Any) -> Reply:
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        reply = await self.client.ask([*messages, {"role": "user", "content": text}], Sampling(**sampling))
        self.requests += 1
        self.emulated = self.emulated or reply.emulated
        price = self.channel.price
        self.costs.append(None if price is None else price.at(dt.datetime.now(dt.UTC)).cost(reply.usage) or 0.0)
        return reply

    def _settle(self, name: str, verdict: Verdict, evidence: str) -> None:
        check = Check(name, verdict, plain(evidence))
        self.checks.append(check)
        if self.on_check is not None:
            self.on_check(check)

    def _thinks(self, reply: Reply) -> None:
        if reply.reasoning.strip():
            words = f"{reply.usage.reasoning_tokens} tokens of thinking before the answer"
            self._settle(
                "thinks", "pass", words + (" (counted here)" if reply.usage.split_source != "provider" else "")
            )
        elif _thought(reply):
            self._settle("thinks", "pass", f"{reply.usage.reasoning_tokens} tokens of thinking, counted but not shown")
        else:
            self._settle("thinks", "fail", "no thinking in any field, and no reasoning tokens in the usage")

    async def _easy(self, thinks: bool) -> None:
        replies = await asyncio.gather(*(self._ask(text, max_tokens=_THINKING_TOKENS) for text in _EASY))
        answered = [(text, r) for text, r in zip(_EASY, replies, strict=True) if r.outcome in ANSWERED]
        bypassed = [text for text, r in answered if not _thought(r)]
        told = f"{len(answered) - len(bypassed)} of {len(answered)} easy prompts were thought about"
        if not answered:
            self._settle("easy_prompts", "unknown", f"no easy prompt was answered ({replies[0].outcome.value})")
        elif bypassed:
            skipped = ", ".join(f'"{text}"' for text in bypassed)
            verdict: Verdict = "fail" if thinks else "unknown"
            self._settle("easy_prompts", verdict, f"{told}; the think block was bypassed on {skipped}")
        else:
            self._settle("easy_prompts", "pass", told)

    async def _temperature(self) -> None:
        spread = {}
        for temperature in (0.0, 1.0):
            asked = (
                self._ask(_OPEN, temperature=temperature, top_p=1.0, max_tokens=_SHORT_TOKENS) for _ in range(_DRAWS)
            )
            texts = [r.reasoning + r.answer for r in await asyncio.gather(*asked) if r.outcome in ANSWERED]
            if len(texts) < 2:
                self._settle("temperature", "unknown", f"fewer than two of {_DRAWS} draws at {temperature:g} succeeded")
                return
            spread[temperature] = _agreement(texts)
        cold, hot = spread[0.0], spread[1.0]
        told = f"{_DRAWS} draws agree over {cold:.0%} of their length at temperature 0, over {hot:.0%} at 1"
        if hot >= 0.99:
            self._settle("temperature", "fail", f"{told}: it is not honoured, or a cache answers")
        elif cold >= 0.99:
            self._settle("temperature", "pass", told)
        elif cold - hot >= 0.3:
            self._settle("temperature", "pass", f"{told}: honoured, though not repeatable to the letter")
        elif cold < 0.5:
            self._settle("temperature", "fail", f"{told}: 0 is drawn as freely as 1")
        else:
            self._settle("temperature", "unknown", told)

    async def _system(self) -> None:
        reply = await self._ask("What is 2 + 3?", system=_SYSTEM, max_tokens=2048)
        if reply.outcome is Outcome.BAD_REQUEST:
            self._settle("system_prompt", "fail", f"refused: {reply.detail}")
        elif reply.outcome not in ANSWERED:
            self._settle("system_prompt", "unknown", f"{reply.outcome.value}: {reply.detail}")
        elif "kiwi" in reply.answer.lower():
            self._settle("system_prompt", "pass", "accepted, and followed")
        else:
            self._settle("system_prompt", "unknown", "accepted, but the answer does not show that it was read")

    async def _ceiling(self, wanted: int) -> Reply | None:
        """By the words of a refusal where there is one, else by an answer that is made to be long."""
        stated = self.channel.max_output
        first = await self._ask("Say yes.", max_tokens=_FAR_TOO_MANY)
        if first.outcome is Outcome.BAD_REQUEST:
            ceiling = _stated_limit(first.detail)
            if ceiling is not None:
                less = stated is not None and ceiling < stated
                against = "" if stated is None else f", the catalogue says {stated}"
                self._settle(
                    "output_ceiling", "fail" if less else "pass", f"refuses more than {ceiling} tokens{against}"
                )
                return None
        asked = min(wanted, stated or wanted)
        long = await self._ask(_LONG, max_tokens=asked)
        tokens = long.usage.completion_tokens or 0
        if long.outcome is Outcome.TRUNCATED and tokens >= 0.9 * asked:
            self._settle("output_ceiling", "pass", f"at least {tokens} tokens; no more were asked for")
        elif long.outcome is Outcome.TRUNCATED:
            self._settle("output_ceiling", "fail", f"stopped by length after {tokens} of {asked} tokens")
        elif long.outcome is Outcome.OK:
            self._settle("output_ceiling", "unknown", f"at least {tokens} tokens: the long answer ended by itself")
        else:
            self._settle("output_ceiling", "unknown", f"{long.outcome.value} after {tokens} tokens: {long.detail}")
        return long

    def _usage(self, reply: Reply) -> None:
        usage = reply.usage
        if usage.source != "provider":
            self._settle("usage", "fail", "no usage block: tokens and cost can only be estimated")
            return
        told = f"{usage.completion_tokens} completion tokens"
        if usage.split_source == "provider" and usage.reasoning_tokens:
            self._settle("usage", "pass", f"{told}, of them {usage.reasoning_tokens} told as reasoning")
            return
        about = estimate_tokens(reply.reasoning) + estimate_tokens(reply.answer)
        counted = (usage.completion_tokens or 0) >= 0.6 * about
        how = "reasoning is in the sum, but not told apart" if counted else f"the text shown is about {about}"
        self._settle("usage", "pass" if counted else "fail", f"{told}; {how}")

    def _streaming(self, reply: Reply) -> None:
        gaps, first = reply.timing.gaps_s, reply.timing.first_token_s or 0.0
        reads, span = len(gaps) + (1 if reply.extra["chunks"] else 0), sum(gaps)
        told = f"{reply.extra['chunks']} chunks at {reads} moments over {span:.2f} s, the first after {first:.2f} s"
        burst = reads <= 2 or span < 0.02 * first
        few = reply.extra["chunks"] <= 2 and (reply.usage.completion_tokens or 0) < 20
        self._settle("streaming", "unknown" if few else "fail" if burst else "pass", told)


def _stated_limit(words: str) -> int | None:
    """The largest number in a refusal that can be a limit on tokens: not its status, not what was asked for."""
    bare = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", words)  # 8,192 is one number, [1,8192] are two
    numbers = (int(n) for n in re.findall(r"(?<![\w.-])\d{3,8}(?![\w-])", bare))
    return max((n for n in numbers if 422 < n < _FAR_TOO_MANY), default=None)


def _thought(reply: Reply) -> bool:
    """Whether there was thinking, shown or only counted by the provider."""
    counted = reply.usage.split_source == "provider" and bool(reply.usage.reasoning_tokens)
    return bool(reply.reasoning.strip()) or counted


def _agreement(texts: Sequence[str]) -> float:
    """Mean share of two texts' length over which they begin alike, in 0 .. 1."""
    return statistics.fmean(_alike(a, b) / max(1, len(a), len(b)) for a, b in combinations(texts, 2))


def _alike(a: str, b: str) -> int:
    """How many characters two texts share at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
