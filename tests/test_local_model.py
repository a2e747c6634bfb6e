"""A model in the process, on tiny-r1's real weights: text, timing, seeds, caps, cancellation, batches."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from dsr1kit.compare.arithmetic import generate
from dsr1kit.errors import ModelError, UnknownName, UsageError
from dsr1kit.local.hardware import choose_dtype, look
from dsr1kit.local.model import LocalModel
from dsr1kit.paths import data_dir
from dsr1kit.records import Outcome, Sampling

GREEDY = Sampling(temperature=0, max_tokens=300)
QUESTION = [{"role": "user", "content": "What is 4827 + 965?"}]
# Far from what it was taught the model is unsure, so that draws differ.
VAGUE = [{"role": "user", "content": "Tell me a story about the sea."}]


def run(scenario, source="tiny-r1", **options):
    """Open a model, hand it to `scenario` (a coroutine function), close it; the scenario's result."""

    async def inside():
        async with LocalModel(source, **{"threads": 1, **options}) as model:
            return await scenario(model)

    return asyncio.run(inside())


def ask(messages=QUESTION, sampling=GREEDY, source="tiny-r1", **options):
    return run(lambda model: model.ask(messages, sampling), source, **options)


def conversations(n):
    return [[{"role": "user", "content": p.question}] for p in generate(("sum2", "words_zh"), "held_out", n, 3)]


def test_import_is_light():
    code = "import sys, dsr1kit.local.model; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_greedy_is_transformers_own_generate_token_for_token():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reply = ask()
    folder = data_dir() / "tiny-r1"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=300)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    reasoning, _, answer = text.partition("</think>")
    assert (reply.reasoning, reply.answer) == (reasoning.strip(), answer.strip())
    tokens = tokenizer(reasoning + answer, add_special_tokens=False)["input_ids"]
    assert reply.usage.completion_tokens == len(tokens)
    assert reply.usage.prompt_tokens == inputs["input_ids"].shape[1]
    assert reply.outcome is Outcome.OK
    assert reply.finish_reason == "stop"


def test_stream_and_timing_tell_the_same_story():
    deltas = []

    async def scenario(model):
        loop = asyncio.get_running_loop()
        return await model.ask(QUESTION, GREEDY, on_delta=deltas.append, due=loop.time() - 2.0)

    reply = run(scenario)
    timing = reply.timing
    for kind, text in (("reasoning", reply.reasoning), ("answer", reply.answer)):
        assert "".join(delta.text for delta in deltas if delta.kind == kind) == text
    kinds = [delta.kind for delta in deltas]
    assert kinds == sorted(kinds, reverse=True), "reasoning first, then answer"
    times = [delta.at_s for delta in deltas]
    assert times == sorted(times)
    assert 2.0 <= timing.queue_s <= timing.first_token_s == times[0]
    assert timing.first_answer_s == next(d.at_s for d in deltas if d.kind == "answer" and d.text.strip())
    assert timing.think_s == pytest.approx(timing.first_answer_s - timing.first_token_s)
    assert timing.total_s == times[-1]
    assert timing.gaps_s == pytest.approx([b - a for a, b in itertools.pairwise(times)])
    tokens = reply.usage.completion_tokens
    assert timing.inter_token_s == pytest.approx((times[-1] - times[0]) / (tokens - 1))
    assert (reply.usage.source, reply.usage.split_source) == ("tokenizer", "tokenizer")
    assert reply.channel == "local:tiny-r1"


def test_loop_stays_live_while_it_generates():
    async def scenario(model):
        ticks = 0
        task = asyncio.ensure_future(model.ask(QUESTION, GREEDY))
        while not task.done():
            await asyncio.sleep(0.005)
            ticks += 1
        return ticks

    assert run(scenario) >= 5


