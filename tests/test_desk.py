"""Many requests, one thread: cancelled, closed, failing, out of memory, from two loops; and what the text comes to."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
import textwrap
import threading

import pytest

from dsr1kit import LocalModel, Sampling
from dsr1kit.errors import ModelError, UsageError
from dsr1kit.local.reading import Detokenizer
from dsr1kit.paths import data_dir
from dsr1kit.records import Outcome

GREEDY = Sampling(temperature=0, max_tokens=120)
ENDLESS = Sampling(temperature=3.0, top_p=1.0, seed=1, max_tokens=900)
NEAR = 1e-4


def asked(text):
    return [{"role": "user", "content": text}]


QUESTION = asked("What is 4827 + 965?")
SUMS = [asked(f"What is {a} + {b}?") for a, b in zip(range(1200, 1220), range(77, 97), strict=True)]


def run(scenario, source="tiny-r1", **options):
    """Open a model, hand it to `scenario` (a coroutine function), close it; the scenario's result."""

    async def inside():
        async with LocalModel(source, **{"threads": 1, **options}) as model:
            return await scenario(model)

    return asyncio.run(inside())


def desk_threads():
    return [thread for thread in threading.enumerate() if thread.name == "dsr1kit-local"]


async def begun(task_of):
    """Start a request by `task_of(on_delta)` and wait for its first piece."""
    first = asyncio.Event()
    task = asyncio.ensure_future(task_of(lambda _: first.set()))
    await first.wait()
    return task


# --- cancelled


def test_two_hundred_requests_cancelled_at_random_moments_leave_nothing_behind():
    import torch

    chance = random.Random(5)
    late, early, told = [], [], []

    def held():
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        return len(tensors), sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    async def one(model):
        over, seen = False, 0
        wanted = chance.choice([0, 0, 1, 2, 5])  # pieces to wait for
        enough = asyncio.Event()

        def note(_):
            nonlocal seen
            seen += 1
            if over:
                late.append(seen)
            if seen >= wanted:
                enough.set()

        task = asyncio.ensure_future(model.ask(QUESTION, ENDLESS, on_delta=note))
        if wanted:
            await enough.wait()
        else:
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
        task.cancel()
        before, over = seen, True  # from the very call to cancel on
        with pytest.raises(asyncio.CancelledError):
            await task
        if not before and seen:
            early.append(seen)
        told.append(seen)

    async def scenario(model):
        await model.ask(QUESTION, GREEDY)
        sizes, peaks = [], []
        for rounds in range(10):
            for _ in range(8):  # alone
                await one(model)
            await asyncio.gather(*(one(model) for _ in range(12)))  # in company
            if rounds in (1, 5, 9):
                await model._in_thread(model._desk.decoder.clear)  # slots that are kept for the next ones
                sizes.append(held())
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        reply = await model.ask(QUESTION, GREEDY)
        return sizes, peaks, reply, len(asyncio.all_tasks())

    threads = len(desk_threads())
    sizes, peaks, reply, tasks = run(scenario)
    assert len(told) == 200
    assert any(told)
    assert not all(told)
    assert late == early == []
    assert sizes == [sizes[0]] * 3, "tensors and their bytes do not grow"
    assert peaks[-1] - peaks[0] < 64 * 1024, "nor does the process, KiB"
    assert reply.outcome is Outcome.OK
    assert tasks == 1
    assert len(desk_threads()) == threads


def test_a_cancelled_request_does_not_touch_its_neighbours():
    async def scenario(model):
        alone = await model.ask(QUESTION, GREEDY)
        victim = await begun(lambda note: model.ask(asked("Tell me a story."), ENDLESS, on_delta=note))
        kept = asyncio.ensure_future(model.ask(QUESTION, GREEDY))
        await asyncio.sleep(0.02)
        victim.cancel()
        return alone, await kept

    alone, kept = run(scenario)
    assert (kept.reasoning, kept.answer) == (alone.reasoning, alone.answer)


def test_a_timeout_ends_a_request_and_the_next_one_starts_at_once():
    async def scenario(model):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await model.ask(QUESTION, ENDLESS)
        pieces = []  # a timeout before does not silence the next request
        reply = await model.ask(QUESTION, GREEDY, on_delta=pieces.append)
        return reply, pieces

    reply, pieces = run(scenario)
    assert reply.outcome is Outcome.OK
    assert "".join(piece.text for piece in pieces if piece.kind == "answer") == reply.answer


