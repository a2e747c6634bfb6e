"""The real loading path on weights that nobody here trained: SmolLM2-135M-Instruct, a GGUF in a package."""

import asyncio
import resource

import pytest

from dsr1kit import LocalModel, Sampling

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_gguf_file_answers_a_question_of_fact(smollm2):
    async def ask():
        async with LocalModel(smollm2) as r1:
            question = "What is the capital of France? Answer in one short sentence."
            messages = [{"role": "user", "content": question}]
            return await r1.ask(messages, Sampling(temperature=0.0, max_tokens=40))

    reply = asyncio.run(ask())
    assert reply.outcome == "ok"
    assert "Paris" in reply.answer
    assert reply.usage.source == "tokenizer"
    assert 0 < reply.timing.first_token_s <= reply.timing.first_answer_s <= reply.timing.total_s


QUESTIONS = (
    "What is the capital of France? Answer in one short sentence.",
    "Name three colours.",
    "Write two sentences about the sea, and then one about the wind that blows over it at night.",
    "What is 12 + 30?",
    "Tell me a joke.",
    "你好, 请用中文回答: 天空是什么颜色?",
)


@pytest.fixture(scope="module")
def transformer(smollm2):
    """The model and tokenizer as transformers itself loads the converted weights, fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dsr1kit.local.gguf import dequantized

    folder = dequantized(smollm2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    return model, AutoTokenizer.from_pretrained(folder)


def continued(model, ids, limit):
    import torch

    inputs = torch.tensor([ids])
    made = model.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=limit)
    return made[0, len(ids) :].tolist()


def prompts(tokenizer):
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for text in QUESTIONS
    ]


def test_streamed_answers_are_generates_own(smollm2, transformer):
    model, tokenizer = transformer
    pieces = {}

    async def ask():
        async with LocalModel(smollm2, dtype="float32") as r1:
            replies = []
            for text in QUESTIONS[:3]:
                given = [{"role": "user", "content": text}]
                sampling = Sampling(temperature=0, max_tokens=40)
                replies.append(await r1.ask(given, sampling, on_delta=pieces.setdefault(text, []).append))
            return replies

    for text, reply, ids in zip(QUESTIONS, asyncio.run(ask()), prompts(tokenizer), strict=False):
        made = continued(model, ids, 40)
        assert reply.answer == tokenizer.decode(made, skip_special_tokens=True).strip()
        assert "".join(piece.text for piece in pieces[text]) == reply.answer
        assert reply.usage.prompt_tokens == len(ids)


def test_a_batch_of_the_same_composition_is_generates_own_batch(transformer):
    import torch

    from dsr1kit.local.decode import Decoder, run_rows
    from dsr1kit.local.rows import Row, marks_of

    model, tokenizer = transformer
    for ids in prompts(tokenizer)[:2]:
        rows = [Row(ids, Sampling(temperature=0), 40, False, lambda _: False) for _ in range(4)]
        run_rows(Decoder(model, marks_of(tokenizer, model), 8192), rows)
        inputs = torch.tensor([ids] * 4)
        theirs = model.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=40)
        assert [one.made for one in rows] == theirs[:, len(ids) :].tolist()


def test_rows_that_replace_each_other_differ_at_near_ties_alone(transformer):
    import torch

    from dsr1kit.local.decode import Decoder, run_rows
    from dsr1kit.local.rows import Row, marks_of

    model, tokenizer = transformer
    greedy = Sampling(temperature=0)
    rows = [Row(ids, greedy, 20 + 5 * n, False, lambda _: False) for n, ids in enumerate(prompts(tokenizer))]
    run_rows(Decoder(model, marks_of(tokenizer, model), 8192), rows, 4)
    for row in rows:
        theirs = continued(model, row.prompt, row.limit)
        at = next((n for n, (a, b) in enumerate(zip(row.made, theirs, strict=False)) if a != b), None)
        if at is None:
            assert len(row.made) == len(theirs)
            continue
        with torch.inference_mode():
            scores = model(torch.tensor([row.prompt + row.made[:at]])).logits[0, -1]
        assert scores.max() - scores[[row.made[at], theirs[at]]].min() < 1e-4


def test_a_batch_takes_memory_for_its_slots_and_gives_it_back(smollm2):
    """A hundred requests, eight at once: the peak is that of eight."""

    async def ask():
        async with LocalModel(smollm2, dtype="float32", max_batch=8) as r1:

            def batch(n):
                given = [[{"role": "user", "content": QUESTIONS[0]}]] * n
                return r1.generate_many(given, [Sampling(temperature=0, max_tokens=4)] * n, batch_size=8)

            await batch(16)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            replies = await batch(100)
            return replies, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    replies, grown_kib = asyncio.run(ask())
    assert len({reply.answer for reply in replies}) == 1
    assert grown_kib < 64 * 1024
