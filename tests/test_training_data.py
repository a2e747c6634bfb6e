"""Training data: every common form read alike, faults told with their line, worked problems true, bad examples found."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsr1kit.compare import arithmetic
from dsr1kit.compare.items import Item, with_instruction
from dsr1kit.compare.tasks import load_task
from dsr1kit.errors import UnknownName, UsageError
from dsr1kit.finetune import worked
from dsr1kit.finetune.checks import REASONS, Checked, check
from dsr1kit.finetune.data import Example, as_row, example, instructed, load_examples, read_file, write_file
from dsr1kit.finetune.forms import read_row

TRACE, ANSWER = "1+1=2\nso two", "The answer is \\boxed{2}."
INLINE = f"<think>\n{TRACE}\n</think>\n\n{ANSWER}"
USER = {"role": "user", "content": "1 + 1 = ?"}
WANTED = ("1 + 1 = ?", TRACE, ANSWER)


def written(tmp_path: Path, content: str | Sequence[dict[str, Any]], name: str = "mine.jsonl") -> Path:
    path = tmp_path / name
    text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(text, encoding="utf-8")
    return path


def told(one: Example) -> tuple[str, str, str]:
    return one.question, one.reasoning, one.answer


# --- forms -------------------------------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "plain": {"question": "1 + 1 = ?", "reasoning": TRACE, "answer": ANSWER},
    "plain, by other names": {"problem": "1 + 1 = ?", "thinking": TRACE, "response": ANSWER},
    "plain, by names of a fetched set": {"prompt": "1 + 1 = ?", "reasoning_content": TRACE, "output": ANSWER},
    "plain, thinking inline": {"prompt": "1 + 1 = ?", "completion": INLINE},
    "plain, opened by the template": {"prompt": "1 + 1 = ?", "completion": INLINE.removeprefix("<think>\n")},
    "plain, a trace by its name": {"question": " 1 + 1 = ?\n", "trace": f"\n{TRACE}\n", "answer": f"{ANSWER}\n"},
    "chat, thinking in tags": {"messages": [USER, {"role": "assistant", "content": INLINE}]},
    "chat, a field for thinking": {
        "messages": [USER, {"role": "assistant", "content": ANSWER, "reasoning_content": TRACE}]
    },
    "chat, the field of others": {"messages": [USER, {"role": "assistant", "content": ANSWER, "thinking": TRACE}]},
    "TRL's prompt and completion": {"prompt": [USER], "completion": [{"role": "assistant", "content": INLINE}]},
    "TRL's prompt, a text behind": {"prompt": [USER], "completion": INLINE},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "1 + 1 = ?"}, {"from": "gpt", "value": INLINE}]
    },
    "ShareGPT, by roles": {"conversations": [USER, {"role": "assistant", "content": INLINE}]},
    "Alpaca": {"instruction": "1 + 1 = ?", "input": "", "output": INLINE},
    "Alpaca, a field for thinking": {"instruction": "1 + 1 = ?", "output": ANSWER, "reasoning": TRACE},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_example(form: str, tmp_path: Path) -> None:
    (one,) = read_file(written(tmp_path, [FORMS[form]]))
    assert told(one) == WANTED
    assert one.messages == (USER,)
    assert one.id == example(*WANTED).id, "the id names what is trained on, whatever form it came in"
    assert one.source == f"{tmp_path / 'mine.jsonl'}, line 1"


def test_alpacas_input_stands_below_its_instruction() -> None:
    (one,) = read_row({"instruction": "Add them.", "input": "1, 1", "output": INLINE}, "here")
    assert one.question == "Add them.\n\n1, 1"


def test_a_conversation_gives_one_example_an_answer_and_earlier_thinking_is_not_seen_again() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": INLINE},
        {"role": "user", "content": "And one more?"},
        {"role": "assistant", "content": "<think>2+1=3</think>3"},
    ]
    first, second = read_row({"messages": turns, "gold": "3"}, "here")
    assert told(first) == WANTED
    assert [turn["role"] for turn in first.messages] == ["system", "user"]
    assert told(second) == ("And one more?", "2+1=3", "3")
    assert second.messages[2] == {"role": "assistant", "content": ANSWER}
    assert (first.gold, second.gold) == ("", "3"), "the gold is the last question's"


def test_what_is_said_of_an_example_is_kept_and_what_is_not_is_guessed() -> None:
    row = {"question": "首都是哪里？", "reasoning": "想", "answer": "北京", "gold": "北京", "kind": "geo"}
    (one,) = read_row(row, "here")
    assert (one.language, one.scorer, one.kind, one.gold) == ("zh", "exact", "geo", "北京")
    (number,) = read_row({**FORMS["plain"], "expected": 2}, "here")
    assert (number.gold, number.scorer, number.language) == ("2", "number", "en")
    (said,) = read_row({**FORMS["plain"], "final_answer": "2", "scorer": "math", "language": "zh"}, "here")
    assert (said.scorer, said.language) == ("math", "zh")


LINES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=40)


@given(
    turns=st.lists(st.tuples(LINES, LINES), max_size=2), question=LINES, reasoning=LINES, answer=LINES,
    kind=LINES.map(str.strip),
)  # fmt: skip
def test_what_is_written_is_read_back_alike(
    turns: list[tuple[str, str]], question: str, reasoning: str, answer: str, kind: str, tmp_path_factory: Any
) -> None:
    before = [{"role": role, "content": text} for asked, said in turns
              for role, text in (("user", asked), ("assistant", said.strip()))]  # fmt: skip
    one = example(question, reasoning, answer, before=before, gold="2", kind=kind)
    path = tmp_path_factory.getbasetemp() / "round.jsonl"
    (back,) = read_file(write_file([one], path))
    assert (back.messages, back.reasoning, back.answer) == (one.messages, one.reasoning, one.answer)
    assert (back.id, back.gold, back.scorer, back.kind, back.language) == (
        one.id, one.gold, one.scorer, one.kind, one.language,
    )  # fmt: skip


def test_a_written_line_without_earlier_turns_is_a_plain_one(tmp_path: Path) -> None:
    one = example(*WANTED, gold="2")
    assert as_row(one) == {**FORMS["plain"], "gold": "2", "scorer": "number", "language": "en"}
    assert [told(back) for back in read_file(write_file([one, one], tmp_path / "deep" / "a.jsonl"))] == [WANTED] * 2


# --- faults ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{broken", "no JSON"),
        ("[1]", "one object with a training example"),
        ("[", "one object a line"),
        ({"text": "all in one"}, "expected messages (chat); or conversations (ShareGPT); or instruction and output"),
        ({"qestion": "1?", "reasoning": "x", "answer": "2"}, "is 'qestion' meant?"),
        ({"question": "1?", "reasoning": "x"}, "no 'answer'"),
        ({"question": "1?", "anser": "2"}, "is 'anser' meant?"),
        ({"question": "1?", "answer": ["2"]}, "an answer stands where a question was expected|a turn is an object"),
        ({"question": "1?", "answer": True}, "answer must be text, not true or false"),
        ({"question": {"a": 1}, "answer": "2"}, "question must be text, not an object"),
        ({"question": "1?", "answer": "2", "scorer": "nmber"}, "did you mean 'number'?"),
        ({"question": "1?", "answer": "2", "language": "fr"}, "the language is en or zh, not 'fr'"),
        ({"question": "1?", "answer": "<think>\n1+1"}, "<think> is opened and never closed"),
        ({"messages": []}, "a list of turns that is not empty"),
        ({"messages": "hello"}, "a list of turns"),
        ({"messages": ["hello"]}, "turn 1: a turn is an object with role and content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role is system, user or assistant"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "turn 1: an answer stands where a question"),
        ({"messages": [USER]}, "holds no answer"),
        ({"messages": [USER, {"role": "assistant", "content": "<think>a"}]}, "turn 2: <think> is opened"),
        ({"conversations": [{"from": "human"}, {"from": "bard", "value": "x"}]}, "turn 2: from is system, user"),
        ({"instruction": "1?", "input": ""}, "no 'output'"),
    ],
)  # fmt: skip
def test_a_line_at_fault_is_named_with_what_was_expected(row: str | dict[str, Any], said: str, tmp_path: Path) -> None:
    line = row if isinstance(row, str) else json.dumps(row)
    path = written(tmp_path, json.dumps(FORMS["plain"]) + "\n\n" + line + "\n")
    with pytest.raises(UsageError) as caught:
        read_file(path)
    message = str(caught.value)
    assert f"{path}, line 3" in message
    assert any(part in message for part in said.split("|"))


def test_a_file_that_is_not_there_or_empty_is_told(tmp_path: Path) -> None:
    written(tmp_path, [FORMS["plain"]], "traces.jsonl")
    with pytest.raises(UsageError, match=r"did you mean 'traces\.jsonl'"):
        read_file(tmp_path / "trace.jsonl")
    with pytest.raises(UsageError, match="holds no examples: write one a line"):
        read_file(written(tmp_path, "\n\n", "empty.jsonl"))
    with pytest.raises(UsageError, match="folder"):
        read_file(tmp_path)
    with pytest.raises(UsageError, match="name some data"):
        load_examples([])


def test_csv_is_read_by_its_columns(tmp_path: Path) -> None:
    content = '\ufeffQuestion;Reasoning;Answer;gold\r\n"1 + 1 = ?";"1+1=2\nso two";"The answer is \\boxed{2}.";2\r\n'
    (one,) = read_file(written(tmp_path, content, "mine.csv"))
    assert told(one) == WANTED
    assert (one.gold, one.scorer) == ("2", "number")
    with pytest.raises(UsageError, match=r"mine\.csv, line 2: no training example; expected"):
        read_file(written(tmp_path, "a,b\n1,2\n", "mine.csv"))
    with pytest.raises(UsageError, match="line 3: 2 cells where the first line names 3"):
        read_file(written(tmp_path, "question,reasoning,answer\na,b,c\na,b\n", "mine.csv"))


# --- worked problems ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*arithmetic.KINDS, "all"])
def test_worked_arithmetic_is_true_unlike_and_from_the_training_side(kind: str) -> None:
    name = "worked:arithmetic" if kind == "all" else f"worked:arithmetic:{kind}"
    found = load_examples([f"{name}:70"])
    assert len(found) == 70
    assert len({(one.question, one.reasoning) for one in found}) == 70
    assert {one.kind for one in found} == ({kind} if kind != "all" else set(arithmetic.TAUGHT))
    held_out = {item.prompt for item in load_task(name.removeprefix("worked:"), 200)}
    for one in found:
        assert arithmetic.false_statements(one.reasoning) == [], one
        assert f"\\boxed{{{one.gold}}}" in one.answer
        assert not any(prompt.startswith(one.question) for prompt in held_out)


def test_a_worked_sum_of_four_shows_no_sum_of_two_that_is_held_out() -> None:
    found = load_examples(["worked:arithmetic:sum4:300"])
    seen = 0
    for one in found:
        for line in one.reasoning.splitlines():
            numbers, equals, _ = line.partition("=")
            terms = numbers.split("+")
            if equals and len(terms) == 2 and max(map(len, terms)) > 1:  # columns have single digits
                assert arithmetic.side_of("sum", tuple(map(int, terms))) == "train", one.reasoning
                seen += 1
    assert seen >= 3 * len(found)


@pytest.mark.parametrize("name", ["reasoning-gym:chain_sum", "reasoning-gym:chain_sum:min_terms=2,allow_negation=True"])
def test_worked_chain_sums_are_true_line_by_line_and_not_those_that_are_asked(name: str) -> None:
    pytest.importorskip("reasoning_gym", reason="the generators are reasoning-gym's")
    found = load_examples([f"worked:{name}:60"])
    assert len({one.question for one in found}) == 60
    for one in found:
        total = None
        for line in one.reasoning.splitlines():
            left, _, right = line.partition(" = ")
            first, sign, second = left.split(" ")
            assert total in (None, int(first)), one.reasoning
            total = int(first) + (int(second) if sign == "+" else -int(second))
            assert total == int(right), line
        assert one.answer == f"The answer is \\boxed{{{total}}}."
        assert int(one.gold) == total
    asked = {item.prompt for item in load_task(name, 300)}
    assert not asked & {one.question for one in found}


def test_a_trace_in_tens_and_ones_goes_from_left_to_right() -> None:
    assert worked.tens_and_ones("64 + 25 - 3") == ("64 + 20 = 84\n84 + 5 = 89\n89 - 3 = 86", 86)
    assert worked.tens_and_ones("5 + 0 - 300") == ("5 + 0 = 5\n5 - 300 = -295", -295)


def test_worked_names_say_how_many_and_faults_are_told() -> None:
    assert len(load_examples(["worked:arithmetic:sum2:30"], limit=7)) == 7
    assert [one.question for one in load_examples(["worked:arithmetic:sum2:5"])] == [
        one.question for one in load_examples(["worked:arithmetic:sum2:9"], limit=5)
    ], "fewer are the beginning of more"
    assert load_examples(["worked:arithmetic:sum2:5"], seed=1) != load_examples(["worked:arithmetic:sum2:5"])
    assert len(load_examples(["worked:arithmetic"])) == worked.USUAL
    with pytest.raises(UnknownName, match="sum2"):
        load_examples(["worked:arithmetic:smu2"])
    with pytest.raises(UnknownName, match="did you mean 'arithmetic'"):
        load_examples(["worked:arithmetc"])
    with pytest.raises(UsageError, match="at least one"):
        load_examples(["worked:arithmetic:sum2:0"])
    with pytest.raises(UsageError, match=r"has [\d,]+ different problems, not 50,000"):
        load_examples(["worked:arithmetic:remainder7:50000"])


def test_sources_stand_behind_one_another_and_the_limit_counts_for_each(tmp_path: Path) -> None:
    path = written(tmp_path, [FORMS["plain"]] * 5)
    found = load_examples([str(path), "worked:arithmetic:sum2:9"], limit=3)
    assert [one.source.partition(",")[0] for one in found] == [str(path)] * 3 + ["worked:arithmetic:sum2"] * 3


def test_a_share_of_the_questions_gets_r1s_instruction_always_the_same_ones() -> None:
    found = load_examples(["worked:arithmetic:400"])
    half = instructed(found, 0.5)
    with_it = [one.question for one in half if "\\boxed" in one.question]
    assert 140 < len(with_it) < 260
    assert half == instructed(found, 0.5)
    assert [one.question for one in reversed(instructed(found[::-1], 0.5))] == [one.question for one in half]
    assert instructed(found, 0.0) == found
    assert all("\\boxed" in one.question for one in instructed(found, 1.0))
    assert instructed(instructed(found), 1.0) == instructed(found), "never twice"
    with pytest.raises(UsageError, match="from 0 to 1"):
        instructed(found, 1.5)


# --- checks ------------------------------------------------------------------------------------------------


def checked(examples: Sequence[Example], **options: Any) -> Checked:
    return asyncio.run(check(examples, **options))


def asked(prompt: str, scorer: str = "math", language: str = "en") -> Item:
    return Item("e1", with_instruction(prompt, scorer, language), "2", "k", language, scorer)


GOOD = example("What is 2 + 2?", "2+2=4", "\\boxed{4}", gold="4", source="good")
LONG = " ".join(f"w{at}" for at in range(40))
FAULTS: dict[str, Callable[[], tuple[Example, dict[str, Any]]]] = {
    "empty answer": lambda: (example("Q?", "think", " "), {}),
    "empty trace": lambda: (example("Q?", " \n", "2"), {}),
    "cut off": lambda: (example("Q?", "so it is \\boxed{4", "It is 4"), {}),
    "disagrees": lambda: (example("Q?", "1+1=3", "\\boxed{3}", gold="2"), {}),
    "duplicate": lambda: (example("what is  2 + 2?", "2+2=4", "\\boxed{4}", gold="4"), {}),
    "asked in the evaluation": lambda: (example("1 + 1 = ?", "t", "2"), {"evaluation": [asked("1+1=?")]}),
    "overlaps the evaluation": lambda: (
        example(f"Now {LONG}. Why?", "t", "2"),
        {"evaluation": [asked(f"Then {LONG}: how?")]},
    ),
    "too long": lambda: (example("Q?", "t " * 50, "2"), {"length": lambda one: len(one.reasoning), "context": 40}),
}


def test_every_reason_has_an_example_here() -> None:
    assert list(FAULTS) == list(REASONS)


@pytest.mark.parametrize("reason", FAULTS)
def test_each_fault_is_found_and_what_is_good_is_kept(reason: str) -> None:
    bad, options = FAULTS[reason]()
    found = checked([GOOD, bad], **options)
    assert found.kept == (GOOD,)
    assert [(one.example, one.reason) for one in found.dropped] == [(bad, reason)]
    assert found.counts == {reason: 1}
    said = "\n".join(found.told())
    assert "1 of 2 examples kept" in said
    assert REASONS[reason] in said
    assert list(found.table().index) == ["kept", reason]


@pytest.mark.parametrize(
    ("reasoning", "answer"),
    [
        ("then <think> again", "2"),
        ("t", "2 </think> 3"),
        ("t", "<think> 2"),
        ("t", "\\boxed{\\frac{1}{2}"),
        ("\\boxed{2}, no: \\boxed{", "2"),
    ],
)
def test_a_text_that_stops_in_the_middle_is_cut_off(reasoning: str, answer: str) -> None:
    assert checked([GOOD, example("Q?", reasoning, answer)]).counts == {"cut off": 1}


def test_of_duplicates_the_first_is_kept_and_another_trace_is_none() -> None:
    twice = example("What is 2 + 2?", "2+2=4", "\\boxed{4}", gold="4", source="second")
    other = example("What is 2 + 2?", "2 more than 2 is 4", "\\boxed{4}", gold="4", source="third")
    found = checked([GOOD, twice, other, other])
    assert [one.source for one in found.kept] == ["good", "third"]
    assert found.counts == {"duplicate": 2}
    assert found.repeated == 1


def test_what_has_no_gold_is_kept_and_counted() -> None:
    found = checked([GOOD, example("Q?", "t", "whatever")])
    assert (len(found.kept), found.unscored) == (2, 1)


def test_a_base_that_does_not_think_needs_no_trace() -> None:
    assert len(checked([example("Q?", "", "2")], needs_reasoning=False).kept) == 1


STORY = "Li Wei has twelve apples and gives three of them to each of his two little sisters before lunch"
CHINESE = "小明有十二个苹果，午饭前给了两个妹妹每人三个，还剩几个？"


@pytest.mark.parametrize(
    ("question", "evaluation", "reason"),
    [
        (STORY, STORY.upper() + "?", "asked in the evaluation"),
        (with_instruction(STORY, "math", "en"), STORY, "asked in the evaluation"),
        (CHINESE, CHINESE.replace("，", ", "), "asked in the evaluation"),
        (f"{STORY}. How many has he?", f"At school {STORY}; how many were there?", "overlaps the evaluation"),
        (f"从前，{CHINESE}说说看", f"{CHINESE}请回答", "overlaps the evaluation"),
    ],
)
def test_an_overlap_is_found_whatever_stands_around_it(question: str, evaluation: str, reason: str) -> None:
    language = "zh" if question[-1] > "\u3000" else "en"
    found = checked([GOOD, example(question, "t", "2")], evaluation=[asked(evaluation, language=language)])
    assert found.counts == {reason: 1}


@pytest.mark.parametrize("scorer", ["math", "choice"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_r1s_own_instruction_is_no_overlap(scorer: str, language: str) -> None:
    one = example(with_instruction("What has four legs? A) a cat B) a bird", scorer, language), "t", "A")
    other = asked("Which is red? A) a rose B) the sky", scorer, language)
    assert checked([one], evaluation=[other]).kept == (one,)


def test_twelve_words_in_a_row_are_no_overlap() -> None:
    twelve = " ".join(f"w{at}" for at in range(12))
    one = example(f"here {twelve} there", "t", "2")
    assert checked([one], evaluation=[asked(f"now {twelve} then")]).kept == (one,)
    assert checked([GOOD, one], evaluation=[asked(f"here {twelve} then")]).counts == {"overlaps the evaluation": 1}


def test_lengths_are_told_of_what_is_kept() -> None:
    rows = [example(f"Q{at}?", "t" * at, "2") for at in range(1, 101)]
    found = checked(rows, length=lambda one: len(one.reasoning), context=90)
    assert found.counts == {"too long": 10}
    assert found.lengths is not None
    assert (found.lengths.p50, found.lengths.longest, found.lengths.context) == (45, 90, 90)
    assert found.lengths.total == sum(range(1, 91))
    assert "longest 90 of 90" in found.told()[-1]
    assert checked(rows).lengths is None


def test_nothing_left_is_told_with_what_was_wrong_with_how_many() -> None:
    with pytest.raises(UsageError, match="no usable example is left of 3: 1 empty answer, 2 empty trace"):
        checked([example("Q?", "t", ""), example("Q?", "", "1"), example("Q?", "", "2")])
    with pytest.raises(UsageError, match="there were none"):
        checked([])
