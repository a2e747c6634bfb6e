"""Who judges a reply, and where: cheap scorers at once, costly ones in a process that can be ended.

Knows replies and items; nothing about how an answer is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from types import TracebackType
from typing import Any

from dsr1kit.compare.items import Item
from dsr1kit.compare.scoring import COSTLY, SCORERS, final_answer, last_boxed, quick_verdict
from dsr1kit.records import ANSWERED, Outcome, Reply, Verdict

_LOG = logging.getLogger(__name__)
#: Seconds that one answer may take to judge.
LIMIT_S = 5.0
#: Seconds that the process may take to start and to load what a scorer needs.
START_S = 120.0
#: Most memory of the process, in bytes: an expression can ask for any amount.
MEMORY_BYTES = 4 * 1024**3


def verdict_of(reply: Reply, item: Item) -> Verdict:
    """Judge a reply here and now; one that is neither whole nor stopped by length says nothing about quality.

    Mathematics can take any time: a run uses `Judge`.
    """
    answer = judged_part(reply)
    return "unscored" if answer is None else SCORERS[item.scorer](answer, item.reference or item.gold)


def final_of(reply: Reply, item: Item) -> str | None:
    """The reply's final answer, normalised as `scoring.final_answer` does; None where there is none."""
    answer = judged_part(reply)
    return None if answer is None else final_answer(answer, item.scorer)


def judged_part(reply: Reply) -> str | None:
    """What of a reply is judged: its answer, of one cut off by a limit the last closed box; None: nothing."""
    if reply.outcome not in ANSWERED:
        return None
    if reply.outcome is not Outcome.TRUNCATED:
        return reply.answer
    # What a limit cut off may end in half a number, or in a step of the thinking: only a closed box counts.
    box = last_boxed(reply.answer)
    return "" if box is None else f"\\boxed{{{box}}}"


class Judge:
    """Judges the replies of a run, so that whoever measures latency never computes algebra.

    What costs nothing is judged at once. The rest goes, one answer after the other, to a process of its own, which
    starts with the first of them, is ended when an answer takes too long, and ends with this object.

    Args:
        limit_s: seconds an answer may take; one that takes longer is `unscored`, and the log says so.
    """

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._process: asyncio.subprocess.Process | None = None
        self._one_at_a_time = asyncio.Lock()

    async def __aenter__(self) -> Judge:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    @staticmethod
    def at_once(reply: Reply, item: Item) -> Verdict | None:
        """The verdict where it costs next to nothing; None where `verdict` has to ask the process."""
        answer = judged_part(reply)
        return "unscored" if answer is None else quick_verdict(answer, item.reference or item.gold, item.scorer)

    async def verdict(self, reply: Reply, item: Item) -> Verdict:
        """As `verdict_of`, within the limit. May be called by many at once, and cancelled."""
        known = self.at_once(reply, item)
        if known is not None:
            return known
        answer, against = judged_part(reply), item.reference or item.gold
        async with self._one_at_a_time:
            try:
                return await self._ask({"scorer": item.scorer, "answer": answer, "against": against})
            except TimeoutError:
                why = f"judging took more than {self._limit_s:g} s"
            except (OSError, EOFError, ValueError) as error:
                why = f"the judging process ended ({error or type(error).__name__})"
            except BaseException:  # cancelled: what the process says next would be taken for another's verdict
                await self._end()
                raise
            await self._end()
        _LOG.warning("an answer to %s is unscored: %s", item.id, why)
        return "unscored"

    async def _ask(self, question: dict[str, Any]) -> Verdict:
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", _PROGRAM, json.dumps([sys.path, self._limit_s, MEMORY_BYTES]),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None  # noqa: S101 - both are pipes
        assert stdout is not None  # noqa: S101
        async with asyncio.timeout(START_S):
            stdin.write(json.dumps(question).encode() + b"\n")
            await stdin.drain()
            if not await stdout.readline():
                raise EOFError("it could not start")
        async with asyncio.timeout(self._limit_s):
            told = await stdout.readline()
        if not told:
            raise EOFError("out of memory, or ended from outside")
        answer = json.loads(told)
        if error := answer.get("error"):
            _LOG.warning("a scorer failed: %s", error)
        verdict: Verdict = answer["verdict"]
        return verdict

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        # Whoever is cancelled meanwhile leaves no zombie either.
        await asyncio.shield(process.wait())
        if process.stdin is not None:
            process.stdin.close()


_PROGRAM = """
import json, sys
path, limit_s, memory_bytes = json.loads(sys.argv[1])
sys.path[:] = path
from dsr1kit.compare.judge import work
work(limit_s, memory_bytes)
"""


def work(limit_s: float, memory_bytes: int) -> None:
    """Judge what comes in as lines of JSON until there is no more; the body of the judging process.

    For each line two go out: an empty one when all that the scorer needs is loaded, and one with the verdict.
    """
    import os
    import resource
    import signal

    os.nice(10)
    with contextlib.suppress(ValueError, OSError):  # a lower limit is set already, or the system knows none
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    # What libraries print must not be taken for a verdict.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        question = json.loads(line)
        _load(question["scorer"])
        print(file=out, flush=True)
        # Should whoever asks be gone, nobody ends an answer without end: the system does.
        signal.alarm(int(limit_s) + 5)
        try:
            told: dict[str, str] = {"verdict": SCORERS[question["scorer"]](question["answer"], question["against"])}
        except Exception as error:  # whatever sympy throws, the next answer is judged
            told = {"verdict": "unscored", "error": f"{type(error).__name__}: {error}"[:300]}
        signal.alarm(0)
        print(json.dumps(told), file=out, flush=True)


def _load(scorer: str) -> None:
    if scorer == "math":
        import math_verify

        math_verify.parse("$1$", parsing_timeout=None)
    elif scorer in COSTLY:
        import reasoning_gym  # noqa: F401 - what is loaded now is not on the answer's time
