"""Tokens of the decoder: those of transformers' own `generate`, whatever runs beside them; thinking's bounds; draws."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dsr1kit.errors import ModelError
from dsr1kit.local.decode import CHUNK, Decoder, RowByRow, SlotMemory, run_rows
from dsr1kit.local.draw import draw, generator_of
from dsr1kit.local.graphs import Graphs
from dsr1kit.local.rows import Marks, Row, marks_of
from dsr1kit.paths import data_dir
from dsr1kit.records import Sampling

GREEDY = Sampling(temperature=0, max_tokens=1)
NO_MARKS = Marks(None, None, frozenset())
SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
         "tie_word_embeddings": False,  # else a random model repeats its last token, whatever it attends to
         "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}  # fmt: skip
NEAR = 1e-4  # logits closer than this may change places where other products are computed beside them


def random_model(kind, config, **options):
    torch.manual_seed(3)
    return kind(config(**SMALL, **options)).eval()


@pytest.fixture(scope="module")
def qwen():
    return random_model(Qwen2ForCausalLM, Qwen2Config, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def tiny_r1():
    folder = data_dir() / "tiny-r1"
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval(), AutoTokenizer.from_pretrained(folder)


def prompt(length, seed=0):
    return torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(length + 7919 * seed)).tolist()


def row(ids, limit, sampling=GREEDY, *, thinking=False):
    return Row(ids, sampling, limit, thinking, lambda _: False)


def generated(model, ids, limit, **options):
    """New tokens of transformers' own greedy generation, the end mark included."""
    inputs = torch.tensor([ids])
    made = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=limit, **options
    )
    return made[0, len(ids) :].tolist()


def assert_same_up_to_near_ties(model, ids, ours, theirs):
    """Where two continuations part, the model's own scores for the two tokens must be all but equal."""
    at = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if at is None:
        assert len(ours) == len(theirs)
        return
    with torch.inference_mode():
        scores = model(torch.tensor([ids + ours[:at]])).logits[0, -1]
    best = scores.max()
    assert best - scores[ours[at]] < NEAR
    assert best - scores[theirs[at]] < NEAR


def questions(tokenizer, texts):
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for text in texts
    ]


SUMS = [f"What is {a} + {b}?" for a, b in ((4827, 965), (12, 30), (99, 1), (731, 278), (6, 7), (5000, 5), (41, 4100))]
SUMS += ["小明有3个苹果, 又买了5个, 一共有几个?", "Tell me a story about the sea, the wind and a very old boat."]


def test_a_single_row_is_generates_own_greedy_text(tiny_r1):
    model, tokenizer = tiny_r1
    decoder = Decoder(model, marks_of(tokenizer, model), 1024)
    for ids in questions(tokenizer, SUMS[:4]):
        alone = row(ids, 200, thinking=True)
        run_rows(decoder, [alone])
        assert alone.made == generated(model, ids, 200)


def test_a_batch_of_the_same_composition_is_generates_own_batch(tiny_r1):
    model, tokenizer = tiny_r1
    ids = questions(tokenizer, SUMS[:1])[0]
    rows = [row(ids, 120, thinking=True) for _ in range(6)]
    run_rows(Decoder(model, marks_of(tokenizer, model), 1024), rows)
    inputs = torch.tensor([ids] * 6)
    theirs = model.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=120)
    assert [one.made for one in rows] == theirs[:, len(ids) :].tolist()


@pytest.mark.parametrize("at_once", [2, 3, 9])
def test_rows_that_replace_each_other_differ_from_generate_at_near_ties_alone(tiny_r1, at_once):
    model, tokenizer = tiny_r1
    asked = questions(tokenizer, SUMS)
    rows = [row(ids, 60 + 20 * n, thinking=True) for n, ids in enumerate(asked)]
    run_rows(Decoder(model, marks_of(tokenizer, model), 1024), rows, at_once)
    for one in rows:
        assert_same_up_to_near_ties(model, one.prompt, one.made, generated(model, one.prompt, one.limit))


