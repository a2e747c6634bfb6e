"""The reply cache: an answer is given again for the same request alone, and a broken store costs speed, no answer.

Over real sockets: scripted providers, a redis-server of Debian's own, several processes on one SQLite file.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import CLOSE, DONE, HANG, ROLE, Scripted, delta, event, free_port, refusal, response, usage
from servers import needed

from dsr1kit.access.cache import ReplyCache, _pack, _unpack, reply_key
from dsr1kit.access.cache_stores import Bounds, _without_login, store_for
from dsr1kit.access.channels import Channel
from dsr1kit.errors import Dsr1kitError, MissingExtra, MissingKey, RunError, UsageError
from dsr1kit.records import Outcome, Reply, Sampling, Usage

PASSWORD = "correct-horse-battery"  # noqa: S105 - of a server that lives for one test
SLOW_S = 5.0  # limit of a store where the limit is not what is tested: machines that run tests are busy
PREFIX = "dsr1kit:cache:v1:"


def question(text="What is 17 + 25?", system=None):
    return [{"role": "system", "content": system}] * (system is not None) + [{"role": "user", "content": text}]


def answer(text="42", *, served="r1-0528", delay_s=0.0, headers=None):
    body = ROLE + delta(reasoning_content=f"I think {text}.") + delta(content=text) + delta(finish="stop") + usage(9, 5)
    body = body.replace(b'"served-r1"', json.dumps(served).encode())
    return response((delay_s, body + DONE), headers=headers)


def echo(request):
    """Each request is answered by its own question and the number of the connection's request."""
    return answer(f"{request.json['messages'][-1]['content']} by {request.json['model']}")


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def cached(source, place, **options):
    return ReplyCache(source, place, **{"limit_s": SLOW_S, **options})