def test_seed_repeats_a_draw_and_samples_differ():
    async def scenario(model):
        hot = [Sampling(temperature=1.5, top_p=1.0, seed=7, sample=n, max_tokens=60) for n in (0, 0, 1, 2)]
        one = [(await model.ask(VAGUE, sampling)).reasoning for sampling in hot]
        # Order and company must not matter: other requests come before, and all at once.
        await model.ask(VAGUE, Sampling(seed=1, max_tokens=20))
        many = await asyncio.gather(*(model.ask(VAGUE, sampling) for sampling in reversed(hot)))
        batch = await model.generate_many([VAGUE] * 4, hot)
        return one, [r.reasoning for r in reversed(many)], [r.reasoning for r in batch]

    one, many, batch = run(scenario)
    assert one[0] == one[1]
    assert len(set(one)) == 3
    assert many == one
    assert batch == one


def test_sampling_without_a_seed_varies():
    async def scenario(model):
        hot = Sampling(temperature=2.0, top_p=1.0, max_tokens=60)
        return [(await model.ask(VAGUE, hot)).reasoning for _ in range(3)]

    assert len(set(run(scenario))) > 1


def test_drawing_follows_the_nucleus():
    import torch

    from dsr1kit.local.draw import draw, generator_of

    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    rows = 4000
    samplings = [Sampling(temperature=1.0, top_p=0.75, seed=1, sample=n) for n in range(rows)]
    tokens = draw(logits.repeat(rows, 1), samplings, [generator_of(sampling) for sampling in samplings])
    share = torch.bincount(torch.tensor(tokens), minlength=4) / rows
    # 0.5 + 0.3 reaches 0.75: the first two tokens, in proportion 5 to 3.
    assert share.tolist() == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)


def test_thinking_is_capped():
    reply = ask(sampling=Sampling(temperature=0, max_tokens=200, max_thinking_tokens=9))
    assert reply.usage.reasoning_tokens == 9
    assert reply.usage.answer_tokens > 0
    assert reply.answer
    whole = ask()
    assert whole.reasoning.startswith(reply.reasoning)


def test_length_truncates():
    reply = ask(sampling=Sampling(temperature=0, max_tokens=12))
    assert reply.outcome is Outcome.TRUNCATED
    assert reply.finish_reason == "length"
    assert reply.usage.completion_tokens == 12
    assert reply.answer == ""
    assert reply.timing.first_answer_s is None
    assert "max_tokens=12" in reply.detail


def test_prompt_beyond_the_context_is_refused_with_numbers():
    async def scenario(model):
        long = [{"role": "user", "content": "1 + " * 1000}]
        alone = await model.ask(long, GREEDY)
        among = await model.generate_many([long, QUESTION], [GREEDY, GREEDY])
        return alone, among, model.loaded.context

    alone, among, context = run(scenario)
    assert alone.outcome is among[0].outcome is Outcome.BAD_REQUEST
    assert str(context) in alone.detail
    assert among[1].outcome is Outcome.OK


def test_cancelling_stops_the_generation_at_once():
    async def scenario(model):
        endless = Sampling(temperature=3.0, top_p=1.0, seed=1, max_tokens=1000)
        seen, begun = [], asyncio.Event()

        def note(delta):
            seen.append(delta)
            begun.set()

        task = asyncio.ensure_future(model.ask(QUESTION, endless, on_delta=note))
        waiting = asyncio.ensure_future(model.ask(QUESTION, endless))
        await begun.wait()
        waiting.cancel()
        task.cancel()
        began = time.perf_counter()
        await asyncio.gather(task, waiting, return_exceptions=True)
        stopped_s = time.perf_counter() - began
        count = len(seen)
        reply = await model.ask(QUESTION, GREEDY)
        return task.cancelled() and waiting.cancelled(), stopped_s, len(seen) - count, reply

    cancelled, stopped_s, late, reply = run(scenario)
    assert cancelled
    assert stopped_s < 0.5
    assert late == 0
    assert reply.outcome is Outcome.OK
    assert reply.timing.queue_s < 0.5