def test_with_a_cap_on_thinking_all_is_the_same_up_to_the_cap(tiny_r1):
    model, tokenizer = tiny_r1
    marks, ids = marks_of(tokenizer, model), questions(tokenizer, SUMS[:1])[0]
    whole = generated(model, ids, 200)
    for cap in (1, 2, 9, whole.index(marks.end_think)):
        capped = row(ids, 200, Sampling(temperature=0, max_tokens=200, max_thinking_tokens=cap), thinking=True)
        run_rows(Decoder(model, marks, 1024), [capped])
        assert capped.made[: cap + 1] == [*whole[:cap], marks.end_think]
        assert capped.thought == cap
        assert capped.made[cap : cap + len(marks.close)] == list(marks.close)
        ended = capped.made[-1] in marks.ends
        assert ended or len(capped.made) == 200


@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 3000])
def test_prompts_read_in_by_parts_are_continued_as_by_generate(qwen, length):
    alone = row(prompt(length), 12)
    run_rows(Decoder(qwen, NO_MARKS, 4096), [alone])
    assert_same_up_to_near_ties(qwen, alone.prompt, alone.made, generated(qwen, alone.prompt, 12))


@pytest.mark.parametrize("lengths", [[1, 2, 40, 700, 1500], [500, 511, 512, 513, 540], [1000, 1023, 1024, 1025, 1090]])
def test_rows_of_different_lengths_do_not_see_each_other(qwen, lengths):
    rows = [row(prompt(length), 10 + 7 * n) for n, length in enumerate(reversed(lengths))]
    run_rows(Decoder(qwen, NO_MARKS, 4096), rows)
    for one in rows:
        assert_same_up_to_near_ties(qwen, one.prompt, one.made, generated(qwen, one.prompt, one.limit))


def test_a_row_fills_its_context_to_the_last_token(qwen):
    rows = [row(prompt(63), 1), row(prompt(50), 14)]
    run_rows(Decoder(qwen, NO_MARKS, 64), rows)
    for one in rows:
        assert len(one.prompt) + len(one.made) == 64
        assert one.made == generated(qwen, one.prompt, one.limit)


def test_rows_that_end_with_their_first_token_leave_the_others_alone(qwen):
    rows = [row(prompt(20, n), 1 if n % 2 else 25) for n in range(9)]
    decoder = Decoder(qwen, NO_MARKS, 4096)
    done = decoder.admit(rows)
    assert set(map(id, done)) == {id(one) for one in rows if one.limit == 1}
    while decoder.rows:
        decoder.step()
    for one in rows:
        assert_same_up_to_near_ties(qwen, one.prompt, one.made, generated(qwen, one.prompt, one.limit))


def test_rows_taken_out_in_the_middle_change_nothing_for_the_rest(qwen):
    rows = [row(prompt(30 + n, n), 40) for n in range(6)]
    decoder = Decoder(qwen, NO_MARKS, 4096)
    decoder.admit(rows)
    for taken in (rows[0], rows[5], rows[2]):
        decoder.step()
        decoder.remove(taken)
    while decoder.rows:
        decoder.step()
    for one in (rows[1], rows[3], rows[4]):
        assert_same_up_to_near_ties(qwen, one.prompt, one.made, generated(qwen, one.prompt, 40))


def test_a_row_that_lost_its_place_goes_on_with_the_same_draws(qwen):
    hot = Sampling(temperature=1.0, top_p=0.95, seed=11, max_tokens=40)
    whole, broken = row(prompt(30), 40, hot), row(prompt(30), 40, hot)
    run_rows(Decoder(qwen, NO_MARKS, 4096), [whole])
    decoder = Decoder(qwen, NO_MARKS, 4096)
    for steps in (0, 3, 20):
        decoder.admit([broken])
        for _ in range(steps):
            decoder.step()
        torch.rand((), generator=broken.generator)  # a number lost with the memory that ran out
        assert decoder.clear() == [broken]
    run_rows(decoder, [broken])
    assert broken.made == whole.made


WINDOWED = {
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 16}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {"sliding_window": 16, "head_dim": 8, "sliding_window_pattern": 2}),
}