class Redis:
    """A redis-server of its own, on a socket in `folder` and a port of loopback."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._command = [needed("redis-server"), "--save", "", "--appendonly", "no", "--dir", str(folder)]
        self.port, self.socket = free_port(), folder / "redis.sock"
        self._command += ["--bind", "127.0.0.1", "--port", str(self.port), "--unixsocket", str(self.socket), *options]
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()

    def say(self, *words: object):
        """What the server answers to one command."""
        import redis

        with redis.Redis.from_url(self.url) as client:
            return client.execute_command(*words)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def redis_server(tmp_path):
    pytest.importorskip("redis")
    server = Redis(tmp_path)
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "redis"])
def place(request, tmp_path):
    """Both kinds of store: what holds of one must hold of the other."""
    return tmp_path / "cache.sqlite" if request.param == "sqlite" else request.getfixturevalue("redis_server").url


# An answer is given again.
def test_the_second_time_nothing_is_asked_and_the_reply_says_so(place):
    shown = []

    async def inside():
        async with Scripted(echo) as server:
            async with cached(server.channel(), place) as r1:
                fresh = await r1.ask(question())
                again = await r1.ask(question(), on_delta=shown.append)
                assert (r1.name, r1.hits, r1.misses, r1.coalesced, r1.errors) == ("scripted", 1, 1, 0, 0)
            async with cached(server.channel(name="elsewhere"), place) as r1:  # another process, another name for it
                third = await r1.ask(question())
            return fresh, again, third, len(server.requests)

    fresh, again, third, asked = asyncio.run(inside())
    assert asked == 1
    assert (fresh.from_cache, again.from_cache, third.from_cache) == (False, True, True)
    assert again.answer == fresh.answer == "What is 17 + 25? by r1"
    assert (again.reasoning, again.usage, again.model_served) == (fresh.reasoning, fresh.usage, "r1-0528")
    assert (again.outcome, again.finish_reason, again.http_status) == (Outcome.OK, "stop", 200)
    assert (again.attempts, again.headers, again.extra) == ((), {}, {})
    assert again.timing.connect_s is None
    assert 0 <= again.timing.first_token_s == again.timing.total_s < 1
    assert [(d.kind, d.text) for d in shown] == [("reasoning", fresh.reasoning), ("answer", fresh.answer)]
    assert (again.channel, third.channel) == ("scripted", "elsewhere")
    assert abs(again.due_at - time.time()) < 60


def test_a_backend_that_is_open_already_is_cached_too_and_stays_open(tmp_path):
    async def inside():
        async with Scripted(echo) as server, server.channel().open() as inner:
            for _ in range(2):
                async with cached(inner, tmp_path / "c") as r1:
                    reply = await r1.ask(question())
            await inner.ask(question())
            async with cached(server.channel(), tmp_path / "c") as r1:  # the same place, opened by the cache
                assert (await r1.ask(question())).from_cache
            return reply, len(server.requests)

    reply, asked = asyncio.run(inside())
    assert reply.from_cache
    assert asked == 2


class Local:
    """A Backend that is no channel."""

    def __init__(self, name, **scope):
        self.name, self.asked = name, 0
        self.__dict__.update(scope)

    async def ask(self, messages, sampling=None, *, on_delta=None, due=None):
        self.asked += 1
        return Reply(Outcome.OK, answer=f"{self.name} {vars(self).get('cache_scope')}", model_requested="tiny")


def test_backends_are_told_apart_by_name_and_scope(tmp_path):
    backends = [Local("router"), Local("router", cache_scope="a, b"), Local("router", cache_scope="a"), Local("tiny")]

    async def inside():
        answers = []
        for backend in backends * 2:
            async with cached(backend, tmp_path / "c") as r1:
                answers.append((await r1.ask(question())).answer)
        return answers

    answers = asyncio.run(inside())
    assert len(set(answers)) == 4
    assert answers[:4] == answers[4:]
    assert [b.asked for b in backends] == [1, 1, 1, 1]


def test_every_request_that_differs_is_asked(place):
    asks = [
        (question(), Sampling(), {}),
        (question("What is 17 + 26?"), Sampling(), {}),
        (question(system="Answer in French."), Sampling(), {}),
        (question(), Sampling(sample=1), {}),
        (question(), Sampling(seed=1), {}),
        (question(), Sampling(temperature=0.5), {}),
        (question(), Sampling(max_tokens=100), {}),
        (question(), Sampling(), {"model": "another"}),
        (question(), Sampling(), {"reasoning": "inline"}),
    ]

    async def inside():
        async with Scripted(echo) as server:
            for _ in range(2):
                for messages, sampling, options in asks:
                    async with cached(server.channel(**options), place) as r1:
                        await r1.ask(messages, sampling)
            return len(server.requests)

    assert asyncio.run(inside()) == len(asks)


def test_only_whole_answers_are_kept(place):
    part = response(ROLE + delta(content="The"), (0.0, b""), CLOSE)
    truncated = response(ROLE + delta(content="The answer") + delta(finish="length") + DONE)
    scripts = [refusal(503), part, truncated, response(ROLE + DONE), answer("42")]

    async def inside():
        async with Scripted(*scripts) as server, cached(server.channel(), place) as r1:
            return [await r1.ask(question()) for _ in range(6)]

    replies = asyncio.run(inside())
    assert [r.outcome for r in replies][-2:] == [Outcome.OK, Outcome.OK]
    assert Outcome.TRUNCATED in [r.outcome for r in replies]
    assert [r.from_cache for r in replies] == [False] * 5 + [True]


def test_another_served_model_drops_what_the_old_one_said(place):
    def script(request):
        return answer(served=served)

    async def inside():
        nonlocal served
        async with (
            Scripted(script) as server,
            cached(server.channel(), place) as r1,
            cached(server.channel(model="other"), place) as other,
        ):
            await r1.ask(question("a"))
            await r1.ask(question("b"))
            await other.ask(question("a"))
            served = "r1-distill"
            assert (await r1.ask(question("a"))).from_cache  # nothing has told of the change yet
            assert not (await r1.ask(question("c"))).from_cache
            first, second = await r1.ask(question("a")), await r1.ask(question("b"))
            assert [r.from_cache for r in (first, second)] == [False, False]
            assert first.model_served == "r1-distill"
            assert (await r1.ask(question("c"))).from_cache
            assert (await other.ask(question("a"))).from_cache  # of that one nothing is known to have changed

    served = "r1-0528"
    asyncio.run(inside())


def test_an_unfinished_reply_tells_of_another_model_too_and_silence_tells_nothing(place):
    truncated = response(event({"model": "new", "choices": [{"delta": {"content": "T"}, "finish_reason": "length"}]}))
    silent = response(event({"choices": [{"delta": {"content": "42"}, "finish_reason": "stop"}]}) + DONE)

    async def inside():
        scripts = (answer(), silent, truncated, answer(served="new"))
        async with Scripted(*scripts) as server, cached(server.channel(), place) as r1:
            await r1.ask(question("a"))
            await r1.ask(question("b"))  # does not say which model
            assert (await r1.ask(question("a"))).from_cache
            assert (await r1.ask(question("c"))).outcome is Outcome.TRUNCATED
            assert not (await r1.ask(question("a"))).from_cache

    asyncio.run(inside())


# What is thrown out.
def test_the_least_frequently_used_goes_first_then_the_longest_unused(place):
    now = 1_800_000_000.0

    def clock():
        nonlocal now
        now += 1
        return now

    async def inside():
        async with Scripted(echo) as server, cached(server.channel(), place, max_entries=3, clock=clock) as r1:

            async def ask(*texts):
                return [(await r1.ask(question(text))).from_cache for text in texts]

            await ask("a", "b", "c", "a", "a", "c", "b")  # a twice; c, then b once
            assert await ask("d") == [False]  # c goes
            assert await ask("a", "b", "d", "d", "d", "d") == [True] * 6
            assert await ask("c") == [False]  # b goes: two uses, against three and four
            assert await ask("a", "d", "c", "b") == [True, True, True, False]

    asyncio.run(inside())


def test_use_counts_outlive_the_process(place):
    async def inside():
        async with Scripted(echo) as server:
            for texts in (["a", "b", "a"], ["c"], ["a"]):
                async with cached(server.channel(), place, max_entries=2) as r1:
                    replies = [await r1.ask(question(text)) for text in texts]
        return replies[-1].from_cache

    assert asyncio.run(inside())


def test_no_more_than_max_entries_even_if_there_were_more_before(place):
    async def inside():
        async with Scripted(echo) as server:
            async with cached(server.channel(), place) as r1:
                for n in range(12):
                    await r1.ask(question(str(n)))
            async with cached(server.channel(), place, max_entries=4) as r1:
                await r1.ask(question("new"))
                replies = [await r1.ask(question(str(n))) for n in (9, 10, 11)]
                assert all(r.from_cache for r in replies)
            return len(entries(place))

    assert asyncio.run(inside()) == 4


def test_an_entry_is_given_for_thirty_days_and_then_asked_anew(place):
    now = 1_800_000_000.0

    async def inside():
        nonlocal now
        async with Scripted(echo) as server, cached(server.channel(), place, clock=lambda: now) as r1:
            await r1.ask(question("a"))
            now += 30 * 86400 - 1
            assert (await r1.ask(question("a"))).from_cache
            now += 2
            await r1.ask(question("b"))
            assert len(entries(place)) == 1
            assert not (await r1.ask(question("a"))).from_cache
            assert (await r1.ask(question("a"))).from_cache

    asyncio.run(inside())


def test_what_a_change_of_the_model_left_behind_does_not_take_the_room_of_the_new(place):
    async def inside():
        store = store_for(place, Bounds(max_entries=5, max_age_s=1000.0, limit_s=SLOW_S))
        await store.open()
        try:
            for n in range(5):
                await store.put(f"old {n}", "origin", "r1", b"old", 1.0)
                assert [await store.get(f"old {n}", 2.0) for _ in range(9)] == [b"old"] * 9
            for n in range(5):
                await store.put(f"new {n}", "origin", "r1-0528", b"new", 3.0)
            return [await store.get(f"{age} {n}", 4.0) for age in ("old", "new") for n in range(5)]
        finally:
            await store.close()

    assert asyncio.run(inside()) == [None] * 5 + [b"new"] * 5
    assert len(entries(place)) == 5


def test_an_old_entry_written_anew_is_new(place):
    async def inside():
        store = store_for(place, Bounds(max_entries=2, max_age_s=100.0, limit_s=SLOW_S))
        await store.open()
        try:
            for now, data in ((0.0, b"old"), (500.0, b"new")):
                await store.put("key", "origin", "r1", data, now)
            return await store.get("key", 510.0), await store.get("key", 610.0)
        finally:
            await store.close()

    assert asyncio.run(inside()) == (b"new", None)


def test_redis_itself_forgets_by_the_same_age_and_keeps_to_its_names(redis_server):
    async def inside():
        async with Scripted(echo) as server, cached(server.channel(), redis_server.url, max_age_s=500) as r1:
            await r1.ask(question())

    asyncio.run(inside())
    (name,) = entries(redis_server.url)
    assert 400 < redis_server.say("TTL", name) <= 500
    assert all(key.startswith(PREFIX.encode()) for key in redis_server.say("KEYS", "*"))
    assert redis_server.say("ZCARD", f"{PREFIX}uses") == 1


def entries(place):
    """The stored entries: names in Redis, rows in SQLite."""
    if isinstance(place, str):
        import redis

        with redis.Redis.from_url(place) as client:
            return client.keys(f"{PREFIX}entry:*")
    with sqlite3.connect(place) as db:
        return db.execute("SELECT reply FROM entries").fetchall()


def spoil(place, data):
    """Put `data` in the place of every stored reply."""
    if isinstance(place, str):
        import redis

        with redis.Redis.from_url(place) as client:
            for name in client.keys(f"{PREFIX}entry:*"):
                if data is None:
                    client.delete(name)
                    client.rpush(name, "a list")
                else:
                    client.hset(name, "reply", data)
    else:
        with sqlite3.connect(place) as db:
            db.execute("UPDATE entries SET reply = ?", ("text" if data is None else data,))


@pytest.mark.parametrize(
    "data",
    [None, b"", b"\xff\xfe", b"null", b"[]", b"{}", b'{"answer": "42"}', b"[" * 100_000],
    ids=["another type", "nothing", "no text", "null", "a list", "an object", "half", "deep"],
)
def test_an_entry_that_does_not_parse_is_dropped_and_asked_anew(place, data):
    async def inside():
        async with Scripted(echo) as server, cached(server.channel(), place) as r1:
            await r1.ask(question())
            spoil(place, data)
            replies = [await r1.ask(question()) for _ in range(2)]
            return [r.from_cache for r in replies], r1.errors

    assert asyncio.run(inside()) == ([False, True], 0)


@pytest.mark.parametrize("text", ["\ud800 half a character", "\0", "四十二 🙂", "x" * 300_000])
def test_whatever_text_comes_is_kept_and_comes_back(place, text):
    class Odd(Local):
        async def ask(self, messages, sampling=None, **options):
            return replace(await super().ask(messages), reasoning=text, answer=text, model_served=text)

    async def inside():
        async with cached(Odd("odd"), place) as r1:
            replies = [await r1.ask(question()) for _ in range(2)]
            return replies, r1.errors

    (_, again), errors = asyncio.run(inside())
    assert (again.from_cache, errors) == (True, 0)
    assert (again.reasoning, again.answer, again.model_served) == (text, text, text)


def test_a_backend_whose_reply_cannot_be_kept_still_answers(tmp_path):
    class Odd(Local):
        async def ask(self, messages, sampling=None, **options):
            return replace(await super().ask(messages), finish_reason=object())

    async def inside():
        async with cached(Odd("odd"), tmp_path / "c") as r1:
            return [(await r1.ask(question())).from_cache for _ in range(2)], r1.errors

    assert asyncio.run(inside()) == ([False, False], 0)


# Keys and entries.
CHANNEL = (("https://a.example/v1",), "r1", "auto")
TEXT = st.text(st.characters(), max_size=8)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": TEXT}), min_size=1, max_size=3
)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    top_p=st.sampled_from([0.5, 1.0]),
    max_tokens=st.integers(1, 3),
    seed=st.none() | st.integers(-1, 2),
    max_thinking_tokens=st.none() | st.integers(1, 2),
    sample=st.integers(0, 2),
)
REQUESTS = st.tuples(
    st.tuples(st.sampled_from(["https://a.example", "https://b.example"])),
    st.sampled_from(["r1", "r1-0528"]),
    st.sampled_from(["auto", "inline"]),
    MESSAGES,
    SAMPLINGS,
)


@settings(max_examples=300, deadline=None)
@given(REQUESTS, REQUESTS)
def test_keys_are_equal_just_where_requests_are(one, other):
    assert (reply_key(*one) == reply_key(*other)) == (one == other)
    assert len(reply_key(*one)) == 64


@settings(deadline=None)
@given(MESSAGES, SAMPLINGS, st.data())
def test_any_field_that_differs_gives_another_key(messages, sampling, data):
    key = reply_key(*CHANNEL, messages, sampling)
    field = data.draw(st.sampled_from([f.name for f in fields(Sampling)]))
    value = {"temperature": 0.25, "top_p": 0.25, "min_thinking_tokens": 1, "stop": ("77",)}.get(field, 77)
    others = [
        (*CHANNEL, messages, replace(sampling, **{field: value})),
        (("https://a.example/v2",), *CHANNEL[1:], messages, sampling),
        ((*CHANNEL[0], "https://b.example"), *CHANNEL[1:], messages, sampling),
        (CHANNEL[0], "r2", "auto", messages, sampling),
        (CHANNEL[0], "r1", "inline", messages, sampling),
        (*CHANNEL, [*messages, {"role": "user", "content": ""}], sampling),
        (*CHANNEL, [{**messages[0], "role": "assistant"}, *messages[1:]], sampling),
        (*CHANNEL, [{**messages[0], "content": messages[0]["content"] + " "}, *messages[1:]], sampling),
    ]
    assert len({key, *(reply_key(*other) for other in others)}) == 1 + len(others)


def test_text_cannot_move_from_one_message_into_the_next():
    split = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    joined = [{"role": "user", "content": 'a"],["user","b'}]
    assert reply_key(*CHANNEL, split, Sampling()) != reply_key(*CHANNEL, joined, Sampling())


def test_equal_numbers_of_other_types_are_one_key():
    keys = {reply_key(*CHANNEL, question(), Sampling(temperature=t, top_p=p)) for t, p in ((1, 1), (1.0, 1.0))}
    keys |= {reply_key(*CHANNEL, question(), Sampling(temperature=1, top_p=1.0))}
    assert len(keys) == 1
    assert len({reply_key(*CHANNEL, question(), Sampling(temperature=t)) for t in (0, 0.0, -0.0)}) == 1


def test_a_key_is_the_same_in_every_process():
    code = (
        "from dsr1kit.access.cache import reply_key; from dsr1kit.records import Sampling\n"
        f"print(reply_key(*{CHANNEL!r}, {question('四十二 🙂')!r}, Sampling(seed=3)))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True, timeout=60,
        ).stdout.strip()
        for seed in ("1", "2")
    }  # fmt: skip
    assert found == {reply_key(*CHANNEL, question("四十二 🙂"), Sampling(seed=3))}


@settings(max_examples=200, deadline=None)
@given(st.binary() | st.recursive(st.none() | st.text() | st.integers(), st.lists, max_leaves=5).map(json.dumps))
def test_no_bytes_in_an_entry_raise(data):
    assert _unpack(data.encode() if isinstance(data, str) else data) is None


COUNT = st.none() | st.integers(0, 10**9)
SOURCES = st.sampled_from(["provider", "tokenizer", "estimated"])


@settings(deadline=None)
@given(st.text(st.characters()), st.text(st.characters()), st.none() | TEXT, COUNT, SOURCES, st.booleans())
def test_a_reply_comes_back_as_it_was(reasoning, text, served, count, source, emulated):
    reply = Reply(
        Outcome.OK,
        reasoning=reasoning,
        answer=text,
        finish_reason="stop",
        channel="a",
        model_requested="r1",
        model_served=served,
        usage=Usage(count, 1, None, source, "estimated"),
        http_status=200,
        emulated=emulated,
    )
    assert _unpack(_pack(reply)) == reply


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_an_entry_with_one_wrong_value_is_none(data):
    entry = json.loads(_pack(Reply(Outcome.OK, answer="42", model_served="r1", usage=Usage(1, 2, 3), http_status=200)))
    inner = data.draw(st.sampled_from([entry, entry["usage"]]))
    name = data.draw(st.sampled_from(sorted(inner)))
    inner[name] = data.draw(st.sampled_from([[], {}, 1.5, [1]]))
    assert _unpack(json.dumps(entry).encode()) is None


def test_no_key_and_no_header_is_stored(place, monkeypatch):
    monkeypatch.setenv("CACHED_API_KEY", "sk-cached-0123456789abcdef")
    script = answer(headers={"X-Echo": "sk-cached-0123456789abcdef", "Set-Cookie": "session=abc"})

    async def inside():
        fields = {"api_key_env": "CACHED_API_KEY"}
        async with Scripted(script) as server, cached(server.channel(**fields), place) as r1:
            await r1.ask(question("what a secret question"))

    asyncio.run(inside())
    if isinstance(place, str):
        import redis

        with redis.Redis.from_url(place) as client:
            stored = b"".join(b"".join(client.hgetall(name).values()) for name in entries(place))
    else:
        stored = b"".join(path.read_bytes() for path in place.parent.glob(place.name + "*"))
    assert b"I think 42." in stored
    for secret in (b"sk-cached", b"session=abc", b"127.0.0.1", b"secret question"):
        assert secret not in stored
    assert b"[redacted]" in _pack(Reply(Outcome.OK, "of sk-cached-0123456789abcdef", answer="42"))


# Equal requests in flight.
def test_equal_requests_in_flight_are_asked_once(place):
    shown = []

    async def inside():
        async with Scripted(answer(delay_s=0.2)) as server, cached(server.channel(), place) as r1:
            leader = asyncio.create_task(r1.ask(question()))
            await server.until(lambda: len(server.requests) == 1)
            rest = [r1.ask(question(), on_delta=shown.append) for _ in range(9)]
            replies = [*await asyncio.gather(*rest), await leader]
            assert (r1.hits, r1.misses, r1.coalesced) == (0, 1, 9)
            return replies, len(server.requests)

    (*rest, leader), asked = asyncio.run(inside())
    assert asked == 1
    assert not leader.from_cache
    assert leader.extra.get("coalesced") is None
    for reply in rest:
        assert (reply.answer, reply.from_cache, reply.extra, reply.attempts) == ("42", True, {"coalesced": True}, ())
        assert reply.timing.connect_s is None
    assert [d.text for d in shown] == ["I think 42.", "42"] * 9


def test_draws_in_flight_are_not_one_request(tmp_path):
    async def inside():
        async with Scripted(answer(delay_s=0.05)) as server, cached(server.channel(), tmp_path / "c") as r1:
            await asyncio.gather(*(r1.ask(question(), Sampling(sample=n)) for n in range(4)))
            return len(server.requests), r1.coalesced

    assert asyncio.run(inside()) == (4, 0)


@pytest.mark.parametrize("how", ["cancelled", "raises"])
def test_one_that_waits_takes_over_from_a_request_that_ends_without_a_reply(tmp_path, how):
    def fail(_):
        raise KeyError("the leader's own on_delta")

    first = response(ROLE + delta(content="x"), HANG)

    async def inside():
        async with Scripted(first, answer()) as server, cached(server.channel(), tmp_path / "c") as r1:
            leader = asyncio.create_task(r1.ask(question(), on_delta=fail if how == "raises" else None))
            rest = [asyncio.create_task(r1.ask(question())) for _ in range(5)]
            await server.until(lambda: len(server.requests) >= 1)
            if how == "cancelled":
                leader.cancel()
            with pytest.raises(asyncio.CancelledError if how == "cancelled" else KeyError):
                await leader
            replies = await asyncio.gather(*rest)
            assert not r1._flights
            return replies, len(server.requests)

    replies, asked = asyncio.run(inside())
    assert asked == 2
    assert {r.answer for r in replies} == {"42"}
    assert [r.from_cache for r in replies].count(False) == 1


def test_cancelling_one_that_waits_disturbs_nobody(tmp_path):
    async def inside():
        async with Scripted(answer(delay_s=0.1)) as server, cached(server.channel(), tmp_path / "c") as r1:
            tasks = [asyncio.create_task(r1.ask(question())) for _ in range(3)]
            await server.until(lambda: len(server.requests) == 1)
            tasks[1].cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            return done, len(server.requests)

    (first, cancelled, last), asked = asyncio.run(inside())
    assert isinstance(cancelled, asyncio.CancelledError)
    assert (first.answer, last.answer, asked) == ("42", "42", 1)


def test_those_that_wait_get_a_refusal_too_and_the_next_one_asks_anew(tmp_path):
    slow = lambda request: [(0.1, b""), *refusal(429, "later")]  # noqa: E731 - a script

    async def inside():
        async with Scripted(slow, answer()) as server, cached(server.channel(), tmp_path / "c") as r1:
            replies = await asyncio.gather(*(r1.ask(question()) for _ in range(3)))
            return replies, await r1.ask(question()), len(server.requests)

    replies, after, asked = asyncio.run(inside())
    assert [r.outcome for r in replies] == [Outcome.THROTTLED] * 3
    assert len({r.detail for r in replies}) == 1
    assert [r.from_cache for r in replies] == [False, True, True]
    assert (after.outcome, asked) == (Outcome.OK, 2)


# Stores that fail in mid-run.
@contextmanager
def warnings_of(caplog):
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="dsr1kit.cache"):
        yield lambda: [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@contextmanager
def timed(at_most_s):
    began = time.monotonic()
    yield
    assert time.monotonic() - began < at_most_s


def test_redis_killed_in_mid_run_costs_no_answer_and_is_used_again_when_back(redis_server, caplog):
    async def inside(warnings):
        channel_and_place = redis_server.url
        async with Scripted(echo) as server, cached(server.channel(), channel_and_place, pause_s=0.3) as r1:
            await r1.ask(question())
            redis_server.signal(signal.SIGKILL)
            replies = [await r1.ask(question(str(n % 3))) for n in range(12)]
            assert [r.outcome for r in replies] == [Outcome.OK] * 12
            assert len(warnings()) == 1
            assert redis_server.url in warnings()[0]
            assert 1 <= r1.errors <= 4
            redis_server.start()
            await asyncio.sleep(0.35)
            await r1.ask(question("new"))
            assert (await r1.ask(question("new"))).from_cache
            redis_server.signal(signal.SIGKILL)  # another trouble, another warning
            assert (await r1.ask(question("new"))).answer
            assert len(warnings()) == 2

    with warnings_of(caplog) as warnings:
        asyncio.run(inside(warnings))


def test_a_restart_between_two_requests_is_not_even_noticed(redis_server, caplog):
    async def inside(warnings):
        async with Scripted(echo) as server, cached(server.channel(), redis_server.url) as r1:
            await r1.ask(question())
            redis_server.signal(signal.SIGKILL)
            redis_server.start()
            assert not (await r1.ask(question())).from_cache  # it kept nothing on disk
            assert (await r1.ask(question())).from_cache
            assert (r1.errors, warnings()) == (0, [])

    with warnings_of(caplog) as warnings:
        asyncio.run(inside(warnings))


def test_a_redis_that_is_silent_is_waited_for_once_a_pause(redis_server, caplog):
    async def inside(warnings):
        options = {"limit_s": 0.25, "pause_s": 60.0}
        async with Scripted(echo) as server, cached(server.channel(), redis_server.url, **options) as r1:
            fresh = [await r1.ask(question(str(n))) for n in range(3)]
            redis_server.signal(signal.SIGSTOP)
            try:
                with timed(0.25 + 1.0):
                    replies = await asyncio.gather(*(r1.ask(question(str(n))) for n in range(20)))
                    replies += [await r1.ask(question(str(n))) for n in range(20)]
            finally:
                redis_server.signal(signal.SIGCONT)
            assert [r.answer for r in replies] == [f"{n} by r1" for n in range(20)] * 2
            assert len(warnings()) == 1
            assert "0.25 s" in warnings()[0]
            r1._troubled = dict.fromkeys(r1._troubled, 0.0)  # the pause is over
            again = [await r1.ask(question(str(n))) for n in range(3)]  # late answers of Redis are nobody's
            assert [r.answer for r in again] == [r.answer for r in fresh]
            assert all(r.from_cache for r in again)

    with warnings_of(caplog) as warnings:
        asyncio.run(inside(warnings))


def test_a_redis_that_takes_no_more_still_gives_what_it_has(redis_server, caplog):
    async def inside(warnings):
        async with Scripted(echo) as server, cached(server.channel(), redis_server.url, pause_s=60.0) as r1:
            await r1.ask(question("a"))
            redis_server.say("CONFIG", "SET", "maxmemory", "1")
            replies = [await r1.ask(question(text)) for text in ("b", "a", "c", "a")]
            assert [r.from_cache for r in replies] == [False, True, False, True]
            assert (len(warnings()), r1.errors) == (1, 1)
            assert "writing" in warnings()[0]

    with warnings_of(caplog) as warnings:
        asyncio.run(inside(warnings))


def test_a_locked_database_costs_no_answer_and_hits_go_on(tmp_path, caplog):
    async def inside(warnings):
        path = tmp_path / "c"
        async with Scripted(echo) as server, cached(server.channel(), path, limit_s=0.3, pause_s=0.2) as r1:
            await r1.ask(question("a"))
            writer = sqlite3.connect(path, isolation_level=None)
            writer.execute("BEGIN IMMEDIATE")
            with timed(1.5):
                replies = [await r1.ask(question(text)) for text in ("b", "a", "c", "a")]
            assert [r.from_cache for r in replies] == [False, True, False, True]
            assert len(warnings()) == 1
            assert "locked" in warnings()[0]
            writer.execute("ROLLBACK")
            await asyncio.sleep(0.25)
            assert [(await r1.ask(question("d"))).from_cache for _ in range(2)] == [False, True]

    with warnings_of(caplog) as warnings:
        asyncio.run(inside(warnings))


def test_a_full_disk_costs_no_answer(tmp_path, caplog):
    async def inside(warnings):
        async with Scripted(echo) as server, cached(server.channel(), tmp_path / "c", pause_s=60.0) as r1:
            await r1.ask(question("a"))
            # SQLite's own bound on the file's pages gives the error that a full disk gives.
            await asyncio.wrap_future(
                r1._store._worker.submit(lambda: r1._store._db.execute("PRAGMA max_page_count=1"))
            )
            replies = [await r1.ask(question(text)) for text in ("b" * 20_000, "a", "b" * 20_000, "a")]
            assert [r.from_cache for r in replies] == [False, True, False, True]
            assert ["full" in warning for warning in warnings()] == [True]

    with warnings_of(caplog) as warnings:
        asyncio.run(inside(warnings))


def test_a_database_that_is_overwritten_in_mid_run_costs_no_answer(tmp_path, caplog):
    async def inside(warnings):
        path = tmp_path / "c"
        async with Scripted(echo) as server, cached(server.channel(), path, pause_s=60.0, limit_s=1.0) as r1:
            await r1.ask(question("a"))
            writer = sqlite3.connect(path, isolation_level=None)
            writer.execute("BEGIN IMMEDIATE")
            await r1.ask(question("b"))  # cannot be written; from now on the file is not open
            writer.close()
            path.write_bytes(b"no database " * 4096)
            replies = [await r1.ask(question(text)) for text in ("a", "b", "a", "b")]
            assert {r.outcome for r in replies} == {Outcome.OK}
            assert ["locked" in warning for warning in warnings()] == [True, False]
            assert "not a database" in warnings()[1]
            for each in tmp_path.glob("c*"):
                each.unlink()
            r1._troubled = dict.fromkeys(r1._troubled, 0.0)  # the pause is over
            assert [(await r1.ask(question("c"))).from_cache for _ in range(2)] == [False, True]

    with warnings_of(caplog) as warnings:
        asyncio.run(inside(warnings))


def test_after_a_pause_one_request_tries_and_the_others_do_not_wait(redis_server):
    async def inside():
        options = {"limit_s": 0.3, "pause_s": 0.2}
        async with Scripted(echo) as server, cached(server.channel(), redis_server.url, **options) as r1:
            await r1.ask(question())
            redis_server.signal(signal.SIGSTOP)
            try:
                await r1.ask(question("a"))
                await asyncio.sleep(0.25)
                before = r1.errors
                began = time.monotonic()
                times = []

                async def ask(n):
                    await r1.ask(question(str(n)))
                    times.append(time.monotonic() - began)

                await asyncio.gather(*map(ask, range(10)))
            finally:
                redis_server.signal(signal.SIGCONT)
            assert r1.errors - before <= 2
            assert sorted(times)[7] < 0.3

    asyncio.run(inside())


def test_a_long_look_up_does_not_stop_the_event_loop(tmp_path):
    async def inside():
        path = tmp_path / "c"
        async with Scripted(echo) as server, cached(server.channel(), path, limit_s=1.0, pause_s=0.0) as r1:
            await r1.ask(question("a"))
            writer = sqlite3.connect(path, isolation_level=None)
            writer.execute("BEGIN IMMEDIATE")
            task = asyncio.create_task(r1.ask(question("b")))  # its entry waits for the writer
            await server.until(lambda: len(server.requests) == 2)
            longest, last = 0.0, time.monotonic()
            while not task.done():
                await asyncio.sleep(0.005)
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
            return longest

    assert asyncio.run(inside()) < 0.5


# Several processes.
WORKER = """
import asyncio, sys
from dsr1kit.access.cache import ReplyCache
from dsr1kit.records import Outcome, Reply

