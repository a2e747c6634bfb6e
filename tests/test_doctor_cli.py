"""`channels` and `doctor` from outside: exit codes, one JSON object on stdout, advice, never a key."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import matplotlib as mpl
import pytest
from scripted import ANSWER, free_port

from dsr1kit.access.channels import load_channels

SECRET = "correct-horse-battery-staple-80"  # noqa: S105 - a made-up value that must not leak


class Provider(BaseHTTPRequestHandler):
    """Channels by their path: /good answers, /busy is busy, /echo says the key back, wherever it can."""

    server: Any

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        key = self.headers.get("Authorization", "none")
        if self.path.startswith("/echo") and "balance" in self.path:
            return self.reply(200, {"is_available": True, "balance_infos": [{"total_balance": key, "currency": key}]})
        names = [key] if self.path.startswith("/echo") else ["served-r1"]
        return self.reply(200, {"data": [{"id": name} for name in names]})

    def do_POST(self) -> None:
        self.server.asked.append(self.path)
        self.rfile.read(int(self.headers["Content-Length"]))
        key = self.headers.get("Authorization", "none")
        if self.path.startswith("/busy"):
            return self.reply(503, {"error": {"message": "The server is busy"}})
        if self.path.startswith("/echo-error"):
            return self.reply(400, {"error": {"message": f"wrong key {key}"}})
        body = ANSWER
        if self.path.startswith("/echo"):
            body = ANSWER.replace(b"served-r1", key.encode()).replace(b"17 + 25", key.encode())
        return self.send(200, "text/event-stream", body)

    def reply(self, status: int, value: object) -> None:
        self.send(status, "application/json", json.dumps(value).encode())

    def send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("X-Echo", self.headers.get("Authorization", "none"))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def asked(server: Any) -> list[str]:
    server.asked.clear()
    paths: list[str] = server.asked
    return paths


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Provider)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def bare(home: Path) -> dict[str, str]:
    """An environment without any key, and without files that hold one."""
    names = {c.api_key_env for c in load_channels().values() if c.api_key_env}
    kept = {k: v for k, v in os.environ.items() if k not in names and not k.startswith(("AWS_", "DSR1KIT_"))}
    nowhere = str(home / "nowhere")
    return kept | {"HOME": str(home), "AWS_SHARED_CREDENTIALS_FILE": nowhere, "AWS_CONFIG_FILE": nowhere,
                   "AWS_EC2_METADATA_DISABLED": "true", "MPLCONFIGDIR": mpl.get_configdir()}  # fmt: skip


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home folder whose channel file moves the shipped local servers to a port where nothing listens."""
    dead = free_port()
    lines = [
        f"[channel.{name}]\nbase_url = 'http://127.0.0.1:{dead}/v1'\n"
        for name, c in load_channels().items()
        if c.base_urls and all(urlsplit(url).hostname in ("localhost", "127.0.0.1") for url in c.base_urls)
    ]
    (tmp_path / "none.toml").write_text("".join(lines))
    return tmp_path


@pytest.fixture
def mine(home: Path, server: Any) -> Path:
    """A channel file with channels of all kinds."""
    url = f"http://127.0.0.1:{server.server_port}"
    path = home / "mine.toml"
    fields = {
        "good": "",
        "busy": "",
        "keyed": "api_key_env = 'MY_KEY'",
        "echo": "api_key_env = 'MY_KEY'\nbalance_path = '/balance'",
        "echo-error": "api_key_env = 'MY_KEY'",
        "gone": "retires = 2020-01-01",
    }
    path.write_text(
        (home / "none.toml").read_text()
        + "".join(
            f"[channel.{name}]\nbase_url = '{url}/{name}'\nmodel = 'served-r1'\n{more}\n"
            for name, more in fields.items()
        )
    )
    return path