def test_a_batch_cancelled_midway_ends_at_once_and_tells_no_progress_after():
    async def scenario(model):
        first, seen = asyncio.Event(), []

        def progress(done, total):
            seen.append((done, total))
            first.set()

        limits = [Sampling(temperature=3.0, top_p=1.0, seed=n, max_tokens=5 + 100 * (n > 3)) for n in range(40)]
        task = asyncio.ensure_future(model.generate_many([QUESTION] * 40, limits, batch_size=8, on_progress=progress))
        await first.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        count = len(seen)
        reply = await model.ask(QUESTION, GREEDY)
        return seen[count:], reply

    after, reply = run(scenario)
    assert after == []
    assert reply.outcome is Outcome.OK
    assert reply.timing.queue_s < 2


def test_a_load_that_is_cancelled_leaves_neither_thread_nor_model():
    async def inside():
        model = LocalModel("tiny-r1", threads=1)
        opening = asyncio.ensure_future(model.__aenter__())
        await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        with pytest.raises(UsageError, match="not open"):
            _ = model.loaded
        assert model.adapter is None
        async with model:  # and it can be opened again
            return await model.ask(QUESTION, GREEDY)

    threads = len(desk_threads())
    assert asyncio.run(inside()).outcome is Outcome.OK
    assert len(desk_threads()) == threads


# --- closed


def test_closing_ends_requests_that_run_and_those_that_wait(caplog):
    async def inside():
        model = await LocalModel("tiny-r1", threads=1, max_batch=1).__aenter__()
        running = await begun(lambda note: model.ask(QUESTION, ENDLESS, on_delta=note))
        waiting = [asyncio.ensure_future(model.ask(QUESTION, ENDLESS)) for _ in range(3)]
        batch = asyncio.ensure_future(model.generate_many([QUESTION] * 3, [ENDLESS] * 3))
        swap = asyncio.ensure_future(model.use_adapter(None))
        await asyncio.sleep(0)
        await asyncio.wait_for(model.__aexit__(), 20)
        return await asyncio.gather(running, *waiting, batch, swap, return_exceptions=True)

    with caplog.at_level(logging.ERROR, "asyncio"):
        ends = asyncio.run(inside())
        gc.collect()
    assert [type(end) for end in ends] == [UsageError] * 6
    assert all("was closed" in str(end) for end in ends)
    assert [record.message for record in caplog.records] == [], "no future is left with an error that nobody saw"


def test_work_for_the_thread_keeps_its_place_among_the_requests():
    """Requests made before a switch of adapters run before it, however few run at once."""

    async def scenario(model):
        order, loop = [], asyncio.get_running_loop()
        first = await begun(lambda note: model.ask(QUESTION, GREEDY, on_delta=note))

        def asked(name):
            return asyncio.ensure_future(model.ask(QUESTION, GREEDY, on_delta=lambda _: order.append(name)))

        before = asked("before")
        await asyncio.sleep(0)
        # The thread tells the loop of pieces and of this work in the order in which it made them.
        model._desk.call(lambda: loop.call_soon_threadsafe(order.append, "work"))
        after = asked("after")
        await asyncio.gather(first, before, after)
        return [name for name, _ in itertools.groupby(order)]

    assert run(scenario, max_batch=1) == ["before", "work", "after"]


# --- failing


def test_what_a_progress_callback_raises_reaches_the_caller_and_ends_the_rest():
    def refuse(done, total):
        raise ZeroDivisionError("mine")

    async def scenario(model):
        limits = [Sampling(temperature=3.0, top_p=1.0, seed=n, max_tokens=3 + 900 * (n > 0)) for n in range(4)]
        with pytest.raises(ZeroDivisionError):
            await model.generate_many([QUESTION] * 4, limits, on_progress=refuse)
        return await model.ask(QUESTION, GREEDY)

    reply = run(scenario)
    assert reply.outcome is Outcome.OK
    assert reply.timing.queue_s < 2


def test_a_step_that_fails_is_told_to_every_request_and_the_next_one_works(caplog, monkeypatch):
    from dsr1kit.local.slots import SlotCache

    whole = SlotCache.update
    broken = []

    def update(self, *given, **named):
        if broken:
            raise ValueError("a kernel that is not there")
        return whole(self, *given, **named)

    monkeypatch.setattr(SlotCache, "update", update)

    async def scenario(model):
        first = await begun(lambda note: model.ask(QUESTION, ENDLESS, on_delta=note))
        batch = asyncio.ensure_future(model.generate_many([QUESTION] * 3, [ENDLESS] * 3))
        broken.append(True)
        ends = await asyncio.gather(first, batch, return_exceptions=True)
        broken.clear()
        return ends, await model.ask(QUESTION, GREEDY)

    with caplog.at_level(logging.ERROR, "asyncio"):
        ends, reply = run(scenario)
        gc.collect()
    assert [type(end) for end in ends] == [ModelError, ModelError]
    assert "a kernel that is not there" in str(ends[0])
    assert reply.outcome is Outcome.OK
    assert caplog.records == []


