"""What only a CUDA device can show: recorded steps give the eager ones' tokens, memory limits hold, 4-bit answers."""

import asyncio

import pytest

from dsr1kit.compare.arithmetic import generate
from dsr1kit.local.model import LocalModel
from dsr1kit.records import Outcome, Sampling

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GREEDY = Sampling(temperature=0.0, max_tokens=120)
ASKED = [[{"role": "user", "content": p.question}] for p in generate(("sum2", "words_zh"), "held_out", 24, 3)]


def answers(**options):
    async def inside():
        async with LocalModel("tiny-r1", device="cuda:0", **options) as r1:
            alone = [await r1.ask(messages, GREEDY) for messages in ASKED[:4]]
            many = await r1.generate_many(ASKED, [GREEDY] * len(ASKED), batch_size=8)
            again = await r1.generate_many(ASKED, [GREEDY] * len(ASKED), batch_size=8)
            return alone, many, again

    return asyncio.run(inside())


def same(some, others):
    return sum((a.reasoning, a.answer) == (b.reasoning, b.answer) for a, b in zip(some, others, strict=True))


def test_recorded_steps_give_the_tokens_of_eager_ones():
    eager, recorded = answers(dtype="float32", compiled=False), answers(dtype="float32", compiled=True)
    assert same(recorded[0], eager[0]) == 4
    # Fixed shapes round differently and may tip a near tie.
    assert same(recorded[1], eager[1]) >= len(ASKED) - 1
    assert same(recorded[2], recorded[1]) == len(ASKED)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantized_models_answer_on_the_gpu(quantization):
    alone, many, _ = answers(quantization=quantization)
    assert {reply.outcome for reply in (*alone, *many)} <= {Outcome.OK, Outcome.TRUNCATED}
    assert same(alone, many[:4]) >= 3


def test_memory_that_runs_out_on_the_gpu_leaves_the_process_usable():
    async def inside():
        async with LocalModel("tiny-r1", device="cuda:0", dtype="float32") as r1:
            held = torch.cuda.memory_reserved()
            # Room for a few rows of a thousand tokens, not for 4,000.
            torch.cuda.set_per_process_memory_fraction((held + 200 * 2**20) / torch.cuda.mem_get_info()[1])
            try:
                many = await r1.generate_many(ASKED * 170, [GREEDY] * len(ASKED) * 170, batch_size=4096)
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)
            return many, await r1.ask(ASKED[0], GREEDY)

    many, after = asyncio.run(inside())
    assert {reply.outcome for reply in many} <= {Outcome.OK, Outcome.TRUNCATED}
    assert after.outcome is Outcome.OK
