"""Why does this channel not answer? A staged examination that stops at the first cause and names its outcome.

From what is known without asking (retirement, key, tariff) over the network (DNS, TCP, TLS, proxy) and the
account (key, balance, model, quota) to one small question. Every request goes the way the channel's own
questions go: same proxy, same TLS, same key. Knows nothing about printing.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import difflib
import ipaddress
import math
import os
import shutil
import signal
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from dsr1kit import identity
from dsr1kit.access import outcomes
from dsr1kit.access.channels import Channel
from dsr1kit.access.client import EMULATED_HEADER, ChannelClient
from dsr1kit.access.fetch import Fetched
from dsr1kit.access.findings import LONGEST, Diagnosis, State, Step, plain
from dsr1kit.access.pool import Pool
from dsr1kit.access.quota import Quota
from dsr1kit.access.reach import why_unreachable
from dsr1kit.errors import UsageError
from dsr1kit.records import ANSWERED, BUSY, Message, Outcome, Reply, Sampling

QUESTION: list[Message] = [{"role": "user", "content": "What is 12 + 30?"}]
SMALL_LIMIT = 128  # tokens of the small question's answer: R1 is usually cut inside its thinking, which will do

_EXPIRES_SOON = dt.timedelta(days=14)
_TRACE_S = 30.0
_LONGEST_ROUTE = 6000  # characters of a route
_MOST_NAMES = 10_000  # of a list of models, in which the nearest is looked for


async def diagnose(
    channel: Channel,
    *,
    first_token_s: float = 30.0,
    stall_s: float = 20.0,
    connect_s: float = 10.0,
    trace: bool = False,
    on_step: Callable[[Step], None] | None = None,
    now: Callable[[], dt.datetime] | None = None,
) -> Diagnosis:
    """Examine a channel, step by step, until the first cause or an answer to one small question.

    Args:
        first_token_s, stall_s, connect_s: limits, in seconds; UsageError where one is not above 0.
        trace: also ask mtr or traceroute for the route, where one is installed; takes up to 30 s.
        on_step: told of each finding as it is made.
        now: the clock that retirement and tariff are read by (timezone-aware).
    """
    clocks = {"first_token_s": first_token_s, "stall_s": stall_s, "connect_s": connect_s}
    examination = _Examination(channel, clocks, trace, on_step, now or (lambda: dt.datetime.now(dt.UTC)))
    return await examination.run()


class _Cause(Exception):
    """The first cause was found."""

    def __init__(self, outcome: Outcome, detail: str) -> None:
        self.outcome, self.detail = outcome, detail


@dataclass
class _Examination:
    channel: Channel
    clocks: dict[str, float]
    trace: bool
    on_step: Callable[[Step], None] | None
    now: Callable[[], dt.datetime]
    steps: list[Step] = field(default_factory=list)
    emulated: bool = False
    reply: Reply | None = None

    async def run(self) -> Diagnosis:
        unopened = ChannelClient(self.channel, **self.clocks)  # raises for limits that cannot be meant
        try:
            self._known()
            async with self._opened(unopened) as client:
                await self._network(client)
                if self.channel.protocol == "chat-completions":
                    await self._account(client)
                outcome, detail = await self._question(client)
        except _Cause as cause:
            outcome, detail = cause.outcome, cause.detail
        reply, price = self.reply, self.channel.price
        cost = price.at(self.now()).cost(reply.usage) if price is not None and reply is not None else None
        return Diagnosis(
            self.channel.name,
            self.channel.model,
            outcome,
            plain(detail, 2 * LONGEST),
            tuple(self.steps),
            reply,
            cost,
            None if price is None or cost is None else price.currency,
            self.emulated or self.channel.emulated or (reply is not None and reply.emulated),
        )

    def _add(self, name: str, state: State, said: str, seconds: float = 0.0) -> None:
        said = plain(said, _LONGEST_ROUTE, "\n") if name == "route" else plain(said)
        step = Step(name, state, said, round(seconds, 6))
        self.steps.append(step)
        if self.on_step is not None:
            self.on_step(step)

    def _fail(self, name: str, outcome: Outcome, fact: str, seconds: float = 0.0, *, todo: str = "") -> _Cause:
        """The cause, with what to do: `todo`, or the usual advice for such an outcome."""
        fact = plain(fact)
        self._add(name, "fail", fact, seconds)
        return _Cause(outcome, f"{fact}: {todo}" if todo else outcomes.detail(outcome, fact))

    # What is known without asking.
    def _known(self) -> None:
        channel, now = self.channel, self.now()
        if retired := channel.retired_on(now):
            raise self._fail("retirement", Outcome.RETIRED, f"retired on {retired}")
        warning = channel.retirement_warning(now)
        until = f"announced for {channel.retires:%Y-%m-%d}" if channel.retires else "no date known"
        self._add("retirement", "warn" if warning else "pass", warning or until)
        if channel.fill_in:
            missing = {"base_url": Outcome.UNREACHABLE, "model": Outcome.UNKNOWN_MODEL}
            outcome = missing.get(channel.fill_in[0], Outcome.UNAUTHORIZED)
            fact = f"the catalogue cannot know your {' and '.join(channel.fill_in)}"
            todo = f"put it under [channel.{channel.name}] in your own file" + (
                f" ({channel.note})" if channel.note else ""
            )
            raise self._fail("entry", outcome, fact, todo=todo)
        if channel.key_present() is False:
            variable = channel.api_key_env
            raise self._fail(
                "key", Outcome.UNAUTHORIZED, f"the variable {variable} is not set", todo=f"export {variable}=..."
            )
        self._add("key", "pass", f"{channel.api_key_env} is set" if channel.api_key_env else "none needed")
        if channel.peak is not None:
            self._tariff(now)

    def _tariff(self, now: dt.datetime) -> None:
        peak, price = self.channel.peak, self.channel.price
        assert peak is not None  # noqa: S101 - the caller has checked it
        doubt = "" if peak.holidays_known(now) else "; this year's public holidays are not in the data"
        if not peak.peak(now):
            self._add("tariff", "pass", f"not in {peak.name}'s peak hours{doubt}")
            return
        cheaper = price.next_cheaper(now) if price is not None else None
        until = f", until {cheaper:%Y-%m-%d %H:%M} UTC" if cheaper else ""
        self._add("tariff", "warn", f"peak hour: {peak.factor:g} times the price{until}{doubt}")

    # The network.
    @asynccontextmanager
    async def _opened(self, unopened: ChannelClient) -> AsyncIterator[ChannelClient]:
        began = asyncio.get_running_loop().time()
        try:
            client = await unopened.__aenter__()
        except UsageError as error:  # a key that no header can carry, a missing extra
            self._add("key", "fail", str(error))
            raise _Cause(Outcome.UNAUTHORIZED, str(error)) from None
        try:
            if client.reaches:
                reachable = [r for r in client.reaches if not r.trouble]
                far = ", ".join(f"{r.base_url} {r.distance_s * 1e3:.0f} ms" for r in reachable)
                lost = "; ".join(r.trouble for r in client.reaches if r.trouble)
                said = "; ".join(filter(None, (f"nearest first: {far}" if far else "", lost)))
                self._add("address", "warn" if lost else "pass", said, asyncio.get_running_loop().time() - began)
            yield client
        finally:
            await client.__aexit__(None, None, None)

    async def _network(self, client: ChannelClient) -> None:
        pool, loop = client.pool, asyncio.get_running_loop()
        host, port = pool.door
        whose = f"the proxy {pool.proxy}" if pool.proxy else host
        self._add("proxy", "pass" if pool.proxy else "skip", f"through {pool.proxy}" if pool.proxy else "none in use")
        began = loop.time()
        try:
            async with asyncio.timeout(self.clocks["connect_s"]):
                found = await loop.getaddrinfo(host, port, type=0, proto=6)
        except (OSError, UnicodeError, TimeoutError) as error:
            why = getattr(error, "strerror", None) or str(error) or "no answer in time"
            fact = f"the name of {whose} cannot be resolved ({why})"
            raise self._fail("dns", Outcome.UNREACHABLE, fact, loop.time() - began) from None
        addresses = list(dict.fromkeys(entry[4][0] for entry in found))
        literal = _is_address(host)
        said = f"{host} is an address" if literal else f"{host} is {', '.join(map(str, addresses[:4]))}"
        self._add("dns", "skip" if literal else "pass", said, loop.time() - began)
        if self.trace:
            await self._route(host)
        began = loop.time()
        try:
            async with asyncio.timeout(self.clocks["connect_s"]):
                _, writer = await asyncio.open_connection(host, port)
                writer.close()
        except (OSError, TimeoutError) as error:
            where = f"the proxy {pool.proxy}" if pool.proxy else f"{host}:{port}"
            if isinstance(error, ConnectionRefusedError):
                fact = f"nothing listens at {where} (connection refused)"
            else:
                why = getattr(error, "strerror", None) or f"no answer within {self.clocks['connect_s']:g} s"
                fact = f"{where} cannot be connected to ({why})"
            raise self._fail("tcp", Outcome.UNREACHABLE, fact, loop.time() - began) from None
        self._add("tcp", "pass", f"{whose}, port {port}", loop.time() - began)
        if pool.tls:
            await self._tls(pool)
        else:
            self._add("tls", "skip", "plain HTTP")

    async def _tls(self, pool: Pool) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            connection, _ = await pool.acquire(fresh=True)
        except (OSError, UnicodeError) as error:
            fact = why_unreachable(pool, error)
            raise self._fail("tls", Outcome.UNREACHABLE, fact, loop.time() - began) from None
        took = loop.time() - began
        certificate = connection.told("peercert") or {}
        version = connection.told("ssl_object").version()
        pool.release(connection, True)
        expires = certificate.get("notAfter")
        if not expires:
            self._add("tls", "pass", f"{version}", took)
            return
        left = dt.datetime.fromtimestamp(ssl.cert_time_to_seconds(expires), dt.UTC) - self.now()
        said = f"{version}, certificate good for {left.days} days"
        self._add("tls", "warn" if left < _EXPIRES_SOON else "pass", said, took)

    async def _route(self, host: str) -> None:
        tool = next((t for t in ("mtr", "traceroute") if shutil.which(t)), None)
        if tool is None:
            self._add("route", "skip", "neither mtr nor traceroute is installed (apt install mtr-tiny)")
            return
        options = ["--report", "--report-cycles", "3", "--no-dns"] if tool == "mtr" else ["-n", "-q", "1", "-w", "2"]
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            process = await asyncio.create_subprocess_exec(
                *(tool, *options, "--", host),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,  # mtr has a child, which would keep the pipe open
            )
        except OSError as error:
            self._add("route", "warn", f"{tool} cannot be run ({error.strerror})", loop.time() - began)
            return
        try:
            async with asyncio.timeout(_TRACE_S):
                told, _ = await process.communicate()
            said = told.decode("utf-8", "replace").strip() or f"{tool} ended with {process.returncode} and no word"
        except TimeoutError:
            said = f"{tool} did not end within {_TRACE_S:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):  # something that left the group may keep the pipe
            async with asyncio.timeout(1.0):
                await process.wait()
        self._add("route", "pass" if process.returncode == 0 else "warn", said, loop.time() - began)

    # The account.
    async def _get(self, client: ChannelClient, path: str) -> Fetched | str:
        try:
            response = await client.fetch(path, timeout_s=self.clocks["connect_s"])
        except (OSError, UnicodeError) as error:
            return str(error)
        self.emulated = self.emulated or EMULATED_HEADER in response.headers
        return response

    async def _account(self, client: ChannelClient) -> None:
        listed = await self._get(client, "/models")
        if isinstance(listed, str):
            self._add("http", "warn", listed)  # the question goes elsewhere and may fare better
        else:
            if listed.status == 407:
                fact = f"the proxy {client.pool.proxy} wants a login (HTTP 407)"
                todo = "put user and password into the proxy's URL"
                raise self._fail("http", Outcome.UNREACHABLE, fact, listed.total_s, todo=todo)
            self._add("http", "pass", f"GET /models answers {listed.status}", listed.total_s)
            self._refused(listed)
        if self.channel.balance_path:
            await self._balance(client)
        if not isinstance(listed, str):
            self._listed(listed)

    def _refused(self, response: Fetched) -> None:
        """Stop where the answer to a plain request settles it; the model list is the first that the key meets."""
        outcome, detail = outcomes.from_status(response.status, response.body)
        if response.status in (401, 402) or (response.status == 403 and outcome is Outcome.NO_BALANCE):
            self._add("key accepted", "fail", detail, response.total_s)
            raise _Cause(outcome, detail)
        if response.status == 403:  # some keep the list from keys that may well ask questions
            self._add("key accepted", "warn", "the model list is not for this key; the question will tell")
        elif response.status == 200 and self.channel.api_key_env:
            self._add("key accepted", "pass", "nothing against it")

    async def _balance(self, client: ChannelClient) -> None:
        response = await self._get(client, self.channel.balance_path)
        if isinstance(response, str):
            self._add("balance", "warn", response)
            return
        outcome, detail = outcomes.from_status(response.status, response.body)
        if outcome is Outcome.NO_BALANCE and response.status in (402, 403):
            self._add("balance", "fail", detail, response.total_s)
            raise _Cause(outcome, detail)
        if response.status in (401, 403):  # it may be kept from keys that may well ask questions
            self._add("balance", "warn", "it is not told to this key; the question will tell", response.total_s)
            return
        told: Any = response.json() if response.status == 200 else None
        infos = told.get("balance_infos") if isinstance(told, dict) else None
        if not isinstance(infos, list):
            self._add("balance", "skip", f"GET {self.channel.balance_path} answers {response.status} without one")
            return
        parts = [i for i in infos if isinstance(i, dict)]
        left = ", ".join(f"{i.get('total_balance')} {i.get('currency')}" for i in parts) or "nothing told"
        if told.get("is_available") is False:
            raise self._fail(
                "balance", Outcome.NO_BALANCE, f"the account's balance is used up ({left})", response.total_s
            )
        numbers = all(_is_number(i.get("total_balance")) for i in parts) and bool(parts)
        self._add("balance", "pass" if numbers else "warn", left, response.total_s)

    def _listed(self, response: Fetched) -> None:
        told = response.json() if response.status == 200 else None
        data = told.get("data") if isinstance(told, dict) else None
        names = (
            [m["id"] for m in data if isinstance(m, dict) and isinstance(m.get("id"), str)]
            if isinstance(data, list)
            else []
        )
        wanted = self.channel.model
        if not names:
            self._add("model", "skip", "no list of models here")
        elif wanted in names:
            self._add("model", "pass", f"{wanted} is in the list of {len(names)}")
        else:
            near = difflib.get_close_matches(wanted, names[:_MOST_NAMES], n=3, cutoff=0.4)
            like = f"; there: {', '.join(near)}" if near else f"; there: {', '.join(names[:3])}"
            self._add("model", "warn", f"{wanted} is not in the list of {len(names)}{like}")

    # The question.
    async def _question(self, client: ChannelClient) -> tuple[Outcome, str]:
        reply = self.reply = await client.ask(QUESTION, Sampling(max_tokens=SMALL_LIMIT))
        outcome, detail, took = reply.outcome, reply.detail, reply.timing.total_s or 0.0
        if outcome is Outcome.TRUNCATED:
            tokens, limit = reply.usage.completion_tokens or 0, min(SMALL_LIMIT, self.channel.max_output or SMALL_LIMIT)
            if tokens >= limit // 2:
                detail = f"works: cut at the examination's own limit of {limit} tokens, as it should be"
            else:
                detail = f"works, but stops answers after {tokens} of {limit} tokens: its own ceiling is that low"
        elif outcome is Outcome.OK:
            first = reply.timing.first_token_s
            detail = "works: answered in full" + ("" if first is None else f", first token after {first:.2f} s")
        self._add("question", "pass" if outcome in ANSWERED else "fail", detail, took)
        if outcome in ANSWERED:
            other = identity.told(reply.model_requested, reply.model_served)
            self._add("identity", "warn" if other else "pass", other or reply.model_served or "no name in the answer")
        quota = reply.extra.get("quota")
        if isinstance(quota, Quota):
            spent = any(a.remaining == 0 for a in quota.allowances)
            self._add("quota", "warn" if spent else "pass" if quota.told else "skip", str(quota))
        if outcome in BUSY and any(s.name == "tariff" and s.state == "warn" for s in self.steps):
            detail += ". It is a peak hour there"
        if outcome is Outcome.UNKNOWN_MODEL and (seen := next((s for s in self.steps if s.name == "model"), None)):
            detail += f" ({seen.said})"
        return outcome, detail


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
