"""Who judges: replies by their outcome, costly answers in a process of its own that always ends."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest

from dsr1kit.compare.items import Item
from dsr1kit.compare.judge import Judge, final_of, verdict_of
from dsr1kit.compare.tasks import load_task
from dsr1kit.records import Outcome, Reply

#: sympy would compute these for longer than anybody waits.
ENDLESS = r"\boxed{9^{9^{9^{9^9}}}}"


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test in a loop of its own."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


def asking(gold: str, scorer: str = "math") -> Item:
    return Item("one", "What is it?", gold, "algebra", "en", scorer)


def replied(answer: str, outcome: Outcome = Outcome.OK) -> Reply:
    return Reply(outcome, answer=answer)


def children() -> list[int]:
    return sorted(child.pid for child in psutil.Process().children())


def test_only_an_answer_is_judged() -> None:
    item = asking("42", "number")
    assert verdict_of(replied("42"), item) == "right"
    assert verdict_of(replied("41"), item) == "wrong"
    assert verdict_of(Reply(Outcome.OK, answer="", reasoning=r"\boxed{42}"), item) == "wrong"
    for outcome in set(Outcome) - {Outcome.OK, Outcome.TRUNCATED}:
        assert verdict_of(replied(r"\boxed{42}", outcome), item) == "unscored"
        assert final_of(replied(r"\boxed{42}", outcome), item) is None


@pytest.mark.parametrize(("scorer", "gold"), [("number", "42"), ("math", "x+1"), ("exact", "Paris"), ("choice", "C")])
def test_an_answer_cut_off_by_a_limit_counts_only_by_a_closed_box(scorer: str, gold: str) -> None:
    item = asking(gold, scorer)
    assert verdict_of(replied(f"Answer: {gold}", Outcome.TRUNCATED), item) == "wrong"
    assert verdict_of(replied(rf"\boxed{{{gold}}} and then", Outcome.TRUNCATED), item) == "right"
    assert verdict_of(replied(rf"\boxed{{{gold}", Outcome.TRUNCATED), item) == "wrong"
    assert final_of(replied(f"Answer: {gold}", Outcome.TRUNCATED), item) is None


def test_a_reference_stands_before_the_gold() -> None:
    item = Item("one", "?", "7", "k", "en", "number", reference="42")
    assert verdict_of(replied("42"), item) == "right"


@in_loop
async def test_the_process_gives_the_verdicts_that_the_function_gives() -> None:
    golds = ["1+x", "x+1", r"\frac{1}{\sqrt{2}}", "42", r"\foo{", r"(3,\pi)"]
    answers = [r"\boxed{x+1}", r"\boxed{x+2}", r"\boxed{\frac{\sqrt{2}}{2}}", r"\boxed{42}", r"\boxed{1}", "no idea"]
    async with Judge() as judge:
        told = await asyncio.gather(
            *(judge.verdict(replied(a), asking(g)) for a, g in zip(answers, golds, strict=True))
        )
    assert told == [verdict_of(replied(a), asking(g)) for a, g in zip(answers, golds, strict=True)]
    assert told == ["right", "wrong", "right", "right", "unscored", "wrong"]


@in_loop
async def test_the_process_judges_what_generators_asked() -> None:
    items = load_task("reasoning-gym:countdown", 2)
    async with Judge() as judge:
        for item in items:
            assert await judge.verdict(replied(rf"\boxed{{{item.gold}}}"), item) == "right"
            assert await judge.verdict(replied(r"\boxed{exit(3)}"), item) == "wrong"


@in_loop
async def test_what_costs_nothing_starts_no_process() -> None:
    before = children()
    async with Judge() as judge:
        assert await judge.verdict(replied(r"\boxed{\dfrac12}"), asking(r"\frac{1}{2}")) == "right"
        assert await judge.verdict(replied("C"), asking("C", "choice")) == "right"
        assert await judge.verdict(replied("x", Outcome.CUT), asking("x")) == "unscored"
        assert children() == before


@in_loop
async def test_an_answer_without_end_is_unscored_and_the_next_one_is_judged(caplog: pytest.LogCaptureFixture) -> None:
    before = children()
    async with Judge(limit_s=1) as judge:
        with caplog.at_level(logging.WARNING):
            assert await judge.verdict(replied(ENDLESS), asking("x+1")) == "unscored"
        assert "an answer to one is unscored: judging took more than 1 s" in caplog.text
        assert await judge.verdict(replied(r"\boxed{1+x}"), asking("x+1")) == "right"
        assert len(children()) == len(before) + 1
    assert children() == before


@in_loop
async def test_the_loop_goes_on_while_an_answer_is_judged() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.01)
            turns += 1

    async with Judge(limit_s=1) as judge:
        counting = asyncio.create_task(count())
        await judge.verdict(replied(ENDLESS), asking("x+1"))
        counting.cancel()
    assert turns > 20


@in_loop
async def test_one_who_is_cancelled_takes_nobody_elses_verdict_and_leaves_no_process() -> None:
    before = children()
    async with Judge(limit_s=60) as judge:
        assert await judge.verdict(replied(r"\boxed{1+x}"), asking("x+1")) == "right"
        endless = asyncio.create_task(judge.verdict(replied(ENDLESS), asking("x+1")))
        waiting = asyncio.create_task(judge.verdict(replied(r"\boxed{1+y}"), asking("y+1")))
        await asyncio.sleep(0.1)
        endless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await endless
        assert await waiting == "right"
        assert await judge.verdict(replied(r"\boxed{2+x}"), asking("x+1")) == "wrong"
    assert children() == before


@in_loop
async def test_a_process_that_dies_costs_one_verdict() -> None:
    async with Judge() as judge:
        before = set(children())
        assert await judge.verdict(replied(r"\boxed{1+x}"), asking("x+1")) == "right"
        (pid,) = set(children()) - before
        os.kill(pid, signal.SIGKILL)
        assert await judge.verdict(replied(r"\boxed{1+x}"), asking("x+1")) == "unscored"
        assert await judge.verdict(replied(r"\boxed{1+x}"), asking("x+1")) == "right"


def test_neither_judge_nor_process_loads_torch_or_algebra_before_it_is_needed() -> None:
    code = "import json, sys, dsr1kit.compare.judge, dsr1kit.compare.tasks; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"torch", "sympy", "math_verify", "datasets", "reasoning_gym", "pandas"} & set(json.loads(done.stdout))


def test_a_judge_whose_owner_is_killed_does_not_outlive_it() -> None:
    code = (
        "import asyncio\n"
        "from dsr1kit.compare.judge import Judge\n"
        "from dsr1kit.compare.items import Item\n"
        "from dsr1kit.records import Outcome, Reply\n"
        "async def main():\n"
        "    async with Judge() as judge:\n"
        "        item = Item('one', '?', 'x+1', 'k', 'en', 'math')\n"
        "        await judge.verdict(Reply(Outcome.OK, answer=r'\\boxed{1+x}'), item)\n"
        "        print(judge._process.pid, flush=True)\n"
        "        await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    owner.stdout.close()
    until = time.monotonic() + 30
    while _runs(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
