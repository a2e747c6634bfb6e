"""The doctor names the first cause, asks nothing after it, and shows no key: over real sockets on loopback."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import shutil
import subprocess
import time

import pytest
from scripted import (
    ANSWER,
    CLOSE,
    DONE,
    HANG,
    ROLE,
    ConnectProxy,
    Scripted,
    certificate,
    delta,
    free_port,
    refusal,
    response,
    usage,
)

from dsr1kit.access.channels import Channel
from dsr1kit.access.doctor import diagnose
from dsr1kit.access.prices import Price, Tariff
from dsr1kit.emulator.channel import channel_of
from dsr1kit.emulator.server import Emulator
from dsr1kit.emulator.troubles import load_troubles, play
from dsr1kit.emulator.weather import load_weather
from dsr1kit.errors import UsageError
from dsr1kit.records import ANSWERED, Outcome

SECRET = "correct-horse-battery-staple-77"  # noqa: S105 - a made-up value that must not leak
CLOCKS = {"first_token_s": 0.8, "stall_s": 0.5, "connect_s": 2.0}
OWN = {Outcome.DEADLINE, Outcome.OVER_BUDGET, Outcome.CANCELLED}
TROUBLES = load_troubles()
NOW = dt.datetime(2026, 11, 23, 3, 30, tzinfo=dt.UTC)  # 11:30 in Shanghai


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("DOCTOR_KEY", SECRET)


def body(value, status=200, **headers):
    """One JSON response with its length."""
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return response(raw, status=status, framing="length", headers={"Content-Type": "application/json", **headers})


def listing(*names):
    return body({"object": "list", "data": [{"id": name} for name in names]})


RICH = body({"is_available": True, "balance_infos": [{"currency": "CNY", "total_balance": "110.00"}]})
POOR = body({"is_available": False, "balance_infos": [{"currency": "CNY", "total_balance": "0.00"}]})


def provider(models=None, chat=None, balance=RICH):
    """A script that answers by path."""
    models = listing("served-r1") if models is None else models
    chat = response(ANSWER) if chat is None else chat

    def script(request):
        given = chat if request.method == "POST" else balance if "balance" in request.target else models
        return given(request) if callable(given) else given

    return script


def examine(script, tls=None, now=None, trace=False, clocks=None, **fields):
    """Diagnose a scripted provider; returns the diagnosis and the server."""

    async def inside():
        async with Scripted(script, tls=tls) as server:
            channel = server.channel(**{"model": "served-r1", **fields})
            return await diagnose(channel, trace=trace, now=now, **{**CLOCKS, **(clocks or {})}), server

    return asyncio.run(inside())


def diagnosed(channel, **more):
    return asyncio.run(diagnose(channel, **{**CLOCKS, **more}))


def names(diagnosis):
    return [step.name for step in diagnosis.steps]


def step(diagnosis, name):
    (found,) = [s for s in diagnosis.steps if s.name == name]
    return found


def posts(server):
    return [r for r in server.requests if r.method == "POST"]


# --- the confusion table ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table():
    """Every shipped trouble and what the doctor made of it."""

    async def one(trouble, turns):
        async with turns, play(trouble) as channel:
            return await diagnose(channel, **CLOCKS)

    async def inside():
        turns = asyncio.Semaphore(6)
        return await asyncio.gather(*(one(t, turns) for t in TROUBLES.values()))

    return dict(zip(TROUBLES, asyncio.run(inside()), strict=True))


@pytest.mark.parametrize("name", TROUBLES)
def test_the_doctor_names_every_trouble_by_its_outcome(table, name):
    found = table[name]
    assert found.outcome is TROUBLES[name].outcome, (found.detail, found.steps)
    assert found.usable == (found.outcome in ANSWERED)
    assert found.detail
    assert found.emulated
    told = found.to_json()
    assert json.loads(json.dumps(told)) == told
    fails = [s for s in found.steps if s.state == "fail"]
    if found.usable:
        assert not fails
    else:
        # One cause, and it is the last thing that was found out; the same reply may tell a quota with it.
        assert len(fails) == 1
        assert names(found)[names(found).index(fails[0].name) + 1 :] in ([], ["quota"])
        assert len(found.detail) > len(fails[0].said) or ":" in found.detail  # what to do next is told too


def test_the_table_holds_every_outcome_of_the_far_side_and_no_other():
    assert {t.outcome for t in TROUBLES.values()} == set(Outcome) - OWN


def test_a_trouble_is_told_with_what_is_seen_of_it():
    assert all(t.says and t.seen and t.weather.title == name for name, t in TROUBLES.items())


# --- nothing is asked after the first cause --------------------------------------------------------------------


def test_a_channel_past_its_retirement_is_sent_nothing_not_even_the_key():
    found, server = examine(provider(), api_key_env="DOCTOR_KEY", retires=dt.date(2026, 7, 24), now=lambda: NOW)
    assert found.outcome is Outcome.RETIRED
    assert server.connections == 0
    assert [(s.name, s.state) for s in found.steps] == [("retirement", "fail")]
    assert "2026-07-24" in found.detail
    assert "another channel" in found.detail


def test_retirement_is_read_by_the_clock_that_is_given():
    found, server = examine(provider(), retires=dt.date(2098, 1, 1), now=lambda: dt.datetime(2099, 1, 1, tzinfo=dt.UTC))
    assert found.outcome is Outcome.RETIRED
    assert server.connections == 0


def test_of_several_addresses_none_hears_of_a_retired_channel():
    found, server = examine(
        provider(), base_urls=("http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"), retires=dt.date(2026, 7, 24)
    )
    assert (found.outcome, server.connections) == (Outcome.RETIRED, 0)


def test_without_its_key_nothing_is_asked_and_the_variable_is_named(monkeypatch):
    monkeypatch.delenv("DOCTOR_KEY")
    found, server = examine(provider(), api_key_env="DOCTOR_KEY")
    assert found.outcome is Outcome.UNAUTHORIZED
    assert server.connections == 0
    assert names(found) == ["retirement", "key"]
    assert "export DOCTOR_KEY=" in found.detail


def test_a_key_that_no_header_can_carry_is_told_and_not_sent(monkeypatch):
    monkeypatch.setenv("DOCTOR_KEY", "“" + SECRET + "”")
    found, server = examine(provider(), api_key_env="DOCTOR_KEY")
    assert found.outcome is Outcome.UNAUTHORIZED
    assert server.connections == 0
    assert "copy the key again" in found.detail
    assert SECRET not in json.dumps(found.to_json())


def test_an_entry_with_something_to_fill_in_says_what_and_where():
    channel = Channel(name="mine", base_urls=(), model="m", fill_in=("base_url",), note="find it in the console")
    found = diagnosed(channel)
    assert found.outcome is Outcome.UNREACHABLE
    assert all(part in found.detail for part in ("base_url", "[channel.mine]", "find it in the console"))
    channel = Channel(name="mine", base_urls=("http://127.0.0.1:1/v1",), model="", fill_in=("model",))
    assert diagnosed(channel).outcome is Outcome.UNKNOWN_MODEL


def test_an_empty_account_is_found_before_a_question_is_asked():
    found, server = examine(provider(balance=POOR), api_key_env="DOCTOR_KEY", balance_path="/user/balance")
    assert found.outcome is Outcome.NO_BALANCE
    assert "0.00 CNY" in found.detail
    assert [r.target for r in server.requests] == ["/v1/models", "/v1/user/balance"]
    assert names(found)[-1] == "balance"


@pytest.mark.parametrize(
    ("refused", "outcome"),
    [
        (refusal(401, "Authentication Fails"), Outcome.UNAUTHORIZED),
        (refusal(402, "Insufficient Balance"), Outcome.NO_BALANCE),
        (refusal(403, "Your account is in arrears"), Outcome.NO_BALANCE),
    ],
)
def test_a_refusal_of_the_model_list_that_settles_it_ends_the_examination(refused, outcome):
    found, server = examine(provider(models=refused), api_key_env="DOCTOR_KEY", balance_path="/user/balance")
    assert found.outcome is outcome
    assert len(server.requests) == 1
    assert "HTTP 40" in found.detail


@pytest.mark.parametrize("fault", ["unauthorized", "no_balance"])
def test_the_emulator_is_asked_no_question_where_the_account_is_refused(tmp_path, fault):
    path = tmp_path / "w.toml"
    path.write_text(f'[model]\nscript = "42"\n[faults]\n{fault} = 1\n')

    async def inside():
        emulator = Emulator(load_weather(path))
        async with emulator.listen() as url:
            channel = channel_of(emulator.weather, url, "e", dt.datetime.now(dt.UTC))
            return await diagnose(channel, **CLOCKS), emulator.served

    found, served = asyncio.run(inside())
    assert found.outcome.value == fault
    assert not served


# --- a healthy channel -----------------------------------------------------------------------------------------


def test_all_steps_are_made_in_order_timed_and_told_as_they_are_made():
    heard = []

    async def inside():
        async with Scripted(provider()) as server:
            channel = server.channel(
                model="served-r1",
                api_key_env="DOCTOR_KEY",
                balance_path="/user/balance",
                price=Price(1.0, 10.0, "CNY"),
            )
            return await diagnose(channel, on_step=heard.append, **CLOCKS), server

    found, server = asyncio.run(inside())
    assert names(found) == [
        "retirement", "key", "proxy", "dns", "tcp", "tls", "http", "key accepted", "balance", "model", "question",
        "identity", "quota",
    ]  # fmt: skip
    assert tuple(heard) == found.steps
    assert found.outcome is Outcome.OK
    assert found.usable
    assert step(found, "balance").said == "110.00 CNY"
    assert step(found, "proxy").said == "none in use"
    assert all(step(found, name).seconds > 0 for name in ("tcp", "http", "balance", "question"))
    assert len(posts(server)) == 1
    assert posts(server)[0].json["max_tokens"] <= 256
    assert found.cost == pytest.approx((7 * 1.0 + 9 * 10.0) / 1e6)
    assert found.currency == "CNY"
    assert not found.emulated
    assert {r.headers["authorization"] for r in server.requests} == {f"Bearer {SECRET}"}


def test_a_slow_step_is_told_as_slow():
    slow = [(0.15, b""), *listing("served-r1")]
    found, _ = examine(provider(models=slow))
    assert 0.14 < step(found, "http").seconds < 1.5


def test_a_model_list_that_is_forbidden_is_no_cause_where_questions_are_answered():
    found, _ = examine(provider(models=refusal(403, "not for this key")), api_key_env="DOCTOR_KEY")
    assert found.usable
    assert step(found, "key accepted").state == "warn"


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_a_balance_that_is_not_told_is_no_cause_where_questions_are_answered(status):
    found, _ = examine(provider(balance=refusal(status, "no")), api_key_env="DOCTOR_KEY", balance_path="/user/balance")
    assert found.usable, found.detail
    assert step(found, "balance").state in ("warn", "skip")
    assert "model list" not in step(found, "balance").said


def test_an_account_in_arrears_is_a_cause_where_its_balance_is_asked():
    refused = provider(balance=refusal(402, "Insufficient Balance"))
    found, server = examine(refused, api_key_env="DOCTOR_KEY", balance_path="/user/balance")
    assert found.outcome is Outcome.NO_BALANCE
    assert not posts(server)


@pytest.mark.parametrize(
    "told",
    [b"", b"null", b"[]", b'{"balance_infos": 7}', b'{"balance_infos": [7, null]}', b'{"balance_infos": []}',
     b'{"is_available": "no", "balance_infos": [{}]}', b"<html></html>", b"[" * 50000],
)  # fmt: skip
def test_a_strange_balance_is_no_cause(told):
    found, _ = examine(provider(balance=body(told)), balance_path="/user/balance")
    assert found.usable
    assert step(found, "balance").state in ("warn", "skip")


def test_a_model_that_is_served_though_not_listed_is_usable_and_told_with_the_nearest():
    found, _ = examine(provider(models=listing("gpt-4", "served-r2", "served-r1-0528")))
    assert found.usable
    assert step(found, "model").state == "warn"
    assert "served-r1-0528" in step(found, "model").said


def test_a_model_that_is_neither_listed_nor_served_is_told_with_the_nearest():
    found, _ = examine(provider(models=listing("gpt-4", "served-r1x"), chat=refusal(404, "The model does not exist")))
    assert found.outcome is Outcome.UNKNOWN_MODEL
    assert "served-r1x" in found.detail


def test_another_model_that_answers_is_told():
    found, _ = examine(provider(models=listing("deepseek-r1")), model="deepseek-r1")
    assert found.usable
    assert step(found, "identity").state == "warn"
    assert "asked for deepseek-r1, answered by served-r1" in step(found, "identity").said
    assert found.to_json()["model_served"] == "served-r1"


def cut_after(tokens):
    text = "".join(delta(reasoning_content="so ").decode() for _ in range(tokens)).encode()
    return response(ROLE + text + delta(finish="length") + usage(tokens, tokens) + DONE)


def test_a_low_ceiling_is_told_apart_from_the_examination_s_own_limit():
    own = examine(provider(chat=lambda r: cut_after(r.json["max_tokens"])))[0]
    low = examine(provider(chat=cut_after(9)))[0]
    assert (own.outcome, low.outcome) == (Outcome.TRUNCATED, Outcome.TRUNCATED)
    assert own.usable
    assert low.usable
    assert "own limit" in own.detail
    assert "own limit" not in low.detail
    assert "9 of" in low.detail
    stated, server = examine(provider(chat=lambda r: cut_after(r.json["max_tokens"])), max_output=20)
    assert posts(server)[0].json["max_tokens"] == 20
    assert "ceiling" not in stated.detail
    assert "20 tokens" in stated.detail


def test_what_is_left_of_a_quota_is_told():
    left = {"x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "3"}
    found, _ = examine(provider(chat=response(ANSWER, headers=left)))
    assert step(found, "quota").state == "pass"
    assert "3 of 60 requests left" in step(found, "quota").said
    spent = {"x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "0"}
    assert step(examine(provider(chat=response(ANSWER, headers=spent)))[0], "quota").state == "warn"
    assert step(examine(provider())[0], "quota").state == "skip"


def test_a_question_that_is_refused_costs_nothing():
    found, _ = examine(provider(chat=refusal(503, "busy")), price=Price(1.0, 10.0))
    assert found.outcome is Outcome.OVERLOADED
    assert not found.cost


# --- the calendar and the clock --------------------------------------------------------------------------------


PEAK = Tariff(name="peak", timezone="Asia/Shanghai", hours=((10.0, 12.0), (15.0, 17.0)), factor=3.0)


def test_a_peak_hour_is_named_with_the_next_cheaper_moment():
    fields = {"peak": PEAK, "tariff": "peak", "price": Price(1.0, 10.0, tariff=PEAK)}
    found, _ = examine(provider(), now=lambda: NOW, **fields)
    tariff = step(found, "tariff")
    assert tariff.state == "warn"
    assert "3 times the price" in tariff.said
    assert "2026-11-23 04:00 UTC" in tariff.said
    assert found.usable
    assert found.cost == pytest.approx(3 * (7 * 1.0 + 9 * 10.0) / 1e6)
    busy, _ = examine(provider(chat=refusal(503, "busy")), now=lambda: NOW, **fields)
    assert "peak hour" in busy.detail
    calm, _ = examine(provider(chat=refusal(503, "busy")), now=lambda: NOW.replace(hour=5), **fields)
    assert step(calm, "tariff").state == "pass"
    assert "peak hour" not in calm.detail


def test_a_peak_hour_without_a_price_is_told_all_the_same():
    found, _ = examine(provider(), now=lambda: NOW, peak=PEAK, tariff="peak")
    assert "peak hour" in step(found, "tariff").said
    assert found.cost is None
    assert found.currency is None


def test_a_year_without_known_holidays_is_told():
    tariff = Tariff(
        name="peak", timezone="Asia/Shanghai", hours=((10.0, 12.0),), factor=3.0, holiday_years=frozenset({2025})
    )
    found, _ = examine(provider(), now=lambda: NOW, peak=tariff)
    assert "holidays" in step(found, "tariff").said


def test_a_retirement_within_thirty_days_warns_also_when_the_channel_is_busy():
    soon = dt.datetime.now(dt.UTC).date() + dt.timedelta(days=9)
    found, _ = examine(provider(), retires=soon)
    assert found.usable
    assert step(found, "retirement").state == "warn"
    assert f"{soon:%Y-%m-%d}" in step(found, "retirement").said
    busy, _ = examine(provider(chat=refusal(503, "busy")), retires=soon)
    assert busy.outcome is Outcome.OVERLOADED
    assert f"{soon:%Y-%m-%d}" in busy.detail
    far, _ = examine(provider(), retires=dt.date(2099, 1, 1))
    assert step(far, "retirement").state == "pass"
    assert "2099-01-01" in step(far, "retirement").said


# --- the way there ---------------------------------------------------------------------------------------------


def test_a_name_that_cannot_be_resolved_stops_at_dns():
    found = diagnosed(Channel(name="c", base_urls=("http://r1.invalid/v1",), model="m"))
    assert (found.outcome, names(found)[-1]) == (Outcome.UNREACHABLE, "dns")
    assert "r1.invalid" in found.detail


@pytest.mark.parametrize("host", ["a..b", "x" * 70 + ".example", "xn--a"])
def test_a_name_that_no_host_can_have_stops_at_dns(host):
    found = diagnosed(Channel(name="c", base_urls=(f"http://{host}/v1",), model="m"))
    assert (found.outcome, names(found)[-1]) == (Outcome.UNREACHABLE, "dns")


def test_a_port_on_which_nothing_listens_stops_at_tcp():
    port = free_port()
    found = diagnosed(Channel(name="c", base_urls=(f"http://127.0.0.1:{port}/v1",), model="m"))
    assert (found.outcome, names(found)[-1]) == (Outcome.UNREACHABLE, "tcp")
    assert f"127.0.0.1:{port} (connection refused)" in found.detail
    assert "check the network" in found.detail


def test_of_several_addresses_the_nearest_is_asked_and_the_lost_one_is_told():
    async def inside():
        slow = provider(models=[(0.1, b""), *listing("served-r1")])
        async with Scripted(slow) as far, Scripted(provider()) as near:
            dead = f"http://127.0.0.1:{free_port()}/v1"
            channel = near.channel(model="served-r1", base_urls=(dead, far.url, near.url))
            return await diagnose(channel, **CLOCKS), far, near, dead

    found, far, near, dead = asyncio.run(inside())
    assert found.usable
    address = step(found, "address")
    assert address.state == "warn"
    assert dead in address.said
    assert address.said.index(near.url) < address.said.index(far.url)
    assert (len(posts(near)), len(posts(far))) == (1, 0)


def test_several_addresses_of_which_none_is_there_are_unreachable():
    urls = tuple(f"http://127.0.0.1:{free_port()}/v1" for _ in range(2))
    found = diagnosed(Channel(name="c", base_urls=urls, model="m"))
    assert found.outcome is Outcome.UNREACHABLE
    assert all(url in step(found, "address").said for url in urls)


def test_clocks_that_cannot_be_meant_are_the_caller_s_fault():
    channel = Channel(name="c", base_urls=("http://127.0.0.1:1/v1",), model="m")
    for wrong in ({"first_token_s": 0.0}, {"stall_s": -1.0}, {"connect_s": 0.0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            diagnosed(channel, **wrong)


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    made = certificate(tmp_path_factory.mktemp("tls"))
    if made is None:
        pytest.skip("no openssl to make a certificate with")
    return made


def dated(folder, begins, ends, host="IP:127.0.0.1"):
    """As `certificate`, with dates of one's own: a server context and the file to trust."""
    import ssl

    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make a certificate with")
    (folder / "index.txt").write_text("")
    (folder / "ca.cnf").write_text(
        "[ca]\ndefault_ca=d\n[d]\ndatabase=index.txt\nnew_certs_dir=.\ndefault_md=sha256\npolicy=p\n"
        f"rand_serial=yes\nx509_extensions=e\n[p]\ncommonName=supplied\n[e]\nsubjectAltName={host}\n"
    )
    make = [openssl, "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-subj", "/CN=r1", "-keyout", "key.pem", "-out", "request.pem"]  # fmt: skip
    sign = [openssl, "ca", "-batch", "-config", "ca.cnf", "-selfsign", "-keyfile", "key.pem", "-in", "request.pem",
            "-startdate", begins, "-enddate", ends, "-notext", "-out", "cert.pem"]  # fmt: skip
    for command in (make, sign):
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=30)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context, folder / "cert.pem"