class Backend:
    name = "shared"
    async def ask(self, messages, sampling=None, *, on_delta=None, due=None):
        return Reply(Outcome.OK, answer=messages[-1]["content"] * 50, model_served="r1")

async def main(me):
    async with ReplyCache(Backend(), sys.argv[1], max_entries=60, limit_s=5.0) as r1:
        for n in range(80):
            for text in (f"{me}-{n}", f"common-{n % 10}"):
                reply = await r1.ask([{"role": "user", "content": text}])
                assert reply.answer == text * 50, (text, reply)
        print(r1.hits, r1.misses, r1.errors)

asyncio.run(main(sys.argv[2]))
"""


def test_several_processes_share_one_store(place):
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(place), str(n)], stdout=subprocess.PIPE, text=True)
        for n in range(4)
    ]
    told = [worker.communicate(timeout=60)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4
    counts = [tuple(map(int, line.split())) for line in told]
    assert all(errors == 0 for _, _, errors in counts)
    assert sum(hits for hits, _, _ in counts) >= 4 * 70  # the common ones, but for the first time
    assert len(entries(place)) <= 60


# Bad input at opening.
def opening(place, **fields):
    """Open a cache that is expected to be refused; what it says."""

    async def inside():
        async with Scripted(echo) as server:
            try:
                async with ReplyCache(server.channel(**fields), place):
                    pytest.fail("was opened")
            finally:
                assert server.connections == 0

    with pytest.raises(Dsr1kitError) as caught:
        asyncio.run(inside())
    return caught.value


@pytest.mark.parametrize("what", ["text", "folder", "other", "below a file", "no such place", "empty", "scheme", "nul"])
def test_a_path_that_cannot_be_a_cache_is_named_and_nothing_is_asked(tmp_path, what):
    path = tmp_path / "here.sqlite"
    if what == "text":
        path.write_text("This is no database.\n" * 100)
    elif what == "folder":
        path.mkdir()
    elif what == "other":
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE mine (a)")
    elif what == "below a file":
        path.write_text("")
        path = path / "here.sqlite"
    before = path.read_bytes() if path.is_file() else b""
    place = {"no such place": "/proc/here.sqlite", "empty": "", "scheme": "http://here.sqlite", "nul": "here.sqlite\0"}
    error = opening(place.get(what, path))
    assert isinstance(error, UsageError)
    assert "here.sqlite" in str(error) or what in ("empty", "scheme")
    assert "name a" in str(error) or "path" in str(error)
    assert (path.read_bytes() if path.is_file() else b"") == before


def test_a_locked_database_is_refused_at_opening(tmp_path):
    holder = sqlite3.connect(tmp_path / "c.sqlite", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    error = opening(tmp_path / "c.sqlite")
    assert isinstance(error, RunError)
    assert "c.sqlite is locked" in str(error)


def test_a_redis_that_wants_a_password_says_so_and_no_password_is_shown(tmp_path):
    pytest.importorskip("redis")
    server = Redis(tmp_path, "--requirepass", PASSWORD)
    try:
        plain = server.url
        assert isinstance(opening(plain), UsageError)
        assert "password" in str(opening(plain))
        wrong = opening(plain.replace("//", "//:wrong-horse-battery@"))
        assert isinstance(wrong, UsageError)
        assert "wrong-horse" not in str(wrong)
        assert "127.0.0.1" in str(wrong)

        async def inside():
            async with Scripted(echo) as upstream:
                async with cached(upstream.channel(), plain.replace("//", f"//:{PASSWORD}@")) as r1:
                    assert PASSWORD not in r1._store.shown
                    await r1.ask(question())
                async with cached(upstream.channel(), f"unix://:{PASSWORD}@{server.socket}?db=0") as r1:
                    return await r1.ask(question())

        assert asyncio.run(inside()).from_cache
    finally:
        server.stop()


def test_a_redis_that_lets_nobody_write_is_refused(redis_server):
    redis_server.say("ACL", "SETUSER", "reader", "on", ">reader-password", "~*", "+@read", "+@connection")
    error = opening(redis_server.url.replace("//", "//reader:reader-password@"))
    assert isinstance(error, RunError)
    assert "scripts" in str(error)


@pytest.mark.parametrize("url", ["redis://:pa/ss@h:1", "redis://h:port", "redis://[::1", "redis://h?wrong=1"])
def test_a_redis_url_that_does_not_parse_is_refused(url):
    pytest.importorskip("redis")
    error = opening(url)
    assert isinstance(error, UsageError)
    assert "redis://[user:password@]host:port/0" in str(error)
    assert "ss@" not in str(error)


def test_what_refuses_or_is_no_redis_is_told_apart():
    pytest.importorskip("redis")
    refused = opening(f"redis://:{PASSWORD}@127.0.0.1:{free_port()}/0")
    assert isinstance(refused, RunError)
    assert "redis-server" in str(refused)
    assert PASSWORD not in str(refused)

    async def http():
        async def serve(reader, writer):
            await reader.read(1)
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server, ReplyCache(Local("x"), f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"):
            pass

    with pytest.raises(UsageError, match="is not Redis"):
        asyncio.run(http())


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:pw@h:1/0", "redis://h:1/0"),
        ("rediss://me:p@w@h/0?password=x", "rediss://h/0"),
        ("redis://:p/w@h", "redis://h"),
        ("redis://:p?w@h", "redis://..."),
        ("redis://h/0?password=a@b", "redis://..."),
        ("unix://:pw@/run/redis.sock?db=1", "unix:///run/redis.sock"),
    ],
)
def test_a_url_is_shown_without_its_login(url, shown):
    assert _without_login(url) == shown


def test_without_the_package_redis_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "redis", None)
    assert isinstance(opening("redis://127.0.0.1/0"), MissingExtra)


@pytest.mark.parametrize(
    "options", [{"max_entries": 0}, {"max_age_s": 0}, {"limit_s": -1}, {"max_age_s": float("inf")}]
)
def test_bounds_that_cannot_be_meant_are_refused(tmp_path, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        ReplyCache(Local("x"), tmp_path / "c", **options)


def test_a_cache_stands_before_something_that_can_be_asked_and_is_used_while_open(tmp_path):
    with pytest.raises(UsageError, match="Channel or an open Backend"):
        ReplyCache("a", tmp_path / "c")
    cache = ReplyCache(Local("x"), tmp_path / "c")

    async def inside():
        with pytest.raises(UsageError, match="not open"):
            await cache.ask(question())
        async with cache:
            with pytest.raises(UsageError, match="messages"):
                await cache.ask([])
            with pytest.raises(UsageError, match="open already"):
                async with cache:
                    pass
            await cache.ask(question())
        async with cache:
            assert (await cache.ask(question())).from_cache

    asyncio.run(inside())


def test_a_channel_that_cannot_be_opened_leaves_no_store_open(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_API_KEY", raising=False)
    channel = Channel(name="a", base_urls=("http://127.0.0.1:1/v1",), model="r1", api_key_env="NO_SUCH_API_KEY")
    assert isinstance(opening(tmp_path / "c", api_key_env="NO_SUCH_API_KEY"), MissingKey)
    cache = ReplyCache(channel, tmp_path / "c")
    with pytest.raises(MissingKey):
        asyncio.run(cache.__aenter__())
    assert cache._store._db is None


def test_no_key_that_a_far_side_says_back_lies_on_the_disk(tmp_path, monkeypatch):
    secret = "sk-abcdefgh12345678ABCD"  # noqa: S105 - a made-up value that must not lie there
    monkeypatch.setenv("FOO_API_KEY", secret)
    path = tmp_path / "cache.sqlite"

    async def inside():
        async with (
            Scripted(lambda request: answer(f"you sent {secret}", served=f"r1 {secret}")) as server,
            cached(server.channel(api_key_env="FOO_API_KEY"), path) as r1,
        ):
            assert (await r1.ask(question())).outcome == "ok"
            return await r1.ask(question())

    again = asyncio.run(inside())
    assert again.from_cache
    assert again.answer == "you sent [redacted]"
    assert path.stat().st_mode & 0o077 == 0
    assert all(secret.encode() not in file.read_bytes() for file in tmp_path.iterdir())
