"""A whole tuning: what is held out, what is looked at first, what is trained and measured, and never done twice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsr1kit.compare.journal import read_records
from dsr1kit.compare.tasks import load_task
from dsr1kit.errors import ModelError, UsageError
from dsr1kit.finetune.data import Example, example, load_examples, write_file
from dsr1kit.finetune.lint import lint_template
from dsr1kit.finetune.settings import AdapterSettings, SftSettings
from dsr1kit.finetune.tuning import Looked, Measure, Tuned, hold_out, look_at, suited, tokenizer_and_marks, tune
from dsr1kit.records import Sampling

pytest.importorskip("trl", reason="fine-tuning is TRL's")


def settings(**changed: Any) -> SftSettings:
    usual: dict[str, Any] = {
        "model": "tiny-r1", "adapter": AdapterSettings(rank=4, alpha=8), "learning_rate": 5e-3, "steps": 4,
        "batch_size": 8, "save_every": 2, "max_length": 1024,
    }  # fmt: skip
    return SftSettings(**(usual | changed))


def own(n: int, **more: Any) -> list[Example]:
    """Examples with different questions."""
    return [
        example(f"{at} + 1 = ?", f"{at}+1={at + 1}", f"\\boxed{{{at + 1}}}", gold=str(at + 1), **more)
        for at in range(n)
    ]


def look(data: Sequence[str], out: Path, measure: Measure, **changed: Any) -> Looked:
    return asyncio.run(look_at(settings(**changed), data, out, measure))


# --- what is held out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("questions", "held"), [(10, 2), (40, 8), (44, 8), (1499, 299), (1600, 300)])
def test_a_fifth_of_the_questions_is_held_out_and_at_most_300(questions: int, held: int, tmp_path: Path) -> None:
    rest, task = hold_out(own(questions), tmp_path)
    asked = load_task(task, 0)
    assert (len(rest), len(asked)) == (questions - held, held)


def test_no_question_is_on_both_sides_whatever_its_trace_or_the_space_around_it(tmp_path: Path) -> None:
    examples = own(20)
    again = [example(f"{one.question} ", "in another way", one.answer, gold=one.gold) for one in examples]
    bare = [example(one.question, "in a third way", one.answer) for one in examples]
    rest, task = hold_out([*examples, *again, *bare], tmp_path / "new" / "run")
    asked = load_task(task, 0)
    assert len(asked) == 4
    left = {one.question.strip() for one in rest}
    assert len(left) == 16
    assert len(rest) == 3 * 16
    assert left.isdisjoint(item.prompt.partition("\n")[0] for item in asked)


def test_what_is_held_out_hangs_on_the_questions_alone_and_is_asked_as_it_stands(tmp_path: Path) -> None:
    examples = [*own(9, kind="sums"), example("首都是哪里？", "想", "北京", gold="北京", scorer="exact", language="zh")]
    rest, task = hold_out(examples, tmp_path / "a")
    other, again = hold_out(list(reversed(examples)), tmp_path / "b")
    assert {one.id for one in rest} == {one.id for one in other}
    assert {item.id for item in load_task(task, 0)} == {item.id for item in load_task(again, 0)}
    assert [one for one in examples if one in rest] == rest, "in their order"
    by_question = {one.question: one for one in examples}
    for item in load_task(task, 0):
        one = next(one for question, one in by_question.items() if item.prompt.startswith(question))
        assert (item.gold, item.scorer, item.language) == (one.gold, one.scorer, one.language)
        assert not one.kind or item.kind == one.kind


def test_examples_without_a_gold_are_trained_on_and_never_asked(tmp_path: Path) -> None:
    without = [example(f"Why is {at} even?", "since", "because") for at in range(30)]
    rest, task = hold_out([*without, *own(10)], tmp_path)
    assert len(load_task(task, 0)) == 2
    assert len(rest) == 38
    assert rest[:30] == without


@pytest.mark.parametrize("golds", [0, 1, 9])
def test_too_few_golds_to_hold_some_out_are_refused_with_both_ways_out(golds: int, tmp_path: Path) -> None:
    examples = [*own(golds), *own(golds), example("Why?", "since", "because")]
    with pytest.raises(
        UsageError, match=rf"^{golds} questions have a gold.*add a gold to the data, .*\(--task\).*\(--no-evaluate\)"
    ):
        hold_out(examples, tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- what is looked at before -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "named", "task"),
    [
        (["worked:arithmetic:sum4:24"], "", "arithmetic:sum4"),
        (["worked:arithmetic:remainder7"], "", "arithmetic:remainder7"),
        (["worked:arithmetic:24"], "", "arithmetic"),
        (["worked:arithmetic:sum4:24"], "arithmetic:sum3", "arithmetic:sum3"),
        (["FILE"], "arithmetic:sum3", "arithmetic:sum3"),
    ],
)
def test_measured_is_the_task_named_or_else_that_of_the_first_worked_data(
    data: list[str], named: str, task: str, tmp_path: Path
) -> None:
    file = write_file(own(12), tmp_path / "mine.jsonl")
    looked = asyncio.run(
        look_at(
            settings(), [str(file) if name == "FILE" else name for name in data], tmp_path / "run",
            Measure(task=named, items=3, others=("arithmetic:sum2",)), limit=24,
        )
    )  # fmt: skip
    assert looked.task == task
    assert list(looked.asked) == [task, "arithmetic:sum2"]
    assert [item.id for item in looked.asked[task]] == [item.id for item in load_task(task, 3)]
    assert looked.lint.sound
    assert not (tmp_path / "run").exists()


def test_of_ones_own_data_a_part_is_held_out_and_none_of_what_goes_with_it(tmp_path: Path) -> None:
    turns = example("And then?", "one more", "\\boxed{3}", gold="3")
    turns = replace(turns, messages=({"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"},
                                     *turns.messages))  # fmt: skip
    file = write_file([*own(30), turns], tmp_path / "mine.jsonl")
    looked = look([str(file), "worked:arithmetic:sum2:40"], tmp_path / "run", Measure(items=300))
    assert looked.task == f"file:{tmp_path / 'run' / 'held_out.jsonl'}"
    assert {item.prompt.partition("\n")[0] for item in looked.asked[looked.task]} <= {one.question for one in own(30)}
    assert sum(one.source.startswith("worked:") for one in looked.checked.kept) == 40


def test_where_nothing_is_to_be_measured_nothing_is_held_out_and_no_gold_is_needed(tmp_path: Path) -> None:
    file = write_file([example("Why?", "since", "because"), example("How?", "so", "thus")], tmp_path / "mine.jsonl")
    looked = look([str(file)], tmp_path / "run", Measure(wanted=False))
    assert (looked.task, looked.asked, len(looked.checked.kept)) == ("", {}, 2)
    assert not (tmp_path / "run").exists()


def test_examples_without_a_trace_are_kept_where_that_is_wanted(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"question": "Why?", "answer": "because"}\n')
    with pytest.raises(UsageError, match=r"1 dropped, empty trace: .*mine.jsonl, line 1"):
        look([str(file)], tmp_path / "run", Measure(wanted=False))
    looked = asyncio.run(
        look_at(settings(), [str(file)], tmp_path / "run", Measure(wanted=False), needs_reasoning=False)
    )
    assert len(looked.checked.kept) == 1


def test_data_of_ones_own_is_measured_on_the_part_that_is_held_out(tmp_path: Path) -> None:
    file = write_file(own(30), tmp_path / "mine.jsonl")
    looked = look([str(file)], tmp_path / "run", Measure(items=300))
    assert looked.task == f"file:{tmp_path / 'run' / 'held_out.jsonl'}"
    assert len(looked.asked[looked.task]) == 6, "all that is held out, where fewer than asked for"
    assert len(looked.checked.kept) == 24
    assert looked.checked.counts == {}


def test_what_the_evaluation_asks_is_dropped_and_what_is_too_long_as_well(tmp_path: Path) -> None:
    (asked,) = load_task("arithmetic:sum2", 1)
    leak = example(asked.prompt, "a+b", f"\\boxed{{{asked.gold}}}", gold=asked.gold)
    long = example("1 + 1 = ?", "1+1=2\n" * 300, "\\boxed{2}", gold="2")
    file = write_file([leak, long, *own(5)], tmp_path / "mine.jsonl")
    looked = look([str(file)], tmp_path, Measure(task="arithmetic:sum2", items=1), max_length=200)
    assert looked.checked.counts == {"asked in the evaluation": 1, "too long": 1}
    assert looked.checked.lengths is not None
    assert looked.checked.lengths.longest <= 200


def test_a_model_is_known_by_its_tokenizer_before_its_weights_are_loaded() -> None:
    from dsr1kit.local.load import load

    tokenizer, marks = tokenizer_and_marks("tiny-r1")
    loaded = load("tiny-r1", "none", "cpu", "auto", None)
    assert marks == loaded.marks
    assert tokenizer.chat_template == loaded.tokenizer.chat_template
    assert suited("tiny-r1").values["max_length"] == loaded.context
    assert suited("tiny-r1", max_length=100).values["max_length"] == 100
    with pytest.raises(ModelError):
        suited("/no/such/folder")


# --- tuned and measured --------------------------------------------------------------------------------------------

DATA = ["worked:arithmetic:sum4:48"]
MEASURE = Measure(items=10, others=("arithmetic:sum2",), sampling=Sampling(max_tokens=400))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tuned, Path, list[str]]:
    out = tmp_path_factory.mktemp("tuned") / "my.run"
    said: list[str] = []
    return asyncio.run(tune(settings(), DATA, out, MEASURE, on_text=said.append)), out, said


def test_a_tuning_leaves_adapter_and_gain_in_its_folder_and_says_what_was_checked(
    tuned: tuple[Tuned, Path, list[str]],
) -> None:
    found, out, said = tuned
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "gain", "run.json"]
    assert {"records.jsonl", "summary.json", "report.html", "gain.json", "run.json"} <= {
        path.name for path in (out / "gain").iterdir()
    }
    assert found.trained.adapter == out / "adapter"
    assert (found.trained.steps, found.trained.rows) == (4, 48)
    assert found.trained.curve.losses[-1] < found.trained.curve.losses[0]
    assert said[0].startswith("48 of 48 examples kept")


def test_the_gain_is_measured_on_held_out_questions_of_the_task_and_of_others(
    tuned: tuple[Tuned, Path, list[str]],
) -> None:
    found, out, _ = tuned
    assert found.gain is not None
    assert [(one.adapter, one.task, one.tuned) for one in found.gain.changes] == [
        ("my.run", "arithmetic:sum4", True), ("my.run", "arithmetic:sum2", False),
    ]  # fmt: skip
    records = read_records(out / "gain" / "records.jsonl")
    assert len(records) == 2 * 2 * 10
    trained = {one.question for one in found.looked.checked.kept}
    assert all(question not in r["question"] for r in records for question in trained)
    for one in found.gain.changes:
        ids = {item.id for item in found.looked.asked[one.task]}
        for name, share in (("before", one.before), ("my.run", one.after)):
            right = [r["verdict"] == "right" for r in records if r["channel"] == name and r["item"] in ids]
            assert share.value == pytest.approx(sum(right) / 10)
        assert one.difference.value == pytest.approx(one.after.value - one.before.value)
    assert found.gain.changes[1].before.value >= 0.5, "sums of two are what tiny-r1 was taught"


def test_a_second_call_trains_nothing_and_asks_nothing(
    tuned: tuple[Tuned, Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, out, _ = tuned
    records = (out / "gain" / "records.jsonl").read_bytes()
    adapter = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr("dsr1kit.finetune.sft.open_base", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr("dsr1kit.finetune.gain.LocalModel", lambda *_, **__: pytest.fail("the model was loaded"))
    steps: list[Any] = []
    asked: list[Any] = []
    again = asyncio.run(
        tune(settings(), DATA, out, MEASURE, on_step=lambda *step: steps.append(step),
             on_progress=lambda *at: asked.append(at))
    )  # fmt: skip
    assert (steps, asked) == ([], [])
    assert again.gain is not None
    assert found.gain is not None
    assert again.gain.changes == found.gain.changes
    assert again.trained.curve == found.trained.curve
    assert (out / "gain" / "records.jsonl").read_bytes() == records
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_where_nothing_is_to_be_measured_nothing_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsr1kit.finetune.gain.LocalModel", lambda *_, **__: pytest.fail("something was asked"))
    monkeypatch.chdir(tmp_path)
    found = asyncio.run(tune(settings(steps=1), DATA, ".", Measure(items=10, wanted=False)))
    assert found.gain is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "run.json"]


def test_a_text_that_the_linter_finds_unfit_is_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "dsr1kit.finetune.tuning.lint", lambda tokenizer, marks, one, _: lint_template(tokenizer, marks, one)
    )
    told = r"trained on a wrong text: the reasoning is gone from what the loss counts.*dsr1kit finetune check"
    with pytest.raises(UsageError, match=told):
        asyncio.run(tune(settings(), DATA, tmp_path / "run", MEASURE))
    assert not (tmp_path / "run").exists()


def test_a_name_that_the_report_needs_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none 'before'"):
        asyncio.run(tune(settings(), DATA, tmp_path / "before", MEASURE))
    assert not (tmp_path / "before").exists()


def test_other_data_or_settings_in_the_same_folder_are_refused(tuned: tuple[Tuned, Path, list[str]]) -> None:
    _, out, _ = tuned
    run = json.loads((out / "run.json").read_text())
    with pytest.raises(UsageError, match="holds another training: data was"):
        asyncio.run(tune(settings(), ["worked:arithmetic:sum4:40"], out, MEASURE))
    with pytest.raises(UsageError, match=r"holds another training: sft\.learning_rate"):
        asyncio.run(tune(settings(learning_rate=1e-3), DATA, out, MEASURE))
    assert json.loads((out / "run.json").read_text()) == run
    assert load_examples(DATA), "the data is still there"
