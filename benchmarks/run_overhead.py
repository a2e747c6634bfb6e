"""What does a whole run cost beyond asking? CPU per request against the bare client, memory, and the report's time.

10,000 requests over 256 streams against the scripted server (its own process): once through `run_comparison`, with
judging, journal and progress, once through the bare client with nothing kept. Each part runs in a process of its own,
in turn; the ratio is of CPU seconds between the first request and the last. The run's memory is read after a fifth of
its requests and after all.

    python benchmarks/run_overhead.py [--requests 10000] [--streams 256] [--repeat 3]
    python benchmarks/run_overhead.py --records 100000     # summary and report of that many: time and peak memory
    python benchmarks/run_overhead.py --part run --profile # where a run's CPU goes
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import dataclasses
import json
import os
import pstats
import random
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from dsr1kit.emulator.scripted import Script, ScriptedServer

SAMPLES = 4
MAX_RATIO = 1.2
CHANNELS = ("hosted-a", "hosted-b", "hosted-c", "hosted-d")


def rss_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def bare(requests: int, streams: int) -> dict[str, float]:
    """The client alone: the same questions and draws, nothing judged and nothing kept."""
    from dsr1kit.access.channels import Channel
    from dsr1kit.compare.tasks import load_task
    from dsr1kit.records import Sampling

    items = load_task("arithmetic", requests // SAMPLES)
    draws = iter([(item, sample) for sample in range(SAMPLES) for item in items])
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(ScriptedServer(Script()))
        channel = Channel(name="scripted", base_urls=(server.url,), model="scripted")
        client = await stack.enter_async_context(channel.open())

        async def stream() -> None:
            for item, sample in draws:
                (await client.ask(item.messages(), Sampling(seed=0, sample=sample))).raise_for_outcome()

        began, cpu = time.monotonic(), time.process_time()
        await asyncio.gather(*(stream() for _ in range(streams)))
        cpu, seconds = time.process_time() - cpu, time.monotonic() - began
    return {"cpu_ms": cpu * 1e3 / requests, "seconds": seconds}


async def run(requests: int, streams: int, profile: bool) -> dict[str, float]:
    """The whole: run_comparison into a folder, over a channel file that names the server."""
    from dsr1kit.compare.runner import RunSettings, run_comparison

    seen: dict[str, float] = {}
    profiler = cProfile.Profile()

    def tell(stage: str, done: int, total: int) -> None:
        if stage == "hosted" and done == 0:
            seen.update(began=time.monotonic(), cpu=time.process_time())
            if profile:
                profiler.enable()
        elif stage == "hosted" and done == requests // 5:
            seen["rss_early_mib"] = rss_mib()
        elif stage == "hosted" and done == total:
            profiler.disable()
            seen.update(
                cpu=time.process_time() - seen["cpu"], seconds=time.monotonic() - seen["began"], rss_mib=rss_mib()
            )

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with ScriptedServer(Script()) as server:
            channels = folder / "channels.toml"
            channels.write_text(f'[channel.scripted]\nbase_url = "{server.url}"\nmodel = "scripted"\n')
            settings = RunSettings(
                channels=("scripted",), items=requests // SAMPLES, samples=SAMPLES, concurrency=streams
            )
            done = await run_comparison(
                settings, folder / "run", channel_file=channels, client_check=False, on_progress=tell
            )
        answered = done.summary["channels"]["scripted"]["outcomes"].get("ok", 0)
        assert answered == requests, f"{answered} of {requests} answered"
        record_bytes = done.records.stat().st_size / requests
        client = json.loads((folder / "run" / "run.json").read_text())["client"][-1]
    if profile:
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("cumulative").print_stats("compare/|keys|progress")
    return {
        "cpu_ms": seen["cpu"] * 1e3 / requests,
        "seconds": seen["seconds"],
        "rss_early_mib": seen["rss_early_mib"],
        "rss_mib": seen["rss_mib"],
        "record_bytes": record_bytes,
        "in_flight": client["in_flight"]["mean"],
        "cpu_share": client["cpu_share"],
        "lag_p99_ms": client["lag_ms"]["p99"],
    }


def write_records(folder: Path, count: int, chars: int) -> None:
    """A run's folder with `count` records over four channels, in the shapes that replies have."""
    from dsr1kit import about
    from dsr1kit.access.prices import Price
    from dsr1kit.compare.journal import Journal
    from dsr1kit.compare.record import to_record
    from dsr1kit.compare.settings import RunSettings
    from dsr1kit.compare.tasks import load_task
    from dsr1kit.records import Outcome, Reply, Timing, Usage

    rng = random.Random(0)
    items = load_task("arithmetic", count // len(CHANNELS) // SAMPLES)
    settings = RunSettings(channels=CHANNELS, items=len(items), samples=SAMPLES)
    weights = {"ok": 94.0, "truncated": 2.5, "throttled": 1.5, "stalled": 1.0, "overloaded": 0.7, "cut": 0.3}
    identity = dataclasses.asdict(settings) | {"channels": list(CHANNELS), "facts": {}}
    del identity["max_cost"], identity["objective"]
    words = [f"step {n} carries {n * 7 % 10}, so that the sum is {n * 13 % 97}. " for n in range(997)]
    price = Price(0.55, 2.19)
    at = time.time()
    made_with = {"versions": about.versions(), "hardware": about.hardware(), "promises": {}, "warnings": []}
    with Journal(folder, identity, made_with) as journal, journal.records_path.open("ab") as file:
        for sample in range(SAMPLES):
            for item in items:
                for place, channel in enumerate(CHANNELS):
                    at += rng.expovariate(20.0)
                    outcome = Outcome(rng.choices(list(weights), list(weights.values()))[0])
                    answered = outcome in (Outcome.OK, Outcome.TRUNCATED)
                    right = answered and rng.random() < 0.9 - 0.1 * place
                    first = 0.8 * rng.lognormvariate(0, 0.5)
                    length = int(chars * rng.lognormvariate(0, 0.8)) if answered else 0
                    begin = rng.randrange(len(words))
                    tokens = length // 4
                    think = tokens * 0.02
                    reply = Reply(
                        outcome,
                        "" if answered else f"the provider said so ({outcome.value})",
                        reasoning="".join(words[(begin + n) % len(words)] for n in range(length // 45)),
                        answer=f"The answer is \\boxed{{{item.gold if right else 7}}}." if answered else "",
                        finish_reason="stop" if answered else None,
                        model_requested="r1",
                        model_served="r1",
                        timing=Timing(
                            0.001, 0.03, True, first, first + think, think, 0.02, first + think + 0.4
                        ) if answered else Timing(0.001, 0.03, True, total_s=first),
                        usage=Usage(60, tokens, 20, "provider", "provider") if answered else Usage(),
                        due_at=at,
                    )  # fmt: skip
                    verdict = ("right" if right else "wrong") if answered else "unscored"
                    record = {"run": journal.run_id, **to_record(reply, channel, item, sample, price, verdict)}
                    file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def report(folder: Path) -> dict[str, float]:
    from dsr1kit.compare.runner import finish

    before = rss_mib()
    began, cpu = time.monotonic(), time.process_time()
    finish(folder)
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    size = (folder / "report.html").stat().st_size / 2**20
    return {"seconds": seconds, "cpu": cpu, "before_mib": before, "peak_mib": peak, "report_mib": size}


def part(*arguments: str) -> dict[str, float]:
    """One part in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def compare(requests: int, streams: int, repeat: int) -> bool:
    sizes = ("--requests", str(requests), "--streams", str(streams))
    measured: dict[str, list[dict[str, float]]] = {"bare": [], "run": []}
    print(f"{requests:,} requests over {streams} streams, 64 tokens each; each part {repeat} times, in turn; "
          f"Python {sys.version.split()[0]}")  # fmt: skip
    for _ in range(repeat):
        for name, found in measured.items():
            found.append(part("--part", name, *sizes))
    # The least disturbed of each: whatever else runs on the machine only ever adds.
    whole, alone = (min(measured[name], key=lambda m: m["cpu_ms"]) for name in ("run", "bare"))
    ratio = whole["cpu_ms"] / alone["cpu_ms"]
    for name, best, key in (("bare client", alone, "bare"), ("whole run", whole, "run")):
        every = ", ".join(f"{m['cpu_ms']:.2f}" for m in measured[key])
        print(f"{name:<12} {best['cpu_ms']:.2f} ms CPU a request, least of {every}; "
              f"{requests / best['seconds']:.0f} requests/s")  # fmt: skip
    print(f"ratio        {ratio:.2f} (at most {MAX_RATIO:g})")
    print(f"memory       {whole['rss_early_mib']:.0f} MiB after {requests // 5:,} requests, {whole['rss_mib']:.0f} MiB "
          f"after all; a record takes {whole['record_bytes']:.0f} bytes on disk")  # fmt: skip
    print(f"the run says: {whole['in_flight']:.0f} in flight, {whole['cpu_share']:.0%} of one core, loop lag p99 "
          f"{whole['lag_p99_ms']:.1f} ms")  # fmt: skip
    return ratio <= MAX_RATIO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=3, help="times that each part runs")
    parser.add_argument("--records", type=int, help="time the report of that many records instead")
    parser.add_argument("--chars", type=int, default=1500, help="median length of their reasoning, in characters")
    parser.add_argument("--part", choices=("bare", "run", "report"), help="one part alone, told as JSON")
    parser.add_argument("--folder", type=Path, help="the run's folder, for --part report")
    parser.add_argument("--profile", action="store_true", help="with --part run: where the CPU goes, on stderr")
    given = parser.parse_args()
    if given.part:
        found: dict[str, Any]
        if given.part == "report":
            found = report(given.folder)
        else:
            sizes = (given.requests, given.streams)
            found = asyncio.run(bare(*sizes) if given.part == "bare" else run(*sizes, given.profile))
        print(json.dumps(found))
    elif given.records:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_records(folder, given.records, given.chars)
            size = (folder / "records.jsonl").stat().st_size / 2**20
            found = part("--part", "report", "--folder", str(folder))
        print(f"{given.records:,} records ({size:.0f} MiB): {found['seconds']:.1f} s ({found['cpu']:.1f} s CPU), peak "
              f"{found['peak_mib']:.0f} MiB ({found['before_mib']:.0f} MiB before), report.html "
              f"{found['report_mib']:.1f} MiB")  # fmt: skip
    elif not compare(given.requests, given.streams, given.repeat):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
