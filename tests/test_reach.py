"""The nearest of several addresses, plain requests over the measured way, proxies; and who it was that answered."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import time

import pytest
from scripted import ANSWER, CLOSE, HANG, RESET, ConnectProxy, Scripted, certificate, free_port, refusal, response

from dsr1kit.access.channels import Channel
from dsr1kit.access.fetch import fetch
from dsr1kit.access.pool import Pool
from dsr1kit.identity import match_models, told
from dsr1kit.records import Outcome

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
KEY = "sk-scripted-0123456789abcdef"
MODELS = b'{"object": "list", "data": [{"id": "r1"}]}'
OK = response(ANSWER)


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("REACH_KEY", KEY)


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    made = certificate(tmp_path_factory.mktemp("tls"))
    if made is None:
        pytest.skip("no openssl to make a certificate with")
    return made


def far(delay_s, models=MODELS, status=200):
    """A server's script: the model list after a delay, every question at once."""

    def script(request):
        if request.method == "GET":
            return [(delay_s, b""), *response(models, status=status, framing="length")]
        return OK

    return script


def channel(*urls, **fields):
    return Channel(**{"name": "c", "base_urls": urls, "model": "r1", **fields})


def posts(server):
    return [r for r in server.requests if r.method == "POST"]


def gets(server):
    return [r for r in server.requests if r.method == "GET"]


def dead():
    return f"http://127.0.0.1:{free_port()}/v1"


# The nearest address.
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_the_nearest_by_measured_time_is_asked_whatever_the_order_in_the_file(order):
    async def inside():
        async with Scripted(far(0.1)) as slow, Scripted(far(0.0)) as near, Scripted(far(0.05)) as middle:
            servers = (slow, near, middle)
            async with channel(*(servers[i].url for i in order)).open() as r1:
                replies = [await r1.ask(QUESTION) for _ in range(3)]
                return [r.base_url for r in r1.reaches], [s.url for s in (near, middle, slow)], replies, servers

    measured, wanted, replies, (slow, near, middle) = asyncio.run(inside())
    assert measured == wanted
    assert [reply.outcome for reply in replies] == [Outcome.OK] * 3
    assert {reply.extra["base_url"] for reply in replies} == {near.url}
    assert (len(posts(near)), len(posts(middle)), len(posts(slow))) == (3, 0, 0)


def test_addresses_are_measured_side_by_side_and_the_distance_is_what_was_measured():
    async def inside():
        async with Scripted(far(0.15)) as a, Scripted(far(0.15)) as b, Scripted(far(0.15)) as c:
            began = time.perf_counter()
            async with channel(a.url, b.url, c.url).open() as r1:
                return time.perf_counter() - began, r1.reaches

    took, reaches = asyncio.run(inside())
    assert took < 3 * 3 * 0.15  # one after the other it would be at least that
    assert all(reach.first_byte_s >= 0.14 and not reach.trouble for reach in reaches)
    assert all(reach.distance_s == reach.connect_s + reach.first_byte_s for reach in reaches)


def test_a_refusal_is_an_answer_too():
    async def inside():
        async with (
            Scripted(far(0.1)) as slow,
            Scripted(far(0.0, b"{}", 401)) as near,
            channel(slow.url, near.url).open() as r1,
        ):
            return (await r1.ask(QUESTION)).extra["base_url"], near.url

    used, near = asyncio.run(inside())
    assert used == near


def test_an_unreachable_address_is_passed_over_and_told():
    lost = dead()

    async def inside():
        async with Scripted(far(0.05)) as server, channel(lost, server.url).open() as r1:
            return r1.reaches, await r1.ask(QUESTION), server.url

    reaches, reply, url = asyncio.run(inside())
    assert [r.base_url for r in reaches] == [url, lost]
    assert reaches[0].trouble == ""
    assert reaches[1].trouble == f"nothing listens at {lost} (connection refused)"
    assert reaches[1].distance_s == float("inf")
    assert (reply.outcome, reply.extra["base_url"]) == (Outcome.OK, url)