def stamp(days):
    return f"{dt.datetime.now(dt.UTC) + dt.timedelta(days=days):%Y%m%d%H%M%SZ}"


def test_a_certificate_that_nobody_vouches_for_stops_at_tls(tls):
    found, server = examine(provider(), tls=tls[0])
    assert (found.outcome, names(found)[-1]) == (Outcome.UNREACHABLE, "tls")
    assert "not trusted" in found.detail
    assert "self" in found.detail
    assert not server.requests


def test_an_expired_certificate_stops_at_tls(tmp_path, monkeypatch):
    context, trusted = dated(tmp_path, stamp(-40), stamp(-3))
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    found, server = examine(provider(), tls=context)
    assert (found.outcome, names(found)[-1]) == (Outcome.UNREACHABLE, "tls")
    assert "expired" in found.detail
    assert not server.requests


def test_a_certificate_of_another_host_stops_at_tls(tmp_path, monkeypatch):
    context, trusted = dated(tmp_path, stamp(-1), stamp(60), host="DNS:elsewhere.example")
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    found, server = examine(provider(), tls=context)
    assert (found.outcome, names(found)[-1]) == (Outcome.UNREACHABLE, "tls")
    assert "127.0.0.1" in found.detail
    assert not server.requests


def test_the_days_left_of_a_good_certificate_are_told_and_few_of_them_warn(tls, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tls[1]))
    found, _ = examine(provider(), tls=tls[0])
    assert found.usable
    assert step(found, "tls").state == "warn"
    assert "good for 1 day" in step(found, "tls").said
    context, trusted = dated(tmp_path, stamp(-1), stamp(60.5))
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    found, _ = examine(provider(), tls=context)
    assert step(found, "tls").state == "pass"
    assert "TLSv1.3, certificate good for 60 days" in step(found, "tls").said
    assert found.usable


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_is_not_there_is_named(scheme):
    port = free_port()
    channel = Channel(
        name="c", base_urls=(f"{scheme}://r1.example/v1",), model="m", proxy=f"http://me:{SECRET}@127.0.0.1:{port}"
    )
    found = diagnosed(channel)
    assert (found.outcome, names(found)[-1]) == (Outcome.UNREACHABLE, "tcp")
    assert f"the proxy 127.0.0.1:{port}" in found.detail
    assert f"through 127.0.0.1:{port}" in step(found, "proxy").said
    assert SECRET not in json.dumps(found.to_json())


