"""From examples to token ids: the prompt as it is asked, what the loss counts, and what the linter says of it."""

from __future__ import annotations

import importlib.util
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsr1kit.errors import UsageError
from dsr1kit.finetune.data import Example, example
from dsr1kit.finetune.encode import IGNORED, Encoded, encode, encode_all, whole_conversations
from dsr1kit.finetune.lint import lint, lint_template
from dsr1kit.local.prompts import prompt_of
from dsr1kit.local.rows import Marks, marks_of
from dsr1kit.paths import data_dir

transformers = pytest.importorskip("transformers", reason="tokenizers are transformers'")


def shipped(template: str | None = None) -> tuple[Any, Marks]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(data_dir() / "tiny-r1")
    if template is not None:
        tokenizer.chat_template = template
    config = transformers.GenerationConfig.from_pretrained(data_dir() / "tiny-r1")
    return tokenizer, marks_of(tokenizer, type("Model", (), {"generation_config": config}))


def distill_template() -> str:
    found = importlib.util.find_spec("trl")
    places = [] if found is None else list(found.submodule_search_locations or [])
    for place in places:
        path = Path(place) / "chat_templates" / "deepseek_r1_distill.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    pytest.skip("this TRL ships no template of R1's distills")


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Marks]:
    return shipped()


@pytest.fixture(scope="module")
def distill() -> tuple[Any, Marks]:
    return shipped(distill_template())


@pytest.fixture(params=["tiny", "distill"])
def model(request: pytest.FixtureRequest) -> tuple[Any, Marks]:
    found: tuple[Any, Marks] = request.getfixturevalue(request.param)
    return found


ONE = example("What is 48 + 27?", "48+27\n8+7=15\n48+27=75", "The answer is \\boxed{75}.", gold="75")
LATER = example(
    "And 75 + 5?",
    "75+5=80",
    "\\boxed{80}.",
    before=(
        {"role": "user", "content": "What is 48 + 27?"},
        {"role": "assistant", "content": "<think>\n48+27=75\n</think>\n\nIt is 75."},
    ),
)


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def counted(tokenizer: Any, row: Encoded) -> str:
    return decoded(tokenizer, [label for label in row.labels if label != IGNORED])


@pytest.mark.parametrize("one", [ONE, LATER], ids=["one turn", "several"])
def test_the_prompt_is_what_the_model_reads_when_it_is_asked(model: tuple[Any, Marks], one: Example) -> None:
    tokenizer, marks = model
    asked = prompt_of(tokenizer, marks, one.messages)
    assert asked.opened
    row = encode(tokenizer, marks, one)
    assert row.input_ids[: len(asked.ids)] == asked.ids
    assert row.labels[: len(asked.ids)] == [IGNORED] * len(asked.ids)
    assert row.labels[len(asked.ids) :] == row.input_ids[len(asked.ids) :]
    assert decoded(tokenizer, asked.ids).endswith("<think>\n")
    assert row.input_ids[-1] in marks.ends
    assert row.counted == len(row.input_ids) - len(asked.ids)


def test_the_loss_counts_trace_closing_tag_answer_and_end(model: tuple[Any, Marks]) -> None:
    tokenizer, marks = model
    end = tokenizer.eos_token
    row = encode(tokenizer, marks, ONE)
    assert counted(tokenizer, row) == f"{ONE.reasoning}\n</think>\n\n{ONE.answer}{end}"
    whole = encode(tokenizer, marks, ONE, "all")
    assert whole.labels == whole.input_ids == row.input_ids


def test_earlier_thinking_is_not_seen(model: tuple[Any, Marks]) -> None:
    tokenizer, marks = model
    text = decoded(tokenizer, encode(tokenizer, marks, LATER).input_ids)
    assert "48+27=75" not in text
    assert "It is 75." in text
    assert text.count("<think>") == text.count("</think>") == 1


def test_with_loss_assistant_the_earlier_answers_count_too(model: tuple[Any, Marks]) -> None:
    tokenizer, marks = model
    row = encode(tokenizer, marks, LATER, "assistant")
    end = tokenizer.eos_token
    assert counted(tokenizer, row) == f"It is 75.{end}{LATER.reasoning}\n</think>\n\n{LATER.answer}{end}"
    assert row.input_ids == encode(tokenizer, marks, LATER).input_ids


def test_with_loss_assistant_a_conversation_is_one_row(tiny: tuple[Any, Marks]) -> None:
    tokenizer, marks = tiny
    first = example("What is 48 + 27?", "48+27=75", "It is 75.")
    other = example("What is 1 + 1?", "1+1=2", "2")
    rows = encode_all(tokenizer, marks, whole_conversations([first, LATER, other]), "assistant")
    assert rows == [encode(tokenizer, marks, one, "assistant") for one in (LATER, other)]
    assert len(encode_all(tokenizer, marks, [first, LATER, other], "completion")) == 3


