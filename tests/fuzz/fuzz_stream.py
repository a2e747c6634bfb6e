"""Coverage-guided fuzzing of the reader of Chat Completions bodies, with atheris.

    python tests/fuzz/fuzz_stream.py --seconds 60

starts from a few valid streams and ends with one line, `runs N, coverage edges M, findings K`; the exit status
is 0 when K is 0. Every finding is kept as a file and can be looked at alone:

    python tests/fuzz/fuzz_stream.py --replay FILE

The property tests use `check` as well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsr1kit.errors import MissingExtra

# The modules below are not imported up here: atheris instruments modules while they are imported.

MODES = ("auto", "reasoning_content", "reasoning", "inline")
INSTRUMENTED = ("dsr1kit.access.stream", "dsr1kit.access.outcomes", "dsr1kit.thinking")
HEADER = 4  # bytes before the body: the choices, then three sizes of reads
_LONGEST = 4096
_SLOW_S = 10  # for one input; libFuzzer's own limit of twenty minutes would hide what is quadratic


def check(
    pieces: Iterable[bytes], mode: str = "auto", *, thinks: bool = False, broken: str = "", sliced: bool = False
) -> tuple[Any, ...]:
    """Read a body that comes in `pieces`, assert what must hold for any bytes at all, return what was read.

    `sliced`: parse after each read for no time at all, so that lines are left for later.
    """
    from dsr1kit.access.stream import CompletionReader
    from dsr1kit.records import Outcome

    live: list[Any] = []
    reader = CompletionReader(mode, lambda: 0.0, live.extend, thinks=thinks)  # type: ignore[arg-type]
    for at, piece in enumerate(pieces):
        reader.feed(piece, float(at))
        reader.parse_some(-1.0 if sliced else float("inf"))
    _ = reader.usage("question"), reader.complete  # a reply may be made of what is there so far
    outcome, detail = reader.finish(broken=broken)
    usage = reader.usage("question")
    splitter = reader.splitter

    assert isinstance(outcome, Outcome), outcome
    assert isinstance(detail, str), detail
    assert detail or outcome is Outcome.OK
    assert reader.complete or outcome is not Outcome.OK
    assert len(detail) < 2000, "the body's length reaches the detail"
    # Whatever is told is written to terminals and files: no halves of characters.
    for text in (detail, splitter.reasoning, splitter.answer, reader.finish_reason or "", reader.model_served or ""):
        text.encode()
    for piece in live:
        piece.text.encode()
    # The labels of pieces may be set right at the end; their text was shown and stays.
    assert "".join(p.text for p in live) == "".join(p.text for p in splitter.pieces)
    for count in (usage.prompt_tokens, usage.reasoning_tokens, usage.answer_tokens):
        assert count is None or (isinstance(count, int) and count >= 0), usage
        float(count or 0)  # prices and rates are computed in floats
    return (
        outcome, detail, splitter.reasoning, splitter.answer, reader.finish_reason, reader.model_served, usage,
        reader.keep_alives, reader.chunks,
    )  # fmt: skip


def check_input(data: bytes) -> None:
    """What one input of the fuzzer means: choices and sizes of reads, then the body."""
    if len(data) < HEADER:
        return
    choices, sizes, body = data[0], data[1:HEADER], data[HEADER:]
    how: dict[str, Any] = {
        "mode": MODES[choices & 3],
        "thinks": bool(choices & 4),
        "broken": "the connection was reset" if choices & 8 else "",
    }
    pieces, start, number = [], 0, 0
    while start < len(body):
        end = start + 1 + sizes[number % len(sizes)]
        pieces.append(body[start:end])
        start, number = end, number + 1
    # Holds for any bytes, not only for valid streams: lines are cut at bytes and decoded whole, and what comes
    # before the form is known is counted byte by byte. Only bodies and lines over 64 MiB, which are given up
    # when a read makes them so, may depend on the reads; no input here is that long.
    assert check(pieces, sliced=bool(choices & 16), **how) == check([body], **how)


def seeds() -> dict[str, bytes]:
    """One valid body of each dialect, and of each form that is not a stream, behind a header."""

    def chunk(finish: str | None = None, **delta: Any) -> dict[str, Any]:
        return {"model": "r1", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    def stream(*events: dict[str, Any] | str, end: str = "\n") -> bytes:
        told = (e if isinstance(e, str) else json.dumps(e, ensure_ascii=False) for e in events)
        return "".join(f"data: {e}{end}{end}" for e in told).encode()

    details = {"completion_tokens_details": {"reasoning_tokens": 5}}
    usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 9, **details}}
    stop, role = chunk("stop"), chunk(role="assistant", content="")
    fields = (role, chunk(reasoning_content="先算 17."), chunk(content="It is 42 😀."), stop, usage, "[DONE]")
    inline = tuple(chunk(content=t) for t in ("<thi", "nk>\n17", " < 25\n</th", "ink>\n\n", "42"))
    parts = [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]
    whole = {"model": "r1", "choices": [{"message": {"reasoning": "hm", "content": "42"}, "finish_reason": "stop"}]}
    bodies = {
        "reasoning_content": (1, stream(*fields)),
        "reasoning": (2, stream(chunk(reasoning="hm", reasoning_details=[]), chunk(content="42"), stop, "[DONE]")),
        "inline": (3, stream(*inline, stop, usage)),
        "prefilled": (7, stream(*inline[1:], chunk("length"))),
        "auto": (0, stream(*inline, "[DONE]", end="\r\n")),
        "cr": (16, b"\xef\xbb\xbf" + stream(*fields, end="\r")),
        "keep_alives": (0, b": wait\n\n\n\n" + stream(*fields) + b"id: 1\nretry: 3\nevent: message\n: end\n\n"),
        "halves": (0, rb'data: {"choices":[{"delta":{"content":"\ud83d"}}]}' + b"\n\n" + stream(stop)),
        "parts": (0, stream(chunk(content=parts), stop)),
        "lines": (0, b'data: {"choices": [{"delta":\ndata: {"content": "42"}}]}\n\n' + stream(stop)),
        "whole": (0, b"\n\n" + json.dumps(whole).encode()),
        "error": (0, stream({"error": {"message": "Rate limit", "type": "rate_limit", "code": "429"}})),
        "error_event": (0, b'event: error\ndata: {"message": "busy"}\n\n'),
        "html": (0, b"<html><title>busy</title></html>"),
        "broken": (8, stream(*fields)[:150]),
    }
    return {name: bytes([choices, 2, 30, 9]) + body for name, (choices, body) in bodies.items()}


_WORDS = (
    "data: ", "data:", "event: error\n", ": ", "\n\n", "\r\n", "[DONE]", '"choices"', '"delta"', '"message"',
    '"content"', '"reasoning"', '"reasoning_content"', '"finish_reason"', '"stop"', '"length"', '"index"', '"usage"',
    '"error"', '"object"', '"code"', '"type"', '"text"', '"model"', '"completion_tokens"',
    '"completion_tokens_details"', '"reasoning_tokens"', '"prompt_tokens"', "<think>", "</think>", "null", "true",
    "NaN", "1e999", r'"\ud800"', r"\udc00", "²", "[[[[", "{}", "\ufeff",
)  # fmt: skip


_FIELDS = (
    "model", "object", "error", "choices", "usage", "index", "delta", "message", "finish_reason", "content",
    "reasoning", "reasoning_content", "text", "code", "type", "prompt_tokens", "completion_tokens",
    "completion_tokens_details", "reasoning_tokens", "\ud800",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 7, 429, 2**53, 10**320, 0.5, float("nan"), float("inf"), "", " ", "\n", "hm", "好", "😀",
    "\ud83d", "\ude00", "²", "٣", "402", "9" * 3000, "stop", "length", "content_filter", "<think>", "</think>", "</thi",
    "nk>", "rate limit", "model not found", [], [[]], {}, [{"text": "a"}], [{"text": [{"text": "a"}]}],
    {"message": "busy"}, {"delta": {"content": "a"}}, [{"delta": {"content": "a"}}, {"index": 1}],
)  # fmt: skip


def spoil(body: bytes, chance: random.Random) -> bytes | None:
    """Another value, key or gap somewhere in the JSON of one line; None where the drawn line holds none."""
    lines = body.split(b"\n")
    likely = [number for number, line in enumerate(lines) if b"{" in line]
    if not likely:
        return None
    number = chance.choice(likely)
    before, brace, rest = lines[number].partition(b"{")
    try:
        event = json.loads(brace + rest)
    except (ValueError, RecursionError):
        return None
    # Written as one list of places, so that deep values are as likely as shallow ones.
    places: list[tuple[Any, Any]] = []
    inside: list[Any] = [event]
    while inside:
        holder = inside.pop()
        entries = list(holder.items() if isinstance(holder, dict) else enumerate(holder))
        places += [(holder, key) for key, _ in entries]
        inside += [value for _, value in entries if isinstance(value, dict | list)]
        if isinstance(holder, dict):
            places.append((holder, chance.choice(_FIELDS)))
    holder, key = chance.choice(places)
    if chance.random() < 0.1 and (isinstance(holder, list) or key in holder):
        del holder[key]
    else:
        holder[key] = chance.choice(_VALUES)
    lines[number] = before + json.dumps(event, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    return b"\n".join(lines)


def _fuzz(folder: Path, seconds: int) -> None:
    """The child: libFuzzer ends its process, so the parent counts what the folder and the output hold."""
    import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

    with atheris.instrument_imports(include=list(INSTRUMENTED)):
        import dsr1kit.access.outcomes
        import dsr1kit.access.stream
        import dsr1kit.thinking  # noqa: F401 - all three are imported to be instrumented

    def one_input(data: bytes) -> None:
        try:
            check_input(data)
        except Exception as error:
            # Kept and passed over, once for each place, so that one finding does not hide the next.
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
            kept = folder / "findings" / f"error-{hashlib.sha256(place.encode()).hexdigest()[:12]}"
            if not kept.exists():
                kept.write_bytes(data)
                print(f"finding: {place}: {error!s:.200}", file=sys.stderr, flush=True)

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        # Bytes changed at random seldom stay JSON: mostly the change is made inside it. libFuzzer chains several.
        if seed % 8:
            try:
                changed = spoil(data[HEADER:], random.Random(seed))
            except RecursionError:  # can be read, but not written
                changed = None
            if changed is not None and HEADER + len(changed) <= longest:
                return data[:HEADER] + changed
        return bytes(atheris.Mutate(data, longest))

    options = [
        f"-max_total_time={seconds}", f"-max_len={_LONGEST}", f"-timeout={_SLOW_S}", "-print_final_stats=1",
        "-len_control=0", f"-dict={folder / 'words'}",
        f"-artifact_prefix={folder / 'findings'}/", str(folder / "corpus"),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options], one_input, custom_mutator=mutate)
    atheris.Fuzz()


def _prepare(folder: Path) -> None:
    (folder / "findings").mkdir()
    (folder / "corpus").mkdir()
    for name, seed in seeds().items():
        (folder / "corpus" / name).write_bytes(seed)
    words = ("".join(f"\\x{byte:02x}" for byte in word.encode()) for word in _WORDS)
    (folder / "words").write_text("".join(f'"{word}"\n' for word in words), encoding="ascii")


def _supervise(seconds: int) -> int:
    from importlib.util import find_spec

    if find_spec("atheris") is None:
        raise MissingExtra("fuzzing", "fuzz", "atheris")
    folder = Path(tempfile.mkdtemp(prefix="fuzz_stream-"))
    _prepare(folder)
    command = [sys.executable, __file__, "--seconds", str(seconds), "--child", str(folder)]
    with (folder / "log").open("w+", encoding="utf-8", errors="replace") as log:
        try:
            # An input that hangs ends at libFuzzer's limit; this one is for a libFuzzer that hangs itself.
            limit = seconds + 10 * _SLOW_S
            ended = subprocess.run(command, stderr=log, stdout=log, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            ended = -1
        log.seek(0)
        text = log.read()
    runs = re.findall(r"^stat::number_of_executed_units: (\d+)", text, re.MULTILINE)
    runs = runs or re.findall(r"^#(\d+)\s", text, re.MULTILINE) or ["0"]
    edges = re.findall(r"\bcov: (\d+)", text) or ["0"]
    # slow-unit files are libFuzzer's notes on inputs within the limit, mostly those of a busy machine.
    findings = sorted(f for f in (folder / "findings").iterdir() if not f.name.startswith("slow-unit-"))
    for line in re.findall(r"^finding: .*", text, re.MULTILINE):
        print(line)
    for finding in findings:
        print(f"kept: {finding}")
    count = len(findings)
    if not count and (ended or runs[-1] == "0"):  # it never ran, or died without a word: that is no success
        print(text[-3000:])
        print(f"kept: {folder / 'log'}")
        count = 1
    if not count:
        shutil.rmtree(folder)
    print(f"runs {runs[-1]}, coverage edges {edges[-1]}, findings {count}")
    return 1 if count else 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fuzz the reader of Chat Completions bodies.")
    parser.add_argument("--seconds", type=int, default=60, help="how long (60)")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="read one kept input again, and show its error")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.replay is not None:
        check_input(chosen.replay.read_bytes())
        print("nothing found")
    elif chosen.child is not None:
        _fuzz(chosen.child, chosen.seconds)
    else:
        try:
            return _supervise(chosen.seconds)
        except MissingExtra as error:
            print(f"fuzz_stream: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