def test_a_proxy_that_refuses_to_connect_is_named():
    async def inside():
        async with ConnectProxy(1, status=403) as proxy:
            address = f"127.0.0.1:{proxy.port}"
            channel = Channel(name="c", base_urls=("https://r1.example/v1",), model="m", proxy=f"http://{address}")
            return await diagnose(channel, **CLOCKS), address

    found, address = asyncio.run(inside())
    assert (found.outcome, names(found)[-1]) == (Outcome.UNREACHABLE, "tls")
    assert f"the proxy {address} answered CONNECT r1.example:443 with status 403" in found.detail


def test_a_proxy_that_wants_a_login_is_named():
    async def inside():
        async with Scripted(refusal(407, "login")) as proxy:
            address = f"127.0.0.1:{proxy.port}"
            channel = Channel(name="c", base_urls=("http://r1.example/v1",), model="m", proxy=f"http://{address}")
            return await diagnose(channel, **CLOCKS), proxy, address

    found, proxy, address = asyncio.run(inside())
    assert found.outcome is Outcome.UNREACHABLE
    assert f"the proxy {address} wants a login" in found.detail
    assert not posts(proxy)


def test_through_a_proxy_that_works_everything_is_examined(tls, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tls[1]))

    async def inside():
        async with Scripted(provider(), tls=tls[0]) as server, ConnectProxy(server.port) as proxy:
            channel = server.channel(
                model="served-r1", base_urls=("https://r1.example/v1",), proxy=f"http://127.0.0.1:{proxy.port}"
            )
            return await diagnose(channel, **CLOCKS), proxy

    found, proxy = asyncio.run(inside())
    assert found.usable, found.detail
    assert step(found, "proxy").state == "pass"
    assert {r.target for r in proxy.asked} == {"r1.example:443"}
    assert step(found, "tls").said.startswith("TLS")


