"""The catalogue: which ways to R1 there are, as data. Shipped entries, and the person's own on top.

A Channel is frozen data; `open()` gives the Backend that speaks to it. Knows nothing about how.
"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import urlsplit

from dsr1kit.config import Table, read_toml
from dsr1kit.errors import ConfigError, UnknownName
from dsr1kit.keys import find_key
from dsr1kit.paths import data_dir
from dsr1kit.records import ReasoningMode, Usage

if TYPE_CHECKING:
    from dsr1kit.access.client import ChannelClient

Family = Literal["r1", "r1-distill", "successor", "other"]
ENVIRONMENT = "DSR1KIT_CHANNELS"


@dataclass(frozen=True, slots=True)
class Price:
    """What a million tokens cost.

    Attributes:
        input: prompt tokens, in `currency` per million.
        output: reasoning and answer tokens together, likewise.
        as_of: when this was read.
    """

    input: float
    output: float
    currency: str = "USD"
    as_of: dt.date | None = None

    def cost(self, usage: Usage) -> float | None:
        """Cost of one reply in `currency`; None where the tokens were not counted at all."""
        if usage.prompt_tokens is None and usage.completion_tokens is None:
            return None
        return ((usage.prompt_tokens or 0) * self.input + (usage.completion_tokens or 0) * self.output) / 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    """One way to R1; the fields are those of the catalogue file (see README).

    Attributes:
        base_urls: where Chat Completions lives, without `/chat/completions`.
        api_key_env: name of the variable that holds the key; empty: no key needed.
        reasoning: how this place returns reasoning.
        requests_per_minute, tokens_per_minute, max_in_flight: limits kept on this side.
        context, max_output: in tokens.
        retires: from this moment the place no longer serves the model.
        emulated: served by the kit's own emulator; told in every record and report.
    """

    name: str
    base_urls: tuple[str, ...]
    model: str
    title: str = ""
    api_key_env: str = ""
    family: Family = "other"
    protocol: Literal["chat-completions", "bedrock-converse"] = "chat-completions"
    reasoning: ReasoningMode = "auto"
    weight: float = 1.0
    backup: bool = False
    region: str = ""
    proxy: str = field(default="", repr=False)  # may hold a login
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_in_flight: int | None = None
    context: int | None = None
    max_output: int | None = None
    price: Price | None = None
    tariff: str = ""
    retires: dt.date | None = None
    source: str = ""
    as_of: dt.date | None = None
    emulated: bool = False

    def open(
        self,
        *,
        first_token_s: float = 120.0,
        stall_s: float = 60.0,
        deadline_s: float | None = None,
        connect_s: float = 10.0,
    ) -> ChannelClient:
        """The Backend for this channel, to be used with `async with`; limits in seconds."""
        from dsr1kit.access.client import ChannelClient

        if self.protocol != "chat-completions":
            raise ConfigError(f"channel {self.name!r}: protocol {self.protocol!r} cannot be opened by this version")
        return ChannelClient(
            self, first_token_s=first_token_s, stall_s=stall_s, deadline_s=deadline_s, connect_s=connect_s
        )

    def retired_on(self, now: dt.datetime | None = None) -> str:
        """The date on which the channel was retired, if that is past at `now` (UTC); else an empty string."""
        if self.retires is None:
            return ""
        now = now or dt.datetime.now(dt.UTC)
        moment = self.retires
        if not isinstance(moment, dt.datetime):
            moment = dt.datetime(moment.year, moment.month, moment.day)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=dt.UTC)
        return f"{self.retires:%Y-%m-%d}" if moment <= now else ""

    def key_present(self) -> bool | None:
        """Whether the key is at hand; None where none is needed."""
        return find_key(self.api_key_env) is not None if self.api_key_env else None


class Catalogue(Mapping[str, Channel]):
    """Channels by name; an unknown name raises UnknownName with the nearest one."""

    def __init__(self, channels: Mapping[str, Channel]) -> None:
        self._channels = dict(channels)

    def __getitem__(self, name: str) -> Channel:
        try:
            return self._channels[name]
        except KeyError:
            raise UnknownChannel(name, self._channels) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._channels)

    def __len__(self) -> int:
        return len(self._channels)


class UnknownChannel(UnknownName, KeyError):
    """No channel of that name; a KeyError too, so that the catalogue behaves as a mapping."""

    def __init__(self, name: str, known: Mapping[str, Channel]) -> None:
        super().__init__("channel", name, known, hint="(dsr1kit channels lists all)")

    def __str__(self) -> str:
        return str(self.args[0])


def load_channels(path: str | Path | None = None) -> Catalogue:
    """The shipped catalogue with the person's own entries over it, field by field.

    Args:
        path: the person's file; None: the one that DSR1KIT_CHANNELS names, if any.

    Raises:
        ConfigError: a file does not parse or holds a wrong key or value; says where.
    """
    entries = _entries(data_dir() / "channels.toml")
    own = path or os.environ.get(ENVIRONMENT, "").strip()
    if own:
        for name, (file, values) in _entries(Path(own).expanduser()).items():
            base = entries[name][1] if name in entries else {}
            if "base_url" in values or "base_urls" in values:
                base = {k: v for k, v in base.items() if k not in ("base_url", "base_urls")}
            entries[name] = (file, base | values)
    return Catalogue({name: _channel(file, name, values) for name, (file, values) in entries.items()})


def _entries(path: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    top = Table(path, "", read_toml(path))
    table = top.table("channel")
    top.finish()
    raw = table.raw_all() if table else {}
    for name, values in raw.items():
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: channel.{name} must be a table: [channel.{name}]")
    return {name: (path, values) for name, values in raw.items()}


def _channel(path: Path, name: str, values: dict[str, Any]) -> Channel:
    t = Table(path, f"channel.{name}", values)
    if t.has("base_url") and t.has("base_urls"):
        raise t.error("base_urls", "give base_url or base_urls, not both")
    if t.has("base_urls"):
        urls = t.texts("base_urls")
        if not urls:
            raise t.error("base_urls", "expected at least one URL")
    else:
        urls = (t.text("base_url", required=True),)
    key = "base_urls" if t.has("base_urls") else "base_url"
    proxy = t.text("proxy")
    if proxy:
        _check_url(t, "proxy", proxy, ("http",), login_allowed=True)
    channel = Channel(
        name=name,
        base_urls=tuple(_check_url(t, key, url, ("http", "https")) for url in urls),
        model=t.text("model", required=True),
        title=t.text("title", name),
        api_key_env=t.text("api_key_env"),
        family=cast("Family", t.text("family", "other", choices=("r1", "r1-distill", "successor", "other"))),
        protocol=cast("Any", t.text("protocol", "chat-completions", choices=("chat-completions", "bedrock-converse"))),
        reasoning=cast(
            "ReasoningMode",
            t.text("reasoning", "auto", choices=("auto", "reasoning_content", "reasoning", "inline")),
        ),
        weight=t.number("weight", 1.0) or 0.0,
        backup=t.flag("backup"),
        region=t.text("region"),
        proxy=proxy,
        requests_per_minute=t.number("requests_per_minute", low=1e-9),
        tokens_per_minute=t.number("tokens_per_minute", low=1e-9),
        max_in_flight=t.whole("max_in_flight", low=1),
        context=t.whole("context", low=1),
        max_output=t.whole("max_output", low=1),
        price=read_price(t.table("price")),
        tariff=t.text("tariff"),
        retires=t.date("retires"),
        source=t.text("source"),
        as_of=t.date("as_of"),
    )
    t.finish()
    return channel


def read_price(table: Table | None) -> Price | None:
    """A price from its table: input and output per million tokens, currency, as_of."""
    if table is None:
        return None
    amounts = {key: table.number(key) for key in ("input", "output")}
    for key, amount in amounts.items():
        if amount is None:
            raise table.error(key, "is missing")
    price = Price(
        input=amounts["input"] or 0.0,
        output=amounts["output"] or 0.0,
        currency=table.text("currency", "USD"),
        as_of=table.date("as_of"),
    )
    table.finish()
    return price


def _check_url(table: Table, key: str, url: str, schemes: tuple[str, ...], *, login_allowed: bool = False) -> str:
    try:
        parts = urlsplit(url)
        port_ok = parts.port is None or parts.port > 0
    except ValueError:
        raise table.error(key, "is not a URL (host or port does not parse)") from None
    wanted = " or ".join(f"{s}://" for s in schemes)
    # The URL itself is shown only once it is known to hold no credentials.
    if (parts.username or parts.password) and not login_allowed:
        raise table.error(key, "holds credentials; put the key into a variable and name it in api_key_env")
    if parts.scheme not in schemes or not parts.hostname or not port_ok:
        raise table.error(key, f"expected a URL that begins with {wanted} and names a host")
    if not url.isascii() or any(c.isspace() or not c.isprintable() for c in url):
        raise table.error(key, "must be plain ASCII without spaces (percent-encode; xn-- for other hosts)")
    if parts.fragment:
        raise table.error(key, f"must not have a fragment (#...): {url!r}")
    return url.rstrip("/")
