"""The weather of an emulated provider: how fast, how busy, how broken, in which dialect. Data and draws.

Every draw depends on (seed, question, draw, attempt) alone, never on the order in which requests arrive.
Knows nothing about HTTP.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from dsr1kit.access.channels import Price, read_price
from dsr1kit.config import Table, read_toml
from dsr1kit.errors import ConfigError, UnknownName
from dsr1kit.paths import data_dir
from dsr1kit.records import Outcome

#: What the server can be made to do; `unreachable` needs no server, and the caller's own are the caller's.
FAULTS = tuple(
    o.value
    for o in Outcome
    if o not in (Outcome.OK, Outcome.UNREACHABLE, Outcome.DEADLINE, Outcome.OVER_BUDGET, Outcome.CANCELLED)
)


@dataclass(frozen=True, slots=True)
class Draw:
    """What one request will meet.

    Attributes:
        first_token_s: from the request's arrival to its first token.
        gaps_s: function of n: the n pauses before the tokens after the first.
        fault: the outcome to act out; None: a sound answer.
        cut_at: share of the tokens after which a cut, stall or truncation happens.
    """

    first_token_s: float
    fault: str | None
    cut_at: float
    _random: random.Random
    _inter_token_s: float
    _spread: float

    def gaps_s(self, count: int) -> list[float]:
        """`count` pauses between tokens, in seconds."""
        return [_spread(self._inter_token_s, self._spread, self._random) for _ in range(count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """One provider's conditions, as a weather file gives them (all tables but [model] are optional).

    Attributes:
        script: the answer given to every question, thinking between <think> tags; None: a model answers.
        model: what answers instead of a script: `tiny-r1`, a folder, a hub id.
        quantization: none, 8bit or 4bit.
        temperature: used instead of the request's; None: the request's.
        first_token_s, inter_token_s: medians, in seconds.
        spread: sigma of the log-normal that multiplies both; 0: constant.
        seed: of all draws.
        peak_hours: (from, to) in hours of the day in `timezone`; both are multiplied by `peak_factor` then.
        requests_per_minute, max_in_flight: beyond them the answer is 429 with Retry-After.
        faults: share of requests for each outcome, adding up to at most 1.
        queue_s: how long a `queued` request is kept alive before the connection is closed.
        reasoning: field or tag in which thinking is sent; `prefilled` is inline without the opening tag.
        keep_alive: what is sent while a request waits; every `keep_alive_s` seconds.
        tokens_per_chunk, usage, done, crlf: details of the stream.
        price: per million tokens, for cost figures.
    """

    path: Path
    script: str | None = None
    model: str | None = None
    quantization: Literal["none", "8bit", "4bit"] = "none"
    temperature: float | None = None
    first_token_s: float = 0.0
    inter_token_s: float = 0.0
    spread: float = 0.0
    seed: int = 0
    peak_hours: tuple[tuple[float, float], ...] = ()
    peak_factor: float = 1.0
    timezone: str = "UTC"
    requests_per_minute: float | None = None
    max_in_flight: int | None = None
    faults: dict[str, float] = field(default_factory=dict)
    queue_s: float = 600.0
    reasoning: Literal["reasoning_content", "reasoning", "inline", "prefilled"] = "reasoning_content"
    keep_alive: Literal["none", "comment", "blank"] = "none"
    keep_alive_s: float = 1.0
    tokens_per_chunk: int = 1
    usage: bool = True
    done: bool = True
    crlf: bool = False
    title: str = ""
    price: Price | None = None

    @property
    def served_model(self) -> str:
        """The model's name as the emulator tells it."""
        return self.model or "scripted-r1"

    def slowdown(self, now: dt.datetime) -> float:
        """Factor on all latencies at the moment `now` (timezone-aware)."""
        local = now.astimezone(ZoneInfo(self.timezone))
        hour = local.hour + local.minute / 60 + local.second / 3600
        return self.peak_factor if any(low <= hour < high for low, high in self.peak_hours) else 1.0

    def draw(self, question: str, draw: str, attempt: int, now: dt.datetime) -> Draw:
        """What the `attempt`-th asking of this draw of this question meets at the moment `now`."""
        key = f"{self.seed}/{hashlib.sha256(question.encode()).hexdigest()}/{draw}/{attempt}"
        rng = random.Random(key)
        factor = self.slowdown(now)
        level = rng.random()
        fault = None
        for name, share in self.faults.items():
            if level < share:
                fault = name
                break
            level -= share
        first = _spread(self.first_token_s * factor, self.spread, rng)
        return Draw(first, fault, rng.uniform(0.1, 0.9), rng, self.inter_token_s * factor, self.spread)


def _spread(median: float, sigma: float, rng: random.Random) -> float:
    return median * math.exp(rng.gauss(0.0, sigma)) if sigma > 0 else median


