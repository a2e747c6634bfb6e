"""tiny-r1: how it is made, in miniature, and that what is shipped is what its card says."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from dsr1kit.compare.arithmetic import INSTRUCTION, KINDS, TAUGHT, UNTAUGHT, false_statements, generate
from dsr1kit.errors import ModelError, UsageError
from dsr1kit.finetune import pretrain
from dsr1kit.finetune.card import read_card, render_card, write_card
from dsr1kit.paths import data_dir

SHIPPED = data_dir() / "tiny-r1"
TINY = pretrain.Recipe(steps=30, batch_size=8, layers=1, width=64, heads=2, feed_forward=128)


@pytest.fixture(scope="module")
def tokenizer():
    return pretrain.build_tokenizer()


@pytest.fixture(scope="module")
def shipped_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def trained(tokenizer):
    import torch

    torch.set_num_threads(1)
    model = pretrain.build_model(TINY, tokenizer)
    lines = []
    curve = pretrain.train(model, tokenizer, TINY, on_progress=lines.append, every=5)
    return model, curve, lines


# --- the tokenizer -----------------------------------------------------------------------------------------


def test_digits_stand_alone(tokenizer):
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("4827+965=5792")["input_ids"])
    assert pieces == list("4827+965=5792")
    assert not [piece for piece in tokenizer.get_vocab() if re.search(r"\d", piece) and len(piece) > 1]


def test_any_text_comes_back_whole(tokenizer):
    for text in ("What is 48 + 27?", "小明有3个苹果。", "naïve 😀\t龘\n", INSTRUCTION["zh"]):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_r1s_tokens_are_single(tokenizer):
    for text in (
        pretrain.BOS,
        pretrain.EOS,
        pretrain.PAD,
        pretrain.USER,
        pretrain.ASSISTANT,
        "<think>",
        "</think>",
    ):
        assert len(tokenizer(text)["input_ids"]) == 1, text
    assert tokenizer.all_special_tokens == [pretrain.BOS, pretrain.EOS, pretrain.PAD]


def test_the_saved_tokenizer_cuts_like_the_trained_one(tokenizer, shipped_tokenizer):
    for problem in generate(KINDS, "train", 90, 4):
        text = pretrain.prompt_text(problem.question) + pretrain.completion_text(problem)
        ids = tokenizer(text)["input_ids"]
        assert shipped_tokenizer(text)["input_ids"] == ids
        assert shipped_tokenizer.decode(ids) == text


def test_template_gives_the_prompt_that_training_used(shipped_tokenizer):
    def render(messages, **options):
        return shipped_tokenizer.apply_chat_template(messages, tokenize=False, **options)

    user = {"role": "user", "content": "What is 2 + 2?"}
    past = {"role": "assistant", "content": "<think>\n2+2=4\n</think>\n\nThe answer is \\boxed{4}."}
    prompt = "<｜begin▁of▁sentence｜><｜User｜>What is 2 + 2?<｜Assistant｜><think>\n"
    assert render([user], add_generation_prompt=True) == prompt == pretrain.prompt_text(user["content"])
    assert render([user, past]) == (
        "<｜begin▁of▁sentence｜><｜User｜>What is 2 + 2?<｜Assistant｜>The answer is \\boxed{4}.<｜end▁of▁sentence｜>"
    )


# --- training ----------------------------------------------------------------------------------------------


def test_loss_falls_and_progress_tells_the_time_left(trained):
    _, curve, lines = trained
    assert curve.steps == [5, 10, 15, 20, 25, 30]
    assert curve.losses[-1] < curve.losses[0] - 1
    assert curve.seconds == sorted(curve.seconds)
    assert curve.tokens == sorted(curve.tokens)
    assert all("s left" in line and "tokens/s" in line for line in lines)


def test_same_recipe_same_first_steps(tokenizer):
    short = replace(TINY, steps=3)
    losses = [
        pretrain.train(pretrain.build_model(short, tokenizer), tokenizer, short, every=1).losses for _ in range(2)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_batches_teach_the_completion_alone(tokenizer):
    ids, labels = next(pretrain.batches(TINY, tokenizer))
    assert ids.shape == labels.shape
    assert len(ids) == TINY.batch_size
    for row, wanted in zip(ids, labels, strict=True):
        taught = wanted != -100
        assert (row[taught] == wanted[taught]).all()
        text = tokenizer.decode(wanted[taught])
        assert text.endswith(pretrain.EOS)
        assert "</think>\n\n" in text
        prompt = tokenizer.decode(row[: int(taught.nonzero()[0])])
        assert prompt.startswith(pretrain.BOS)
        assert prompt.endswith("<think>\n")


def test_what_is_saved_loads_and_has_a_card(trained, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    model, curve, _ = trained
    folder = pretrain.save(model, tokenizer, tmp_path / "mine")
    scores = pretrain.evaluate(folder, ("sum2", "sum4"), 4, max_tokens=40)
    assert [(score.kind, score.n) for score in scores] == [("sum2", 4), ("sum4", 4)]
    assert all(0 <= s.low <= s.accuracy <= s.high <= 1 for s in scores)
    write_card(folder, recipe=TINY, curve=curve, parameters=model.num_parameters(), sampled=scores, greedy=scores)
    facts = read_card(folder)
    assert facts["curve"]["losses"] == curve.losses
    assert "It is not DeepSeek R1" in (folder / "README.md").read_text(encoding="utf-8")
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() == model.num_parameters()
    assert model.dtype.is_floating_point
    assert str(model.dtype) == "torch.float32", "saving in half precision must leave the model at hand alone"


def test_mistakes_say_what_to_do(tokenizer, tmp_path):
    with pytest.raises(UsageError, match="multiple of heads"):
        pretrain.build_model(replace(TINY, heads=5), tokenizer)
    recipe = replace(TINY, optimizer="sgd")
    model = pretrain.build_model(recipe, tokenizer)
    with pytest.raises(UsageError, match="muon or adamw"):
        pretrain.train(model, tokenizer, recipe)
    with pytest.raises(ModelError, match=r"training\.json"):
        read_card(tmp_path)


def test_boxed_number_is_read_after_the_thinking_alone():
    assert pretrain.boxed("\\boxed{1}\n</think>\n\nThe answer is \\boxed{42}.") == 42
    assert pretrain.boxed("\\boxed{1} and no end") is None


# --- what is shipped ---------------------------------------------------------------------------------------


def test_shipped_weights_are_small_safe_and_tied():
    from safetensors import safe_open

    names = {path.name for path in SHIPPED.iterdir()}
    assert names == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert (SHIPPED / "model.safetensors").stat().st_size < 12 * 2**20
    with safe_open(SHIPPED / "model.safetensors", "pt") as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118  # not a dict
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float16"}
    parameters = sum(tensor.numel() for tensor in tensors.values())
    assert 0.8e6 < parameters < 5e6
    assert parameters == read_card(SHIPPED)["parameters"]
    config = json.loads((SHIPPED / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["tie_word_embeddings"] is True
    # bitsandbytes' 4-bit on a processor is silently wrong for other widths.
    assert config["hidden_size"] % 64 == config["intermediate_size"] % 64 == 0


def test_shipped_recipe_is_the_default_one():
    assert read_card(SHIPPED)["recipe"] == json.loads(json.dumps(vars_of(pretrain.Recipe())))


def vars_of(recipe):
    from dataclasses import asdict

    return asdict(recipe)


def test_card_is_the_rendering_of_its_data_and_says_what_it_must():
    facts = read_card(SHIPPED)
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert card == render_card(facts)
    assert "must not be presented as R1" in card
    for name in ("sampled", "instructed", "greedy"):
        assert {score["kind"] for score in facts[name]} == set(KINDS)
        assert all(score["n"] >= 300 for score in facts[name])


def test_shipped_accuracy_leaves_room_and_untaught_stays_untaught():
    sampled = {score["kind"]: score["right"] / score["n"] for score in read_card(SHIPPED)["sampled"]}
    assert sum(0.40 <= sampled[kind] <= 0.95 for kind in TAUGHT) >= 3
    assert all(sampled[kind] < 0.20 for kind in UNTAUGHT)


def test_shipped_model_reasons_truly_on_held_out_problems(shipped_tokenizer):
    from transformers import AutoModelForCausalLM

    from dsr1kit.local.decode import Decoder, run_rows
    from dsr1kit.local.rows import Row, marks_of
    from dsr1kit.records import Sampling

    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype="float32").eval()
    problems = generate(TAUGHT, "held_out", 63, seed=11)
    prompts = shipped_tokenizer([pretrain.prompt_text(p.question) for p in problems])["input_ids"]
    rows = [Row(ids, Sampling(temperature=0), 256, thinking=True, on_token=lambda _: False) for ids in prompts]
    run_rows(Decoder(model, marks_of(shipped_tokenizer, model), 1024), rows)
    texts = [shipped_tokenizer.decode(row.made) for row in rows]
    right = sum(pretrain.boxed(text) == p.value for text, p in zip(texts, problems, strict=True))
    true_traces = sum(not false_statements(text.partition("</think>")[0]) for text in texts)
    assert right >= 0.5 * len(problems)
    assert true_traces >= 0.5 * len(problems)
    assert sum(text.endswith(pretrain.EOS) for text in texts) >= 0.9 * len(problems)
