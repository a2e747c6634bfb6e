"""The real loading path on weights that nobody here trained: SmolLM2-135M-Instruct, a GGUF in a package."""

import asyncio

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