def test_a_template_that_changes_what_stood_before_is_refused_for_loss_assistant() -> None:
    template = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}[{{ m.role }}]{{ m.content }}"
        "{% else %}(earlier){{ m.content | upper }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer, marks = shipped(template)
    with pytest.raises(UsageError, match=r"renders a conversation otherwise once more turns follow.*take loss 'compl"):
        encode(tokenizer, marks, LATER, "assistant")
    assert encode(tokenizer, marks, LATER).counted > 0


def test_an_unknown_loss_is_refused(tiny: tuple[Any, Marks]) -> None:
    with pytest.raises(UsageError, match="the loss counts completion, assistant, all, not 'answer'"):
        encode(*tiny, ONE, "answer")  # type: ignore[arg-type]


def test_a_model_that_knows_no_thinking_gets_the_trace_before_the_answer(tiny: tuple[Any, Marks]) -> None:
    tokenizer, marks = tiny
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    other, _ = shipped(plain)
    none = Marks(None, None, marks.ends)
    row = encode(other, none, ONE)
    assert counted(other, row) == f"{ONE.reasoning}\n\n{ONE.answer}{tokenizer.eos_token}"
    assert counted(other, encode(other, none, example("Q", "", "A"))) == f"A{tokenizer.eos_token}"


@settings(max_examples=100, deadline=None)
@given(
    question=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="<｜"), max_size=40),
    reasoning=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="<｜"), max_size=60),
    answer=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="<｜"), max_size=40),
)
def test_reasoning_and_answer_come_back_whole_from_the_ids(
    tiny: tuple[Any, Marks], question: str, reasoning: str, answer: str
) -> None:
    tokenizer, marks = tiny
    one = example(question, reasoning, answer)
    row = encode(tokenizer, marks, one)
    text = f"{one.reasoning}\n</think>\n\n{one.answer}{tokenizer.eos_token}"
    assert counted(tokenizer, row) == unicodedata.normalize("NFC", text), "as the tokenizer writes it"
    assert len(row.labels) == len(row.input_ids)
    assert all(label in (IGNORED, token) for label, token in zip(row.labels, row.input_ids, strict=True))


# --- the linter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", [ONE, LATER], ids=["one turn", "several"])
def test_the_kits_own_way_is_sound(model: tuple[Any, Marks], one: Example) -> None:
    found = lint(*model, one)
    assert found.sound, [finding.said for finding in found.findings if not finding.holds]
    told = " ".join(finding.said for finding in found.findings)
    assert "the loss counts the whole reasoning" in told
    assert "inside the thinking" in told
    assert "the end mark is trained" in told
    masked, trained = found.pieces
    assert (masked.counted, trained.counted) == (False, True)
    assert masked.text.endswith("<think>\n")
    assert trained.text.startswith(one.reasoning)
    row = encode(*model, one)
    assert (found.tokens, found.counted) == (len(row.input_ids), row.counted)


def test_plain_training_through_the_template_of_r1_is_found_to_drop_the_reasoning(model: tuple[Any, Marks]) -> None:
    found = lint_template(*model, ONE)
    assert not found.sound
    assert not found.findings[0].holds
    assert found.findings[0].said.startswith("the reasoning is gone from what the loss counts")
    assert ONE.reasoning not in "".join(piece.text for piece in found.pieces)
    assert ONE.answer in "".join(piece.text for piece in found.pieces if piece.counted)


def test_a_template_that_keeps_the_reasoning_is_not_said_to_drop_it() -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
    )
    found = lint_template(*shipped(template), ONE)
    assert found.sound, [finding.said for finding in found.findings if not finding.holds]


def test_where_all_counts_the_start_is_found_wrong_but_not_the_reasoning(tiny: tuple[Any, Marks]) -> None:
    found = lint(*tiny, ONE, "all")
    assert found.findings[0].holds
    assert [piece.counted for piece in found.pieces] == [True]


def test_what_is_masked_is_shown_grey_and_nothing_of_the_text_is_html(tiny: tuple[Any, Marks]) -> None:
    shown = lint(*tiny, example("Is <b>2</b> > 1?", "2>1 & so", "yes"))._repr_html_()
    grey, plain = shown.split("</span>")[:2]
    assert 'style="color:#767676"' in grey
    assert "&lt;b&gt;2&lt;/b&gt; &gt; 1?" in grey
    assert grey.endswith("&lt;think&gt;\n")
    assert 'style=""' in plain
    assert "2&gt;1 &amp; so" in plain
    assert "<b>" not in shown
    assert "tokens count in the loss; those in grey are read only" in shown
