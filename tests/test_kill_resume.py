"""A comparison killed at random moments and continued: nothing lost, and nothing asked twice."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsr1kit.compare.journal import read_records

ITEMS, SAMPLES, CONCURRENCY, KILLS = 30, 2, 4, 3
TOTAL = ITEMS * SAMPLES * 2


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[str]:
    """An emulator in a process of its own, which remembers what it was asked over all kills."""
    weather = tmp_path / "weather.toml"
    weather.write_text(
        '[model]\nscript = "<think>a b c</think>\\\\boxed{1}"\n[latency]\nfirst_token_s = 0.08\nspread = 0.5\n'
    )
    command = [sys.executable, "-m", "dsr1kit", "emulate", str(weather)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.terminate()


def asked(url: str) -> Counter[str]:
    with urllib.request.urlopen(f"{url.removesuffix('/v1')}/emulator/served", timeout=10) as response:  # noqa: S310 - loopback
        return Counter(json.load(response)["asked"])


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_killed_run_goes_on_with_nothing_lost_and_nothing_asked_twice(tmp_path: Path, provider: str) -> None:
    catalogue = tmp_path / "mine.toml"
    catalogue.write_text("".join(f"[channel.{name}]\nbase_url = '{provider}'\nmodel = 'm'\n" for name in "ab"))
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "dsr1kit", "compare", "--channels", "a,b", "--items", str(ITEMS),
        "--samples", str(SAMPLES), "--concurrency", str(CONCURRENCY), "--channel-file", str(catalogue),
        "--out", str(out), "--json",
    ]  # fmt: skip
    rng = random.Random(20)
    records = out / "records.jsonl"
    kept: list[str] = []
    for number in range(KILLS):
        # From this many records on, and then a moment later: torn lines, open requests, half a start.
        until = lines(records) + rng.randrange(0, TOTAL // (KILLS + 2)) * (number > 0)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            limit = time.monotonic() + 60
            while lines(records) <= until and process.poll() is None and time.monotonic() < limit:
                time.sleep(0.002)
            time.sleep(rng.uniform(0.0, 0.1))
        finally:
            process.kill()
        assert process.wait(timeout=10) == -signal.SIGKILL, "the run ended before it could be killed"
        now = records.read_text().splitlines()
        assert now[: len(kept)] == kept, "a record was lost or changed"
        kept = now[: lines(records)]
    assert 0 < len(kept) < TOTAL

    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    found = Counter((r["channel"], r["item"], r["sample"]) for r in read_records(records))
    assert len(found) == TOTAL
    assert set(found.values()) == {1}
    assert {n: c["outcomes"] for n, c in summary["channels"].items()} == {
        name: {"ok": ITEMS * SAMPLES} for name in ("a", "b")
    }
    assert records.read_text().splitlines()[: len(kept)] == kept
    # The two channels are one server that counts by question and draw: each is asked twice.
    counts = asked(provider)
    assert len(counts) == ITEMS * SAMPLES
    assert min(counts.values()) == 2
    assert sum(counts.values()) <= TOTAL + CONCURRENCY * KILLS

    before = counts
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert asked(provider) == before
    assert len((json.loads((out / "run.json").read_text()))["starts"]) == KILLS + 2