@pytest.mark.parametrize("how", [[CLOSE], [RESET], [(0.0, b"SSH-2.0-OpenSSH_9\r\n"), CLOSE]])
def test_an_address_that_does_not_answer_in_http_is_passed_over(how):
    async def inside():
        async with Scripted(how) as broken, Scripted(far(0.05)) as server, channel(broken.url, server.url).open() as r1:
            return r1.reaches, await r1.ask(QUESTION), server.url, broken.url

    reaches, reply, url, broken = asyncio.run(inside())
    assert reply.extra["base_url"] == url
    assert reaches[1].base_url == broken
    assert broken in reaches[1].trouble


async def counter(port):
    """A listener on `port` that counts who comes."""
    came = []

    async def serve(reader, writer):
        came.append(1)
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", port), came


def test_when_the_nearest_dies_in_mid_run_the_next_answers_and_the_dead_one_is_not_tried_first_again():
    async def inside():
        async with Scripted(far(0.1)) as backup, contextlib.AsyncExitStack() as stack:
            near = await stack.enter_async_context(Scripted(far(0.0)))
            async with channel(backup.url, near.url).open() as r1:
                first = await r1.ask(QUESTION)
                await stack.aclose()  # it dies
                second = await r1.ask(QUESTION)
                back, came = await counter(near.port)  # something is there again
                async with back:
                    more = [await r1.ask(QUESTION) for _ in range(3)]
                    fetched = await r1.fetch("/models")
                return [first, second, *more], fetched, near.url, backup.url, came

    replies, fetched, near, backup, came = asyncio.run(inside())
    assert [reply.outcome for reply in replies] == [Outcome.OK] * 5
    assert [reply.extra["base_url"] for reply in replies] == [near] + [backup] * 4
    assert fetched.status == 200
    assert came == []


def test_questions_in_flight_together_all_move_on_when_the_nearest_dies():
    async def inside():
        async with Scripted(far(0.1)) as backup, contextlib.AsyncExitStack() as stack:
            near = await stack.enter_async_context(Scripted(far(0.0)))
            async with channel(near.url, backup.url).open() as r1:
                await stack.aclose()
                return await asyncio.gather(*(r1.ask(QUESTION) for _ in range(12))), backup.url

    replies, backup = asyncio.run(inside())
    assert {(reply.outcome, reply.extra["base_url"]) for reply in replies} == {(Outcome.OK, backup)}


def test_an_address_that_comes_back_is_used_when_all_others_have_died():
    async def inside():
        async with contextlib.AsyncExitStack() as first, contextlib.AsyncExitStack() as second:
            near = await first.enter_async_context(Scripted(far(0.0)))
            other = await second.enter_async_context(Scripted(far(0.05)))
            async with channel(near.url, other.url).open() as r1:
                await first.aclose()
                used = [(await r1.ask(QUESTION)).extra["base_url"]]
                await second.aclose()
                lost = await r1.ask(QUESTION)
                again = Scripted(far(0.0))
                server = await asyncio.start_server(again._serve, "127.0.0.1", near.port)
                again._tasks = set()
                async with server:
                    used.append((await r1.ask(QUESTION)).extra["base_url"])
                    for task in again._tasks:
                        task.cancel()
                return used, lost, near.url, other.url

    used, lost, near, other = asyncio.run(inside())
    assert used == [other, near]
    assert lost.outcome is Outcome.UNREACHABLE


def test_all_addresses_dead_is_unreachable_with_the_reason_of_each():
    refused, unnamed = dead(), "http://r1.invalid/v1"

    async def inside():
        async with channel(refused, unnamed).open() as r1:
            return r1.reaches, [await r1.ask(QUESTION) for _ in range(2)]

    reaches, replies = asyncio.run(inside())
    assert all(reach.trouble for reach in reaches)
    for reply in replies:
        assert reply.outcome is Outcome.UNREACHABLE
        assert f"nothing listens at {refused} (connection refused)" in reply.detail
        assert f"the name in {unnamed} cannot be resolved" in reply.detail


def test_one_address_is_not_measured():
    async def inside():
        async with Scripted(far(0.0)) as server, channel(server.url).open() as r1:
            await asyncio.sleep(0)
            before = server.connections
            reply = await r1.ask(QUESTION)
            return before, r1.reaches, reply, server

    before, reaches, reply, server = asyncio.run(inside())
    assert (before, reaches, reply.outcome) == (0, [], Outcome.OK)
    assert [r.method for r in server.requests] == ["POST"]


