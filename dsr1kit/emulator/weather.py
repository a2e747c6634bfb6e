"""The weather of an emulated provider: how fast, how busy, how broken, in which dialect. Data and draws.

Every draw depends on (seed, question, draw, attempt) alone, never on the order in which requests arrive.
Knows nothing about HTTP.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args
from zoneinfo import ZoneInfo

from dsr1kit.access.channels import WireProtocol
from dsr1kit.access.prices import Price, read_price
from dsr1kit.config import Table, read_toml
from dsr1kit.errors import ConfigError, UnknownName
from dsr1kit.hours import Spans, as_moment, read_hours, read_zone, within
from dsr1kit.paths import data_dir
from dsr1kit.records import Outcome

#: What the server can be made to do; `unreachable` needs no server, and the caller's own are the caller's.
FAULTS = tuple(
    o.value
    for o in Outcome
    if o not in (Outcome.OK, Outcome.UNREACHABLE, Outcome.DEADLINE, Outcome.OVER_BUDGET, Outcome.CANCELLED)
)
#: The forms in which an outcome can be acted out, the usual one first.
FORMS: dict[str, tuple[str, ...]] = {
    "throttled": ("429", "event"),
    "overloaded": ("503", "500", "529", "finish_reason", "event"),
    "stalled": ("between", "before"),
    "cut": ("anywhere", "before", "answer"),
    "empty": ("nothing", "thinking", "body"),
    "not_an_answer": ("html", "json", "text"),
    "no_balance": ("402", "403"),
    "unauthorized": ("401", "403"),
    "unknown_model": ("404", "400"),
    "retired": ("410", "404", "400"),
    "bad_request": ("400", "422"),
    "filtered": ("finish_reason", "400"),
}
_FAR_S = 100 * 365 * 86400.0  # what is later than that has no date
QuotaHeaders = Literal[
    "retry-after", "fraction", "date", "retry-after-ms", "openai", "x-ratelimit", "modelscope", "none"
]


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
        scripts: answers, thinking between <think> tags, one of which is given to every question: the first at
            temperature 0, else one drawn at random; none: a model answers.
        model: what answers instead of a script: `tiny-r1`, a folder, a hub id.
        quantization: none, 8bit or 4bit.
        temperature: used instead of the request's; None: the request's.
        first_token_s, inter_token_s: medians, in seconds.
        spread: sigma of the log-normal that multiplies both; 0: constant.
        seed: of all draws.
        peak_hours: (from, to) in hours of the day in `timezone`; both are multiplied by `peak_factor` then.
        requests_per_minute, max_in_flight: beyond them the answer is 429 with Retry-After.
        max_output: tokens after which every answer is stopped by length.
        refuse_above: `max_tokens` above which a request is refused.
        retry_after_s: the wait that is told with a 429 or 503 that no limit of ours explains.
        balance: what is left on the account, told at `/user/balance`; at 0 every question is refused.
        retires_at, retires_in_s, shrinks_s: when the model is retired, by the clock or after the emulator's
            start, and how long before that its requests a minute begin to shrink to nothing.
        faults: share of requests for each outcome, adding up to at most 1.
        how: the form in which an outcome is acted out, by its name, where it has several.
        system: whether a system prompt is accepted, refused, or obeyed in the one way a script can.
        queue_s: how long a `queued` or `stalled` request is held before the connection is closed.
        protocol: what it speaks.
        reasoning: field or tag in which thinking is sent; `prefilled` is inline without the opening tag.
        keep_alive: what is sent while a request waits; every `keep_alive_s` seconds.
        tokens_per_chunk, done, crlf: details of the stream.
        burst: nothing is sent until everything is there.
        usage: token counts with the reasoning told apart, as a sum, or none.
        quota_headers: in which headers limits are told.
        models: whether there is a list of models, and `listed` what is in it; None: the model that is served.
        serves: the model's name in answers, where it is not the one that was asked for.
        price: per million tokens, for cost figures.
    """

    path: Path
    scripts: tuple[str, ...] = ()
    model: str | None = None
    quantization: Literal["none", "8bit", "4bit"] = "none"
    temperature: float | None = None
    first_token_s: float = 0.0
    inter_token_s: float = 0.0
    spread: float = 0.0
    seed: int = 0
    peak_hours: Spans = ()
    peak_factor: float = 1.0
    timezone: str = "UTC"
    requests_per_minute: float | None = None
    max_in_flight: int | None = None
    max_output: int | None = None
    refuse_above: int | None = None
    balance: float | None = None
    retry_after_s: float = 1.0
    retires_at: dt.datetime | None = None
    retires_in_s: float | None = None
    shrinks_s: float = 30 * 86400.0
    faults: dict[str, float] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    system: Literal["accept", "refuse", "obey"] = "accept"
    protocol: WireProtocol = "chat-completions"
    queue_s: float = 600.0
    reasoning: Literal["reasoning_content", "reasoning", "inline", "prefilled"] = "reasoning_content"
    keep_alive: Literal["none", "comment", "blank"] = "none"
    keep_alive_s: float = 1.0
    tokens_per_chunk: int = 1
    burst: bool = False
    usage: Literal["split", "sum", "none"] = "split"
    quota_headers: QuotaHeaders = "retry-after"
    models: Literal["list", "none", "forbidden"] = "list"
    listed: tuple[str, ...] | None = None
    serves: str = ""
    done: bool = True
    crlf: bool = False
    title: str = ""
    price: Price | None = None

    def form(self, outcome: str | None) -> str:
        """The form in which an outcome is acted out; empty where it has but one."""
        return self.how.get(outcome or "", FORMS.get(outcome or "", ("",))[0])

    def retirement(self, began: dt.datetime) -> dt.datetime | None:
        """When the model is retired, for an emulator that began at `began`; None: it stays."""
        if self.retires_in_s is not None:
            return began + dt.timedelta(seconds=self.retires_in_s)
        return self.retires_at

    def quota_left(self, began: dt.datetime, now: dt.datetime) -> float:
        """Share of the requests a minute that is still granted: 1 long before the retirement, then 0."""
        at = self.retirement(began)
        if at is None:
            return 1.0
        left = (at - now).total_seconds()
        return 0.0 if left <= 0 else min(1.0, left / self.shrinks_s)

    @property
    def served_model(self) -> str:
        """The model's name as the emulator tells it."""
        return self.model or "scripted-r1"

    def slowdown(self, now: dt.datetime) -> float:
        """Factor on all latencies at the moment `now` (timezone-aware)."""
        local = now.astimezone(ZoneInfo(self.timezone))
        return self.peak_factor if within(self.peak_hours, local) else 1.0

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
    return read_weather(path, "", read_toml(path))