def dsr1kit(
    home: Path, *arguments: str | Path, code: int | None = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "dsr1kit", *map(str, arguments)],
        capture_output=True, text=True, timeout=60, env=bare(home) | environment, check=False,
    )  # fmt: skip
    assert code in (None, done.returncode), (done.returncode, done.stdout[-800:], done.stderr[-1500:])
    assert "Traceback" not in done.stderr + done.stdout
    assert SECRET not in done.stderr + done.stdout
    return done


def one_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    assert isinstance(value, dict)
    assert text.count("\n") == 1
    return value


# --- channels --------------------------------------------------------------------------------------------------


def test_channels_tells_which_are_open_and_why_others_are_not(home: Path, mine: Path) -> None:
    rows = one_object(dsr1kit(home, "channels", "--json", "--channel-file", mine, MY_KEY=SECRET).stdout)["channels"]
    status = {r["name"]: (r["open"], r["status"]) for r in rows}
    assert status["good"] == status["keyed"] == (True, "open")
    assert status["gone"] == (False, "retired 2020-01-01")
    assert status["openrouter"][0] is False
    assert status["openrouter"][1].startswith("needs ")
    assert {r["name"] for r in rows} == set(load_channels(mine))
    only = one_object(dsr1kit(home, "channels", "--open", "--json", "--channel-file", mine, MY_KEY="").stdout)
    assert {r["name"] for r in only["channels"]} == {"good", "busy"}


def test_channels_open_is_a_table_of_the_open_ones(home: Path, mine: Path) -> None:
    done = dsr1kit(home, "channels", "--open", "--channel-file", mine, MY_KEY=SECRET)
    first = [line.split()[0] for line in done.stdout.splitlines()]
    assert first == ["channel", "good", "busy", "keyed", "echo", "echo-error"]


def test_channels_without_an_open_one_gives_advice_and_prints_no_table(home: Path) -> None:
    done = dsr1kit(home, "channels", "--open", "--channel-file", home / "none.toml")
    assert done.stdout == ""
    assert "set a key" in done.stderr
    told = dsr1kit(home, "channels", "--open", "--json", "--channel-file", home / "none.toml")
    assert one_object(told.stdout) == {"channels": []}


# --- doctor: exit codes and words ------------------------------------------------------------------------------


def test_a_usable_channel_is_exit_0_and_its_steps_are_shown(home: Path, mine: Path, asked: list[str]) -> None:
    done = dsr1kit(home, "doctor", "good", "--channel-file", mine)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "good"
    assert [line.split()[1] for line in lines[1:5]] == ["retirement", "key", "proxy", "dns"]
    assert "good: usable. works" in done.stdout
    assert "FAIL" not in done.stdout
    assert asked == ["/good/models", "/good/chat/completions"]


def test_a_busy_channel_is_exit_1_and_named_with_what_to_do(home: Path, mine: Path) -> None:
    done = dsr1kit(home, "doctor", "busy", "--channel-file", mine, code=1)
    assert "busy: not usable: overloaded" in done.stdout
    assert "use another channel or wait" in done.stdout
    assert "FAIL" in done.stdout


