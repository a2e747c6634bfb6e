"""A person's own questions: what is read, what is guessed, and what is refused with its line."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsr1kit.compare.task_files import guessed_scorer, load
from dsr1kit.compare.tasks import digest, facts, load_task
from dsr1kit.errors import UsageError

GOOD = '{"question": "1 + 1 = ?", "answer": "2"}\n'


def written(tmp_path: Path, content: str | bytes, name: str = "mine.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_line_of_json_is_a_question_and_what_is_missing_is_guessed(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD + '\n{"question": "首都是哪里？", "answer": "北京", "kind": "geo", "extra": [1]}\n')
    first, second = load(path)
    assert (first.gold, first.scorer, first.language, first.kind) == ("2", "number", "en", "mine")
    assert first.prompt == "1 + 1 = ?\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert (second.gold, second.scorer, second.language, second.kind) == ("北京", "exact", "zh", "geo")
    assert second.prompt.endswith("请逐步推理，并把最终答案放在 \\boxed{} 中。")
    assert sorted(load_task(f"file:{path}", 0), key=lambda i: i.id) == sorted([first, second], key=lambda i: i.id)
    assert load_task(f"file:{path}", 1) == load_task(f"file:{path}", 2)[:1]
    told = facts(f"file:{path}")
    assert (told.size, told.offline, told.languages) == (2, True, ("en", "zh"))


def test_everything_can_be_said_and_numbers_need_no_quotes(tmp_path: Path) -> None:
    row = {"question": "Q", "answer": 1.5, "id": 7, "kind": "k", "language": "zh", "scorer": "quantity"}
    (item,) = load(written(tmp_path, json.dumps(row)))
    assert (item.id, item.gold, item.kind, item.language, item.scorer) == ("7", "1.5", "k", "zh", "quantity")


def test_a_question_that_speaks_of_the_box_is_sent_as_it_is_and_a_choice_asks_for_the_letter(tmp_path: Path) -> None:
    rows = [{"question": "Put it in \\boxed{}.", "answer": "2"}, {"question": "A) x B) y", "answer": "B"}]
    boxed, choice = load(written(tmp_path, "\n".join(map(json.dumps, rows))))
    assert boxed.prompt == "Put it in \\boxed{}."
    assert choice.scorer == "choice"
    assert choice.prompt.endswith("put the letter of your final answer within \\boxed{}.")


@pytest.mark.parametrize(
    ("gold", "scorer"),
    [
        ("2", "number"), ("-1,234.5", "number"), ("1/2", "number"), ("B", "choice"), ("F", "exact"), ("AB", "exact"),
        (r"\frac{1}{2}", "number"), (r"\sqrt{2}", "math"), ("x^2", "math"), ("$x$", "math"), ("Paris", "exact"),
        ("2024-03-05", "date"), ("1.5 h", "exact"), ("Paris | London", "exact"),
    ],
)  # fmt: skip
def test_the_scorer_is_guessed_from_the_answer(gold: str, scorer: str) -> None:
    assert guessed_scorer(gold) == scorer


def test_ids_come_from_the_questions_so_that_a_file_may_be_rearranged(tmp_path: Path) -> None:
    lines = [json.dumps({"question": f"What is {i}?", "answer": i}) + "\n" for i in range(30)]
    forth = load(written(tmp_path, "".join(lines)))
    back = load(written(tmp_path, "".join(reversed(lines)), "back.jsonl"))
    assert {item.prompt: item.id for item in forth} == {item.prompt: item.id for item in back}
    assert len({item.id for item in forth}) == 30
    assert digest(forth) != digest(back)


def test_csv_with_a_mark_semicolons_and_line_ends_inside_quotes(tmp_path: Path) -> None:
    content = (
        '\ufeffQuestion;Answer;kind\r\n"Two lines:\n1 + 1; what is it?";2;sums\r\n\r\n"He said ""x"".";"a, b";text\r\n'
    )
    first, second = load(written(tmp_path, content, "mine.csv"))
    assert first.prompt.startswith("Two lines:\n1 + 1; what is it?")
    assert (first.gold, first.kind) == ("2", "sums")
    assert second.prompt.startswith('He said "x".')
    assert second.gold == "a, b"


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_same_rows_in_csv_and_jsonl_are_the_same_items(delimiter: str, tmp_path: Path) -> None:
    rows = "".join(f"{i}{delimiter}What is {i} + 1?{delimiter}{i + 1}\n" for i in range(5))
    path = written(tmp_path, f"id{delimiter}question{delimiter}answer\n{rows}", "mine.csv")
    lines = "".join(
        json.dumps({"id": str(i), "question": f"What is {i} + 1?", "answer": str(i + 1)}) + "\n" for i in range(5)
    )
    assert load(path) == load(written(tmp_path, lines))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (GOOD + '{"question": "1?"}\n', r"line 2: no 'answer'; a line needs .* and has 'question'"),
        (GOOD + '{"question": "1?", "anwser": 1}\n', r"line 2: no 'answer' \(is 'anwser' meant\?\)"),
        ("", "holds no questions: write one a line"),
        ("\n\n", "holds no questions"),
        (GOOD + "\n" + GOOD, "line 3: this question is on line 1 already"),
        (GOOD + 2 * '{"question": "?", "answer": 1, "id": "a"}\n', "line 3: the id 'a' is on line 2 already"),
        (GOOD + "{not json\n", r"line 2: no JSON \(.*column 2\)"),
        ("[\n" + GOOD + "]", r"line 1: no JSON .*; write one object a line \(JSONL\), not one document"),
        ('["a", "b"]\n', "line 1: a line holds one object"),
        ("[" * 100_000, "line 1: no JSON"),
        (GOOD.encode() + b'{"question": "\xd6\xd0", "answer": 1}', "line 2: byte 15 is not UTF-8; save the file as"),
        ('{"question": "?", "answer": 1, "scorer": "nubmer"}', "line 1: unknown scorer 'nubmer'; did you mean"),
        ('{"question": "?", "answer": 1, "scorer": "reasoning-gym"}', "line 1: unknown scorer 'reasoning-gym'"),
        ('{"question": "  ", "answer": 1}', "line 1: the question is empty"),
        ('{"question": null, "answer": 1}', "line 1: the question is empty"),
        ('{"question": "?", "answer": ""}', "line 1: the answer is empty"),
        ('{"question": "?", "answer": [1]}', "line 1: answer must be text or a number, not a list"),
        ('{"question": "?", "answer": true}', "line 1: answer must be text or a number, not true or false"),
        ('{"question": "?", "answer": 1, "language": "fr"}', "line 1: the language is en or zh, not 'fr'"),
    ],
)  # fmt: skip
def test_bad_lines_of_json_are_named(content: str | bytes, told: str, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    with pytest.raises(UsageError, match=told) as caught:
        load_task(f"file:{path}", 1)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("question,solution\n1?,2\n", "line 1: no column 'answer'; the first line names the columns, and they are"),
        ("qestion,answer\n1?,2\n", r"line 1: no column 'question' \(is 'qestion' meant\?\)"),
        ("question,answer,answer\n1?,2,3\n", "line 1: two columns are named 'answer'"),
        ('question,answer\n"a\nb",1\n2?,\n', "line 4: the answer is empty"),
        ("question,answer\n1, 2 or 3?,2\n", "line 2: 3 cells where the first line names 2 columns"),
        ('question,answer\n1?,2\n"never closed,3\n4?,5\n', "line 3: no CSV .*is a quotation mark never closed"),
        ("question,answer\n", "holds no questions"),
        ("", "holds no questions"),
        ("question,answer\n1?,2\n1?,2\n", "line 3: this question is on line 2 already"),
        (b"question,answer\n\xd6\xd0,2\n", "line 2: byte 1 is not UTF-8"),
        ('question,answer\n"a\n\nb",1\n"c",2,3\n', "line 5: 3 cells"),
    ],
)
def test_bad_lines_of_csv_are_named_as_an_editor_counts_them(content: str | bytes, told: str, tmp_path: Path) -> None:
    path = written(tmp_path, content, "mine.csv")
    with pytest.raises(UsageError, match=told) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.csv"])
def test_a_line_of_50_mb_is_refused_without_being_held(name: str, tmp_path: Path) -> None:
    head = "question,answer\n" if name.endswith("csv") else GOOD
    path = tmp_path / name
    with path.open("wb") as file:
        file.write(head.encode())
        for _ in range(50):
            file.write(b"x" * 1_000_000)
    tracemalloc.start()
    with pytest.raises(UsageError, match="line 2: longer than 1,000,000 bytes"):
        load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


def test_a_folder_and_a_file_that_is_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder; a task is one file"):
        load(tmp_path)
    written(tmp_path, GOOD, "questions.jsonl")
    with pytest.raises(UsageError, match=r"there is no file .*; did you mean 'questions\.jsonl'\?"):
        load(tmp_path / "question.jsonl")
    with pytest.raises(UsageError, match="there is no file"):
        load(tmp_path / "nowhere" / "x.jsonl")


def test_more_than_there_are_is_refused_with_how_many(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has 1 question, not 2"):
        load_task(f"file:{written(tmp_path, GOOD)}", 2)


@settings(max_examples=80, deadline=None)
@given(content=st.binary(max_size=300) | st.text(alphabet='{}[]":,\n questionanswer123é";', max_size=300))
@pytest.mark.parametrize("name", ["fuzz.jsonl", "fuzz.csv"])
def test_any_file_at_all_is_read_or_refused_by_name(
    name: str, content: str | bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = written(tmp_path_factory.getbasetemp(), content, name)
    try:
        told = str(path) if load(path) else "nothing"
    except UsageError as error:
        told = str(error)
    assert str(path) in told
