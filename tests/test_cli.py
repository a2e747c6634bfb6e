"""The command line from outside: exit codes, one JSON object on stdout, never a traceback or a key."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from dsr1kit.compare.journal import read_records

SECRET = "correct-horse-battery-staple-42"  # noqa: S105 - a made-up value that must not leak
SHAPED = "sk-0123456789abcdef0123"


def dsr1kit(*arguments: str | Path, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "dsr1kit", *map(str, arguments)],
        capture_output=True, text=True, timeout=90, env=os.environ | environment, check=False,
    )  # fmt: skip
    assert done.returncode == code, (done.returncode, done.stdout[-500:], done.stderr[-1500:])
    assert "Traceback" not in done.stderr + done.stdout
    return done


def refused(*arguments: str | Path, **environment: str) -> str:
    """The message of a command that cannot be meant: exit 2, nothing on stdout."""
    done = dsr1kit(*arguments, code=2, **environment)
    assert done.stdout == ""
    assert done.stderr.strip()
    return done.stderr


def one_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    assert isinstance(value, dict)
    return value


def script(path: Path, answer: str = "<think>\nFirst this.\n</think>\n\nThen 42.", rest: str = "") -> Path:
    path.write_text(f"[model]\nscript = {json.dumps(answer)}\n{rest}")
    return path


class Echo(BaseHTTPRequestHandler):
    """A provider that says back the key it was sent: in errors, in answers cut into small pieces, as HTML."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        key = self.headers.get("Authorization", "Bearer none")
        if self.path.startswith("/html"):
            return self.reply(200, "text/html", b"<html><title>hello</title></html>")
        if self.path.startswith("/error"):
            told = {"error": {"message": f"wrong key {key} or {SHAPED}"}}
            return self.reply(401, "application/json", json.dumps(told).encode())
        text = f"Your header is {key} and mine {SHAPED} \\boxed{{1}}"
        events = []
        for field, said in (("reasoning_content", f"Think of {key}. "), ("content", text)):
            for at in range(0, len(said), 3):
                choice = {"index": 0, "delta": {field: said[at : at + 3]}, "finish_reason": None}
                events.append(json.dumps({"model": "echo", "choices": [choice]}))
        events += [json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}), "[DONE]"]
        return self.reply(200, "text/event-stream", "".join(f"data: {e}\n\n" for e in events).encode())

    def reply(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def echo() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def catalogue(folder: Path, echo: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(
        "".join(
            f"[channel.{name}]\nbase_url = '{echo}/{name}'\nmodel = 'm'\napi_key_env = 'ECHO_KEY'\n"
            for name in ("answer", "error", "html")
        )
    )
    return path


# --- what cannot be meant: exit 2 ------------------------------------------------------------------------


def test_unknown_names_are_told_with_the_nearest(tmp_path: Path) -> None:
    run = ("compare", "--json", "--out", tmp_path / "run", "--channels")
    assert "did you mean 'scripted'" in refused(*run, "emulated:scriptd")
    task = refused(*run, "emulated:scripted", "--task", "arithmetics")
    assert "unknown task 'arithmetics'; did you mean 'arithmetic'" in task
    assert "did you mean 'tiny-r1'" in refused(*run, "local:tinyr1")
    (tmp_path / "mine.toml").write_text("[channel.my-lab]\nbase_url = 'http://127.0.0.1:1/v1'\nmodel = 'm'\n")
    told = refused("ask", "x", "--channel", "my-lap", "--channel-file", tmp_path / "mine.toml", "--json")
    assert "unknown channel 'my-lap'; did you mean 'my-lab'" in told
    assert "did you mean 'busy'" in refused("emulate", "bussy")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[channel.a]\nmodel = 'm'\nbase_url = \n", ("line 3", "not valid TOML")),
        ("[channel.a]\nmodel = 'm'\nbase_url = 7\n", ("[channel.a] base_url", "expected a string")),
        ("[channel.a]\nbase_url = 'http://h/v1'\n", ("[channel.a] model", "is missing")),
        (
            "[channel.a]\nmodel = 'm'\nbase_url = 'http://h/v1'\nrequests_per_minute = -5\n",
            ("[channel.a] requests_per_minute", "expected a number of at least"),
        ),
        (
            "[channel.a]\nmodel = 'm'\nbase_url = 'http://h/v1'\nmax_in_flght = 5\n",
            ("max_in_flght", "did you mean 'max_in_flight'"),
        ),
    ],
)
def test_a_wrong_channel_file_is_told_with_file_and_place(tmp_path: Path, text: str, told: tuple[str, ...]) -> None:
    (tmp_path / "mine.toml").write_text(text)
    message = refused("channels", "--json", "--channel-file", tmp_path / "mine.toml")
    assert all(part in message for part in (*told, "mine.toml"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[model]\nscript = 'x'\n[latency\n", "line 3"),
        ("[model]\nscript = 'x'\n[latency]\nfirst_token_s = -1\n", "[latency] first_token_s"),
        ("[model]\nscript = 'x'\n[faults]\nthrottled = 'often'\n", "[faults] throttled"),
        ("[latency]\nfirst_token_s = 1\n", "[model] is missing"),
    ],
)
def test_a_wrong_weather_file_is_told_with_file_and_place(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "w.toml").write_text(text)
    message = refused("emulate", tmp_path / "w.toml")
    assert told in message
    assert "w.toml" in message


def test_a_missing_file_and_a_missing_key_are_named(tmp_path: Path, echo: str) -> None:
    assert "nowhere.toml" in refused("channels", "--channel-file", tmp_path / "nowhere.toml")
    file = ("--channel-file", catalogue(tmp_path, echo))
    told = refused("ask", "x", "--channel", "answer", *file, "--json", ECHO_KEY="")
    assert "ECHO_KEY" in told
    assert "export ECHO_KEY" in told
    out = tmp_path / "run"
    assert "ECHO_KEY" in refused("compare", "--channels", "answer", *file, "--out", out, ECHO_KEY="")
    assert not out.exists()


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refused("emulate", script(tmp_path / "w.toml"), "--port", str(port))
    assert str(port) in message
    assert "--port" in message
    assert "65535" in refused("emulate", tmp_path / "w.toml", "--port", "70000")


def test_an_output_folder_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    run = (
        "compare",
        "--json",
        "--quiet",
        "--channels",
        f"emulated:{script(tmp_path / 'w.toml')}",
        "--items",
        "2",
    )
    assert "cannot be written" in refused(*run, "--out", tmp_path / "file" / "run")
    one_object(dsr1kit(*run, "--out", tmp_path / "run").stdout)
    message = refused(*run, "--out", tmp_path / "run", "--samples", "2")
    assert "holds another run" in message
    assert "samples (1 there, 2 now)" in message


@pytest.mark.parametrize(
    "arguments",
    [
        ("compare", "--channels", "emulated:scripted", "--items", "0"),
        ("compare", "--channels", "emulated:scripted", "--items", "many"),
        ("compare", "--channels", ","),
        ("compare", "--channels", "emulated:scripted", "--first-token-s", "-1"),
        ("compare", "--channels", "emulated:scripted", "--temperature", "-1"),
        ("compare",),
        ("ask", "x", "--channel", "emulated:scripted", "--local", "tiny-r1"),
        ("ask", "x", "--local", "tiny-r1", "--quantization", "5bit"),
        ("nonsense",),
    ],
)
def test_wrong_values_are_usage(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    out = ("--out", str(tmp_path / "run")) if arguments[0] == "compare" else ()
    refused(*arguments, *out)
    assert not (tmp_path / "run").exists()


# --- it ran and the answer is bad: exit 1 ----------------------------------------------------------------


def test_an_endpoint_that_answers_html_fails_the_run_and_says_why(tmp_path: Path, echo: str) -> None:
    file = ("--channel-file", catalogue(tmp_path, echo))
    asked = dsr1kit("ask", "x", "--channel", "html", *file, "--json", code=1, ECHO_KEY=SECRET)
    assert one_object(asked.stdout)["outcome"] == "not_an_answer"
    assert "not_an_answer" in asked.stderr
    run = (
        "compare",
        "--channels",
        "html",
        "--items",
        "2",
        "--json",
        "--quiet",
        *file,
        "--out",
        tmp_path / "run",
    )
    done = dsr1kit(*run, code=1, ECHO_KEY=SECRET)
    assert one_object(done.stdout)["channels"]["html"]["outcomes"] == {"not_an_answer": 2}
    assert "not_an_answer" in done.stderr
    assert "base_url" in done.stderr


# --- what goes well --------------------------------------------------------------------------------------


def test_channels_lists_the_catalogue_and_my_own(tmp_path: Path, echo: str) -> None:
    file = ("--channel-file", catalogue(tmp_path, echo))
    rows = {r["name"]: r for r in one_object(dsr1kit("channels", *file, "--json").stdout)["channels"]}
    assert rows["answer"]["key_present"] is False
    assert len(rows) > 3
    table = dsr1kit("channels", *file, ECHO_KEY=SECRET).stdout
    assert all(f"{name} " in table and r["model"] in table for name, r in rows.items())
    assert SECRET not in table
    by_variable = dsr1kit("channels", "--json", DSR1KIT_CHANNELS=str(file[1]), ECHO_KEY=SECRET)
    rows = {r["name"]: r for r in one_object(by_variable.stdout)["channels"]}
    assert rows["answer"]["key_present"] is True


def test_ask_shows_the_reasoning_and_then_the_answer(tmp_path: Path) -> None:
    answer = "<think>\nFirst [b]this[/b].\n</think>\n\nThen [/x] :smile: 42."
    channel = f"emulated:{script(tmp_path / 'w[1].toml', answer)}"
    done = dsr1kit("ask", "What?", "--channel", channel)
    assert done.stdout.strip().split("\n\n") == ["First [b]this[/b].", "Then [/x] :smile: 42."]
    assert "first token" in done.stderr
    assert channel in done.stderr
    told = one_object(dsr1kit("ask", "What?", "--channel", channel, "--json").stdout)
    assert (told["outcome"], told["answer"].strip()) == ("ok", "Then [/x] :smile: 42.")
    assert told["reasoning"].strip() == "First [b]this[/b]."
    assert told["emulated"] is True
    assert told["timing"]["first_token_s"] > 0


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    slow = script(tmp_path / "w.toml", "word " * 400, "[latency]\ninter_token_s = 0.005\n")
    command = [sys.executable, "-m", "dsr1kit", "ask", "x", "--channel", f"emulated:{slow}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(20)
        process.stdout.close()
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == b""


def test_a_truncated_answer_is_shown_and_told(tmp_path: Path) -> None:
    channel = f"emulated:{script(tmp_path / 'w.toml')}"
    done = dsr1kit("ask", "What?", "--channel", channel, "--max-tokens", "2")
    assert "max_tokens" in done.stderr


def test_compare_prints_paths_and_verdict_or_one_object(tmp_path: Path) -> None:
    run = (
        "compare",
        "--channels",
        f"emulated:{script(tmp_path / 'w.toml')}",
        "--items",
        "3",
        "--out",
        tmp_path / "o",
    )
    plain = dsr1kit(*run)
    assert "Quality:" in plain.stdout
    assert str(tmp_path / "o" / "report.html") in plain.stdout
    told = one_object(dsr1kit(*run, "--json").stdout)
    assert told["paths"]["records"] == str(tmp_path / "o" / "records.jsonl")
    assert len(told["verdict"]) == 3
    assert {"channels", "pairs"} <= set(told)
    assert len(read_records(tmp_path / "o" / "records.jsonl")) == 3


def test_interrupting_a_comparison_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    weather = script(tmp_path / "w.toml", rest="[latency]\nfirst_token_s = 0.15\n")
    command = [
        sys.executable, "-m", "dsr1kit", "compare", "--channels", f"emulated:{weather}", "--items", "24",
        "--concurrency", "2", "--out", str(tmp_path / "run"), "--json",
    ]  # fmt: skip
    records = tmp_path / "run" / "records.jsonl"
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        limit = time.monotonic() + 60
        while (not records.exists() or records.read_bytes().count(b"\n") < 4) and time.monotonic() < limit:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the emulator beside it hears it too
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert "the same command continues" in err
    assert "Traceback" not in err
    kept = read_records(records)
    assert 4 <= len(kept) < 24
    assert {r["outcome"] for r in kept} == {"ok"}
    done = dsr1kit(*command[3:])
    (c,) = one_object(done.stdout)["channels"].values()
    assert c["outcomes"] == {"ok": 24}
    assert read_records(records)[: len(kept)] == kept


# --- notebooks -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    nb = new_notebook(metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "p"}})
    nb.cells = [
        new_markdown_cell("# Small"),
        new_code_cell('shift: float = 0.5\ntitle: str = "x"\n', metadata={"tags": ["parameters"]}),
        new_code_cell("from dsr1kit.notebooks import publish\npublish(shift=shift, title=title)"),
    ]
    path = tmp_path_factory.mktemp("nb") / "small.ipynb"
    nbformat.write(nb, path)
    return path


def test_parameters_come_as_name_and_value_whatever_the_value_holds(notebook: Path, tmp_path: Path) -> None:
    done = dsr1kit(
        "run", notebook, "-p", "shift", "-3", "--parameter", "title", "a=b, c = --d", "--out", tmp_path,
        "--json", "--quiet",
    )  # fmt: skip
    told = one_object(done.stdout)
    assert (told["status"], told["results"]) == ("ok", {"shift": -3.0, "title": "a=b, c = --d"})
    assert Path(told["executed"]).exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("-p", "shfit", "1"), "did you mean 'shift'"),
        (("-p", "shift", "much"), "finite number"),
        (("-p", "shift"), "NAME VALUE"),
        (("-p",), "requires an argument"),
        (("-p", "not a name", "1"), ""),
        (("-p", "shift", "1", "-p", "shift", "2"), "given twice"),
    ],
)
def test_wrong_parameters_are_usage(notebook: Path, tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    assert told in refused("run", notebook, "--out", tmp_path, "--json", *arguments)


def test_a_failing_notebook_is_one_object_and_exit_1(tmp_path: Path) -> None:
    nb = new_notebook(metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "p"}})
    nb.cells = [new_code_cell("raise ValueError('too early')")]
    nbformat.write(nb, tmp_path / "bad.ipynb")
    done = dsr1kit("run", tmp_path / "bad.ipynb", "--out", tmp_path / "out", "--json", code=1)
    assert one_object(done.stdout)["status"] == "failed"
    assert "too early" in done.stderr