def test_a_reader_that_leaves_early_is_no_bad_answer(home: Path, mine: Path) -> None:
    command = [sys.executable, "-m", "dsr1kit", "doctor", "good", "--channel-file", str(mine)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=bare(home)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == b""


def test_of_named_channels_all_must_be_usable_and_without_names_one(home: Path, mine: Path, asked: list[str]) -> None:
    two = one_object(dsr1kit(home, "doctor", "good", "busy", "good", "--channel-file", mine, "--json", code=1).stdout)
    assert [(c["channel"], c["usable"]) for c in two["channels"]] == [("good", True), ("busy", False)]
    asked.clear()
    every = one_object(dsr1kit(home, "doctor", "--channel-file", mine, "--json").stdout)
    assert [c["channel"] for c in every["channels"]] == ["good", "busy"]
    assert not [path for path in asked if "gone" in path or "keyed" in path]


def test_without_names_and_nothing_open_it_is_usage_with_advice(home: Path) -> None:
    done = dsr1kit(home, "doctor", "--channel-file", home / "none.toml", code=2)
    assert done.stdout == ""
    assert all(part in done.stderr for part in ("set a key", "dsr1kit channels", "dsr1kit doctor"))


def test_a_retired_channel_and_one_without_its_key_are_exit_1_and_asked_nothing(
    home: Path, mine: Path, asked: list[str]
) -> None:
    done = dsr1kit(home, "doctor", "gone", "keyed", "--channel-file", mine, "--json", code=1)
    told = {c["channel"]: c for c in one_object(done.stdout)["channels"]}
    assert (told["gone"]["outcome"], told["keyed"]["outcome"]) == ("retired", "unauthorized")
    assert "export MY_KEY=" in told["keyed"]["detail"]
    assert not asked


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("doctor", "goood"), "did you mean 'good'"),
        (("doctor", "good", "emulated:clam"), "did you mean 'calm'"),
        (("doctor", "good", "emulated:./no/where.toml"), "no such weather file"),
        (("doctor", "good", "local:tiny-r1"), "dsr1kit ask --local"),
        (("doctor", "good", "--first-token-s", "0"), "first_token_s"),
        (("doctor", "good", "keyed", "--probe"), "MY_KEY"),
        (("doctor", "good", "--probe", "--ceiling-tokens", "0"), "ceiling"),
        (("doctor", "--probe"), "--probe takes the channels"),
        (("doctor", "good", "--probe", "--trace"), "no --trace"),
        (("doctor", "good", "--every", "10m"), "--for"),
        (("doctor", "--every", "1s", "--for", "2s", "--out", "w"), "a watch takes channels"),
        (("doctor", "good", "--every", "1s", "--for", "2s", "--out", "w", "--probe"), "a watch takes channels"),
        (("doctor", "good", "--every", "often", "--for", "2s", "--out", "w"), "--every takes a duration"),
        (("doctor", "good", "--every", "1s", "--for", "0", "--out", "w"), "--for takes a duration"),
        (("doctor", "goood", "--every", "1s", "--for", "2s", "--out", "w"), "did you mean 'good'"),
        (("doctor", "local:tiny-r1", "--every", "1s", "--for", "2s", "--out", "w"), "can be busy"),
        (("doctor", "keyed", "--every", "1s", "--for", "2s", "--out", "w"), "MY_KEY"),
    ],
)
def test_what_cannot_be_meant_is_exit_2_before_anything_is_asked(
    home: Path, mine: Path, asked: list[str], arguments: tuple[str, ...], told: str
) -> None:
    placed = [str(home / "w") if a == "w" else a for a in arguments]
    done = dsr1kit(home, *placed, "--channel-file", mine, "--json" if "--trace" in arguments else "--", code=2)
    assert done.stdout == ""
    assert told in done.stderr
    assert not asked
    assert not (home / "w").exists()


# --- doctor: probe, watch, emulated ----------------------------------------------------------------------------


SCRIPT = "<think>\\nLet me see: 12 and 30 are 42, I am quite sure of it.\\n</think>\\n\\nIt is 42."


def weather(home: Path, text: str = "") -> str:
    path = home / "w.toml"
    path.write_text(f'[model]\nscript = "{SCRIPT}"\n[latency]\nfirst_token_s = 0.01\ninter_token_s = 0.001\n{text}')
    return f"emulated:{path}"


def test_an_emulated_channel_is_examined_and_said_to_be_emulated(home: Path) -> None:
    done = dsr1kit(home, "doctor", weather(home))
    assert "(emulated): usable" in done.stdout
    told = one_object(dsr1kit(home, "doctor", weather(home, "[faults]\nempty = 1\n"), "--json", code=1).stdout)
    (only,) = told["channels"]
    assert (only["outcome"], only["usable"], only["emulated"]) == ("empty", False, True)
    assert {"steps", "detail", "cost", "currency", "model", "first_token_s"} <= set(only)


