"""Training data: every form that is read, what is refused with its line, worked problems, and the checks."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsr1kit.compare import arithmetic
from dsr1kit.compare.arithmetic import KINDS, TAUGHT, false_statements
from dsr1kit.compare.items import Item, with_instruction
from dsr1kit.compare.tasks import load_task
from dsr1kit.errors import RunError, UnknownName, UsageError
from dsr1kit.finetune.checks import NGRAM, REASONS, Checked, check
from dsr1kit.finetune.data import Example, as_row, example, instructed, load_examples, read_file, write_file
from dsr1kit.finetune.worked import tens_and_ones

GOOD = '{"question": "1 + 1 = ?", "reasoning": "1+1=2", "answer": "It is \\\\boxed{2}."}\n'
TAGGED = "<think>\n1+1=2\n</think>\n\nIt is 2."


def written(folder: Path, content: str | bytes, name: str = "mine.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(folder: Path, *rows: Any) -> list[Example]:
    return read_file(written(folder, "".join(json.dumps(row) + "\n" for row in rows)))


def told(one: Example) -> tuple[str, str, str]:
    return one.question, one.reasoning, one.answer


# --- forms ---------------------------------------------------------------------------------------------------------

USER, ASSISTANT = {"role": "user", "content": "1 + 1 = ?"}, {"role": "assistant", "content": TAGGED}


@pytest.mark.parametrize(
    "row",
    [
        {"question": "1 + 1 = ?", "reasoning": "1+1=2", "answer": "It is 2."},
        {"problem": "1 + 1 = ?", "thinking": "1+1=2", "response": "It is 2."},
        {"prompt": "1 + 1 = ?", "trace": "\n1+1=2\n", "completion": "\n\nIt is 2.\n"},
        {"prompt": "1 + 1 = ?", "reasoning_content": "1+1=2", "output": "It is 2."},
        {"question": "1 + 1 = ?", "answer": TAGGED},
        {"question": "1 + 1 = ?", "answer": "1+1=2\n</think>\n\nIt is 2."},  # R1's template opens the thinking
        {"messages": [USER, ASSISTANT]},
        {"messages": [USER, {"role": "assistant", "content": "It is 2.", "reasoning_content": "1+1=2"}]},
        {"messages": [USER, {"role": "assistant", "content": "It is 2.", "thinking": "1+1=2"}]},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": "1 + 1 = ?", "completion": [ASSISTANT]},
        {"prompt": [USER], "completion": TAGGED},
        {"conversations": [{"from": "human", "value": "1 + 1 = ?"}, {"from": "gpt", "value": TAGGED}]},
        {"conversations": [{"role": "user", "content": "1 + 1 = ?"}, {"role": "assistant", "content": TAGGED}]},
        {"instruction": "1 + 1 = ?", "input": "", "output": TAGGED},
        {"instruction": "1 + 1 = ?", "output": "It is 2.", "reasoning": "1+1=2"},
    ],
)
def test_each_form_holds_the_same_example(row: dict[str, Any], tmp_path: Path) -> None:
    (one,) = read(tmp_path, row)
    assert told(one) == ("1 + 1 = ?", "1+1=2", "It is 2.")
    assert one.messages == ({"role": "user", "content": "1 + 1 = ?"},)
    assert (one.gold, one.language) == ("", "en")
    assert one.source == f"{tmp_path / 'mine.jsonl'}, line 1"


def test_instruction_and_input_of_an_alpaca_line_are_one_question(tmp_path: Path) -> None:
    (one,) = read(tmp_path, {"instruction": "Add.", "input": "1 and 1", "output": "2"})
    assert told(one) == ("Add.\n\n1 and 1", "", "2")


def test_what_is_told_beside_is_kept_and_what_is_not_is_guessed(tmp_path: Path) -> None:
    first, second = read(
        tmp_path,
        {"question": "Q", "reasoning": "R", "answer": "A", "gold": 7, "kind": "k", "language": "zh",
         "scorer": "quantity"},
        {"problem": "首都是哪里？", "answer": "北京", "final_answer": "北京"},
    )  # fmt: skip
    assert (first.gold, first.kind, first.language, first.scorer) == ("7", "k", "zh", "quantity")
    assert (second.gold, second.language, second.scorer) == ("北京", "zh", "exact")


def test_a_conversation_gives_an_example_for_each_answer_without_the_earlier_thinking(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be short."},
        USER,
        ASSISTANT,
        {"role": "user", "content": "And 2 + 2?"},
        {"role": "assistant", "content": "<think>2+2=4</think>4"},
    ]
    first, second = read(tmp_path, {"messages": turns, "gold": "4"})
    assert told(first) == ("1 + 1 = ?", "1+1=2", "It is 2.")
    assert told(second) == ("And 2 + 2?", "2+2=4", "4")
    assert [turn["content"] for turn in second.messages] == ["Be short.", "1 + 1 = ?", "It is 2.", "And 2 + 2?"]
    assert (first.gold, second.gold) == ("", "4")


def test_csv_and_jsonl_of_the_same_rows_are_the_same_examples(tmp_path: Path) -> None:
    table = 'question;reasoning;answer;gold\n"What is 1 + 1;\nexactly?";"1+1=2\nso 2";It is 2.;2\n'
    (one,) = read_file(written(tmp_path, table, "mine.csv"))
    row = {"question": "What is 1 + 1;\nexactly?", "reasoning": "1+1=2\nso 2", "answer": "It is 2.", "gold": "2"}
    (other,) = read(tmp_path, row)
    assert replace(one, source="") == replace(other, source="")
    assert one.id == other.id


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
TURN = st.tuples(TEXT, TEXT).map(
    lambda both: [{"role": "user", "content": both[0]}, {"role": "assistant", "content": both[1].strip()}]
)


def _plain(text: str) -> bool:
    return "think>" not in text


@settings(max_examples=100, deadline=None)
@given(
    question=TEXT.map(str.strip), reasoning=TEXT.filter(_plain), answer=TEXT.filter(_plain),
    gold=st.sampled_from(["", "2", "北京", "x^2"]), before=st.lists(TURN, max_size=2),
)  # fmt: skip
def test_what_is_written_reads_back_alike(
    question: str,
    reasoning: str,
    answer: str,
    gold: str,
    before: Sequence[Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    turns = [turn for pair in before for turn in pair]
    if any("think>" in turn["content"] for turn in turns):
        turns = []
    one = example(question, reasoning, answer, before=turns, gold=gold, kind="k")
    path = write_file([one, one], tmp_path_factory.getbasetemp() / "round" / "trip.jsonl")
    first, second = read_file(path)
    assert replace(first, source="") == one
    assert (first.source, second.source) == (f"{path}, line 1", f"{path}, line 2")


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be written"):
        write_file([], written(tmp_path, "", "file") / "below.jsonl")


def test_a_line_holds_only_what_is_set() -> None:
    assert as_row(example("Q", "R", "A")) == {
        "question": "Q", "reasoning": "R", "answer": "A", "scorer": "math", "language": "en",
    }  # fmt: skip


# --- bad lines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", r'holds no examples: write one a line, as \{"question"'),
        (GOOD + "{not json\n", r"line 2: no JSON \(.*column 2\)"),
        ("[\n" + GOOD + "]", r"line 1: no JSON .*; write one object a line \(JSONL\)"),
        ('["a"]\n', "line 1: a line holds one object with a training example"),
        (GOOD.encode() + b'{"question": "\xd6\xd0"}', "line 2: byte 15 is not UTF-8"),
        (
            GOOD + '{"text": "hello"}\n',
            (
                r"line 2: no training example; expected messages \(chat\); or conversations \(ShareGPT\); or "
                r"instruction and output \(Alpaca\); or question, reasoning and answer \(plain\); the line has 'text'"
            ),
        ),
        ('{"qestion": "1?", "answer": 1}', r"the line has 'qestion', 'answer' \(is 'qestion' meant\?\)"),
        ("{}", "line 1: no training example; .*the line has nothing"),
        (GOOD + '{"question": "1?", "anwser": "2"}', r"line 2: no 'answer' \(is 'anwser' meant\?\); a plain line"),
        ('{"question": ["a"], "answer": "2"}', r"line 1, turn 1: a turn is an object with role and content"),
        ('{"question": {"a": 1}, "answer": "2"}', "line 1: question must be text, not an object"),
        ('{"question": "1?", "answer": true}', "line 1: answer must be text, not true or false"),
        ('{"question": "1?", "reasoning": ["a"], "answer": "2"}', "line 1: reasoning must be text, not a list"),
        ('{"question": "1?", "answer": "2", "scorer": "nubmer"}', "unknown scorer 'nubmer'; did you mean 'number'"),
        ('{"question": "1?", "answer": "2", "language": "fr"}', "line 1: the language is en or zh, not 'fr'"),
        ('{"messages": []}', "line 1: a conversation is a list of turns that is not empty"),
        ('{"messages": "hello"}', "a conversation is a list of turns that is not empty, not 'hello'"),
        ('{"messages": [{"role": "user", "content": "1?"}]}', "line 1: the conversation holds no answer to train on"),
        ('{"messages": [{"role": "assistant", "content": "2"}]}', "turn 1: an answer stands where a question"),
        ('{"messages": [{"role": "robot", "content": "2"}]}', r"turn 1: role is system, user or assistant .*'robot'"),
        ('{"conversations": [{"from": "humman", "value": "2"}]}', "turn 1: from is system, user or assistant"),
        ('{"instruction": "Add."}', "line 1: no 'output'; an Alpaca line has instruction, input"),
        ('{"question": "1?", "answer": "<think>\\n1+1"}', "line 1: <think> is opened and never closed with </think>"),
        ('{"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "<think>1"}]}',
         "line 1, turn 2: <think> is opened and never closed with </think>: the trace was cut off"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_with_what_was_expected(content: str | bytes, expected: str, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    with pytest.raises(UsageError, match=expected) as caught:
        load_examples([str(path)])
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("question,reasoning\n1?,2\n", "line 2: no 'answer'"),
        ("question,answer\n1, 2 or 3?,2\n", "line 2: 3 cells where the first line names 2 columns"),
        ('question,answer\n1?,"never closed\n', "line 2: no CSV"),
        ("questions,answers\n1?,2\n", r"line 2: no training example.*\(is 'questions' meant\?\)"),
    ],
)
def test_a_bad_line_of_csv_is_named(content: str, expected: str, tmp_path: Path) -> None:
    path = written(tmp_path, content, "mine.csv")
    with pytest.raises(UsageError, match=expected) as caught:
        read_file(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_and_no_source_at_all_are_told(tmp_path: Path) -> None:
    written(tmp_path, GOOD, "training.jsonl")
    with pytest.raises(UsageError, match=r"there is no file .*; did you mean 'training\.jsonl'\?"):
        load_examples([str(tmp_path / "trainin.jsonl")])
    with pytest.raises(UsageError, match=r"name some data: a \.jsonl or \.csv file, set:NAME or worked:TASK"):
        load_examples([])


@settings(max_examples=80, deadline=None)
@given(content=st.binary(max_size=200) | st.text(alphabet='{}[]":,\n questionanswermessages12<think>/', max_size=300))
@pytest.mark.parametrize("name", ["fuzz.jsonl", "fuzz.csv"])
def test_any_file_at_all_is_read_or_refused_by_name(
    name: str, content: str | bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = written(tmp_path_factory.getbasetemp(), content, name)
    try:
        said = str(path) if read_file(path) else "nothing"
    except UsageError as error:
        said = str(error)
    assert str(path) in said


# --- worked problems -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_worked_problems_are_true_and_from_the_training_side(kind: str) -> None:
    found = load_examples([f"worked:arithmetic:{kind}:60"], seed=3)
    assert len({one.question for one in found} | {one.id for one in found}) >= 60
    assert len({one.id for one in found}) == 60
    held_out = {item.question for item in arithmetic.generate(kind, "held_out", 150, 3)}
    for one in found:
        assert (one.kind, one.scorer, one.source) == (kind, "number", f"worked:arithmetic:{kind}")
        assert false_statements(one.reasoning) == []
        assert f"\\boxed{{{one.gold}}}" in one.answer
        assert one.question not in held_out


def test_no_sum_of_two_that_is_asked_to_measure_stands_in_a_trace_of_four() -> None:
    for one in load_examples(["worked:arithmetic:sum4:300"]):
        first, *rest = [int(number) for number in one.reasoning.partition("\n")[0].split("+")]
        for number in rest:
            assert arithmetic.side_of("sum", (first, number)) == "train"
            first += number
        assert str(first) == one.gold


def test_all_that_was_taught_comes_in_turn() -> None:
    found = load_examples(["worked:arithmetic:70"])
    assert {one.kind for one in found} == set(TAUGHT)
    assert {sum(one.kind == kind for one in found) for kind in TAUGHT} == {10}


def test_the_seed_decides_and_limits_hold() -> None:
    assert load_examples(["worked:arithmetic:sum2:9"], seed=1) == load_examples(["worked:arithmetic:sum2:9"], seed=1)
    assert load_examples(["worked:arithmetic:sum2:9"], seed=1) != load_examples(["worked:arithmetic:sum2:9"], seed=2)
    assert len(load_examples(["worked:arithmetic:sum2", "worked:arithmetic:sum3:7"], limit=5)) == 10
    assert load_examples(["worked:arithmetic:sum2"], limit=3) == load_examples(["worked:arithmetic:sum2:3"])


@pytest.mark.parametrize(
    ("name", "error", "expected"),
    [
        ("worked:arithmetic:sum5", UnknownName, "sum5"),
        ("worked:aritmetic", UnknownName, "unknown worked task 'aritmetic'; did you mean 'arithmetic'"),
        ("worked:", UnknownName, "unknown worked task"),
        ("worked:arithmetic:sum2:0", UsageError, "must give at least one example"),
        ("worked:arithmetic:remainder7:2400", UsageError, r"has [\d,]+ different problems, not 2,400"),
    ],
)
def test_worked_problems_that_there_are_not_are_refused(name: str, error: type[UsageError], expected: str) -> None:
    with pytest.raises(error, match=expected):
        load_examples([name])


@settings(max_examples=100, deadline=None)
@given(numbers=st.lists(st.integers(0, 999), min_size=1, max_size=6), data=st.data())
def test_a_chain_is_worked_out_in_true_lines(numbers: list[int], data: st.DataObject) -> None:
    signs = [data.draw(st.sampled_from("+-")) for _ in numbers[1:]]
    chain = str(numbers[0]) + "".join(f" {sign} {number}" for sign, number in zip(signs, numbers[1:], strict=True))
    trace, value = tens_and_ones(chain)
    assert value == eval(chain)  # noqa: S307 - digits and signs of our own
    total = numbers[0]
    for line in trace.splitlines():
        left, result = line.split(" = ")
        assert left.split()[0] == str(total)
        total = int(result)
        assert eval(left) == total  # noqa: S307
    assert total == value


def test_chain_sums_have_true_traces_and_are_none_that_are_asked() -> None:
    pytest.importorskip("reasoning_gym", reason="the generator is reasoning-gym's")
    from dsr1kit.compare import gym

    name = "reasoning-gym:chain_sum:min_terms=2,max_terms=3,min_digits=2,max_digits=3"
    found = load_examples([f"worked:{name}:40"])
    assert len(found) == 40
    for one in found:
        assert all(eval(left) == int(right) for left, right in re.findall(r"(.+) = (-?\d+)", one.reasoning))  # noqa: S307
        assert f"\\boxed{{{one.gold}}}" in one.answer
    asked = {item.prompt for item in gym.load(name, 40, 0)}
    assert len(asked & {one.question for one in found}) <= 1


def test_the_instruction_is_put_behind_the_share_that_is_asked_for() -> None:
    found = load_examples(["worked:arithmetic:sum2:200"])
    some = instructed(found, 0.5)
    count = sum("\\boxed" in one.question for one in some)
    assert 70 < count < 130
    assert instructed(found, 0.5) == some
    whole = {one.question for one in instructed(found, 1.0)}
    assert whole == {with_instruction(one.question, "number", one.language, " ") for one in found}
    assert whole & {item.prompt for item in load_task("practice:sum2", 2000)}, "as the task asks it"
    (own,) = instructed([example("1 + 1 = ?", "1+1=2", "\\boxed{2}")], 1.0)
    assert own.question == with_instruction("1 + 1 = ?", "number", "en")
    assert instructed(found, 0.0) == found
    with pytest.raises(UsageError, match="share of instructed questions must be from 0 to 1, not 2"):
        instructed(found, 2)


# --- checks --------------------------------------------------------------------------------------------------------


def looked_at(examples: Sequence[Example], **options: Any) -> Checked:
    return asyncio.run(check(examples, **options))


def item(prompt: str, language: str = "en") -> Item:
    return Item("id", with_instruction(prompt, "number", language), "1", "k", language, "number")


LONG = "Anna has 12 red apples, 7 green ones and 3 pears in her basket. How many pieces of fruit are there?"
CHINESE = "小明有12个红苹果和7个青苹果，他又买了3个梨。一共有多少个水果？"
SOUND = example("What is 2 + 2?", "2+2=4", "It is \\boxed{4}.", gold="4")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (example("Q?", "R", "  "), "empty answer"),
        (example("Q?", " \n", "4"), "empty trace"),
        (example("Q?", "R <think> again", "4"), "cut off"),
        (example("Q?", "R", "</think> 4"), "cut off"),
        (example("Q?", "R", "It is \\boxed{4"), "cut off"),
        (example("Q?", "R", "It is \\boxed{3}, no, \\boxed{\\frac{1}{2"), "cut off"),
        (example("Q?", "so \\boxed{4", "4"), "cut off"),
        (example("What is 2 + 3?", "2+3=6", "It is \\boxed{6}.", gold="5"), "disagrees"),
        (example("what is  2 + 2?", "2+2=4", "It is \\boxed{4}."), "duplicate"),
        (example("What is 48 + 27?", "R", "75"), "asked in the evaluation"),
        (example("what is 48+27", "R", "75"), "asked in the evaluation"),
        (example(f"Once more: {LONG}", "R", "22"), "overlaps the evaluation"),
        (example(f"题目：{CHINESE}", "R", "22"), "overlaps the evaluation"),
        (example("Q?", "R" * 200, "4"), "too long"),
    ],
)
def test_each_fault_is_found_by_its_name(bad: Example, reason: str) -> None:
    asked = [item("What is 48 + 27?"), item(LONG), item(CHINESE, "zh")]
    found = looked_at([SOUND, bad], evaluation=asked, length=lambda one: len(one.reasoning), context=100)
    assert found.kept == (SOUND,)
    assert found.counts == {reason: 1}
    assert found.dropped[0].example == bad
    assert list(found.table().index) == ["kept", reason]
    assert any(f"1 dropped, {reason}: {REASONS[reason]}" in line for line in found.told())


def test_every_reason_has_a_case_above() -> None:
    mark = next(one for one in test_each_fault_is_found_by_its_name.pytestmark if one.name == "parametrize")  # type: ignore[attr-defined]
    assert {reason for _, reason in mark.args[1]} == set(REASONS)


def test_of_duplicates_the_first_is_kept_and_other_traces_are_counted() -> None:
    first, again = replace(SOUND, source="a"), replace(SOUND, source="b")
    other = example("What is 2 + 2?", "4=2+2", "It is \\boxed{4}.", gold="4")
    found = looked_at([first, again, other])
    assert [one.source for one in found.kept] == ["a", ""]
    assert (found.counts, found.repeated, found.lengths) == ({"duplicate": 1}, 1, None)


def test_r1s_instruction_is_no_overlap() -> None:
    """All questions share it, and it is as long as the words that make an overlap."""
    trained = [
        example(with_instruction("What is 5 + 5?", "number", "en"), "R", "10"),
        example(with_instruction("5 + 6 等于多少？", "number", "zh"), "R", "11"),
    ]
    asked = [item("What is 1 + 1?"), item("1 + 2 等于多少？", "zh")]
    assert looked_at(trained, evaluation=asked).kept == tuple(trained)
    same = example("What is 1 + 1?", "R", "2")  # without the instruction that the evaluation has
    with pytest.raises(UsageError, match="1 asked in the evaluation"):
        looked_at([same], evaluation=asked)


def test_thirteen_words_in_a_row_overlap_and_twelve_do_not() -> None:
    words = [f"w{at}" for at in range(40)]
    asked = [item(" ".join(words))]
    for count, kept in ((NGRAM - 1, 1), (NGRAM, 0)):
        one = example(f"x {' '.join(words[5 : 5 + count])} y", "R", "4")
        assert len(looked_at([SOUND, one], evaluation=asked).kept) == 1 + kept


def test_a_trace_is_not_asked_for_where_none_is_needed() -> None:
    bare = example("Q?", "", "4")
    assert looked_at([bare], needs_reasoning=False).kept == (bare,)


def test_golds_that_are_missing_are_counted_and_lengths_are_told() -> None:
    many = [example(f"What is {n} + 1?", "R" * n, str(n + 1), gold=str(n + 1) if n % 2 else "") for n in range(1, 11)]
    found = looked_at(many, length=lambda one: len(one.reasoning), context=20)
    assert found.unscored == 5
    assert found.lengths is not None
    assert (found.lengths.p50, found.lengths.longest, found.lengths.total, found.lengths.context) == (5, 10, 55, 20)
    assert "10 of 10 examples kept; 5 of them without a gold" in found.told()[0]
    assert "longest 10 of 20; 55 in all" in found.told()[-1]


def test_nothing_that_is_left_is_refused_with_what_was_wrong() -> None:
    bad = [example("Q?", "", "4"), example("P?", "", "4"), example("Q?", "R", "")]
    with pytest.raises(
        UsageError, match=r"no usable example is left of 3: 1 empty answer, 2 empty trace\. 1 dropped, "
    ):
        looked_at(bad)
    with pytest.raises(UsageError, match="no usable example is left of 0: there were none"):
        looked_at([])
