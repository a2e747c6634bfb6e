"""The measuring client over real sockets: what it times, how it names every ending, what it sends.

Bounds from above are generous, since machines that run tests are busy; orders and bounds from below are not.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import gc
import gzip
import json
import socket
import time
import zlib
from itertools import pairwise

import pytest
from scripted import (
    ANSWER,
    CLOSE,
    DONE,
    HANG,
    RESET,
    ROLE,
    ConnectProxy,
    Scripted,
    certificate,
    delta,
    event,
    free_port,
    refusal,
    response,
    usage,
)

from dsr1kit.access.channels import Channel
from dsr1kit.errors import MissingKey, OutcomeError, UsageError
from dsr1kit.records import BUSY, Outcome, Sampling

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
OK = response(ANSWER)
SLACK_S = 0.25  # for a busy machine
KEY = "sk-scripted-0123456789abcdef"


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def play(*scripts, times=1, fields=None, tls=None, sampling=None, **clocks):
    """Ask a scripted server `times` times in a row; the last reply and the server."""

    async def inside():
        async with Scripted(*scripts, tls=tls) as server, server.channel(**fields or {}).open(**clocks) as r1:
            for _ in range(times):
                reply = await r1.ask(QUESTION, sampling or Sampling())
            return reply, server

    return asyncio.run(inside())


def ask(channel, **clocks):
    async def inside():
        async with channel.open(**clocks) as r1:
            return await r1.ask(QUESTION)

    return asyncio.run(inside())


def near(value, wanted):
    """Not earlier than the script, not much later."""
    return value is not None and wanted - 0.005 <= value <= wanted + SLACK_S


# Times.
def test_times_are_those_of_the_script():
    reply, _ = play(
        response(
            ROLE,
            (0.05, b": wait\n\n"),
            (0.05, delta(reasoning_content="a")),
            (0.05, delta(reasoning_content="b")),
            (0.05, delta(content="\n\n")),
            (0.05, delta(content="c")),
            (0.05, delta(finish="stop") + usage(6, 2) + DONE),
        )
    )
    t = reply.timing
    assert reply.outcome is Outcome.OK
    assert near(t.first_token_s, 0.1)
    assert near(t.first_answer_s, 0.25)
    assert t.think_s == pytest.approx(t.first_answer_s - t.first_token_s)
    assert t.total_s == pytest.approx(t.first_answer_s)  # the last chunk with text, not the end of the stream
    assert t.inter_token_s == pytest.approx((t.total_s - t.first_token_s) / 5)
    assert len(t.gaps_s) == 3
    assert sum(t.gaps_s) == pytest.approx(t.total_s - t.first_token_s)
    assert all(gap > 0.02 for gap in t.gaps_s)
    assert (reply.extra["keep_alives"], reply.extra["chunks"]) == (1, 4)


def test_several_tokens_in_one_chunk_count_by_usage():
    reply, _ = play(response(delta(content="a b c"), (0.1, delta(content="d", finish="stop") + usage(11, 0) + DONE)))
    assert near(reply.timing.inter_token_s * 10, 0.1)


def test_one_chunk_alone_has_no_time_between_tokens():
    reply, _ = play(response(delta(content="a b c", finish="stop") + usage(3) + DONE))
    assert reply.timing.inter_token_s is None
    assert reply.timing.gaps_s == ()


def test_inline_thinking_is_timed_like_fields():
    for fields, opening in (({"reasoning": "inline"}, ""), ({}, "<think>\n")):
        reply, _ = play(
            response(
                ROLE,
                delta(content=opening + "I add."),
                (0.05, delta(content="</th")),
                (0.05, delta(content="ink>\n\n")),
                (0.05, delta(content="42")),
                delta(finish="stop") + DONE,
            ),
            fields=fields,
        )
        assert (reply.reasoning, reply.answer) == ("I add.", "42")
        assert near(reply.timing.first_token_s, 0.0)
        assert near(reply.timing.think_s, 0.15)


def test_no_answer_leaves_answer_times_empty():
    reply, _ = play(response(delta(reasoning_content="hm"), delta(finish="length") + DONE))
    assert reply.outcome is Outcome.TRUNCATED
    assert reply.timing.first_token_s is not None
    assert reply.timing.first_answer_s is None
    assert reply.timing.think_s is None


def test_a_late_dispatch_shows_as_queue_time():
    async def inside():
        async with Scripted(OK) as server, server.channel().open() as r1:
            due = asyncio.get_running_loop().time() - 0.5
            return await r1.ask(QUESTION, due=due)

    reply = asyncio.run(inside())
    assert near(reply.timing.queue_s, 0.5)
    assert reply.timing.first_token_s >= reply.timing.queue_s + reply.timing.connect_s
    now = dt.datetime.now(dt.UTC).timestamp()
    assert 0.4 < now - reply.due_at < 30


def test_the_second_request_reuses_the_connection():
    async def inside():
        async with Scripted(OK) as server, server.channel().open() as r1:
            first = await r1.ask(QUESTION)
            second = await r1.ask(QUESTION)
            return first.timing, second.timing, server.connections

    first, second, connections = asyncio.run(inside())
    assert connections == 1
    assert (first.connection_reused, second.connection_reused) == (False, True)
    assert first.connect_s > 0
    assert second.connect_s == 0.0


def test_connections_are_pooled_and_all_closed_at_the_end():
    async def inside():
        async with Scripted(response((0.05, ANSWER))) as server:
            async with server.channel().open() as r1:
                for _ in range(2):
                    replies = await asyncio.gather(*(r1.ask(QUESTION) for _ in range(5)))
                    assert {r.outcome for r in replies} == {Outcome.OK}
                assert server.connections == 5
            await server.until(lambda: server.open_connections == 0)

    asyncio.run(inside())


# What is sent.
def test_the_body_carries_the_sampling_and_asks_for_usage():
    sampling = Sampling(temperature=0.3, top_p=0.9, max_tokens=500, seed=7, max_thinking_tokens=99)
    _, server = play(OK, sampling=sampling)
    request = server.requests[0]
    assert (request.method, request.target) == ("POST", "/v1/chat/completions")
    assert request.headers["accept-encoding"] == "identity"
    assert "authorization" not in request.headers
    body = request.json
    assert body["messages"] == QUESTION
    assert (body["model"], body["stream"], body["stream_options"]) == ("r1", True, {"include_usage": True})
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.3, 0.9, 500)
    assert body["seed"] == sampling.draw_seed()
    assert body["thinking_budget"] == 99


def test_without_a_seed_none_is_sent():
    _, server = play(OK)
    assert "seed" not in server.requests[0].json


def test_max_tokens_is_clamped_to_max_output():
    _, server = play(OK, fields={"max_output": 100})
    assert server.requests[0].json["max_tokens"] == 100
    _, server = play(OK, fields={"max_output": 100}, sampling=Sampling(max_tokens=10))
    assert server.requests[0].json["max_tokens"] == 10


def test_a_query_in_the_base_url_stays_at_the_end():
    async def inside():
        async with Scripted(OK) as server:
            async with server.channel(base_urls=(server.url + "?api-version=1",)).open() as r1:
                await r1.ask(QUESTION)
            return server.requests[0].target

    assert asyncio.run(inside()) == "/v1/chat/completions?api-version=1"


def test_the_key_is_sent_and_shown_nowhere(monkeypatch):
    monkeypatch.setenv("SCRIPTED_KEY", KEY)
    fields = {"api_key_env": "SCRIPTED_KEY"}
    reply, server = play(refusal(401, f"Incorrect API key provided: {KEY}", echo=KEY), fields=fields)
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert reply.outcome is Outcome.UNAUTHORIZED
    assert KEY not in repr(reply)
    reply, _ = play(response(event({"error": {"message": f"bad {KEY}"}})), fields=fields)
    assert KEY not in repr(reply)
    assert KEY not in repr(server.channel(**fields).open())


def test_a_missing_key_is_told_on_entering():
    channel = Channel(name="c", base_urls=("http://127.0.0.1:9/v1",), model="m", api_key_env="NO_SUCH_KEY_HERE")
    with pytest.raises(MissingKey, match="NO_SUCH_KEY_HERE"):
        ask(channel)


# Misuse raises, the far side never.
def test_misuse_raises():
    async def unopened():
        await Channel(name="c", base_urls=("http://127.0.0.1:9",), model="m").open().ask(QUESTION)

    with pytest.raises(UsageError, match="async with"):
        asyncio.run(unopened())
    channel = Channel(name="c", base_urls=("http://127.0.0.1:9",), model="m")
    for clocks in ({"first_token_s": 0}, {"stall_s": -1}, {"deadline_s": 0}, {"connect_s": float("nan")}):
        with pytest.raises(UsageError, match=next(iter(clocks))):
            channel.open(**clocks)


@pytest.mark.parametrize("error", [KeyError("mine"), TimeoutError("mine")])
def test_what_on_delta_raises_reaches_the_caller_once(error):
    calls = []

    async def inside():
        async with Scripted(response(ANSWER, HANG)) as server, server.channel().open() as r1:

            def on_delta(piece):
                calls.append(piece)
                raise error

            with pytest.raises(type(error)):
                await r1.ask(QUESTION, on_delta=on_delta)
            await server.until(lambda: server.open_connections == 0)

    asyncio.run(inside())
    assert len(calls) == 1


def test_deltas_arrive_live_and_add_up():
    async def inside():
        script = response(delta(reasoning_content="a"), (0.1, delta(content="b")), (0.1, delta(finish="stop") + DONE))
        async with Scripted(script) as server, server.channel().open() as r1:
            loop = asyncio.get_running_loop()
            start = loop.time()
            seen = []
            reply = await r1.ask(QUESTION, on_delta=lambda d: seen.append((d, loop.time() - start)))
            return reply, seen, loop.time() - start

    reply, seen, whole_s = asyncio.run(inside())
    assert [(d.kind, d.text) for d, _ in seen] == [("reasoning", "a"), ("answer", "b")]
    assert seen[0][0].at_s == pytest.approx(reply.timing.first_token_s)
    assert seen[1][0].at_s == pytest.approx(reply.timing.first_answer_s)
    assert seen[0][1] <= whole_s - 0.19


# Outcomes.
CASES = {
    "ok": (OK, Outcome.OK),
    "truncated": (response(delta(content="4", finish="length") + DONE), Outcome.TRUNCATED),
    "filtered": (response(delta(content="4", finish="content_filter") + DONE), Outcome.FILTERED),
    "filtered by words": (refusal(400, "Content Exists Risk"), Outcome.FILTERED),
    "throttled": (refusal(429, "Rate limit reached"), Outcome.THROTTLED),
    "throttled whatever it says": (refusal(429, "Insufficient quota"), Outcome.THROTTLED),
    "overloaded 500": (refusal(500), Outcome.OVERLOADED),
    "overloaded 503": (refusal(503, "Server busy"), Outcome.OVERLOADED),
    "overloaded 529": (refusal(529), Outcome.OVERLOADED),
    "overloaded, HTML": (
        response(b"<html><title>502 Bad Gateway</title>", status=502), Outcome.OVERLOADED,
    ),
    "overloaded in the stream": (
        response(delta(content="4") + delta(finish="insufficient_system_resource") + DONE),
        Outcome.OVERLOADED,
    ),
    "overloaded by event": (response(b'event: error\ndata: {"message":"busy"}\n\n'), Outcome.OVERLOADED),
    "cut": (response(delta(content="4"), CLOSE), Outcome.CUT),
    "cut by reset": (response(delta(content="4"), (0.02, b": x\n\n"), RESET), Outcome.CUT),
    "cut before headers": ([CLOSE], Outcome.CUT),
    "cut, length not reached": (
        [(0.0, b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + delta(content="4")), CLOSE],
        Outcome.CUT,
    ),
    "cut, but properly framed": (response(delta(content="4")), Outcome.CUT),
    "cut inside chunk framing": (
        [(0.0, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")], Outcome.CUT,
    ),
    "empty": (response(ROLE + delta(finish="stop") + DONE), Outcome.EMPTY),
    "empty body": (response(framing="length"), Outcome.EMPTY),
    "not_an_answer": (response(b"<!DOCTYPE html><title>x</title>"), Outcome.NOT_AN_ANSWER),
    "not_an_answer, JSON": (response(b'{"choices": ['), Outcome.NOT_AN_ANSWER),
    "not_an_answer, redirect": (response(status=301, framing="length"), Outcome.NOT_AN_ANSWER),
    "not_an_answer, not HTTP": ([(0.0, b"SSH-2.0-OpenSSH_9.6\r\n\r\n"), HANG], Outcome.NOT_AN_ANSWER),
    "no_balance": (refusal(402, "Insufficient Balance"), Outcome.NO_BALANCE),
    "no_balance by words": (refusal(400, "Access denied: account in arrears"), Outcome.NO_BALANCE),
    "unauthorized 401": (refusal(401), Outcome.UNAUTHORIZED),
    "unauthorized 403": (refusal(403), Outcome.UNAUTHORIZED),
    "unknown_model 404": (refusal(404), Outcome.UNKNOWN_MODEL),
    "unknown_model by words": (refusal(400, "Model Not Exist"), Outcome.UNKNOWN_MODEL),
    "unknown_model by words, dotted": (
        refusal(400, "The model `deepseek-r1-distill-qwen-1.5b` does not exist."), Outcome.UNKNOWN_MODEL,
    ),
    "retired 410": (refusal(410), Outcome.RETIRED),
    "retired by words": (refusal(400, "deepseek-r1 is no longer available"), Outcome.RETIRED),
    "retired by words, 404": (refusal(404, "This model was deprecated on 2026-07-01"), Outcome.RETIRED),
    "bad_request": (refusal(400, "temperature must be below 2"), Outcome.BAD_REQUEST),
    "bad_request 422": (refusal(422), Outcome.BAD_REQUEST),
    "bad_request, not retired": (
        refusal(400, "The parameter top_k is deprecated and no longer supported"), Outcome.BAD_REQUEST,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_ending_has_its_outcome(case):
    script, outcome = CASES[case]
    reply, server = play(script, first_token_s=20)
    assert reply.outcome is outcome, reply.detail
    assert len(server.requests) == 1
    assert bool(reply.detail) == (outcome is not Outcome.OK)
    assert reply.timing.total_s >= 0
    assert reply.attempts[0].outcome is outcome
    assert (reply.channel, reply.model_requested) == ("scripted", "r1")
    if outcome is Outcome.OK:
        assert reply.raise_for_outcome() is reply
        assert (reply.model_served, reply.http_status) == ("served-r1", 200)
    else:
        with pytest.raises(OutcomeError, match=outcome.value):
            reply.raise_for_outcome()


def test_a_refusal_keeps_the_providers_words_status_and_headers():
    reply, _ = play(refusal(429, "Slow down, please", **{"Retry-After": "7"}))
    assert "Slow down, please" in reply.detail
    assert reply.http_status == 429
    assert reply.headers["retry-after"] == "7"
    assert reply.outcome in BUSY


def test_a_cut_answer_keeps_what_came():
    reply, _ = play(response(delta(reasoning_content="hm"), delta(content="4"), CLOSE))
    assert (reply.reasoning, reply.answer) == ("hm", "4")
    assert "inside the answer" in reply.detail


def test_a_refusal_that_breaks_off_still_counts_by_its_status():
    reply, _ = play([(0.0, b"HTTP/1.1 503 Busy\r\nContent-Length: 999\r\n\r\nbusy"), CLOSE])
    assert reply.outcome is Outcome.OVERLOADED


def keep_alives(count, every_s=0.03):
    return [(every_s, b": keep-alive\n\n")] * count


def test_keep_alives_without_a_token_are_queued():
    reply, server = play(response(ROLE, *keep_alives(30)), first_token_s=0.3)
    assert reply.outcome is Outcome.QUEUED, reply.detail
    assert near(reply.timing.total_s, 0.3)
    assert reply.extra["keep_alives"] >= 1
    assert server.gone == [1]


@pytest.mark.parametrize("script", [[HANG], response(HANG), response(ROLE, HANG)])
def test_silence_before_the_first_token_is_stalled(script):
    reply, _ = play(script, first_token_s=0.15)
    assert reply.outcome is Outcome.STALLED
    assert near(reply.timing.total_s, 0.15)
    assert reply.timing.first_token_s is None


def test_silence_between_tokens_is_stalled_and_keep_alives_do_not_break_it():
    reply, _ = play(response(delta(content="4"), *keep_alives(30)), first_token_s=0.1, stall_s=0.3)
    assert reply.outcome is Outcome.STALLED
    assert reply.answer == "4"
    assert "middle" in reply.detail


def test_slow_but_steady_tokens_are_not_stalled():
    steady = [(0.05, delta(content="4"))] * 6
    reply, _ = play(response(*steady, delta(finish="stop") + DONE), first_token_s=1.0, stall_s=1.0)
    assert reply.outcome is Outcome.OK


def test_a_response_left_open_after_done_is_ok_and_its_connection_is_given_up():
    reply, server = play(response(ANSWER, HANG), OK, times=2, first_token_s=20)
    assert reply.outcome is Outcome.OK
    assert server.connections == 2
    assert not reply.timing.connection_reused


def test_a_finish_reason_without_an_end_is_ok_once_the_stall_clock_ran_out():
    reply, _ = play(response(delta(content="42"), delta(finish="stop"), HANG), first_token_s=0.2, stall_s=0.2)
    assert reply.outcome is Outcome.OK


def test_the_deadline_ends_a_request_and_keeps_what_came():
    async def inside():
        async with Scripted(response(delta(content="4"), HANG)) as server:
            async with server.channel().open(deadline_s=0.15) as r1:
                reply = await r1.ask(QUESTION)
                await server.until(lambda: server.open_connections == 0)  # told by closing, at once
            return reply

    reply = asyncio.run(inside())
    assert (reply.outcome, reply.answer) == (Outcome.DEADLINE, "4")


def test_a_channel_past_its_date_is_retired_without_asking():
    reply, server = play(OK, fields={"retires": dt.date(2026, 1, 1)})
    assert reply.outcome is Outcome.RETIRED
    assert "2026-01-01" in reply.detail
    assert server.requests == []
    reply, _ = play(OK, fields={"retires": dt.datetime.now(dt.UTC) + dt.timedelta(days=1)})
    assert reply.outcome is Outcome.OK


# Connections that cannot be made.
def test_refused():
    reply = ask(Channel(name="c", base_urls=(f"http://127.0.0.1:{free_port()}/v1",), model="m"))
    assert reply.outcome is Outcome.UNREACHABLE
    assert "connection refused" in reply.detail


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b"])
def test_a_name_that_cannot_be_resolved(host, monkeypatch):
    def fail(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    if host.endswith("invalid"):
        monkeypatch.setattr(socket, "getaddrinfo", fail)
    reply = ask(Channel(name="c", base_urls=(f"http://{host}/v1",), model="m"))
    assert reply.outcome is Outcome.UNREACHABLE
    assert "resolved" in reply.detail


def test_connecting_has_a_limit():
    async def inside():
        # A server that takes the connection and never speaks TLS.
        async with Scripted([HANG]) as server:
            url = server.url.replace("http:", "https:")
            async with server.channel(base_urls=(url,)).open(connect_s=0.2) as r1:
                return await r1.ask(QUESTION)

    reply = asyncio.run(inside())
    assert reply.outcome is Outcome.UNREACHABLE
    assert "0.2 s" in reply.detail


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    made = certificate(tmp_path_factory.mktemp("tls"))
    if made is None:
        pytest.skip("no openssl to make a certificate with")
    return made


def test_an_untrusted_certificate_is_unreachable_and_named(tls):
    reply, _ = play(OK, tls=tls[0])
    assert reply.outcome is Outcome.UNREACHABLE
    assert "not trusted" in reply.detail


def test_tls_to_a_server_without_tls_is_unreachable():
    async def plain():
        async def answer(reader, writer):
            await reader.read(10)
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with Channel(name="c", base_urls=(f"https://127.0.0.1:{port}",), model="m").open() as r1:
                return await r1.ask(QUESTION)

    assert asyncio.run(plain()).outcome is Outcome.UNREACHABLE


def test_tls_with_a_trusted_certificate(tls, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tls[1]))
    reply, server = play(OK, tls=tls[0], times=2)
    assert reply.outcome is Outcome.OK
    assert reply.timing.connection_reused
    assert server.connections == 1


def test_a_long_answer_over_tls_arrives_whole(tls, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tls[1]))
    words = [f"word{i} " for i in range(3000)]  # many TLS records in one read
    reply, _ = play(response(b"".join(delta(content=w) for w in words), delta(finish="stop") + DONE), tls=tls[0])
    assert (reply.outcome, reply.answer) == (Outcome.OK, "".join(words))


# Proxies.
def test_an_http_proxy_gets_the_absolute_url_and_the_login():
    async def inside():
        async with Scripted(OK) as proxy:
            channel = proxy.channel(
                base_urls=("http://r1.example/v1",), proxy=f"http://me:pw%40x@127.0.0.1:{proxy.port}"
            )
            async with channel.open() as r1:
                return await r1.ask(QUESTION), proxy.requests[0]

    reply, request = asyncio.run(inside())
    assert reply.outcome is Outcome.OK
    assert request.target == "http://r1.example/v1/chat/completions"
    assert request.headers["host"] == "r1.example"
    assert request.headers["proxy-authorization"] == "Basic bWU6cHdAeA=="


def test_https_goes_through_a_tunnel(tls, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tls[1]))

    async def inside():
        async with Scripted(OK, tls=tls[0]) as server, ConnectProxy(server.port) as proxy:
            channel = server.channel(base_urls=("https://r1.example/v1",), proxy=f"http://127.0.0.1:{proxy.port}")
            async with channel.open() as r1:
                replies = [await r1.ask(QUESTION) for _ in range(2)]
            return replies, proxy.asked, server

    (first, second), asked, server = asyncio.run(inside())
    assert first.outcome is second.outcome is Outcome.OK
    assert [r.target for r in asked] == ["r1.example:443"]
    assert not first.timing.connection_reused
    assert second.timing.connection_reused
    assert server.requests[0].target == "/v1/chat/completions"


def test_a_proxy_that_refuses_the_tunnel_is_named():
    async def inside():
        async with ConnectProxy(1, status=407) as proxy:
            channel = Channel(
                name="c",
                base_urls=("https://r1.example/v1",),
                model="m",
                proxy=f"http://127.0.0.1:{proxy.port}",
            )
            async with channel.open() as r1:
                return await r1.ask(QUESTION), proxy.port

    reply, port = asyncio.run(inside())
    assert reply.outcome is Outcome.UNREACHABLE
    assert f"127.0.0.1:{port}" in reply.detail
    assert "407" in reply.detail


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_is_down_is_named(scheme, monkeypatch):
    port = free_port()
    monkeypatch.setenv(f"{scheme}_proxy", f"http://127.0.0.1:{port}")
    reply = ask(Channel(name="c", base_urls=(f"{scheme}://r1.example/v1",), model="m"))
    assert reply.outcome is Outcome.UNREACHABLE
    assert f"proxy 127.0.0.1:{port}" in reply.detail


def test_loopback_needs_no_proxy(monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    assert play(OK)[0].outcome is Outcome.OK


# Connections that go stale, are cancelled, or are shared.
@pytest.mark.parametrize("how", [CLOSE, RESET])
def test_a_connection_that_went_stale_is_replaced_once_and_the_question_asked_once(how):
    async def inside():
        async with Scripted([*OK, how], OK) as server, server.channel().open() as r1:
            first = await r1.ask(QUESTION)
            second = await r1.ask(QUESTION)  # at once: the client cannot know yet
            return first, second, server

    first, second, server = asyncio.run(inside())
    assert first.outcome is second.outcome is Outcome.OK
    assert len(server.requests) == 2
    assert server.connections == 2
    assert not second.timing.connection_reused


def test_a_reused_connection_that_ends_after_a_while_is_cut_since_the_question_was_taken(monkeypatch):
    monkeypatch.setattr("dsr1kit.access.http._STALE_S", 0.05)
    reply, server = play(OK, [(0.15, b""), CLOSE], OK, times=2)
    assert reply.outcome is Outcome.CUT
    assert reply.timing.connection_reused
    assert len(server.requests) == 2


def test_a_fresh_connection_that_ends_at_once_is_cut_and_not_asked_again():
    reply, server = play([CLOSE], OK)
    assert reply.outcome is Outcome.CUT
    assert len(server.requests) == 1


def test_cancelling_closes_the_connection_and_silences_on_delta():
    async def inside():
        script = response(ROLE, *[(0.01, delta(content="4"))] * 1000)
        async with Scripted(script) as server, server.channel().open() as r1:
            seen = []
            task = asyncio.create_task(r1.ask(QUESTION, on_delta=seen.append))
            await server.until(lambda: bool(seen))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            count = len(seen)
            await server.until(lambda: server.open_connections == 0)
            assert len(seen) == count

    asyncio.run(inside())


def test_cancelling_one_leaves_the_others_alone():
    async def inside():
        async with Scripted(response((0.15, ANSWER))) as server, server.channel().open() as r1:
            tasks = [asyncio.create_task(r1.ask(QUESTION)) for _ in range(4)]
            await server.until(lambda: len(server.requests) == 4)
            tasks[0].cancel()
            replies = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(replies[0], asyncio.CancelledError)
            assert [r.outcome for r in replies[1:]] == [Outcome.OK] * 3
            assert (await r1.ask(QUESTION)).outcome is Outcome.OK

    asyncio.run(inside())


def test_a_response_nobody_asked_for_spoils_the_connection_only():
    async def inside():
        unasked = (0.0, b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")
        async with Scripted([*OK, unasked], OK) as server, server.channel().open() as r1:
            return [(await r1.ask(QUESTION)).outcome for _ in range(3)]

    assert asyncio.run(inside()) == [Outcome.OK] * 3


# Framing and compression.
@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
def test_every_framing_gives_the_same_text(framing):
    steps = [(0.0, ANSWER[i : i + 37]) for i in range(0, len(ANSWER), 37)]
    reply, server = play(response(*steps, framing=framing), times=2)
    assert reply.outcome is Outcome.OK
    assert (reply.reasoning, reply.answer) == ("17 + 25 is 42.", "The answer is 42.")
    assert reply.timing.connection_reused == (framing != "close")
    assert server.connections == (2 if framing == "close" else 1)


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compression_that_nobody_asked_for_is_undone(encoding, pack):
    packed = pack(ANSWER)
    reply, _ = play(response(packed[:50], (0.02, packed[50:]), headers={"Content-Encoding": encoding}))
    assert (reply.outcome, reply.answer) == (Outcome.OK, "The answer is 42.")


def test_interim_responses_are_skipped():
    reply, _ = play([(0.0, b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"), *OK])
    assert reply.outcome is Outcome.OK
    assert "link" not in reply.headers


def test_a_long_answer_does_not_block_the_loop():
    word = "x" * 150
    chunks = b"".join(delta(content=f"{word}{i} ") for i in range(20_000))  # 5 MB

    async def inside():
        script = response(chunks, delta(finish="stop") + DONE)
        async with Scripted(script) as server, server.channel().open() as r1:
            # The loop's own computing, not wall time: another process may take the core at any moment.
            ticks = [time.thread_time()]

            async def tick():
                while True:
                    await asyncio.sleep(0.001)
                    ticks.append(time.thread_time())

            ticker = asyncio.create_task(tick())
            seen = []
            reply = await r1.ask(QUESTION, on_delta=seen.append)
            ticker.cancel()
            return reply, seen, ticks

    longest = []
    for _ in range(4):  # the machine may be the one that pauses
        gc.disable()  # a pass over everything that pytest keeps alive is no pause of the client's
        try:
            reply, seen, ticks = asyncio.run(inside())
        finally:
            gc.enable()
        assert reply.outcome is Outcome.OK
        assert len(seen) == 20_000
        longest.append(max(b - a for a, b in pairwise(ticks)))
        if longest[-1] < 0.05:
            return
    pytest.fail(f"the loop stood still for {min(longest):.3f} s")


# Limits of the caller's own.
def test_max_in_flight_holds_requests_back():
    async def inside():
        async with Scripted(response((0.05, ANSWER))) as server:
            async with server.channel(max_in_flight=2).open() as r1:
                replies = await asyncio.gather(*(r1.ask(QUESTION) for _ in range(6)))
            return replies, server.connections

    replies, connections = asyncio.run(inside())
    assert {r.outcome for r in replies} == {Outcome.OK}
    assert connections <= 2
    assert max(r.timing.queue_s for r in replies) >= 0.09  # two rounds of waiting, shown as the client's own


def test_requests_per_minute_hold_requests_back():
    async def inside():
        async with Scripted(OK) as server:
            async with server.channel(requests_per_minute=2).open(deadline_s=0.3) as r1:
                outcomes = [(await r1.ask(QUESTION)).outcome for _ in range(3)]
            return outcomes, len(server.requests)

    assert asyncio.run(inside()) == ([Outcome.OK, Outcome.OK, Outcome.DEADLINE], 2)


def test_requests_per_minute_are_spread_once_the_allowance_is_spent():
    reply, _ = play(OK, times=601, fields={"requests_per_minute": 600})
    assert reply.outcome is Outcome.OK


def test_less_than_one_request_a_minute_still_lets_the_first_pass():
    assert play(OK, fields={"requests_per_minute": 0.5}, deadline_s=5)[0].outcome is Outcome.OK


def test_tokens_per_minute_hold_the_next_request_back():
    async def inside():
        big = response(delta(content="42", finish="stop") + usage(5000, prompt=10) + DONE)
        async with Scripted(big) as server, server.channel(tokens_per_minute=1000).open(deadline_s=0.3) as r1:
            return [(await r1.ask(QUESTION)).outcome for _ in range(2)]

    assert asyncio.run(inside()) == [Outcome.OK, Outcome.DEADLINE]


def test_non_ascii_questions_arrive_whole():
    async def inside():
        async with Scripted(OK) as server, server.channel().open() as r1:
            await r1.ask([{"role": "user", "content": "十七加二十五？😀"}])
            return json.loads(server.requests[0].body)["messages"][0]["content"]

    assert asyncio.run(inside()) == "十七加二十五？😀"


def test_the_stall_clock_counts_from_the_first_token_on_not_after_the_first_token_clock():
    reply, _ = play(response(delta(content="4"), HANG), first_token_s=20, stall_s=0.2)
    assert reply.outcome is Outcome.STALLED
    assert "0.2 s" in reply.detail


def test_a_finish_reason_without_an_end_does_not_wait_for_any_clock():
    reply, _ = play(response(delta(content="42"), delta(finish="stop"), HANG), first_token_s=20, stall_s=20)
    assert reply.outcome is Outcome.OK


def test_an_error_status_counts_although_its_body_never_ends():
    head = b"HTTP/1.1 429 Too Many Requests\r\nTransfer-Encoding: chunked\r\nRetry-After: 2\r\n\r\n4\r\nslow\r\n"
    reply, _ = play([(0.0, head), HANG], first_token_s=20)
    assert reply.outcome is Outcome.THROTTLED
    assert reply.headers["retry-after"] == "2"


def test_a_second_choice_is_no_part_of_the_answer():
    second = event({"choices": [{"index": 1, "delta": {"content": "99"}}]})
    reply, _ = play(response(delta(content="42"), second, delta(finish="stop") + DONE))
    assert reply.answer == "42"


def test_messages_that_are_no_mappings_are_the_callers_mistake():
    async def inside():
        async with Scripted(OK) as server, server.channel().open() as r1:
            with pytest.raises(UsageError):
                await r1.ask([3])

    asyncio.run(inside())


def test_a_distill_stopped_inside_its_unmarked_thinking_has_given_no_answer():
    script = response(delta(content="Okay, so it is 56"), delta(finish="length") + DONE)

    async def inside(**fields):
        async with Scripted(script) as server, server.channel(**fields).open() as r1:
            return await r1.ask(QUESTION)

    reply = asyncio.run(inside(family="r1-distill"))
    assert (reply.outcome, reply.reasoning, reply.answer) == (Outcome.TRUNCATED, "Okay, so it is 56", "")
    assert reply.timing.first_answer_s is None
    assert asyncio.run(inside(family="other")).answer == "Okay, so it is 56"