def find_weather(name: str | Path) -> Path:
    """The file a weather name means: a path, or one of the shipped (`calm`, `calm.toml`)."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = {p.stem: p for p in sorted((data_dir() / "weather").glob("*.toml"))}
    if path.parent == Path() and path.stem in shipped and path.suffix in ("", ".toml"):
        return shipped[path.stem]
    if path.parent != Path():
        raise ConfigError(f"{path}: no such weather file; shipped ones: {', '.join(shipped)}")
    raise UnknownName("weather", str(name), shipped, hint="(a file, or a shipped weather)")


def load_weather(name: str | Path) -> Weather:
    """Read a weather file; raises ConfigError with file, table and key where a value is wrong."""
    path = find_weather(name)
    top = Table(path, "", read_toml(path))
    tables = {key: top.table(key) for key in ("model", "latency", "peak", "limits", "faults", "dialect", "price")}
    title = top.text("title", path.stem)
    top.finish()
    values: dict[str, Any] = {"path": path, "title": title}
    readers = {
        "model": _model,
        "latency": _latency,
        "peak": _peak,
        "limits": _limits,
        "faults": _faults,
        "dialect": _dialect,
    }
    if tables["model"] is None:
        raise ConfigError(f'{path}: [model] is missing: give script = "text" or name = "tiny-r1"')
    for key, reader in readers.items():
        table = tables[key]
        if table is not None:
            values |= reader(table)
            table.finish()
    values["price"] = read_price(tables["price"])
    return Weather(**values)


def _model(t: Table) -> dict[str, Any]:
    if t.has("script") == t.has("name"):
        raise t.error("script", "give either script (a text) or name (a model), and not both")
    if t.has("script"):
        script = t.text("script")
        if not script.strip():
            raise t.error("script", "expected some text")
        return {"script": script}
    return {
        "model": t.text("name"),
        "quantization": t.text("quantization", "none", choices=("none", "8bit", "4bit")),
        "temperature": t.number("temperature"),
    }


def _latency(t: Table) -> dict[str, Any]:
    return {
        "first_token_s": t.number("first_token_s", 0.0),
        "inter_token_s": t.number("inter_token_s", 0.0),
        "spread": t.number("spread", 0.0),
        "seed": t.whole("seed", 0),
    }


_HOURS = 'expected spans such as [[10, 12], [15, 17]] or "10-12, 15-17"'


def _hour(text: str | float) -> float:
    """Hours of the day from a number, `10` or `10:30`."""
    if isinstance(text, bool):
        raise TypeError("a boolean is no hour")
    if isinstance(text, int | float):
        return float(text)
    hours, _, minutes = text.strip().partition(":")
    return float(hours) + int(minutes or 0) / 60


def _peak(t: Table) -> dict[str, Any]:
    if not t.has("hours"):
        raise t.error("hours", "is missing; " + _HOURS)
    raw = t.raw("hours")
    if isinstance(raw, str):
        raw = raw.split(",")
    elif isinstance(raw, list) and len(raw) == 2 and not any(isinstance(p, list) or "-" in str(p) for p in raw):
        raw = [raw]  # one span, written flat
    hours: list[tuple[float, float]] = []
    for span in raw if isinstance(raw, list) else [raw]:
        parts = span.replace("–", "-").split("-") if isinstance(span, str) else span
        try:
            low, high = (_hour(part) for part in cast("Any", parts))
        except (TypeError, ValueError):
            raise t.error("hours", _HOURS) from None
        if not (0 <= low <= 24 and 0 <= high <= 24) or low == high:
            raise t.error("hours", f"expected two different hours from 0 to 24, not {low:g} to {high:g}")
        # A span over midnight is two.
        hours += [(low, high)] if low < high else [(low, 24.0), (0.0, high)]
    zone = t.text("timezone", "UTC")
    try:
        ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError):
        raise t.error("timezone", f"no such time zone {zone!r}; expected one such as Asia/Shanghai") from None
    return {"peak_hours": tuple(hours), "peak_factor": t.number("factor", 1.0), "timezone": zone}


def _limits(t: Table) -> dict[str, Any]:
    return {
        "requests_per_minute": t.number("requests_per_minute", low=1e-9),
        "max_in_flight": t.whole("max_in_flight", low=1),
    }


def _faults(t: Table) -> dict[str, Any]:
    shares = {name: t.number(name, high=1.0) for name in FAULTS}
    faults = {name: share for name, share in shares.items() if share}
    if sum(faults.values()) > 1 + 1e-9:
        raise t.error(next(iter(faults)), f"the shares add up to {sum(faults.values()):g}; at most 1 is possible")
    return {"faults": faults}


def _dialect(t: Table) -> dict[str, Any]:
    fields = ("reasoning_content", "reasoning", "inline", "prefilled")
    return {
        "reasoning": t.text("reasoning", "reasoning_content", choices=fields),
        "keep_alive": t.text("keep_alive", "none", choices=("none", "comment", "blank")),
        "keep_alive_s": t.number("keep_alive_s", 1.0, low=0.001),
        "queue_s": t.number("queue_s", 600.0),
        "tokens_per_chunk": t.whole("tokens_per_chunk", 1, low=1),
        "usage": t.flag("usage", True),
        "done": t.flag("done", True),
        "crlf": t.flag("crlf"),
    }