def test_a_quota_of_fewer_cores_bounds_the_threads(monkeypatch):
    import torch

    from dsr1kit.local import load as module

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        monkeypatch.setattr(module, "look", lambda: replace(look(), cores=3))
        module.load("tiny-r1", "none", "cpu", "auto", None)
        assert torch.get_num_threads() == 3
        module.load("tiny-r1", "none", "cpu", "auto", 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_error_while_loading_keeps_nothing_of_the_model(tmp_path):
    import torch

    folder = tmp_path / "silent"
    shutil.copytree(data_dir() / "tiny-r1", folder)
    (folder / "chat_template.jinja").unlink()

    def held():
        gc.collect()
        return sum(isinstance(one, torch.nn.Linear) for one in gc.get_objects())

    before = held()
    with pytest.raises(ModelError, match="no chat template") as raised:
        ask(source=str(folder))
    assert raised.value.__traceback__ is not None
    assert held() == before


def test_the_first_request_finds_4bit_weights_packed_already():
    async def packed_and_compute_dtypes(model):
        layers = [one for one in model.loaded.model.modules() if type(one).__name__ == "Linear4bit"]
        return [(getattr(one.weight.quant_state, "packing_format_for_cpu", False), one.compute_type_is_set,
                 one.support_avx512bf16_for_cpu) for one in layers]  # fmt: skip

    found = run(packed_and_compute_dtypes, quantization="4bit")
    assert found
    # Where the processor multiplies bfloat16 they are packed, elsewhere they are never.
    assert all(packed == packs and ready for packed, ready, packs in found)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantized_models_load_and_answer(quantization, capfd, caplog):
    with caplog.at_level(logging.WARNING):
        reply = ask(quantization=quantization)
    assert reply.outcome in (Outcome.OK, Outcome.TRUNCATED)
    assert reply.reasoning.startswith("4827+965")
    assert reply.extra["quantization"] == quantization
    assert capfd.readouterr().err == ""


def test_nothing_leaks_to_stderr(capfd):
    ask()
    assert capfd.readouterr().err == ""


def test_batches_equal_single_answers_in_input_order():
    asked = conversations(12)
    progress = []

    async def scenario(model):
        many = await model.generate_many(
            asked, [GREEDY] * 12, batch_size=5, on_progress=lambda done, total: progress.append((done, total))
        )
        return many, [await model.ask(messages, GREEDY) for messages in asked]

    many, single = run(scenario)
    # Batched products round differently and may tip a near tie: all but one must agree to the letter.
    same = [a.reasoning == b.reasoning and a.answer == b.answer for a, b in zip(many, single, strict=True)]
    assert sum(same) >= 11
    assert [m.usage for m, ok in zip(many, same, strict=True) if ok] == [
        s.usage for s, ok in zip(single, same, strict=True) if ok
    ]
    assert progress == [(n, 12) for n in range(1, 13)]
    assert many[0].timing.first_token_s is None


def test_batch_rows_keep_their_own_limits():
    async def scenario(model):
        limits = [Sampling(temperature=0, max_tokens=n) for n in (5, 300)]
        return await model.generate_many([QUESTION, QUESTION], limits)

    short, whole = run(scenario)
    assert (short.outcome, short.usage.completion_tokens) == (Outcome.TRUNCATED, 5)
    assert whole.outcome is Outcome.OK


def test_text_never_holds_half_a_character():
    from transformers import AutoTokenizer

    from dsr1kit.local.reading import Detokenizer

    tokenizer = AutoTokenizer.from_pretrained(data_dir() / "tiny-r1")
    text = "龘 𝟜 naïve 😀, 小明有3个苹果 \n\n end " * 4
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    decoder = Detokenizer(tokenizer)
    pieces = [decoder.push(token) for token in ids]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + decoder.flush() == text
    assert Detokenizer(tokenizer).flush() == ""


def test_earlier_thinking_and_system_text_follow_r1s_template():
    async def scenario(model):
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is 2 + 2?"},
            {"role": "assistant", "content": "2+2\n</think>\n\nThe answer is 4."},
            {"role": "user", "content": "What is 3 + 3?"},
        ]
        return model.loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    assert run(scenario) == (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>What is 2 + 2?<｜Assistant｜>The answer is 4."
        "<｜end▁of▁sentence｜><｜User｜>What is 3 + 3?<｜Assistant｜><think>\n"
    )


