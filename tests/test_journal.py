"""The run's folder: nothing lost or doubled by a kill, no two runs mixed, no key written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsr1kit.compare import journal as journal_module
from dsr1kit.compare.journal import Journal, read_records
from dsr1kit.errors import UsageError

IDENTITY = {"task": "arithmetic", "items": 3, "seed": 0, "channels": ["a", "b"]}
SECRET = "correct-horse-battery-staple-42"  # noqa: S105 - a made-up value that must not leak


def record(item: str, outcome: str = "ok", channel: str = "a", sample: int = 0, **more: Any) -> dict[str, Any]:
    return {"channel": channel, "item": item, "sample": sample, "outcome": outcome, **more}


def journal(folder: Path, identity: Mapping[str, Any] = IDENTITY) -> Journal:
    return Journal(folder, identity, {"versions": {"python": "3"}})


def fill(folder: Path, *records: dict[str, Any]) -> Path:
    with journal(folder) as j:
        for r in records:
            j.append(r)
    return folder / "records.jsonl"


def keys(path: Path) -> list[tuple[str, str, int]]:
    return [(r["channel"], r["item"], r["sample"]) for r in read_records(path)]


def test_what_was_written_is_there_again_and_knows_its_run(tmp_path: Path) -> None:
    with journal(tmp_path / "deep" / "run") as j:
        j.append(record("x", answer="四十二 🙂", first_token_s=0.25))
        j.append(record("x", "throttled", sample=1))
        run_id = j.run_id
        assert j.done() == {("a", "x", 0), ("a", "x", 1)}
        assert j.failed() == {("a", "x", 1)}
    with journal(tmp_path / "deep" / "run") as j:
        assert j.run_id == run_id
        assert j.done() == {("a", "x", 0), ("a", "x", 1)}
        assert j.read()[0] == {"run": run_id, **record("x", answer="四十二 🙂", first_token_s=0.25)}
    run = json.loads((tmp_path / "deep" / "run" / "run.json").read_text())
    assert run["identity"] == IDENTITY
    assert run["versions"] == {"python": "3"}
    assert len(run["starts"]) == 2


def test_a_record_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    with journal(tmp_path) as j:
        j.append(record("x"))
        assert keys(tmp_path / "records.jsonl") == [("a", "x", 0)]


@pytest.mark.parametrize("cut", [1, 5, -1])
def test_a_torn_last_line_is_cut_off_and_the_run_goes_on(tmp_path: Path, cut: int) -> None:
    path = fill(tmp_path, record("x"), record("y"))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    path.write_bytes(whole[: first + cut] if cut > 0 else whole[:cut])
    assert keys(path) == [("a", "x", 0)]
    with journal(tmp_path) as j:
        assert j.repaired_bytes > 0
        assert j.done() == {("a", "x", 0)}
        j.append(record("z"))
    assert keys(path) == [("a", "x", 0), ("a", "z", 0)]
    with journal(tmp_path) as j:
        assert j.repaired_bytes == 0


@pytest.mark.parametrize("wrong", [b"not json", b'{"channel": "a"}', b"5", b"[]", b""])
def test_a_wrong_line_in_the_middle_is_refused_with_its_number(tmp_path: Path, wrong: bytes) -> None:
    path = fill(tmp_path, record("x"), record("y"), record("z"))
    lines = path.read_bytes().split(b"\n")
    lines[1] = wrong
    path.write_bytes(b"\n".join(lines))
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r"records\.jsonl, line 2: not a record"), journal(tmp_path):
        pass
    assert path.read_bytes() == before
    with pytest.raises(UsageError, match="line 2: not a record"):
        read_records(path)


def test_another_run_is_refused_naming_what_differs(tmp_path: Path) -> None:
    fill(tmp_path, record("x"))
    other = IDENTITY | {"items": 9, "task": "arithmetic:sum2"}
    with pytest.raises(UsageError) as told, journal(tmp_path, other):
        pass
    message = str(told.value)
    assert "items (3 there, 9 now)" in message
    assert 'task ("arithmetic" there, "arithmetic:sum2" now)' in message
    assert "seed" not in message
    assert "--out" in message
    with journal(tmp_path) as j:
        assert j.done()


def test_a_difference_is_told_down_to_the_setting_however_long_its_value_is(tmp_path: Path) -> None:
    sampling = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 32768, "seed": None, "sample": 0}
    url = "https://a-gateway-with-a-long-name.example/some/long/path/to/a/deployment/of"
    facts = {"a": {"base_urls": [f"{url}/one"], "model": "r1"}}
    there = IDENTITY | {"sampling": sampling, "digest": "0123", "facts": facts}
    with journal(tmp_path, there) as j:
        j.append(record("x"))
    now = there | {
        "sampling": sampling | {"max_tokens": 512},
        "digest": "4567",
        "facts": {"a": {"base_urls": [f"{url}/two"], "model": "r1"}},
    }
    with pytest.raises(UsageError) as told, journal(tmp_path, now):
        pass
    message = str(told.value)
    assert "sampling.max_tokens (32768 there, 512 now)" in message
    assert "temperature" not in message
    assert 'the questions themselves ("0123" there, "4567" now)' in message
    assert '/one"] there' in message
    assert '/two"] now' in message
    assert '"r1"' not in message


def test_a_run_that_never_asked_anything_gives_way_to_another(tmp_path: Path) -> None:
    fill(tmp_path)
    other = IDENTITY | {"items": 9}
    with journal(tmp_path, other) as j:
        j.append(record("x"))
    with pytest.raises(UsageError, match=r"items \(9 there, 3 now\)"), journal(tmp_path):
        pass
    assert json.loads((tmp_path / "run.json").read_text())["identity"] == other


def test_a_folder_that_is_in_use_is_refused_and_free_again_afterwards(tmp_path: Path) -> None:
    with journal(tmp_path) as j:
        j.append(record("x", "cut"))
        with pytest.raises(UsageError, match="in use"), journal(tmp_path):
            pass
        j.forget_failed()
        with pytest.raises(UsageError, match="in use"), journal(tmp_path):
            pass
        j.append(record("x"))
    with journal(tmp_path) as j:
        assert j.done() == {("a", "x", 0)}


def test_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys; from dsr1kit.compare.journal import Journal\n"
        f"j = Journal(pathlib.Path(sys.argv[1]), {IDENTITY!r}).__enter__()\n"
        f"j.append({record('x')!r}); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=30, check=False)
    with journal(tmp_path) as j:
        assert j.done() == {("a", "x", 0)}


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("I am no folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UsageError, match="cannot be written"), journal(folder):
            pass
    (tmp_path / "taken" / "run.tmp").mkdir(parents=True)
    with pytest.raises(UsageError, match="cannot be written"), journal(tmp_path / "taken"):
        pass


def test_records_without_a_run_and_a_strange_run_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text(json.dumps(record("x")) + "\n")
    with pytest.raises(UsageError, match=r"no run\.json"), journal(tmp_path):
        pass
    (tmp_path / "run.json").write_text('{"something": "else"}')
    with pytest.raises(UsageError, match="not a run of this kit"), journal(tmp_path):
        pass


def test_failed_records_move_aside_and_one_record_a_key_is_left(tmp_path: Path) -> None:
    fill(tmp_path, record("x"), record("y", "throttled"), record("z", "truncated"), record("w", "filtered"))
    for round_ in range(3):
        with journal(tmp_path) as j:
            assert j.forget_failed() == 1
            assert j.done() == {("a", i, 0) for i in "xzw"}
            j.append(record("y", "ok" if round_ == 2 else "cut", round=round_))
    path = tmp_path / "records.jsonl"
    assert sorted(keys(path)) == [("a", i, 0) for i in "wxyz"]
    assert [r["outcome"] for r in read_records(tmp_path / "retried.jsonl")] == ["throttled", "cut", "cut"]
    with journal(tmp_path) as j:
        assert j.forget_failed() == 0
        assert [r["item"] for r in j.retired()] == ["y", "y", "y"]


def test_requests_the_budget_kept_back_can_be_taken_out_alone(tmp_path: Path) -> None:
    fill(tmp_path, record("x"), record("y", "throttled"), record("z", "over_budget"))
    with journal(tmp_path) as j:
        assert j.forget_unasked() == 1
        assert j.done() == {("a", "x", 0), ("a", "y", 0)}
        assert j.forget_unasked() == 0


ROUNDS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 400)), min_size=1, max_size=6)
OUTCOMES = st.lists(st.sampled_from(["ok", "truncated", "cut", "over_budget"]), min_size=12, max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=ROUNDS, outcomes=OUTCOMES, retry=st.booleans())
def test_whatever_byte_a_kill_tears_at_each_request_ends_up_recorded_once(
    tmp_path_factory: pytest.TempPathFactory, rounds: list[tuple[int, int]], outcomes: list[str], retry: bool
) -> None:
    folder = tmp_path_factory.mktemp("run")
    wanted = [(f"项{n}", outcome) for n, outcome in enumerate(outcomes)]
    kept: dict[str, str] = {}
    for number, (count, tear) in enumerate([*rounds, (len(wanted), 0)]):
        with journal(folder) as j:
            assert {item for _, item, _ in j.done()} >= kept.keys(), "a whole record was lost"
            if retry:
                j.forget_failed()
            todo = [(item, outcome) for item, outcome in wanted if ("a", item, 0) not in j.done()]
            for item, outcome in todo[:count]:
                j.append(record(item, "ok" if number else outcome, answer="思考" * 9))
        path = folder / "records.jsonl"
        # A kill may come at any byte of the line that is being written: only ever the last one.
        whole = path.read_bytes()
        last = whole.rstrip(b"\n").rfind(b"\n") + 1
        path.write_bytes(whole[: max(last, len(whole) - tear)])
        kept = {r["item"]: r["outcome"] for r in read_records(path)}
    assert sorted(kept) == sorted(item for item, _ in wanted)
    assert len(keys(path)) == len(wanted)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_kill_while_failed_records_move_aside_loses_none_and_doubles_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    fill(tmp_path, record("x"), record("y", "throttled", cost=1.0), record("z", "cut", cost=2.0))
    real, calls = journal_module._replace, []

    def dies(path: Path, records: Any) -> Any:
        calls.append(path)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        return real(path, records)

    monkeypatch.setattr(journal_module, "_replace", dies)
    with pytest.raises(KeyboardInterrupt), journal(tmp_path) as j:
        j.forget_failed()
    monkeypatch.undo()
    with journal(tmp_path) as j:
        assert j.forget_failed() == 2
        assert [(r["item"], r["cost"]) for r in j.retired()] == [("y", 1.0), ("z", 2.0)]
        assert j.done() == {("a", "x", 0)}


def test_warm_ups_lie_apart_and_a_torn_one_is_cut_off(tmp_path: Path) -> None:
    with journal(tmp_path) as j:
        j.append(record("x", sample=-1, cost=0.5), warm_up=True)
        j.append(record("x", sample=-2, cost=0.25), warm_up=True)
        j.append(record("x"))
        assert j.done() == {("a", "x", 0)}
    path = tmp_path / "warm-up.jsonl"
    path.write_bytes(path.read_bytes()[:-3])
    with journal(tmp_path) as j:
        j.append(record("y", sample=-1, cost=0.125), warm_up=True)
        assert [r["cost"] for r in j.warm_ups()] == [0.5, 0.125]
    assert keys(tmp_path / "records.jsonl") == [("a", "x", 0)]


def test_what_is_noted_of_a_run_is_there_at_its_next_start(tmp_path: Path) -> None:
    with journal(tmp_path) as j:
        j.note(client=[{"cpu_share": 0.5}])
        j.append(record("x"))
    with journal(tmp_path) as j:
        assert j.noted("client") == [{"cpu_share": 0.5}]
        assert j.noted("nothing") is None
        j.note(client=[*j.noted("client"), {"cpu_share": 0.25}])
    run = json.loads((tmp_path / "run.json").read_text())
    assert [n["cpu_share"] for n in run["client"]] == [0.5, 0.25]
    assert len(run["starts"]) == 2


def test_keys_are_redacted_in_records_and_run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", SECRET)
    identity = IDENTITY | {"facts": {"base_url": f"http://host/{SECRET}/v1"}}
    with Journal(tmp_path, identity, {"note": f"made with {SECRET}"}) as j:
        j.append(record("x", detail=f"you sent {SECRET}", attempts=[{"channel": SECRET}]))
        j.append(record("y", "cut", answer=f"Bearer {SECRET} and sk-abcdefghijklmnop1234"))
    with Journal(tmp_path, identity) as j:  # and the run knows itself again
        j.forget_failed()
    for path in tmp_path.iterdir():
        assert SECRET not in path.read_text(), path
        assert "sk-abc" not in path.read_text(), path
    assert "[redacted]" in (tmp_path / "records.jsonl").read_text()


@pytest.mark.parametrize("value", ["12345678", "reasoning", '"outcome": "ok"', "arithmetic"])
def test_a_strange_secret_does_not_break_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MONKEY", value)  # any name that speaks of a secret counts
    fill(tmp_path, record("arithmetic-1", reasoning="thought", total_s=0.12345678))
    with journal(tmp_path) as j:
        assert j.done() == {("a", "arithmetic-1", 0)}
        (kept,) = j.read()
    assert (kept["reasoning"], kept["total_s"], kept["outcome"]) == ("thought", 0.12345678, "ok")


def test_a_text_that_has_no_utf8_form_is_written_all_the_same(tmp_path: Path) -> None:
    path = fill(tmp_path, record("x", answer="half an emoji \ud83d"), record("y"))
    assert keys(path) == [("a", "x", 0), ("a", "y", 0)]
