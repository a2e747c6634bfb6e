"""A comparison whose provider dies, or whose clock is set, while it runs: nothing lost, nothing doubled."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dsr1kit.compare.journal import read_records
from dsr1kit.compare.runner import Finished, RunSettings, run_comparison
from dsr1kit.records import ANSWERED

ITEMS, SAMPLES = 20, 2
TOTAL = ITEMS * SAMPLES


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as door:
        port: int = door.getsockname()[1]
        return port


@contextmanager
def provider(weather: Path, port: int = 0) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "dsr1kit", "emulate", str(weather), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"], process
        finally:
            process.kill()


@pytest.fixture
def weather(tmp_path: Path) -> Path:
    file = tmp_path / "weather.toml"
    script = "<think>a b c</think>\\\\boxed{1}"
    file.write_text(f'[model]\nscript = "{script}"\n[latency]\nfirst_token_s = 0.05\ninter_token_s = 0.01\n')
    return file


def catalogue(folder: Path, url: str) -> Path:
    file = folder / "mine.toml"
    file.write_text(f"[channel.a]\nbase_url = '{url}'\nmodel = 'm'\n")
    return file


def asked(url: str) -> Counter[str]:
    with urllib.request.urlopen(f"{url.removesuffix('/v1')}/emulator/served", timeout=10) as response:  # noqa: S310 - loopback
        return Counter(json.load(response)["asked"])


def keys(done: Finished) -> Counter[tuple[str, str, int]]:
    return Counter((r["channel"], r["item"], r["sample"]) for r in read_records(done.records))


def test_a_provider_that_dies_and_comes_back_is_asked_again_for_what_failed_alone(
    weather: Path, tmp_path: Path
) -> None:
    port, out = free_port(), tmp_path / "run"
    settings = RunSettings(channels=("a",), items=ITEMS, samples=SAMPLES, concurrency=4)

    with provider(weather, port) as (url, process):
        mine = catalogue(tmp_path, url)

        def pull_the_plug(stage: str, done: int, total: int) -> None:
            if (stage, done) == ("hosted", TOTAL // 2):
                process.kill()

        first = asyncio.run(
            run_comparison(settings, out, channel_file=mine, client_check=False, on_progress=pull_the_plug)
        )
    records = read_records(first.records)
    failed = {(r["item"], r["sample"]) for r in records if r["outcome"] not in ANSWERED}
    assert set(keys(first).values()) == {1}
    assert len(records) == TOTAL
    assert TOTAL // 2 - 4 <= len(failed) <= TOTAL // 2
    assert {r["outcome"] for r in records} <= {"ok", "cut", "unreachable"}

    with provider(weather, port) as (url, _):
        again = asyncio.run(run_comparison(settings, out, channel_file=mine, client_check=False, retry_failed=True))
        assert sum(asked(url).values()) == len(failed)
    assert set(keys(again).values()) == {1}
    assert {r["outcome"] for r in read_records(again.records)} == {"ok"}
    aside = read_records(out / "retried.jsonl")
    assert {(r["item"], r["sample"]) for r in aside} == failed
    kept = [r for r in records if r["outcome"] in ANSWERED]
    assert read_records(again.records)[: len(kept)] == kept, "a record was lost or changed"


@pytest.mark.parametrize("jump_s", [-7200.0, 7200.0])
def test_a_clock_set_while_it_runs_changes_no_duration_and_doubles_nothing(
    weather: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    real, set_by = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + set_by[0])
    settings = RunSettings(
        channels=("a",), items=ITEMS, samples=SAMPLES, concurrency=4, objective="total_s=60", rate=40.0
    )

    def set_the_clock(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("hosted", TOTAL // 2):
            set_by[0] = jump_s

    with provider(weather) as (url, _):
        mine = catalogue(tmp_path, url)
        first = asyncio.run(
            run_comparison(settings, tmp_path / "run", channel_file=mine, client_check=False, on_progress=set_the_clock)
        )
        count = asked(url)
        again = asyncio.run(run_comparison(settings, tmp_path / "run", channel_file=mine, client_check=False))
        assert asked(url) == count
    records = read_records(first.records)
    assert set(keys(first).values()) == {1}
    assert len(records) == TOTAL
    assert {r["outcome"] for r in records} == {"ok"}
    for r in records:
        assert 0 <= r["queue_s"] <= r["first_token_s"] <= r["first_answer_s"] <= r["total_s"] < 30
    assert len({r["due_at"][:13] for r in records}) >= 2, "the clock was not set at all"
    channel = again.summary["channels"]["a"]
    assert channel["total_s"]["p99"] < 30
    assert channel["goodput"]["met"] == TOTAL
