"""The configuration for nginx: what is refused, and the real nginx with real traffic through it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import random
import re
import socket
import stat
import subprocess
import time
from pathlib import Path

import aiohttp
import pytest
from scripted import ANSWER, CLOSE, DONE, HANG, RESET, Scripted, certificate, delta, free_port, refusal, response
from servers import needed

from dsr1kit.access.channels import Channel, load_channels
from dsr1kit.access.nginx import DEBIAN_BUNDLE, nginx_config
from dsr1kit.emulator.server import Emulator
from dsr1kit.emulator.weather import load_weather
from dsr1kit.errors import UsageError

KEYS = {f"{place}_R1_KEY": f"sk-{place.lower()}-0123456789abcdef" for place in "ABC"}
OK = response(ANSWER)
ASK = {"model": "whatever", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
NOW = dt.datetime(2026, 11, 23, tzinfo=dt.UTC)


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


def channel(name="a", url="https://r1.example/v1", **fields):
    urls = (url,) if isinstance(url, str) else url
    return Channel(**{"name": name, "base_urls": urls, "model": f"{name}/r1", "family": "r1", **fields})


def free_ports(count):
    """The first of so many free ports in a row, below those that connections are given."""
    for _ in range(50):
        first = random.randrange(20_000, 30_000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise RuntimeError("no free ports in a row")


def render(config, folder):
    """What the generated file itself says is to be done with it."""
    (folder / "r1.conf.template").write_text(config)
    command = next(line for line in config.splitlines() if "r1.conf.template" in line)
    command = command.partition("cp ")[1] + command.partition("cp ")[2] or command.lstrip("# ")
    if "envsubst" in command:
        needed("envsubst")
    subprocess.run(["sh", "-c", command], cwd=folder, check=True, timeout=10)
    return folder / "r1.conf"


def accepted(config, folder):
    """Whether `nginx -t` takes it, and what it says."""
    path = render(config, folder)
    done = subprocess.run(
        [needed("nginx"), "-p", folder, "-c", path, "-t"], capture_output=True, text=True, timeout=30, check=False
    )
    return done.returncode == 0, done.stderr


class Nginx:
    """nginx with the configuration for these channels, in a folder of its own."""

    def __init__(self, folder, *channels, **options):
        self.folder, self.channels, self.options = folder, channels, options

    async def __aenter__(self):
        binary = needed("nginx")
        port = free_ports(1 + sum(len(c.base_urls) for c in self.channels))
        self.config = nginx_config(self.channels, port=port, now=NOW, **self.options)
        self.path = render(self.config, self.folder)
        self.origin = f"http://127.0.0.1:{port}"
        self.url = f"{self.origin}/v1"
        self._process = await asyncio.create_subprocess_exec(
            binary, "-p", self.folder, "-c", self.path, "-g", "daemon off;", stderr=asyncio.subprocess.PIPE
        )
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=15))
        async with asyncio.timeout(10):
            while True:
                assert self._process.returncode is None, await self._process.stderr.read()
                with contextlib.suppress(aiohttp.ClientError):
                    if (await self.get("/healthz"))[0] == 200:
                        return self
                await asyncio.sleep(0.01)

    async def __aexit__(self, *_):
        await self._session.close()
        if self._process.returncode is None:
            self._process.terminate()
            await asyncio.wait_for(self._process.wait(), 10)

    async def get(self, path, **headers):
        async with self._session.get(self.origin + path, headers=headers) as answer:
            return answer.status, await answer.text()

    async def ask(self, body=ASK, path="/v1/chat/completions", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        async with self._session.post(self.origin + path, data=data, headers=headers) as answer:
            self.headers = answer.headers
            return answer.status, await answer.text()

    async def stream(self):
        """When each piece of the answer came, from the request on."""
        began, pieces = time.monotonic(), []
        async with self._session.post(self.url + "/chat/completions", json=ASK) as answer:
            async for piece in answer.content.iter_any():
                pieces.append((time.monotonic() - began, piece))  # noqa: PERF401 - the moment counts
        return pieces


# What is refused, and what is written.
@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"proxy": "http://proxy.example:3128"}, "proxy"),
        ({"protocol": "bedrock-converse"}, "bedrock-converse"),
        ({"fill_in": ("model",)}, r"put model under \[channel.a\]"),
        ({"retires": dt.date(2026, 11, 1)}, "retired on 2026-11-01"),
        ({"requests_per_minute": 0.5}, "requests_per_minute"),
        ({"weight": float("nan")}, "weight"),
        ({"weight": -1.0}, "weight"),
        ({"weight": 0.0}, "no channel has a weight"),
        ({"base_urls": ()}, "no address"),
        ({"base_urls": ("https://127.0.0.1:9/v1",)}, "certificate"),
        ({"base_urls": ("http://127.0.0.1:8081/v1",)}, "one of the ports 8080 to 8081"),
        ({"base_urls": ("https://r1.example/v1?api_key=abc",)}, "seems to hold a key"),
        ({"model": "sk-scripted-0123456789abcdef"}, "seems to hold a key"),
        ({"api_key_env": "host"}, "capital"),
        ({"api_key_env": "A KEY"}, "api_key_env"),
        ({"api_key_env": 'A_KEY}";'}, "api_key_env"),
    ],
)
def test_what_nginx_cannot_serve_is_refused_and_named(fields, why):
    with pytest.raises(UsageError, match=why):
        nginx_config([channel(**{"name": "a", **fields})], now=NOW)


@pytest.mark.parametrize(
    "bad", ['"', "'", ";", "{", "}", "\n", "\r", "$host", "${A_R1_KEY}", "\\", "#", "é", "\0", "`"]
)
def test_nothing_breaks_out_of_a_directive(bad):
    for fields in (
        {"name": f"a{bad}b"},
        {"model": f"r1{bad}"},
        {"base_urls": (f"https://r1.example/v1{bad}",)},
        {"base_urls": (f"https://r1{bad}.example/v1",)},
        {"base_urls": (f"https://r1.example/v1?version={bad}",)},
        {"api_key_env": f"A_KEY{bad}"} if bad != "é" else {"name": "é"},
    ):
        with pytest.raises(UsageError):
            nginx_config([channel(**{"name": "a", **fields})])
    for options in (
        {"resolver": f"127.0.0.1{bad}"},
        {"listen": f"127.0.0.1{bad}"},
        {"trusted_certificate": f"/a{bad}"},
    ):
        with pytest.raises(UsageError):
            nginx_config([channel()], **options)


def test_no_channel_twice_or_none_or_ports_that_do_not_exist():
    for channels, port in (((), 8080), ((channel(), channel()), 8080), ((channel(),), 65535), ((channel(),), 0)):
        with pytest.raises(UsageError):
            nginx_config(channels, port=port)


def test_different_models_are_mixed_on_request_alone():
    mixed = [channel("a"), channel("b", family="successor")]
    with pytest.raises(UsageError, match=r"r1: a; successor: b.*--allow-different-models"):
        nginx_config(mixed)
    assert "b/r1" in nginx_config(mixed, allow_different_models=True)


@pytest.mark.parametrize(
    ("weights", "whole"),
    [
        ((1.0, 1.0), [1, 1]),
        ((1.0, 0.5, 0.25), [4, 2, 1]),
        ((0.1, 0.3), [1, 3]),
        ((30.0, 20.0), [3, 2]),
        ((2.0, 0.0), [1, None]),
        ((1.0, 1e-9), [1000, 1]),
        ((1e-12, 2e-12), [1, 2]),
        ((1e308, 5e307), [2, 1]),
    ],
)
def test_weights_are_whole_and_keep_their_proportion(weights, whole):
    text = nginx_config([channel(f"c{i}", weight=w) for i, w in enumerate(weights)])
    lines = [line for line in text.splitlines() if re.match(r"\s+server 127", line)]
    found = [re.search(r" weight=(\d+) ", line) for line in lines]
    assert [f and int(f[1]) for f in found] == whole
    assert [" down;" in line for line in lines] == [w is None for w in whole]


def test_where_all_are_backups_they_take_the_requests():
    text = nginx_config([channel("a", backup=True), channel("b", backup=True)])
    assert "All are backups" in text
    assert not re.search(r"server 127.*backup", text)
    assert re.search(r"server 127.*8082.* backup;", nginx_config([channel("a"), channel("b", backup=True)]))


def test_the_template_holds_no_key_and_its_own_command_puts_it_in(tmp_path):
    text = nginx_config([channel("a", api_key_env="A_R1_KEY"), channel("b", api_key_env="B_R1_KEY"), channel("c")])
    assert not any(key in text for key in KEYS.values())
    path = render(text, tmp_path)
    rendered = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert rendered == text.replace("${A_R1_KEY}", KEYS["A_R1_KEY"]).replace("${B_R1_KEY}", KEYS["B_R1_KEY"])
    assert rendered.count(KEYS["A_R1_KEY"]) == rendered.count(KEYS["B_R1_KEY"]) == 1


def test_what_nginx_does_not_keep_is_told():
    text = nginx_config([channel(tokens_per_minute=100_000, reasoning="inline"), channel("b")], listen="0.0.0.0")  # noqa: S104
    for told in ("cannot keep tokens_per_minute = 100000", "the field that each place uses", "beyond this machine"):
        assert told in text
    assert "-s reload" in text
    assert re.findall(r"proxy_read_timeout (\d+)s", text) == ["300", "310"]  # a channel gives up first
    assert "cp b.conf.template b.conf\n" in nginx_config([channel()], name="b.conf")


# What nginx itself says of it.
def test_nginx_takes_the_whole_catalogue(tmp_path):
    fit = []
    for c in load_channels().values():
        with contextlib.suppress(UsageError):
            nginx_config([c], now=NOW, port=40000)
            fit.append(c)
    assert len(fit) > 8
    text = nginx_config(
        fit, now=NOW, port=40000, allow_different_models=True, resolver="127.0.0.1:53 [::1]:53 valid=60s ipv6=off"
    )
    ok, said = accepted(text, tmp_path)
    assert ok, said
    assert "[warn]" not in said


def test_without_a_resolver_names_are_looked_up_at_the_start(tmp_path):
    gone = channel(url="https://nowhere.invalid/v1")
    ok, said = accepted(nginx_config([gone], port=free_ports(2)), tmp_path)
    assert not ok
    assert "host not found" in said
    assert accepted(nginx_config([gone], port=free_ports(2), resolver="127.0.0.1"), tmp_path)[0]


def test_limits_and_addresses_of_all_kinds_are_taken(tmp_path):
    urls = ("http://127.0.0.1:9/v1", "http://[::1]:9/v1?version=2", "http://127.0.0.1:9/v1")
    limited = [
        channel(f"c{i}", urls, requests_per_minute=rate, max_in_flight=3) for i, rate in enumerate((1.5, 6, 15000))
    ]
    ok, said = accepted(nginx_config(limited, listen="::1", port=free_ports(10)), tmp_path)
    assert ok, said


# Traffic.
def test_each_place_sees_its_own_key_host_path_and_model_alone(tmp_path):
    async def inside():
        async with Scripted(refusal(503)) as a, Scripted(refusal(429)) as b, Scripted(OK) as c:
            places = (a, b, c)
            ports = [p.port for p in places]
            urls = (f"http://127.0.0.1:{ports[0]}", f"http://localhost:{ports[1]}/inference/v1/", f"{c.url}?version=2")
            channels = [
                channel(n, url.rstrip("/"), api_key_env=f"{n.upper()}_R1_KEY", weight=w, max_in_flight=9)
                for n, url, w in zip("abc", urls, (9.0, 3.0, 1.0), strict=True)
            ]
            async with Nginx(tmp_path, *channels) as nginx:
                for _ in range(20):
                    status, text = await nginx.ask(
                        path="/v1/chat/completions?key=mine",
                        Authorization="Bearer mine",
                        Cookie="mine=1",
                        Api_Key="mine",
                    )
                    assert status == 200
                    assert text == ANSWER.decode()
                    assert nginx.headers["X-Dsr1kit-Channel"] == "c"
                logs = (tmp_path / "r1-access.log").read_text() + (tmp_path / "r1-error.log").read_text()
            targets = ("/chat/completions", "/inference/v1/chat/completions", "/v1/chat/completions?version=2")
            hosts = (f"127.0.0.1:{ports[0]}", f"localhost:{ports[1]}", f"127.0.0.1:{ports[2]}")
            for place, name, target, host in zip(places, "abc", targets, hosts, strict=True):
                assert place.requests
                for request in place.requests:
                    assert (request.method, request.target) == ("POST", target)
                    assert request.headers["host"] == host
                    assert request.headers["authorization"] == f"Bearer {KEYS[f'{name.upper()}_R1_KEY']}"
                    assert request.json == {**ASK, "model": f"{name}/r1"}
                    told = str(request.headers)
                    assert "mine" not in told
                    assert not any(key in told for n, key in KEYS.items() if not n.startswith(name.upper()))
            assert '"c"' in logs
            assert not any(key in logs for key in KEYS.values())

    asyncio.run(inside())


def test_a_place_without_a_key_gets_none(tmp_path):
    async def inside():
        async with Scripted(OK) as place, Nginx(tmp_path, channel(url=place.url)) as nginx:
            assert (await nginx.ask(Authorization=f"Bearer {KEYS['A_R1_KEY']}"))[0] == 200
            assert "authorization" not in place.requests[0].headers

    asyncio.run(inside())


@pytest.mark.parametrize(
    "body",
    [
        {
            "messages": [{"role": "user", "content": 'say "model": "x", \\ {[ 好'}],
            "tools": [{"model": "no"}],
            "model": "m",
        },
        {"a": {}, "b": [[], [1, -2.5e3, {"model": "in"}]], "c": None, "model": "", "model_2": "kept", "stream": True},
        {"messages": ['"\\\n' * 400_000], "model": "long"},
        {"messages": [{"content": i} for i in range(50_000)], "model": "many"},
    ],
)
def test_the_model_is_replaced_and_nothing_else(tmp_path, body):
    async def inside():
        async with Scripted(OK) as place, Nginx(tmp_path, channel(url=place.url, model="@cf/x:1~b")) as nginx:
            assert (await nginx.ask(body))[0] == 200
            assert place.requests[0].json == {**body, "model": "@cf/x:1~b"}

    asyncio.run(inside())


def test_a_body_without_a_model_passes_as_it_is(tmp_path):
    async def inside():
        async with Scripted(OK) as place, Nginx(tmp_path, channel(url=place.url)) as nginx:
            for body in (b'{"messages": [{"model": "x"}]}', b"no JSON", b"[" * 100_000, b'{"model": 7}'):
                assert (await nginx.ask(body))[0] == 200
                assert place.requests[-1].body == body
            assert (await nginx.ask(b"x" * (8 * 1024 * 1024 + 1)))[0] == 413

    asyncio.run(inside())


def test_weights_are_kept_and_backups_wait(tmp_path):
    async def inside():
        async with Scripted(OK) as a, Scripted(OK) as b, Scripted(OK) as c, Scripted(OK) as d:
            channels = (
                channel("a", a.url, weight=0.5), channel("b", b.url, weight=0.25),
                channel("c", c.url, backup=True), channel("d", d.url, weight=0.0),
            )  # fmt: skip
            async with Nginx(tmp_path, *channels) as nginx:
                assert {(await nginx.ask())[0] for _ in range(30)} == {200}
            assert [len(p.requests) for p in (a, b, c, d)] == [20, 10, 0, 0]

    asyncio.run(inside())


@pytest.mark.parametrize(
    "trouble", [refusal(429), refusal(500), refusal(502), refusal(503), refusal(504), [RESET], [CLOSE]]
)
def test_trouble_moves_on_to_the_backup_with_the_whole_body(tmp_path, trouble):
    async def inside():
        async with Scripted(trouble) as a, Scripted(OK) as b:
            channels = (channel("a", a.url), channel("b", b.url, backup=True))
            async with Nginx(tmp_path, *channels) as nginx:
                assert await nginx.ask() == (200, ANSWER.decode())
            assert a.requests
            assert b.requests[0].json == {**ASK, "model": "b/r1"}

    asyncio.run(inside())


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404])
def test_what_a_person_has_to_mend_is_told_as_it_is(tmp_path, status):
    async def inside():
        async with Scripted(refusal(status, "look at it")) as a, Scripted(OK) as b:
            async with Nginx(tmp_path, channel("a", a.url), channel("b", b.url, backup=True)) as nginx:
                told, text = await nginx.ask()
                assert told == status
                assert "look at it" in text
            assert not b.requests

    asyncio.run(inside())


def test_the_last_word_of_a_busy_place_is_told_with_its_headers(tmp_path):
    async def inside():
        busy = refusal(429, "slow down", **{"Retry-After": "7"})
        async with Scripted(busy) as a, Nginx(tmp_path, channel(url=a.url)) as nginx:
            status, text = await nginx.ask()
            assert (status, nginx.headers["Retry-After"]) == (429, "7")
            assert "slow down" in text

    asyncio.run(inside())


def test_the_other_addresses_of_a_channel_stand_in_for_the_first(tmp_path):
    async def inside():
        async with Scripted(OK) as b:
            c = channel("a", (f"http://127.0.0.1:{free_port()}/v1", b.url), api_key_env="A_R1_KEY")
            async with Nginx(tmp_path, c) as nginx:
                assert {(await nginx.ask())[0] for _ in range(8)} == {200}
            assert b.requests[0].headers["authorization"] == f"Bearer {KEYS['A_R1_KEY']}"

    asyncio.run(inside())


def test_when_nobody_answers_it_says_so_in_json(tmp_path):
    async def inside():
        async with Nginx(tmp_path, *(channel(n, f"http://127.0.0.1:{free_port()}/v1") for n in "ab")) as nginx:
            answers = [await nginx.ask() for _ in range(30)]
            assert answers[0][0] == 502
            assert "out of reach" in json.loads(answers[0][1])["error"]["message"]
            assert answers[-1][0] == 503  # both rest by now
            assert json.loads(answers[-1][1])["error"]["code"] == 503
            assert nginx.headers["Retry-After"] == "5"

    asyncio.run(inside())


def test_a_connection_that_the_place_closes_costs_no_request(tmp_path):
    async def inside():
        async with Scripted(OK, close_after_response=True) as a, Nginx(tmp_path, channel(url=a.url)) as nginx:
            assert [(await nginx.ask())[0] for _ in range(10)] == [200] * 10
            assert len(a.requests) == 10

    asyncio.run(inside())


def test_a_kept_connection_that_breaks_under_a_request_is_replaced(tmp_path):
    async def inside():
        async with Scripted(OK, [RESET], OK) as a, Nginx(tmp_path, channel(url=a.url)) as nginx:
            assert [(await nginx.ask())[0] for _ in range(2)] == [200, 200]
            assert [r.connection for r in a.requests] == [1, 1, 2]

    asyncio.run(inside())


def test_connections_are_kept(tmp_path):
    async def inside():
        async with Scripted(OK) as a, Nginx(tmp_path, channel(url=a.url)) as nginx:
            for _ in range(5):
                await nginx.ask()
            assert a.connections == 1

    asyncio.run(inside())


@pytest.mark.parametrize("framing", ["chunked", "close"])
def test_tokens_and_keep_alives_come_as_they_are_sent(tmp_path, framing):
    async def inside():
        steps = [(0.0, b": keep-alive\n\n"), *((0.15, delta(content=f"t{i}")) for i in range(5)), (0.15, DONE)]
        async with Scripted(response(*steps, framing=framing)) as a, Nginx(tmp_path, channel(url=a.url)) as nginx:
            pieces = await nginx.stream()
        assert b"".join(piece for _, piece in pieces) == b"".join(data for _, data in steps)
        assert pieces[0][1] == b": keep-alive\n\n"
        assert len(pieces) > 3
        assert pieces[-1][0] - pieces[0][0] > 0.6
        assert pieces[0][0] < 0.5 * pieces[-1][0]

    asyncio.run(inside())


def test_silence_ends_at_the_read_timeout_and_keep_alives_feed_it(tmp_path):
    async def inside():
        kept = response(*((0.4, b": keep-alive\n\n") for _ in range(4)), ANSWER)
        async with Scripted([HANG]) as a, Scripted(kept) as b:
            channels = (channel("a", a.url), channel("b", b.url, backup=True))
            async with Nginx(tmp_path, *channels, read_timeout_s=1) as nginx:
                status, text = await nginx.ask()
            assert status == 200
            assert text.endswith(ANSWER.decode())

    asyncio.run(inside())


def test_a_client_that_leaves_ends_the_request_at_the_place(tmp_path):
    async def inside():
        script = response((0.0, delta(content="t")), HANG)
        async with Scripted(script) as a, Nginx(tmp_path, channel(url=a.url)) as nginx:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await nginx.ask()
            await a.until(lambda: a.gone, 3)

    asyncio.run(inside())


def test_an_emulated_provider_answers_through_it_and_says_that_it_is_one(tmp_path):
    weather = tmp_path / "weather.toml"
    weather.write_text('[model]\nscript = "<think>\\nSo.\\n</think>\\n\\n42."\n')

    async def inside():
        emulator = Emulator(load_weather(weather))
        async with (
            emulator.listen() as url,
            Nginx(tmp_path, channel(url=url, model="deepseek-r1")) as nginx,
            channel("outer", nginx.url, model="any").open() as r1,
        ):
            return await r1.ask([{"role": "user", "content": "What is 12 + 30?"}])

    reply = asyncio.run(inside())
    assert (reply.outcome, reply.answer, reply.emulated) == ("ok", "42.", True)


def test_requests_a_minute_beyond_the_limit_go_elsewhere(tmp_path):
    async def inside():
        async with Scripted(OK) as a, Scripted(OK) as b:
            channels = (channel("a", a.url, requests_per_minute=10), channel("b", b.url, backup=True))
            async with Nginx(tmp_path, *channels) as nginx:
                assert {(await nginx.ask())[0] for _ in range(12)} == {200}
            assert len(a.requests) == 2  # a fifth of a minute's at once
            assert len(b.requests) == 10
            (tmp_path / "alone").mkdir()
            async with Nginx(tmp_path / "alone", channel("a", a.url, requests_per_minute=2)) as nginx:
                assert [(await nginx.ask())[0] for _ in range(3)] == [200, 429, 429]

    asyncio.run(inside())


def test_requests_in_flight_beyond_the_limit_go_elsewhere(tmp_path):
    async def inside():
        slow = response((0.4, ANSWER))
        async with Scripted(slow) as a, Scripted(slow) as b:
            channels = (channel("a", a.url, max_in_flight=2), channel("b", b.url, max_in_flight=1, backup=True))
            async with Nginx(tmp_path, *channels) as nginx:
                answers = await asyncio.gather(*(nginx.ask() for _ in range(5)))
                assert sorted(status for status, _ in answers) == [200, 200, 200, 503, 503]
                assert (len(a.requests), len(b.requests)) == (2, 1)
                assert (await nginx.ask())[0] == 200  # it is no failure, so nobody rests

    asyncio.run(inside())


def test_only_programs_on_this_machine_are_let_in(tmp_path):
    async def inside():
        async with Scripted(OK) as a, Nginx(tmp_path, channel(url=a.url, api_key_env="A_R1_KEY")) as nginx:
            assert (await nginx.get("/healthz")) == (200, "ok\n")
            assert json.loads((await nginx.get("/v1/models"))[1])["data"][0]["id"] == "a/r1"
            assert (await nginx.get("/v1/other"))[0] == 404
            assert (await nginx.get("/v1/chat/completions"))[0] == 403
            assert (await nginx.ask(Host="evil.example"))[0] == 403
            assert (await nginx.ask(**{"Content-Type": "text/plain"}))[0] == 415
            inner = f"http://127.0.0.1:{int(nginx.origin.rpartition(':')[2]) + 1}/v1/chat/completions"
            async with aiohttp.ClientSession() as session, session.post(inner, json=ASK) as answer:
                assert answer.status == 403
            assert not a.requests
            assert re.findall(r"listen (\S+):", nginx.config) == ["127.0.0.1"] * 2

    asyncio.run(inside())


# TLS.
class _Names(asyncio.DatagramProtocol):
    """A name server to whom every name is 127.0.0.1 and has no IPv6 address."""

    def connection_made(self, transport):
        self._transport = transport

    def datagram_received(self, data, address):
        question = data[12 : data.index(b"\0", 12) + 5]
        found = question[-4:-2] == b"\0\1"
        answer = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4\x7f\0\0\1" if found else b""
        self._transport.sendto(data[:2] + b"\x81\x80\0\1" + bytes([0, found]) + bytes(4) + question + answer, address)


@contextlib.asynccontextmanager
async def names():
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(_Names, local_addr=("127.0.0.1", 0))
    yield f"127.0.0.1:{transport.get_extra_info('sockname')[1]}"
    transport.close()


@pytest.mark.parametrize(
    ("host", "trusted", "status"), [("r1.example", True, 200), ("r1.example", False, 502), ("other.example", True, 502)]
)
def test_a_certificate_must_be_trusted_and_bear_the_name(tmp_path, host, trusted, status):
    made = certificate(tmp_path)
    if made is None:
        pytest.skip("openssl is not installed")
    context, cert = made
    if not Path(DEBIAN_BUNDLE).exists():
        pytest.skip("ca-certificates is not installed")
    asked_for = []
    context.sni_callback = lambda _, name, __: asked_for.append(name)

    async def inside():
        async with names() as resolver, Scripted(OK, tls=context) as a:
            options = {"trusted_certificate": str(cert)} if trusted else {}
            c = channel(url=f"https://{host}:{a.port}/v1", api_key_env="A_R1_KEY")
            async with Nginx(tmp_path, c, resolver=resolver, **options) as nginx:
                assert (await nginx.ask())[0] == status
            assert asked_for[0] == host
            assert [r.headers["host"] for r in a.requests] == [f"{host}:{a.port}"] * (status == 200)

    asyncio.run(inside())


def test_a_certificate_of_another_name_is_refused_without_a_resolver_too(tmp_path):
    made = certificate(tmp_path)
    if made is None:
        pytest.skip("openssl is not installed")
    context, cert = made

    async def inside():
        async with Scripted(OK, tls=context) as a, Scripted(OK) as b:
            wrong = channel("a", f"https://localhost:{a.port}/v1", api_key_env="A_R1_KEY")
            async with Nginx(tmp_path, wrong, channel("b", b.url, backup=True), trusted_certificate=str(cert)) as nginx:
                assert (await nginx.ask())[0] == 200
            assert not a.requests
            assert "authorization" not in b.requests[0].headers

    asyncio.run(inside())
