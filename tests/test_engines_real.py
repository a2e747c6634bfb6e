"""Real engines on weights that nobody here trained: SmolLM2-135M-Instruct by transformers and by llama.cpp."""

from __future__ import annotations

import asyncio

import pytest
from weights_of import llama_server

from dsr1kit import LocalModel, Sampling
from dsr1kit.local.engines import Engine
from dsr1kit.local.gguf import dequantized
from dsr1kit.paths import data_dir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
GREEDY = Sampling(temperature=0.0, max_tokens=40)


@pytest.fixture(scope="module")
def conversions(tmp_path_factory):
    """Where GGUF files are converted to, once for this file."""
    return tmp_path_factory.mktemp("conversions")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    found = llama_server(tmp_path_factory.mktemp("llama.cpp"))
    if found is None:
        pytest.skip("no llama-server on PATH, and no compiler to make one")
    return found


def ask(engine, *conversations):
    async def inside():
        async with engine as r1:
            return r1.channel, await asyncio.gather(*(r1.ask(messages, GREEDY) for messages in conversations))

    return asyncio.run(inside())


def test_transformers_serves_a_converted_gguf_of_llama_architecture(smollm2, conversions, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(conversions))
    channel, (reply,) = ask(Engine(smollm2, engine="transformers"), QUESTION)
    assert (reply.outcome, reply.reasoning) == ("ok", "")
    assert "Paris" in reply.answer
    assert "<|" not in reply.answer
    assert (channel.model, channel.context) == ("SmolLM2-135M-Instruct.Q4_1@main", 8192)
    assert reply.usage.source == "provider"


def test_transformers_serves_a_folder_quantized(smollm2, conversions):
    folder = dequantized(smollm2, cache=conversions / "dsr1kit" / "gguf")
    _, (reply,) = ask(Engine(folder, quantization="8bit"), QUESTION)
    assert reply.outcome == "ok"
    assert "Paris" in reply.answer


def test_llama_cpp_serves_a_gguf_and_answers_several_at_a_time(smollm2, server, monkeypatch):
    monkeypatch.setenv("PATH", str(server.parent), prepend=":")
    channel, replies = ask(Engine(smollm2, context=1024, batch=4), *[QUESTION] * 4)
    assert [reply.outcome for reply in replies] == ["ok"] * 4
    assert all("Paris" in reply.answer for reply in replies)
    assert {reply.model_served for reply in replies} == {channel.model}
    assert channel.context == 1024


def test_llama_cpp_is_given_no_more_context_than_the_model_has(smollm2, server, monkeypatch):
    monkeypatch.setenv("PATH", str(server.parent), prepend=":")
    channel, _ = ask(Engine(smollm2, context=100_000, batch=1), QUESTION)
    assert channel.context == 8192
    assert channel.max_output == 6144


def test_an_adapter_is_served_on_its_base(tmp_path):
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    base = data_dir() / "tiny-r1"
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            weight.data *= 4.0  # enough to change every answer
    tuned.save_pretrained(tmp_path / "mine")
    merged = tmp_path / "merged"
    tuned.merge_and_unload().save_pretrained(merged)
    for file in base.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            (merged / file.name).write_bytes(file.read_bytes())
    arithmetic = [{"role": "user", "content": "What is 27 + 65?"}]

    async def at_home(model):
        async with LocalModel(model, dtype="float32") as r1:
            return words(await r1.ask(arithmetic, GREEDY))

    def words(reply):
        return (reply.reasoning + " " + reply.answer).split()

    channel, (served,) = ask(Engine("tiny-r1", adapter=tmp_path / "mine"), arithmetic)
    assert channel.model == "tiny-r1+mine@main"
    assert words(served) == asyncio.run(at_home(merged))
    assert words(served) != asyncio.run(at_home("tiny-r1"))