def test_memory_errors_without_a_word_are_told_as_well(monkeypatch):
    from dsr1kit.local.slots import SlotCache

    def ensure(self, *_):
        raise MemoryError

    async def scenario(model):
        with monkeypatch.context() as patch:
            patch.setattr(SlotCache, "ensure", ensure)
            short = await model.ask(QUESTION, GREEDY)
        return short, await model.ask(QUESTION, GREEDY)

    short, reply = run(scenario)
    assert short.outcome is Outcome.OVERLOADED
    assert "out of memory" in short.detail
    assert reply.outcome is Outcome.OK


def test_memory_that_runs_out_midway_costs_no_token_and_changes_no_draw(monkeypatch):
    """Injected where slots grow, so that it comes at a known step; the real thing is below."""
    from dsr1kit.local.slots import SlotCache

    hot = [Sampling(temperature=1.2, top_p=0.98, seed=n, max_tokens=150) for n in range(8)]
    whole, most = SlotCache.ensure, 10**9

    def ensure(self, slots, length):
        if slots * length > most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate a lot")
        whole(self, slots, length)

    monkeypatch.setattr(SlotCache, "ensure", ensure)

    async def scenario(model):
        nonlocal most
        plenty = await model.generate_many([asked("Tell me a story of the sea.")] * 8, hot)
        most = 300  # two rows for a while, one to the end
        return plenty, await model.generate_many([asked("Tell me a story of the sea.")] * 8, hot)

    plenty, scarce = run(scenario, max_batch=8)
    assert [r.reasoning + r.answer for r in scarce] == [r.reasoning + r.answer for r in plenty]
    assert len({r.reasoning for r in plenty}) == 8