def test_a_probe_is_one_object_and_a_failed_check_is_exit_1(home: Path) -> None:
    text = "[price]\ninput = 1\noutput = 2\n"
    done = dsr1kit(home, "doctor", weather(home, text), "--probe", "--ceiling-tokens", "8", "--json", code=1)
    (only,) = one_object(done.stdout)["channels"]
    assert {c["name"]: c["verdict"] for c in only["checks"]}["temperature"] == "fail"
    assert only["cost"] > 0
    assert only["requests"] == 14
    assert only["emulated"] is True


def test_a_probe_of_a_channel_that_does_not_answer_is_exit_1(home: Path, mine: Path, asked: list[str]) -> None:
    done = dsr1kit(home, "doctor", "busy", "--probe", "--channel-file", mine, code=1)
    assert "overloaded" in done.stdout
    assert "1 requests, price unknown" in done.stdout
    assert asked == ["/busy/chat/completions"]


def test_a_watch_is_one_object_and_the_same_command_again_asks_nothing(
    home: Path, mine: Path, asked: list[str]
) -> None:
    command = ("doctor", "good", "busy", "--channel-file", mine, "--every", "0.2", "--for", "0.4s",
               "--out", home / "w", "--json")  # fmt: skip
    done = dsr1kit(home, *command)
    told = one_object(done.stdout)
    assert {"paths", "channels", "by_hour", "peak", "verdict"} <= set(told)
    assert all(Path(path).exists() for path in told["paths"].values())
    assert told["channels"]["busy"]["availability"]["value"] == 0.0
    assert "1/2  good ok, busy overloaded" in done.stderr
    asked.clear()
    plain = dsr1kit(home, *command[:-1])
    assert not asked
    assert f"report:   {told['paths']['report']}" in plain.stdout
    assert all(line in plain.stdout for line in told["verdict"])


def test_a_watch_in_which_nothing_was_answered_is_exit_1(home: Path, mine: Path) -> None:
    out = ("--every", "1s", "--for", "1s", "--out", home / "w")
    one_object(dsr1kit(home, "doctor", "busy", "--channel-file", mine, *out, "--json", code=1).stdout)


def test_an_interrupted_watch_says_how_to_go_on(home: Path, mine: Path) -> None:
    import signal

    command = [sys.executable, "-m", "dsr1kit", "doctor", "good", "--channel-file", str(mine), "--every", "30s",
               "--for", "1h", "--out", str(home / "w")]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=bare(home)
    ) as process:
        limit = time.monotonic() + 30
        records = home / "w" / "records.jsonl"
        while (not records.exists() or not records.read_bytes()) and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert "the same command goes on" in err
    assert "Traceback" not in err


# --- keys ------------------------------------------------------------------------------------------------------


def test_a_key_that_is_said_back_is_printed_nowhere(home: Path, mine: Path, asked: list[str]) -> None:
    file = ("--channel-file", mine)
    steps = dsr1kit(home, "doctor", "echo", "echo-error", *file, code=1, MY_KEY=SECRET)
    told = dsr1kit(home, "doctor", "echo", "echo-error", *file, "--json", code=1, MY_KEY=SECRET)
    probed = dsr1kit(
        home, "doctor", "echo", "--probe", *file, "--json", "--ceiling-tokens", "8", code=None, MY_KEY=SECRET
    )
    watched = dsr1kit(
        home, "doctor", "echo", *file, "--every", "1", "--for", "1", "--out", home / "w", "--json", MY_KEY=SECRET
    )
    assert {path.split("/")[1] for path in asked} == {"echo", "echo-error"}
    assert all("[redacted]" in done.stdout for done in (steps, told, watched))
    one_object(probed.stdout)
    assert not [p for p in (home / "w").iterdir() if SECRET in p.read_text(encoding="utf-8")]
