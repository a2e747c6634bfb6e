"""The catalogue: which ways to R1 there are, as data. Shipped entries, and the person's own on top.

A Channel is frozen data; `open()` gives the Backend that speaks to it. Knows nothing about how.
"""

from __future__ import annotations

import datetime as dt
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import parse_qsl, urlsplit

from dsr1kit.access.prices import Price, Tariff, read_holidays, read_price, read_tariff
from dsr1kit.config import Table, read_toml
from dsr1kit.errors import ConfigError, UnknownName
from dsr1kit.hours import as_moment
from dsr1kit.keys import find_key, looks_secret, secret_name
from dsr1kit.paths import data_dir
from dsr1kit.records import ReasoningMode

if TYPE_CHECKING:
    from dsr1kit.access.client import ChannelClient

Family = Literal["r1", "r1-distill", "successor", "other"]
WireProtocol = Literal["chat-completions", "bedrock-converse"]
ENVIRONMENT = "DSR1KIT_CHANNELS"
_WARN_DAYS = 30  # vendors may shrink a model's quota from the day its retirement is announced


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    """One way to R1; the fields are those of the catalogue file (see README).

    Attributes:
        base_urls: where Chat Completions lives, without `/chat/completions`; of several, the nearest is used.
        fill_in: fields that a person must add before the entry can be used; `note` says how.
        api_key_env: name of the variable that holds the key; empty: no key needed.
        reasoning: how this place returns reasoning.
        requests_per_minute, tokens_per_minute, max_in_flight: limits kept on this side.
        availability: share of requests that the place promises to answer, to hold it to.
        context, max_output: in tokens.
        price, tariff: what it costs, and the name of the peak hours over it; `price.at(moment)` knows both.
        balance_path: where the account's balance is read, below the base URL's host and path.
        retires: from this moment the place no longer serves the model.
        note: what else is known about the place.
        emulated: served by the kit's own emulator; told in every record and report.
    """

    name: str
    base_urls: tuple[str, ...]
    model: str
    fill_in: tuple[str, ...] = ()
    title: str = ""
    api_key_env: str = ""
    family: Family = "other"
    protocol: WireProtocol = "chat-completions"
    reasoning: ReasoningMode = "auto"
    weight: float = 1.0
    backup: bool = False
    region: str = ""
    proxy: str = field(default="", repr=False)  # may hold a login
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_in_flight: int | None = None
    availability: float | None = None
    context: int | None = None
    max_output: int | None = None
    price: Price | None = None
    tariff: str = ""
    peak: Tariff | None = field(default=None, repr=False)
    balance_path: str = ""
    retires: dt.date | None = None
    source: str = ""
    as_of: dt.date | None = None
    note: str = ""
    emulated: bool = False

    def open(
        self,
        *,
        first_token_s: float = 120.0,
        stall_s: float = 60.0,
        deadline_s: float | None = None,
        connect_s: float = 10.0,
    ) -> ChannelClient:
        """The Backend for this channel, to be used with `async with`; limits in seconds.

        Raises:
            ConfigError: the entry lacks what a person has to fill in.
        """
        from dsr1kit.access.client import ChannelClient

        if self.fill_in:
            raise ConfigError(
                f"channel {self.name!r} cannot be used as shipped: put {' and '.join(self.fill_in)} under "
                f"[channel.{self.name}] in your own file (--channel-file, or {ENVIRONMENT})"
                + (f". {self.note}" if self.note else "")
            )
        return ChannelClient(
            self, first_token_s=first_token_s, stall_s=stall_s, deadline_s=deadline_s, connect_s=connect_s
        )

    def retires_at(self) -> dt.datetime | None:
        """The moment from which the place no longer serves the model (UTC), where it is known."""
        return None if self.retires is None else as_moment(self.retires)

    def retired_on(self, now: dt.datetime | None = None) -> str:
        """The date on which the channel was retired, if that is past at `now` (UTC); else an empty string."""
        moment = self.retires_at()
        past = moment is not None and moment <= (now or dt.datetime.now(dt.UTC))
        return f"{self.retires:%Y-%m-%d}" if past else ""

    def retirement_warning(self, now: dt.datetime | None = None) -> str:
        """A sentence within 30 days of the retirement; before and after that, an empty string."""
        moment = self.retires_at()
        left = None if moment is None else moment - (now or dt.datetime.now(dt.UTC))
        if left is None or not dt.timedelta(0) < left <= dt.timedelta(days=_WARN_DAYS):
            return ""
        days = f"{left.days} days" if left.days > 1 else "a day" if left.days else "less than a day"
        return (
            f"{self.name} retires {self.model} on {self.retires:%Y-%m-%d}, in {days}: until then its quota may "
            "shrink step by step, which looks like 'busy'"
        )

    def key_present(self) -> bool | None:
        """Whether the key is at hand; None where none is needed."""
        if not self.api_key_env:
            return None
        if self.protocol == "bedrock-converse":
            from dsr1kit.access.converse import credentials_present

            return credentials_present(self.api_key_env)
        return find_key(self.api_key_env) is not None

    def closed_because(self, now: dt.datetime | None = None) -> str:
        """Why the channel cannot be used at `now`, as far as that is known here; empty: it can.

        Nothing is asked of the network, save that a server on this machine is looked for on its port.
        """
        if retired := self.retired_on(now):
            return f"retired {retired}"
        if self.fill_in:
            return f"fill in {' and '.join(self.fill_in)}"
        if self.key_present() is False:
            return f"needs {self.api_key_env}"
        if self.emulated or not all(map(_loopback, self.base_urls)) or any(map(_listens, self.base_urls)):
            return ""
        return "not running"


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
    files = [_sections(data_dir() / "channels.toml")]
    if own := path or os.environ.get(ENVIRONMENT, "").strip():
        files.append(_sections(Path(own).expanduser()))
    calendars = _merged(files, "holidays")
    holidays = {name: read_holidays(t) for name, t in calendars.items()}
    tariffs = {name: read_tariff(t, name, holidays) for name, t in _merged(files, "tariff").items()}
    return Catalogue({name: _channel(name, t, tariffs) for name, t in _merged(files, "channel").items()})