def test_a_retired_channel_is_not_measured():
    async def inside():
        async with (
            Scripted(far(0.0)) as a,
            Scripted(far(0.0)) as b,
            channel(a.url, b.url, retires=dt.date(2020, 1, 1)).open() as r1,
        ):
            return (await r1.ask(QUESTION)).outcome, a.connections + b.connections

    assert asyncio.run(inside()) == (Outcome.RETIRED, 0)


def test_the_key_goes_with_the_measuring_and_never_into_a_message():
    def echo(request):
        return [(0.0, f"{request.headers.get('authorization')}\r\n\r\n".encode()), CLOSE]

    async def inside():
        async with Scripted(far(0.0)) as server, Scripted(echo) as talkative:
            async with channel(talkative.url, server.url, api_key_env="REACH_KEY").open() as r1:
                reaches, reply = r1.reaches, await r1.ask(QUESTION)
            asked = gets(server) + gets(talkative)
        async with channel(talkative.url, server.url, api_key_env="REACH_KEY").open() as r1:
            return asked, repr([*reaches, reply, *r1.reaches, await r1.ask(QUESTION)])

    asked, shown = asyncio.run(inside())
    assert len(asked) >= 2
    assert {r.target for r in asked} == {"/v1/models"}
    assert all(r.headers["authorization"] == f"Bearer {KEY}" for r in asked)
    assert "refused" in shown
    assert KEY not in shown


def test_without_a_key_none_is_sent():
    async def inside():
        async with Scripted(far(0.0)) as a, Scripted(far(0.0)) as b, channel(a.url, b.url).open():
            return gets(a) + gets(b)

    assert all("authorization" not in r.headers for r in asyncio.run(inside()))


# Plain requests.
def get(*scripts, path="/models", times=1, server=None, **options):
    async def inside():
        async with server or Scripted(*scripts) as far_side:
            pool = Pool(far_side.url)
            try:
                done = [await fetch(pool, path, **options) for _ in range(times)]
                return done[-1], far_side
            finally:
                pool.close()

    return asyncio.run(inside())


def test_a_plain_request_asks_below_the_base_url_and_gives_the_whole_answer():
    done, server = get(response(MODELS, framing="length", headers={"X-Thing": "a"}), headers={"X-Mine": "b"})
    assert (done.status, done.body, done.json()["data"]) == (200, MODELS, [{"id": "r1"}])
    assert done.headers["x-thing"] == "a"
    request = server.requests[0]
    assert (request.method, request.target, request.headers["x-mine"]) == ("GET", "/v1/models", "b")
    assert request.headers["accept-encoding"] == "identity"
    assert 0 < done.connect_s < done.total_s
    assert 0 < done.first_byte_s < done.total_s


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_a_big_body_comes_whole_in_every_framing(framing):
    body = b'"' + b"0123456789abcdef" * 250_000 + b'"'
    done, _ = get(response(body, framing=framing), timeout_s=20)
    assert len(done.body) == len(body)
    assert done.body == body
    assert done.json() == body[1:-1].decode()