@pytest.mark.parametrize("name", WINDOWED)
def test_models_with_windows_smaller_than_the_text_run_row_by_row_as_generate_does(name):
    kind, config, options = WINDOWED[name]
    model = random_model(kind, config, max_position_embeddings=512, **options)
    decoder = Decoder(model, NO_MARKS, 512)
    assert isinstance(decoder.memory, RowByRow)
    rows = [row(prompt(length), 30) for length in (3, 15, 16, 17, 80)]
    run_rows(decoder, rows, 3)
    for one in rows:
        assert_same_up_to_near_ties(model, one.prompt, one.made, generated(model, one.prompt, 30))
    wide = random_model(kind, config, max_position_embeddings=512, **options | {"sliding_window": 256})
    assert generated(wide, rows[-1].prompt, 30) != rows[-1].made, "the window must matter, or this shows nothing"


@pytest.mark.parametrize("at_once", [1, 2, 3, 7])
def test_the_fixed_shapes_of_recorded_steps_give_the_same_tokens(qwen, monkeypatch, at_once):
    monkeypatch.setattr("dsr1kit.local.graphs.Graphs", partial(Graphs, record=False))
    rows = [row(prompt(length), 40) for length in (5, 230, 250, 300, 470, 500, 511)]
    decoder = Decoder(qwen, NO_MARKS, 4096, compiled=True)
    assert isinstance(decoder.memory, SlotMemory)
    run_rows(decoder, rows, at_once)
    for one in rows:
        assert_same_up_to_near_ties(qwen, one.prompt, one.made, generated(qwen, one.prompt, 40))


def test_the_fixed_shapes_hold_where_the_context_is_full(qwen, monkeypatch):
    monkeypatch.setattr("dsr1kit.local.graphs.Graphs", partial(Graphs, record=False))
    rows = [row(prompt(200, n), 100) for n in range(3)]
    run_rows(Decoder(qwen, NO_MARKS, 300, compiled=True), rows)
    for one in rows:
        assert_same_up_to_near_ties(qwen, one.prompt, one.made, generated(qwen, one.prompt, 100))


# --- bounds on thinking

END, THINK, EOS, BREAK, WAIT, WORD = 1, 2, 3, 4, 5, 9
MARKS = Marks(END, THINK, frozenset({EOS}), (END, BREAK), (WAIT, WAIT, WAIT))


def taken(drawn, *, limit=100, marks=MARKS, **bounds):
    """What a row whose thinking is open makes of the tokens that are drawn."""
    one = row([0], limit, Sampling(temperature=0, **bounds), thinking=True)
    for token in drawn:
        if one.take(token, marks):
            break
    return one


def test_a_cap_closes_the_thinking_and_asks_for_the_answer():
    assert taken([WORD] * 6, max_thinking_tokens=3).made == [WORD, WORD, WORD, END, BREAK, WORD]


def test_thinking_that_would_end_too_soon_goes_on_with_wait():
    for closing in (END, EOS):
        one = taken([WORD, closing, WORD, WORD, END, WORD], min_thinking_tokens=4)
        assert one.made == [WORD, WAIT, WAIT, WAIT, END, WORD]
        assert one.thought == 4


def test_a_cap_holds_also_in_the_middle_of_what_prolongs_the_thinking():
    one = taken([WORD, END] + [WORD] * 6, min_thinking_tokens=2, max_thinking_tokens=2)
    assert one.made[:4] == [WORD, WAIT, END, BREAK]
    assert one.thought == 2


def test_an_end_mark_inside_the_thinking_ends_the_row():
    assert taken([WORD, EOS, WORD]).made == [WORD, EOS]


def test_max_tokens_ends_a_row_also_in_the_middle_of_what_is_forced():
    assert taken([WORD] * 9, limit=4, max_thinking_tokens=3).made == [WORD, WORD, WORD, END]


def test_bounds_mean_nothing_to_a_model_without_tags():
    assert taken([WORD] * 5 + [EOS], marks=Marks(None, None, frozenset({EOS})), max_thinking_tokens=1).made == [
        *[WORD] * 5, EOS]  # fmt: skip