def read_weather(path: Path, where: str, values: object) -> Weather:
    """A weather from the tables of a file; `where` names the place in it, for messages."""
    top = Table(path, where, values)
    tables = {key: top.table(key) for key in (*_READERS, "price")}
    read: dict[str, Any] = {"path": path, "title": top.text("title", path.stem)}
    top.finish()
    if tables["model"] is None:
        raise ConfigError(f'{path}: [model] is missing: give script = "text" or name = "tiny-r1"')
    for key, reader in _READERS.items():
        table = tables[key]
        if table is not None:
            read |= reader(table)
            table.finish()
    read["price"] = read_price(tables["price"])
    return Weather(**read)


def _model(t: Table) -> dict[str, Any]:
    if t.has("script") == t.has("name"):
        raise t.error("script", "give either script (a text) or name (a model), and not both")
    if t.has("script"):
        scripts = t.texts("script") if isinstance(t.raw("script"), list) else (t.text("script"),)
        if not scripts or not all(script.strip() for script in scripts):
            raise t.error("script", "expected some text")
        return {"scripts": scripts, "temperature": t.number("temperature")}
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


def _peak(t: Table) -> dict[str, Any]:
    hours = read_hours(t)
    return {"peak_hours": hours, "peak_factor": t.number("factor", 1.0), "timezone": read_zone(t)}


def _limits(t: Table) -> dict[str, Any]:
    return {
        "requests_per_minute": t.number("requests_per_minute", low=1e-9),
        "max_in_flight": t.whole("max_in_flight", low=1),
        "max_output": t.whole("max_output", low=1),
        "refuse_above": t.whole("refuse_above", low=1),
        "balance": t.number("balance"),
        "retry_after_s": t.number("retry_after_s", 1.0),
    }


def _retirement(t: Table) -> dict[str, Any]:
    at = t.date("at")
    if (at is None) == (not t.has("in_s")):
        raise t.error("at", "give either at (a date) or in_s (seconds after the start), and not both")
    shrinks_s = t.number("shrinks_s", 30 * 86400.0, low=1e-3)
    return {
        "retires_at": None if at is None else as_moment(at),
        "retires_in_s": t.number("in_s", high=_FAR_S),
        "shrinks_s": shrinks_s,
    }


def _how(t: Table) -> dict[str, Any]:
    system = t.text("system", "accept", choices=("accept", "refuse", "obey"))
    forms = {o: t.text(o, forms[0], choices=forms) for o, forms in FORMS.items()}  # all: so that they are known keys
    return {"how": {o: form for o, form in forms.items() if t.has(o)}, "system": system}


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
        "usage": _usage(t),
        "burst": t.flag("burst"),
        "protocol": t.text("protocol", "chat-completions", choices=("chat-completions", "bedrock-converse")),
        "quota_headers": t.text("quota_headers", "retry-after", choices=get_args(QuotaHeaders)),
        "models": t.text("models", "list", choices=("list", "none", "forbidden")),
        "listed": t.texts("listed") if t.has("listed") else None,
        "serves": t.text("serves"),
        "done": t.flag("done", True),
        "crlf": t.flag("crlf"),
    }


def _usage(t: Table) -> str:
    """`true` and `false` mean with the reasoning told apart, and none."""
    if isinstance(t.raw("usage"), bool):
        return "split" if t.flag("usage") else "none"
    return t.text("usage", "split", choices=("split", "sum", "none"))


_READERS: dict[str, Callable[[Table], dict[str, Any]]] = {
    "model": _model,
    "latency": _latency,
    "peak": _peak,
    "limits": _limits,
    "retirement": _retirement,
    "faults": _faults,
    "how": _how,
    "dialect": _dialect,
}