def test_mistakes_say_what_to_do(tmp_path):
    with pytest.raises(UnknownName, match="did you mean 'tiny-r1'"):
        ask(source="tiny-r2")
    with pytest.raises(UnknownName, match="4bit"):
        LocalModel("tiny-r1", quantization="4bits")  # type: ignore[arg-type]  # the mistake under test
    with pytest.raises(ModelError, match="download"):
        ask(source=str(tmp_path / "none.gguf"))
    with pytest.raises(ModelError, match="no folder"):
        ask(source=str(tmp_path / "none"))
    with pytest.raises(UsageError, match="async with"):
        asyncio.run(LocalModel("tiny-r1").ask(QUESTION))


def test_pickled_checkpoints_are_refused(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(data_dir() / "tiny-r1", folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickles, which can run any code"):
        ask(source=str(folder))


def test_files_that_are_named_themselves_are_refused_by_what_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for name in ("r1.pt", "pytorch_model.bin", "R1.CKPT"):
        (tmp_path / "model" / name).write_bytes(b"\x80\x04.")
        # Relative, it reads like a hub id.
        for source in (str(tmp_path / "model" / name), f"model/{name}"):
            with pytest.raises(ModelError, match="is a pickle, which can run any code"):
                ask(source=source)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is a file: name the folder"):
        ask(source="model/model.safetensors")


def test_a_folder_serves_as_well(tmp_path):
    shutil.copytree(data_dir() / "tiny-r1", tmp_path / "mine")
    reply = ask(source=str(tmp_path / "mine"), name="mine", dtype="bfloat16")
    assert (reply.channel, reply.extra["dtype"]) == ("mine", "bfloat16")
    assert reply.answer


def test_small_models_stay_in_fp32_on_a_processor():
    assert choose_dtype(1_400_000, "cpu")[0] == "float32"
    assert choose_dtype(1_500_000_000, "cpu")[1]


def test_what_on_delta_raises_reaches_the_caller():
    def refuse(_):
        raise ZeroDivisionError("mine")

    async def inside():
        async with LocalModel("tiny-r1") as r1:
            with pytest.raises(ZeroDivisionError):
                await r1.ask([{"role": "user", "content": "What is 12 + 30?"}], on_delta=refuse)
            return await r1.ask([{"role": "user", "content": "What is 12 + 30?"}], Sampling(temperature=0.0))

    assert asyncio.run(inside()).outcome == "ok"


def test_what_the_open_model_holds_is_not_counted_against_it(monkeypatch):
    """Advice after a shortage is about the request, not about loading the same weights a second time."""
    from dsr1kit.local import room as loading

    async def scenario(model):
        held = int(model.loaded.model.get_memory_footprint())
        here = loading.seen_from("cpu")
        assert loading.with_free(here, held).memory_free_bytes == here.memory_free_bytes + held
        return model.loaded.advice(100)

    assert "should fit" in run(scenario)


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    import dataclasses
    import json

    from dsr1kit.local import room as loading

    folder = tmp_path / "huge"
    shutil.copytree(data_dir() / "tiny-r1", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "layer_types": None}
    config |= {"num_attention_heads": 64, "num_key_value_heads": 8}
    (folder / "config.json").write_text(json.dumps(config))
    small = dataclasses.replace(loading.look(), memory_free_bytes=8 * 2**30, gpus=())
    monkeypatch.setattr(loading, "look", lambda: small)
    with pytest.raises(ModelError, match=r"does not fit.*GiB short.*What would fit"):
        ask(source=str(folder), dtype="bfloat16")
    with pytest.raises(ModelError, match="GiB short"):
        ask(source=str(folder), quantization="auto")