def _merged(files: Sequence[Mapping[str, Table | None]], kind: str) -> dict[str, Table]:
    """The tables of a kind by name; fields of a later file go over those of an earlier one."""
    entries: dict[str, Table] = {}
    for sections in files:
        for name, table in _tables(sections, kind):
            base = entries[name].raw_all() if name in entries else {}
            if table.has("base_url") or table.has("base_urls"):
                base = {k: v for k, v in base.items() if k not in ("base_url", "base_urls")}
            entries[name] = Table(table.path, table.where, base | table.raw_all())
    return entries


def _sections(path: Path) -> dict[str, Table | None]:
    top = Table(path, "", read_toml(path))
    sections = {kind: top.table(kind) for kind in ("channel", "tariff", "holidays")}
    top.finish()
    return sections


def _tables(sections: Mapping[str, Table | None], kind: str) -> Iterator[tuple[str, Table]]:
    section = sections[kind]
    if section is None:
        return
    for name, values in section.raw_all().items():
        if not isinstance(values, dict):
            raise ConfigError(f"{section.path}: {kind}.{name} must be a table: [{kind}.{name}]")
        yield name, Table(section.path, f"{kind}.{name}", values)


def _channel(name: str, t: Table, tariffs: Mapping[str, Tariff]) -> Channel:
    _check_url_types(t)
    given = {"base_url"} if t.has("base_urls") else set()
    missing = tuple(key for key in t.texts("fill_in") if not t.has(key) and key not in given)
    if t.has("base_url") and t.has("base_urls"):
        raise t.error("base_urls", "give base_url or base_urls, not both")
    if t.has("base_urls"):
        urls = t.texts("base_urls")
        if not urls:
            raise t.error("base_urls", "expected at least one URL")
    elif "base_url" in missing:
        urls = ()
    else:
        urls = (t.text("base_url", required=True),)
    key = "base_urls" if t.has("base_urls") else "base_url"
    proxy = t.text("proxy")
    if proxy:
        _check_url(t, "proxy", proxy, ("http", "https"), login_allowed=True)
    tariff = t.text("tariff")
    if tariff and tariff not in tariffs:
        raise t.error("tariff", str(UnknownName("tariff", tariff, tariffs)))
    peak = tariffs.get(tariff)
    price = read_price(t.table("price"))
    channel = Channel(
        name=name,
        base_urls=tuple(_check_url(t, key, url, ("http", "https")) for url in urls),
        model=t.text("model", required="model" not in missing),
        fill_in=missing,
        title=t.text("title", name),
        api_key_env=_variable(t, "api_key_env"),
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
        availability=t.number("availability", high=1.0),
        price=None if price is None else replace(price, tariff=peak),
        tariff=tariff,
        peak=peak,
        balance_path=t.text("balance_path"),
        retires=t.date("retires"),
        source=t.text("source"),
        as_of=t.date("as_of"),
        note=t.text("note"),
    )
    t.finish()
    return channel


def _check_url_types(table: Table) -> None:
    # Before they are read: a complaint about their type would show the value, which may hold a login.
    for key, kind, wanted in (("base_url", str, "a string"), ("proxy", str, "a string"), ("base_urls", list, "")):
        value = table.raw(key)
        texts = value if isinstance(value, list) else []
        if table.has(key) and not (isinstance(value, kind) and all(isinstance(text, str) for text in texts)):
            raise table.error(key, f"expected {wanted or 'a list of strings'}")


def _variable(t: Table, key: str) -> str:
    """The name of an environment variable; what else stands there may be the key itself, and is not shown."""
    name = t.text(key)
    if name and (not name.isascii() or not name.isidentifier() or looks_secret(name)):
        raise t.error(key, "expected the name of a variable that holds the key, such as MY_KEY, never the key itself")
    return name


def _check_url(table: Table, key: str, url: str, schemes: tuple[str, ...], *, login_allowed: bool = False) -> str:
    try:
        parts = urlsplit(url)
        port_ok = parts.port is None or parts.port > 0
    except ValueError:
        raise table.error(key, "is not a URL (host or port does not parse)") from None
    wanted = " or ".join(f"{s}://" for s in schemes)
    # The URL itself is never shown: a proxy's may hold a login, any URL's query a key.
    if (parts.username or parts.password) and not login_allowed:
        raise table.error(key, "holds credentials; put the key into a variable and name it in api_key_env")
    if parts.scheme not in schemes or not parts.hostname or not port_ok:
        raise table.error(key, f"expected a URL that begins with {wanted} and names a host")
    if not url.isascii() or any(c.isspace() or not c.isprintable() for c in url):
        raise table.error(key, "must be plain ASCII without spaces (percent-encode; xn-- for other hosts)")
    if any(secret_name(name) or looks_secret(value) for name, value in parse_qsl(parts.query)):
        raise table.error(key, "holds a key in its query; put it into a variable and name that in api_key_env")
    if parts.fragment or url.endswith("#"):
        raise table.error(key, "must not have a fragment (#...)")
    return url.rstrip("/")


def _loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or (host.startswith("127.") and host.replace(".", "").isdigit())


def _listens(url: str) -> bool:
    """Whether something listens on this machine at the URL's port; known at once."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=0.2):
            return True
    except OSError:
        return False