# --- model lists of all kinds ----------------------------------------------------------------------------------


MANY = {"data": [{"id": f"served-r1-{i:05}"} for i in range(60_000)]}
LISTS = {
    "hangs": [HANG],
    "hangs in its headers": [(0.0, b"HTTP/1.1 200 OK\r\nContent-"), HANG],
    "hangs in its body": [*response(b"", status=200, framing="close")[:1], (0.0, b'{"data": ['), HANG],
    "closed at once": [CLOSE],
    "not HTTP": [(0.0, b"SSH-2.0-OpenSSH_9\r\n"), CLOSE],
    "bytes": body(bytes(range(256)) * 9),
    "html": response(b"<!DOCTYPE html><title>Welcome</title>", framing="length", headers={"Content-Type": "text/html"}),
    "404": refusal(404, "no"),
    "500": refusal(500, "oops"),
    "429": refusal(429, "slow down"),
    "redirect": refusal(302, "elsewhere", Location="http://127.0.0.1:1/"),
    "nothing": body(b""),
    "null": body(None),
    "a list": body([{"id": "served-r1"}]),
    "no data": body({"data": None}),
    "data of another kind": body({"data": {"id": "served-r1"}}),
    "names of another kind": body({"data": [1, None, {"id": None}, {"id": 7}, {"id": ["served-r1"]}, []]}),
    "deep": body(b"[" * 200_000),
    "very many": body(MANY),
    "one very long name": body({"data": [{"id": "served-r" * 500_000}]}),
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_strange_model_list_does_not_stop_the_diagnosis(kind):
    began = time.monotonic()
    found, server = examine(provider(models=LISTS[kind]), clocks={"connect_s": 0.4})
    assert found.usable, found.detail
    assert len(posts(server)) == 1
    assert time.monotonic() - began < 5.0
    assert all(len(s.said) < 2000 for s in found.steps)


def test_a_model_list_without_end_is_given_up_in_time():
    endless = [(0.0, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")]
    endless += [(0.002, b"8\r\n" + b"[" * 8 + b"\r\n")] * 2000
    began = time.monotonic()
    found, _ = examine(provider(models=endless), clocks={"connect_s": 0.3})
    assert found.usable
    assert step(found, "http").state == "warn"
    assert time.monotonic() - began < 2.5


def test_what_a_server_says_is_printable_whatever_it_says():
    nasty = "\x1b[2J\x1b]0;mine\x07r1\ud83d\u202e\r\nGET"
    chat = response(
        delta(content="hi").replace(b"served-r1", json.dumps(nasty)[1:-1].encode()) + delta(finish="stop") + DONE
    )
    infos = {"balance_infos": [{"total_balance": nasty, "currency": nasty}]}
    found, _ = examine(provider(models=listing(nasty), chat=chat, balance=body(infos)), balance_path="/balance")
    assert found.usable
    for said in (found.detail, *(s.said for s in found.steps)):
        said.encode()
        assert said.isprintable(), said
    json.dumps(found.to_json(), ensure_ascii=False).encode()
    refused, _ = examine(provider(chat=refusal(400, nasty)))
    assert refused.detail.isprintable()


# --- keys ------------------------------------------------------------------------------------------------------


def echoes(part):
    """A provider that says back the Authorization header, in one place or another."""

    def script(request):
        told = request.headers.get("authorization", "none")
        header = {"X-Echo": told, "Retry-After": told, "X-RateLimit-Limit": told}
        wrong = refusal(400, f"wrong key {told}", **header)
        if request.method == "POST":
            if part == "refusal":
                return wrong
            if part == "event":
                return response(ROLE + b'data: {"error": {"message": "bad ' + told.encode() + b'"}}\n\n')
            if part == "not an answer":
                return response(told.encode(), framing="length", headers={"Content-Type": "text/plain", **header})
            answer = ANSWER.replace(b"served-r1", told.encode()).replace(b"17 + 25", told.encode())
            return response(answer, headers=header)
        if part == "account":
            return refusal(401, f"wrong key {told}", **header)
        if "balance" in request.target:
            return body({"is_available": part != "balance", "balance_infos": [{"total_balance": told, told: 1}]})
        return listing(told, f"served-{told}")

    return script


@pytest.mark.parametrize("part", ["refusal", "event", "not an answer", "account", "balance", "names"])
def test_a_key_that_is_said_back_is_in_no_step_detail_or_json(part):
    found, server = examine(echoes(part), api_key_env="DOCTOR_KEY", balance_path="/user/balance")
    assert f"Bearer {SECRET}" in {r.headers["authorization"] for r in server.requests}
    shown = [found.detail, json.dumps(found.to_json()), *(s.said for s in found.steps)]
    assert not any(SECRET in text or SECRET[:12] in text for text in shown)
    assert "[redacted]" in json.dumps(found.to_json())


# --- the route -------------------------------------------------------------------------------------------------


def tool(folder, name, script):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(script)
    path.chmod(0o755)
    return path


@pytest.fixture
def path_with(tmp_path, monkeypatch):
    """A PATH whose first folder holds the tools that are given."""

    def put(**tools):
        for name, script in tools.items():
            tool(tmp_path / "bin", name, script)
        (tmp_path / "bin").mkdir(exist_ok=True)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    return put


@pytest.mark.parametrize("name", ["mtr", "traceroute"])
def test_the_route_is_told_where_a_tool_is_there_and_it_was_asked_for(path_with, tmp_path, name):
    path_with(**{name: f'#!/bin/sh\necho "{name} $@"\necho "1. 10.0.0.1 0.3 ms"\necho ran >> {tmp_path}/ran\n'})
    quiet, _ = examine(provider())
    assert "route" not in names(quiet)
    assert not (tmp_path / "ran").exists()
    found, _ = examine(provider(), trace=True)
    assert found.usable
    route = step(found, "route")
    assert route.state == "pass"
    assert "10.0.0.1 0.3 ms" in route.said
    assert "-- 127.0.0.1" in route.said
    assert (tmp_path / "ran").read_text() == "ran\n"
    assert names(found).index("dns") < names(found).index("route") < names(found).index("tcp")


def test_without_a_tool_the_route_is_left_out_and_that_is_told(path_with):
    path_with()
    found, _ = examine(provider(), trace=True)
    assert found.usable
    assert step(found, "route").state == "skip"
    assert "mtr" in step(found, "route").said


@pytest.mark.parametrize(
    "script",
    ["#!/bin/sh\necho 'mtr: Failure to open raw sockets' >&2\nexit 1\n", "#!/nowhere/sh\n", "\x00\x01no program", ""],
)
def test_a_tool_that_fails_does_not_stop_the_diagnosis(path_with, script):
    path_with(mtr=script)
    found, _ = examine(provider(), trace=True)
    assert found.usable
    assert step(found, "route").state == "warn"


def test_a_tool_that_hangs_is_ended_in_time_with_its_children(path_with, monkeypatch, tmp_path):
    monkeypatch.setattr("dsr1kit.access.doctor._TRACE_S", 0.4)
    sleep = shutil.which("sleep")
    path_with(mtr=f"#!/bin/sh\n{sleep} 30 &\necho $! > {tmp_path}/child\nwait\n")
    began = time.monotonic()
    found, _ = examine(provider(), trace=True)
    assert found.usable
    assert step(found, "route").state == "warn"
    assert "did not end within 0.4 s" in step(found, "route").said
    assert 0.4 <= step(found, "route").seconds < 3
    assert time.monotonic() - began < 5
    stat = f"/proc/{(tmp_path / 'child').read_text().strip()}/stat"
    for _ in range(100):
        try:
            with open(stat) as file:  # noqa: PTH123 - gone any moment
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    break
        except FileNotFoundError:
            break
        time.sleep(0.02)
    else:
        pytest.fail("the tool's child goes on")