OUT_OF_MEMORY = """
import asyncio, ctypes, json, resource, sys, time
from pathlib import Path
from dsr1kit import LocalModel, Sampling

def size():
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if "VmData" in l) << 10

def user(text):
    return [{"role": "user", "content": text}]

async def main():
    async with LocalModel(sys.argv[1], threads=1, max_batch=64) as r1:
        greedy = Sampling(temperature=0, max_tokens=24)
        long = [user("1 + " * 150 + f"{n} = ?") for n in range(64)]
        plain = [await r1.ask(messages, greedy) for messages in long[:4]]
        await asyncio.gather(*(r1.ask(m, greedy) for m in long[:4]))
        ctypes.CDLL(None).malloc_trim(0)
        # A thread's stack counts as data: those that are needed later start now.
        await asyncio.gather(*(asyncio.to_thread(time.sleep, 0.05) for _ in range(4)))
        before = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (size() + int(sys.argv[2]) * 2**20, before[1]))
        most = 0
        admit = r1._desk.decoder.admit
        def watched(rows):
            nonlocal most
            done = admit(rows)
            most = max(most, len(r1._desk.decoder.rows) + len(done))
            return done
        r1._desk.decoder.admit = watched
        many = await r1.generate_many(long, [greedy] * 64)
        asked = await asyncio.gather(*(r1.ask(m, greedy) for m in long))
        big = await r1.ask(user("1 + " * 14_000), greedy)
        small = await r1.ask(long[0], greedy)
        resource.setrlimit(resource.RLIMIT_DATA, before)
        print(json.dumps({
            "right": [m.answer + m.reasoning == p.answer + p.reasoning for m, p in zip(many, plain)],
            "outcomes": sorted({r.outcome for r in (*many, *asked)}), "most": most,
            "same": sum(a.reasoning == m.reasoning for a, m in zip(asked, many)),
            "big": [big.outcome, big.detail], "small": small.reasoning == plain[0].reasoning,
        }))

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA bounds an allocator on Linux alone")
def test_real_shortage_of_memory_is_answered_by_fewer_at_once_and_for_one_by_advice(tmp_path):
    folder = tmp_path / "long"
    shutil.copytree(data_dir() / "tiny-r1", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 65_536}))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(OUT_OF_MEMORY), folder, "130"],
        capture_output=True, text=True, timeout=250,
        # The tokenizer's threads end the process where malloc fails them: none of them, and one heap for all.
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["outcomes"] == ["truncated"]
    assert all(told["right"])
    assert 1 <= told["most"] < 64
    assert told["same"] >= 62  # a near tie may tip, as other rows run beside it
    outcome, detail = told["big"]
    assert outcome == "overloaded"
    assert "out of memory" in detail
    assert "GiB" in detail
    assert told["small"]


# --- many


def test_twenty_requests_at_once_equal_their_single_answers_and_none_waits_long():
    import torch

    async def scenario(model):
        ticks, waits = 0, []
        single = [await model.ask(messages, GREEDY) for messages in SUMS]
        tasks = [asyncio.ensure_future(model.ask(messages, GREEDY)) for messages in SUMS]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0.005)
            ticks += 1
        many = [task.result() for task in tasks]
        first = await begun(lambda note: model.ask(QUESTION, ENDLESS, on_delta=note))
        joined = await model.ask(QUESTION, Sampling(temperature=0, max_tokens=3))
        assert not first.done(), "the one that came later was not made to wait for the first"
        first.cancel()
        waits.append(joined.timing.queue_s)
        tokenizer, transformer = model.loaded.tokenizer, model.loaded.model
        for messages, a, b in zip(SUMS, single, many, strict=True):
            mine, theirs = a.reasoning + a.answer, b.reasoning + b.answer
            if mine != theirs:  # only where two tokens were all but equally likely
                ids = [tokenizer(f"{prompt_of(model, messages)}{text}", add_special_tokens=False)["input_ids"]
                       for text in (a.reasoning, b.reasoning)]  # fmt: skip
                at = next(n for n, pair in enumerate(zip(*ids, strict=False)) if pair[0] != pair[1])
                with torch.inference_mode():
                    best = transformer(torch.tensor([ids[0][:at]])).logits[0, -1].topk(2).values
                assert best[0] - best[1] < NEAR
        return ticks, waits

    ticks, waits = run(scenario)
    assert ticks >= 5
    assert max(waits) < 2


def prompt_of(model, messages):
    return model.loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


# The task that is left behind says so when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_model_serves_two_event_loops_and_outlives_one_that_is_closed():
    async def scenario(model):
        def elsewhere():
            return asyncio.run(model.ask(QUESTION, GREEDY))

        def abandoned():
            loop = asyncio.new_event_loop()
            first = threading.Event()
            task = loop.create_task(model.ask(QUESTION, ENDLESS, on_delta=lambda _: (first.set(), loop.stop())))
            loop.run_forever()
            task._log_destroy_pending = False  # it is left without an end on purpose
            loop.close()
            return first.is_set()

        here, there = await asyncio.gather(model.ask(QUESTION, GREEDY), asyncio.to_thread(elsewhere))
        left = await asyncio.to_thread(abandoned)
        after = await model.ask(QUESTION, GREEDY)
        return here, there, left, after

    here, there, left, after = run(scenario)
    assert here.answer == there.answer == after.answer
    assert left
    gc.collect()


# --- what the text comes to


def test_an_answer_ends_before_its_stop_string_across_tokens_and_characters():
    async def scenario(model):
        whole = await model.ask(QUESTION, GREEDY)
        answers = {}
        for stop in (whole.answer[3:9], whole.answer[:5], whole.answer[-4:], whole.answer[0], "nowhere", "\ufffd"):
            pieces = []
            reply = await model.ask(
                QUESTION, Sampling(temperature=0, max_tokens=120, stop=(stop, "not there")), on_delta=pieces.append
            )
            assert "".join(p.text for p in pieces if p.kind == "answer") == reply.answer
            assert reply.reasoning == whole.reasoning, "stop strings are looked for in the answer alone"
            answers[stop] = reply
        return whole, answers

    whole, answers = run(scenario)
    assert len(whole.answer) > 12
    for stop, reply in answers.items():
        assert reply.answer == whole.answer.partition(stop)[0]
        assert reply.finish_reason == "stop"
        assert reply.outcome is (Outcome.OK if reply.answer else Outcome.EMPTY)


def read_text(text, stop=()):
    """What reading gives for an answer of these characters, a token each byte or so."""
    from transformers import AutoTokenizer

    from dsr1kit.local.reading import Text, read
    from dsr1kit.local.rows import Marks

    class Loaded:
        tokenizer = AutoTokenizer.from_pretrained(data_dir() / "tiny-r1")
        marks = Marks(None, None, frozenset())

    kept = Text(opened=False)
    feed, finish = read(Loaded, kept, lambda *piece: kept.pieces.append(piece), lambda: 0.0, stop)
    for token in Loaded.tokenizer(text, add_special_tokens=False)["input_ids"]:
        if feed(token):
            break
    finish()
    return kept


@pytest.mark.parametrize(
    ("text", "stop", "left"),
    [
        ("The end of it", ("The end",), ""),  # at the very beginning, white space within
        ("The endless", ("The end of",), "The endless"),  # what only began as one is given after all
        ("a 😀😁 b", ("😁",), "a 😀"),
        ("naïve, 苹果和梨", ("果和",), "naïve, 苹"),
        ("one STOP", ("STOP",), "one "),
        ("one STO", ("STOP",), "one STO"),
        ("ab\n\nabab\n\n\nc", ("\n\n\n",), "ab\n\nabab"),
        ("xaab", ("aab", "aac"), "x"),
        ("xaaab", ("aab",), "xa"),
        ("Q: x", ("z", "Q: "), ""),
    ],
)
def test_stop_strings_are_found_wherever_tokens_part(text, stop, left):
    kept = read_text(text, stop)
    assert kept.text("answer") == left
    assert kept.stopped == (left != text)


def test_bytes_that_never_become_characters_neither_hide_text_nor_grow_dear():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data_dir() / "tiny-r1")
    lead = tokenizer("😀", add_special_tokens=False)["input_ids"][0]
    assert tokenizer.decode([lead]) == "\ufffd"
    decoded = []

    class Counting:
        def decode(self, ids, **named):
            decoded.append(len(ids))
            return tokenizer.decode(ids, **named)

    decoder = Detokenizer(Counting())
    good = tokenizer("ok", add_special_tokens=False)["input_ids"]
    text = "".join(decoder.push(token) for token in [*good, *[lead] * 500, *good]) + decoder.flush()
    assert text.startswith("ok")
    assert text.endswith("ok")
    assert max(decoded) < 100


@pytest.mark.parametrize("extra", [0, 1])
def test_a_prompt_one_short_of_the_context_gets_one_token(extra):
    async def scenario(model):
        room = model.loaded.context - len(
            model.loaded.tokenizer(prompt_of(model, asked("")), add_special_tokens=False)["input_ids"]
        )
        return await model.ask(asked("7" * (room - 1 + extra)), GREEDY), model.loaded.context

    reply, context = run(scenario)
    if extra:
        assert reply.outcome is Outcome.BAD_REQUEST
    else:
        assert reply.usage.prompt_tokens == context - 1
        assert reply.usage.completion_tokens == 1
        assert reply.outcome is Outcome.TRUNCATED
        assert "context was full" in reply.detail


def test_thinking_goes_on_to_its_least_and_no_further_than_its_most():
    async def scenario(model):
        short = await model.ask(QUESTION, GREEDY)
        least = short.usage.reasoning_tokens + 5
        longer = await model.ask(QUESTION, Sampling(temperature=0, max_tokens=300, min_thinking_tokens=least))
        both = Sampling(temperature=0, max_tokens=300, min_thinking_tokens=least, max_thinking_tokens=least + 1)
        return short, longer, await model.ask(QUESTION, both), least

    short, longer, both, least = run(scenario)
    assert longer.reasoning.startswith(short.reasoning)
    assert "Wait," in longer.reasoning[len(short.reasoning) :]
    assert longer.usage.reasoning_tokens >= least
    assert least <= both.usage.reasoning_tokens <= least + 1
    assert both.answer


def other_template(tmp_path, template):
    folder = tmp_path / "model"
    shutil.copytree(data_dir() / "tiny-r1", folder)
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


def test_templates_that_neither_open_the_thinking_nor_drop_it_are_helped(tmp_path):
    """The same tokens go in as with R1's own template: `<think>` opened, earlier reasoning left out."""
    plain = (
        "<｜begin▁of▁sentence｜>{% for m in messages %}{{ '<｜User｜>' if m.role == 'user' else '<｜Assistant｜>' }}"
        "{{ m.content }}{{ '<｜end▁of▁sentence｜>' if m.role != 'user' }}{% endfor %}<｜Assistant｜>"
    )
    turns = [
        *asked("What is 2 + 2?"),
        {"role": "assistant", "content": "<think>\n2+2=4\n</think>\n\nThe answer is 4."},
        *asked("What is 12 + 30?"),
    ]

    async def scenario(model):
        return await model.ask(turns, GREEDY), await model.ask(turns[:1], GREEDY)

    own = run(scenario)
    helped = run(scenario, source=other_template(tmp_path, plain))
    for a, b in zip(own, helped, strict=True):
        assert (a.reasoning, a.answer, a.usage) == (b.reasoning, b.answer, b.usage)
        assert b.reasoning