def test_an_unknown_notebook_is_told() -> None:
    assert "unknown notebook 'no_such_thing'" in refused("run", "no_such_thing", "--json")


# --- keys ------------------------------------------------------------------------------------------------


def test_a_key_the_server_echoes_is_in_no_output_and_no_file(tmp_path: Path, echo: str) -> None:
    file = ("--channel-file", catalogue(tmp_path, echo))
    run = ("compare", "--channels", "answer,error", "--items", "3", *file, "--out", tmp_path / "run")
    asking = ("ask", "x", *file, "--channel")
    outputs = [
        dsr1kit(*asking, "answer", ECHO_KEY=SECRET),
        dsr1kit(*asking, "answer", "--json", ECHO_KEY=SECRET),
        dsr1kit(*asking, "error", code=1, ECHO_KEY=SECRET),
        dsr1kit(*asking, "error", "--json", code=1, ECHO_KEY=SECRET),
        dsr1kit(*run, code=1, ECHO_KEY=SECRET),
        dsr1kit(*run, "--json", "--retry-failed", code=1, ECHO_KEY=SECRET),
    ]
    texts = {f"output {n}": o.stdout + o.stderr for n, o in enumerate(outputs)}
    texts |= {p.name: p.read_text() for p in (tmp_path / "run").iterdir()}
    assert {"records.jsonl", "run.json", "summary.json", "report.html", "retried.jsonl"} <= set(texts)
    for where, text in texts.items():
        assert SECRET not in text, where
        assert SHAPED not in text, where
    assert outputs[0].stdout.count("[redacted]") == 3
    assert "Your header is Bearer [redacted] and mine [redacted] \\boxed{1}" in outputs[0].stdout
    assert "[redacted]" in texts["records.jsonl"]


def test_nginx_writes_a_template_without_keys(tmp_path: Path) -> None:
    named = tmp_path / "r1.conf.template"
    done = dsr1kit(
        "nginx", "--channels", "openrouter, siliconflow", "--out", named,
        OPENROUTER_API_KEY=SECRET, SILICONFLOW_API_KEY=SHAPED,
    )  # fmt: skip
    assert done.stdout == ""
    assert "first lines say how" in done.stderr
    text = named.read_text()
    assert "${OPENROUTER_API_KEY}" in text
    assert SECRET not in text + done.stderr
    assert SHAPED not in text + done.stderr
    assert dsr1kit("nginx", "--channels", "openrouter,siliconflow").stdout == text


def test_nginx_refuses_what_it_cannot_serve(tmp_path: Path) -> None:
    assert "did you mean 'openrouter'" in refused("nginx", "--channels", "openruter")
    assert "bedrock" in refused("nginx", "--channels", "openrouter,bedrock")
    assert "r1.conf.template" in refused("nginx", "--channels", "openrouter", "--out", tmp_path / "r1.conf")
    missing = tmp_path / "no" / "r1.conf.template"
    assert "cannot be written" in refused("nginx", "--channels", "openrouter", "--out", missing)