@pytest.mark.parametrize("body", [b"<html>", b"", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_a_body_that_is_not_json_is_none(body):
    assert get(response(body, framing="length"))[0].json() is None


def test_an_error_status_is_a_response_like_any_other():
    done, _ = get(refusal(503, "busy", **{"Retry-After": "5"}))
    assert (done.status, done.headers["retry-after"], done.json()) == (503, "5", {"error": {"message": "busy"}})


@pytest.mark.parametrize(
    "script",
    [
        [HANG],
        [(0.0, b"HTTP/1.1 200 OK\r\nContent-"), HANG],
        [(0.0, b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345"), HANG],
        [(0.0, b"HTTP/1.1 200 OK\r\n\r\n"), *[(0.05, b"more")] * 40],
    ],
)
def test_what_does_not_end_is_given_up_in_time_and_its_connection_closed(script):
    began = time.perf_counter()

    async def inside():
        async with Scripted(script) as server:
            pool = Pool(server.url)
            with pytest.raises(OSError, match=r"no whole response to GET /models within 0\.2 s"):
                await fetch(pool, "/models", timeout_s=0.2)
            await server.until(lambda: server.open_connections == 0)
            pool.close()

    asyncio.run(inside())
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ([CLOSE], "the connection ended before the response did"),
        ([RESET], "the connection ended before the response did"),
        ([(0.0, b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345"), CLOSE], "ended before the response did"),
        ([(0.0, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n123"), CLOSE], "ended before"),
        ([(0.0, b"220 mail.example ESMTP\r\n"), HANG], "the answer is not HTTP"),
        ([(0.0, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnot-a-size\r\n"), HANG], "is not HTTP"),
    ],
)
def test_what_breaks_off_or_is_no_http_is_an_error_that_says_so(script, told):
    with pytest.raises(OSError, match=told):
        get(script)


@pytest.mark.parametrize("how", [CLOSE, RESET])
def test_a_connection_that_went_stale_is_replaced(how):
    done, server = get([*response(MODELS, framing="length"), how], times=2)
    assert done.body == MODELS
    assert len(server.requests) == 2


def test_a_connection_is_reused_unless_a_fresh_one_is_wanted():
    again, server = get(response(MODELS, framing="length"), times=3)
    assert (server.connections, again.connect_s) == (1, 0.0)
    _, server = get(response(MODELS, framing="length"), times=3, fresh=True)
    assert server.connections == 3


def test_a_plain_request_that_is_cancelled_closes_its_connection():
    async def inside():
        async with Scripted([HANG]) as server:
            pool = Pool(server.url)
            task = asyncio.create_task(fetch(pool, "/models"))
            await server.until(lambda: len(server.requests) == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await server.until(lambda: server.open_connections == 0)

    asyncio.run(inside())


# Proxies.
class SecureProxy(ConnectProxy):
    """The same over TLS."""

    def __init__(self, to_port, context, status=200):
        super().__init__(to_port, status)
        self.context = context

    async def __aenter__(self):
        self._tasks = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.context)
        self.port = self._server.sockets[0].getsockname()[1]
        return self


def test_a_proxy_over_tls_carries_tls_inside(tls, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tls[1]))

    async def inside():
        async with Scripted(OK, tls=tls[0]) as server, SecureProxy(server.port, tls[0]) as proxy:
            via = channel("https://r1.example/v1", proxy=f"https://me:pw%40x@127.0.0.1:{proxy.port}")
            async with via.open() as r1:
                replies = [await r1.ask(QUESTION) for _ in range(2)]
            return replies, proxy.asked, server.requests

    replies, asked, requests = asyncio.run(inside())
    assert [(r.outcome, r.answer) for r in replies] == [(Outcome.OK, "The answer is 42.")] * 2
    assert [r.timing.connection_reused for r in replies] == [False, True]
    assert [(r.method, r.target) for r in asked] == [("CONNECT", "r1.example:443")]
    assert asked[0].headers["proxy-authorization"] == "Basic bWU6cHdAeA=="
    assert all("proxy-authorization" not in r.headers for r in requests)


def test_a_big_body_comes_whole_through_tls_in_tls(tls, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tls[1]))
    body = b"0123456789abcdef" * 100_000

    async def inside():
        async with (
            Scripted(response(body, framing="length"), tls=tls[0]) as server,
            SecureProxy(server.port, tls[0]) as proxy,
        ):
            pool = Pool("https://r1.example/v1", proxy=f"https://127.0.0.1:{proxy.port}")
            done = await fetch(pool, "/models", timeout_s=20)
            pool.close()
            return done.body

    assert asyncio.run(inside()) == body


def test_a_proxy_over_tls_gets_plain_requests_as_whole_urls(tls, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tls[1]))

    async def inside():
        async with Scripted(OK, tls=tls[0]) as proxy:
            via = channel("http://r1.example/v1", proxy=f"https://127.0.0.1:{proxy.port}")
            async with via.open() as r1:
                return await r1.ask(QUESTION), proxy.requests

    reply, requests = asyncio.run(inside())
    assert reply.outcome is Outcome.OK
    assert [r.target for r in requests] == ["http://r1.example/v1/chat/completions"]


def test_addresses_are_measured_through_the_proxy(tls, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tls[1]))

    async def inside():
        async with Scripted(far(0.0), tls=tls[0]) as server, SecureProxy(server.port, tls[0]) as proxy:
            two = ("https://r1.example/a", "https://r1.example/b")
            async with channel(*two, proxy=f"https://127.0.0.1:{proxy.port}").open() as r1:
                return [r.trouble for r in r1.reaches], {r.target for r in gets(server)}, len(proxy.asked)

    troubles, targets, tunnels = asyncio.run(inside())
    assert troubles == ["", ""]
    assert targets == {"/a/models", "/b/models"}
    assert tunnels == 6  # each time on a new connection


def via_proxy(proxy, url="https://r1.example/v1", **clocks):
    async def inside():
        async with channel(url, proxy=proxy).open(**clocks) as r1:
            return await r1.ask(QUESTION)

    reply = asyncio.run(inside())
    assert reply.outcome is Outcome.UNREACHABLE
    return reply.detail


@pytest.mark.parametrize("url", ["https://r1.example/v1", "http://r1.example/v1"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_is_down_is_unreachable_and_named_without_its_login(scheme, url):
    port = free_port()
    detail = via_proxy(f"{scheme}://me:s3cr3t-p4ss@127.0.0.1:{port}", url)
    assert f"the proxy 127.0.0.1:{port} cannot be reached" in detail
    assert "s3cr3t" not in detail


@pytest.mark.parametrize("host", ["proxy.invalid", "a..b.example", "x" * 70 + ".example"])
def test_a_proxy_whose_name_leads_nowhere_is_what_is_named(host):
    assert f"the proxy {host}:3128 cannot be reached" in via_proxy(f"https://{host}:3128")


def test_a_proxy_whose_certificate_is_not_trusted_is_what_is_named(tls):
    async def inside():
        async with (
            SecureProxy(1, tls[0]) as proxy,
            channel("https://r1.example/v1", proxy=f"https://127.0.0.1:{proxy.port}").open() as r1,
        ):
            return await r1.ask(QUESTION), proxy.port, proxy.asked

    reply, port, asked = asyncio.run(inside())
    assert reply.outcome is Outcome.UNREACHABLE
    assert f"the proxy 127.0.0.1:{port} cannot be reached" in reply.detail
    assert "certificate" in reply.detail
    assert asked == []


def test_an_untrusted_server_behind_a_trusted_proxy_is_the_one_that_is_named(tls, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tls[1]))
    other = certificate(tmp_path)
    assert other is not None

    async def inside():
        async with (
            Scripted(OK, tls=other[0]) as server,
            SecureProxy(server.port, tls[0]) as proxy,
            channel("https://r1.example/v1", proxy=f"https://127.0.0.1:{proxy.port}").open() as r1,
        ):
            return await r1.ask(QUESTION), server.requests

    reply, requests = asyncio.run(inside())
    assert reply.outcome is Outcome.UNREACHABLE
    assert "the certificate of https://r1.example/v1 is not trusted" in reply.detail
    assert requests == []


@pytest.mark.parametrize("status", [403, 407, 502])
def test_a_proxy_over_tls_that_refuses_is_named_with_its_status(tls, monkeypatch, status):
    monkeypatch.setenv("SSL_CERT_FILE", str(tls[1]))

    async def inside():
        async with (
            SecureProxy(1, tls[0], status) as proxy,
            channel("https://r1.example/v1", proxy=f"https://127.0.0.1:{proxy.port}").open() as r1,
        ):
            return await r1.ask(QUESTION), proxy.port

    reply, port = asyncio.run(inside())
    assert reply.outcome is Outcome.UNREACHABLE
    assert f"the proxy 127.0.0.1:{port} answered CONNECT r1.example:443 with status {status}" in reply.detail


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    "answer", [[CLOSE], [(0.0, b"HTTP/1.1 200 OK\r\n\r\n"), CLOSE], [(0.0, b"rubbish\r\n"), CLOSE]]
)
def test_a_proxy_that_breaks_off_is_unreachable(tls, monkeypatch, scheme, answer):
    monkeypatch.setenv("SSL_CERT_FILE", str(tls[1]))

    async def inside():
        async with (
            Scripted(answer, tls=tls[0] if scheme == "https" else None) as proxy,
            channel("https://r1.example/v1", proxy=f"{scheme}://127.0.0.1:{proxy.port}").open() as r1,
        ):
            return await r1.ask(QUESTION), proxy.port

    reply, port = asyncio.run(inside())
    assert reply.outcome is Outcome.UNREACHABLE
    assert f"the proxy 127.0.0.1:{port} broke off the " in reply.detail


def test_a_proxy_that_keeps_silent_is_given_up_and_named(tls, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tls[1]))

    async def inside():
        async with Scripted([HANG], tls=tls[0]) as proxy:
            via = channel("https://r1.example/v1", proxy=f"https://127.0.0.1:{proxy.port}")
            async with via.open(connect_s=0.3) as r1:
                reply = await r1.ask(QUESTION)
            await proxy.until(lambda: proxy.open_connections == 0)
            return reply, proxy.port

    reply, port = asyncio.run(inside())
    assert reply.outcome is Outcome.UNREACHABLE
    assert f"through the proxy 127.0.0.1:{port} within 0.3 s" in reply.detail


def test_tls_to_a_proxy_that_speaks_none_is_unreachable_and_names_it():
    async def inside():
        async with ConnectProxy(1) as proxy:
            via = channel("https://r1.example/v1", proxy=f"https://127.0.0.1:{proxy.port}")
            async with via.open(connect_s=0.3) as r1:
                return await r1.ask(QUESTION), proxy.port

    reply, port = asyncio.run(inside())
    assert reply.outcome is Outcome.UNREACHABLE
    assert f"the proxy 127.0.0.1:{port}" in reply.detail


# Who answered.
@pytest.mark.parametrize(
    ("requested", "served", "match"),
    [
        ("deepseek-r1", "deepseek-r1", "same"),
        ("deepseek-ai/DeepSeek-R1", "deepseek-r1", "same"),
        ("deepseek-ai/DeepSeek-R1", "Pro/deepseek-ai/DeepSeek-R1", "same"),
        ("accounts/fireworks/models/deepseek-r1-0528", "deepseek/deepseek-r1-0528", "same"),
        ("@cf/deepseek-ai/deepseek-r1-distill-qwen-32b", "deepseek-r1-distill-qwen-32b", "same"),
        ("deepseek-r1:1.5b", "deepseek-r1-1.5b", "same"),
        ("DeepSeek R1", " deepseek_r1 ", "same"),
        ("/models/DeepSeek-R1/", "DeepSeek-R1", "same"),
        ("deepseek-r1", "deepseek-r1-0528", "variant"),
        ("deepseek-r1-0528", "deepseek-r1", "variant"),
        ("deepseek/deepseek-r1-0528", "deepseek/deepseek-r1-0528:free", "variant"),
        ("deepseek-ai/DeepSeek-R1", "deepseek-ai/DeepSeek-R1-Turbo", "variant"),
        ("deepseek-ai/DeepSeek-R1", "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", "other"),
        ("deepseek-r1-distill", "DeepSeek-R1-Distill-Qwen-7B-Q4_K_M.gguf", "variant"),
        ("deepseek-reasoner", "deepseek-flash", "other"),
        ("deepseek-reasoner", "deepseek-chat", "other"),
        ("deepseek-ai/DeepSeek-R1", "deepseek-ai/DeepSeek-V3", "other"),
        ("deepseek-ai/DeepSeek-R1-Turbo", "deepseek-ai/DeepSeek-R1-0528", "other"),
        ("deepseek-r1-distill-qwen-1.5b", "deepseek-r1-distill-qwen-15b", "other"),
        ("deepseek-r1-distill-qwen-7b", "deepseek-r1-distill-llama-70b", "other"),
        ("deepseek-r1:7b", "deepseek-r1:70b", "other"),
        ("deepseek-r1", "deepseek-r10", "other"),
        ("deepseek-r1", "gpt-4o", "other"),
        ("deepseek-r1", None, None),
        ("deepseek-r1", "", None),
        ("", "deepseek-r1", None),
    ],
)
def test_the_name_that_came_back_against_the_one_asked_for(requested, served, match):
    assert match_models(requested, served) == match
    sentence = told(requested, served)
    if match in ("same", None):
        assert sentence == ""
    else:
        said = "another model" if match == "other" else "a name that differs"
        assert sentence == f"asked for {requested}, answered by {served}: {said}"