@given(
    drawn=st.lists(st.sampled_from([END, THINK, EOS, WORD, WORD, WORD]), min_size=1, max_size=40),
    least=st.integers(1, 8), more=st.integers(0, 8),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_bounds_hold_whatever_is_drawn(drawn, least, more):
    one = taken(drawn, min_thinking_tokens=least, max_thinking_tokens=least + more)
    assert one.thought <= least + more
    if not one.thinking:
        assert least <= one.thought
    assert one.made.count(END) >= (not one.thinking)
    assert len(one.made) <= len(drawn)


def test_a_tag_that_is_only_the_unknown_token_is_no_tag(tiny_r1):
    model, tokenizer = tiny_r1

    class Ignorant:
        unk_token_id, eos_token_id, pad_token_id = 7, 1, None

        def __call__(self, text, **_):
            return {"input_ids": [7]}

    marks = marks_of(Ignorant(), model)
    assert (marks.think, marks.end_think, marks.close) == (None, None, ())
    assert marks_of(tokenizer, model).end_think is not None


# --- draws


def tokens_of(scores, samplings):
    return draw(scores, samplings, [generator_of(sampling) for sampling in samplings])


def test_a_nucleus_larger_than_the_first_look_is_followed():
    logits = torch.linspace(0, -1, 2000)
    shares = logits.double().softmax(-1)
    nucleus = int((shares.cumsum(-1) < 0.7).sum()) + 1
    assert nucleus > 256
    rows = 8000
    samplings = [Sampling(temperature=1.0, top_p=0.7, seed=2, sample=n) for n in range(rows)]
    drawn = torch.tensor(tokens_of(logits.repeat(rows, 1), samplings))
    assert int(drawn.max()) < nucleus
    half = int((shares[:nucleus].cumsum(-1) < shares[:nucleus].sum() / 2).sum())
    share = float((drawn < half).double().mean())
    assert share == pytest.approx(0.5, abs=4 * 0.5 / rows**0.5)


def test_a_whole_vocabulary_is_drawn_from_with_top_p_one():
    samplings = [Sampling(temperature=1.0, top_p=1.0, seed=5, sample=n) for n in range(3000)]
    drawn = tokens_of(torch.zeros(3000, 300), samplings)
    assert len(set(drawn)) > 290


def test_a_draw_depends_on_its_seed_alone_also_among_equal_scores():
    generator = torch.Generator().manual_seed(0)
    # As 16 bits give them: many scores are equal, so their order must not hang on the neighbours.
    peaked = (torch.randn(20, 3000, generator=generator) * 4).round()
    flat = torch.zeros(20, 3000)
    samplings = [Sampling(temperature=0.7 if n % 3 else 0, top_p=0.9, seed=n) for n in range(20)]
    alone = [tokens_of(peaked[n : n + 1], [samplings[n]])[0] for n in range(20)]
    assert tokens_of(peaked, samplings) == alone
    among = tokens_of(torch.stack([peaked, flat], 1).flatten(0, 1), [s for s in samplings for _ in range(2)])
    assert among[::2] == alone


def test_a_source_of_draws_goes_on_behind_those_that_were_used():
    sampling = Sampling(seed=4)
    source = generator_of(sampling)
    numbers = [float(torch.rand((), generator=source)) for _ in range(9)]
    for drawn in (0, 1, 8):
        assert float(torch.rand((), generator=generator_of(sampling, drawn))) == numbers[drawn]


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-5])
def test_a_temperature_next_to_nothing_takes_the_likeliest(temperature):
    scores = torch.randn(4, 500, generator=torch.Generator().manual_seed(1)) * 30
    samplings = [Sampling(temperature=temperature, seed=n) for n in range(4)]
    assert tokens_of(scores, samplings) == scores.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.6])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_an_error_and_no_token(temperature, bad):
    scores = torch.zeros(2, 50)
    scores[1, 7] = bad
    with pytest.raises(ModelError, match="float32"):
        tokens_of(scores, [Sampling(temperature=temperature, seed=1)] * 2)
