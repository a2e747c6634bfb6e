"""Before and after: the same questions to both, what changed in numbers and words, and a folder that goes on."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dsr1kit.compare.items import Item
from dsr1kit.compare.tasks import load_task
from dsr1kit.errors import UsageError
from dsr1kit.finetune.gain import Change, Gain, GainSettings, changes, measure_gain, questions, size_figure
from dsr1kit.local.model import LocalModel
from dsr1kit.paths import data_dir
from dsr1kit.records import Message, Outcome, Reply, Sampling

pytest.importorskip("peft", reason="adapters are PEFT's")

TUNED, OTHER, ITEMS = "arithmetic:remainder7", "arithmetic:sum2", 16
FILES = ["gain.json", "records.jsonl", "report.html", "run.json", "summary.json"]


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of random numbers, under which tiny-r1 forgets how to add."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(data_dir() / "tiny-r1", dtype=torch.float32)
    model: Any = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.3)
    folder = tmp_path_factory.mktemp("adapters") / "noisy"
    model.save_pretrained(folder)
    return folder


def asked(adapter: Path, **changed: Any) -> GainSettings:
    usual: dict[str, Any] = {
        "task": TUNED, "others": (OTHER,), "items": ITEMS, "sampling": Sampling(temperature=0, max_tokens=90),
    }  # fmt: skip
    return GainSettings(model="tiny-r1", adapters={"noisy": adapter}, **(usual | changed))


def measured(settings: GainSettings, out: Path, **options: Any) -> Gain:
    return asyncio.run(measure_gain(settings, out, **options))


@pytest.fixture(scope="module")
def run(noisy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Gain, list[tuple[str, int, int]]]:
    told: list[tuple[str, int, int]] = []
    out = tmp_path_factory.mktemp("gain") / "run"
    return measured(asked(noisy), out, on_progress=lambda *step: told.append(step)), told


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many questions each call of a model was asked."""
    calls: list[int] = []
    generate = LocalModel.generate_many

    async def counting(self: LocalModel, messages: Sequence[Sequence[Message]], *rest: Any, **options: Any) -> Any:
        calls.append(len(messages))
        return await generate(self, messages, *rest, **options)

    monkeypatch.setattr(LocalModel, "generate_many", counting)
    return calls


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


# --- asked of models -----------------------------------------------------------------------------------------------


def test_what_was_forgotten_is_shown_and_the_folder_is_a_runs(run: tuple[Gain, list[tuple[str, int, int]]]) -> None:
    gain, told = run
    assert [(one.adapter, one.task, one.tuned) for one in gain.changes] == [
        ("noisy", TUNED, True), ("noisy", OTHER, False),
    ]  # fmt: skip
    forgotten = gain.of(OTHER)
    assert forgotten.before.value > 0.7
    assert forgotten.after.value < 0.2
    assert forgotten.differs
    assert forgotten.difference.items == ITEMS
    assert "points worse: forgotten" in gain.verdict()[1]
    assert sorted(path.name for path in gain.folder.iterdir() if path.name in FILES) == FILES
    found = lines(gain.folder)
    assert len(found) == 4 * ITEMS
    assert {line["channel"] for line in found} == {"before", "noisy"}
    assert gain.report.read_text().startswith("<!DOCTYPE html>")
    assert json.loads((gain.folder / "gain.json").read_text()) == json.loads(json.dumps(gain.as_data()))
    summary = json.loads((gain.folder / "summary.json").read_text())
    assert set(summary["channels"]) == {"before", "noisy"}
    assert told[-1] == ("noisy", 2 * ITEMS, 2 * ITEMS)
    assert {name for name, _, _ in told} == {"before", "noisy"}


def test_table_and_figure_are_labelled(run: tuple[Gain, list[tuple[str, int, int]]]) -> None:
    gain, _ = run
    table = gain.table()
    assert list(table.index) == [("noisy", TUNED), ("noisy", OTHER)]
    assert list(table["tuned"]) == ["yes", "no"]
    assert table.loc[("noisy", OTHER), "a change"] == "yes"
    (axes,) = gain.figure().axes
    assert axes.get_xlabel() == "right answers (%), held-out questions, with 95 % intervals"
    assert [text.get_text() for text in axes.get_yticklabels()] == [f"{TUNED} (tuned)", OTHER]
    (legend,) = gain.figure().legends
    assert [text.get_text() for text in legend.get_texts()] == ["before", "after"]


def test_a_complete_run_asks_nothing_again(
    run: tuple[Gain, list[tuple[str, int, int]]], noisy: Path, monkeypatch: pytest.MonkeyPatch, counted: list[int]
) -> None:
    monkeypatch.setattr("dsr1kit.finetune.gain.LocalModel", lambda *_, **__: pytest.fail("the model was loaded"))
    before = (run[0].folder / "records.jsonl").read_bytes()
    again = measured(asked(noisy), run[0].folder)
    assert again.changes == run[0].changes
    assert counted == []
    assert (run[0].folder / "records.jsonl").read_bytes() == before


def test_a_killed_run_asks_what_is_missing_and_comes_to_the_same(
    run: tuple[Gain, list[tuple[str, int, int]]], noisy: Path, tmp_path: Path, counted: list[int]
) -> None:
    kept = (run[0].folder / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run.json").write_bytes((run[0].folder / "run.json").read_bytes())
    # The last line is torn, as a kill leaves it.
    (tmp_path / "records.jsonl").write_text("".join(kept[:20]) + kept[20][:50])
    again = measured(asked(noisy), tmp_path)
    assert counted == [2 * ITEMS - 20, 2 * ITEMS]
    assert again.changes == run[0].changes
    assert len(lines(tmp_path)) == 4 * ITEMS


def test_a_folder_of_another_run_is_refused(run: tuple[Gain, list[tuple[str, int, int]]], noisy: Path) -> None:
    with pytest.raises(UsageError, match=r"seed"):
        measured(asked(noisy, seed=1), run[0].folder)


def test_a_folder_measured_with_other_weights_of_that_adapter_is_refused_wherever_they_lie(
    noisy: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(noisy, tmp_path / "copy")
    first = measured(asked(copied, items=2, others=()), tmp_path / "run")
    moved = copied.rename(tmp_path / "moved")
    assert measured(asked(moved, items=2, others=()), tmp_path / "run").changes == first.changes
    weights = moved / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UsageError, match="adapters"):
        measured(asked(moved, items=2, others=()), tmp_path / "run")


def test_two_questions_of_one_name_in_two_tasks_are_both_asked(noisy: Path, tmp_path: Path) -> None:
    by_task = {
        "one": [Item("1", "What is 20 + 22?", "42", "", "en")],
        "two": [Item("1", "What is 20 + 23?", "43", "", "en"), Item("2", "What is 20 + 24?", "44", "", "en")],
    }
    gain = measured(asked(noisy, task="one", others=("two",)), tmp_path, asked=by_task)
    assert [(one.task, one.difference.items) for one in gain.changes] == [("one", 1), ("two", 2)]
    assert {line["question"] for line in lines(tmp_path)} == {i.prompt for items in by_task.values() for i in items}


def test_answers_that_the_limit_cuts_are_counted_apart(noisy: Path, tmp_path: Path) -> None:
    gain = measured(asked(noisy, items=4, sampling=Sampling(temperature=0, max_tokens=3)), tmp_path)
    for one in gain.changes:
        assert (one.cut_before, one.cut_after) == (4, 4)
        assert one.whole is None
        assert not one.differs
    assert all(said.endswith("; cut by the token limit: 4 before, 4 after.") for said in gain.verdict())
    assert list(gain.table()["cut"]) == ["4 / 4", "4 / 4"]
    assert list(gain.table()["without cut answers"]) == ["", ""]


def test_a_question_of_two_tasks_is_asked_once_and_counts_in_both(
    noisy: Path, tmp_path: Path, counted: list[int]
) -> None:
    shared = load_task(OTHER, 6)
    by_task = {"one": shared[:4], "two": shared[2:]}
    gain = measured(asked(noisy, task="one", others=("two",)), tmp_path, asked=by_task)
    assert counted == [6, 6]
    assert [(one.task, one.difference.items, one.tuned) for one in gain.changes] == [
        ("one", 4, True), ("two", 4, False),
    ]  # fmt: skip


def test_a_model_that_ends_without_an_answer_was_wrong(
    noisy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left out, the questions that a tuning has spoilt would make it look better."""

    async def generate(self: LocalModel, messages: Sequence[Sequence[Message]], *_: Any, **__: Any) -> list[Reply]:
        said = [Reply(Outcome.OK, answer=f"\\boxed{{{item.gold}}}") for item in shared]
        if self.adapter is not None:
            said[3:] = [Reply(Outcome.EMPTY, reasoning="hm")] * 3
        return said

    shared = load_task(OTHER, 6)
    monkeypatch.setattr(LocalModel, "generate_many", generate)
    gain = measured(asked(noisy, task=OTHER, others=()), tmp_path, asked={OTHER: shared})
    one = gain.of(OTHER)
    assert (one.before.value, one.after.value, one.difference.items) == (1.0, 0.5, 6)
    assert one.whole is not None
    assert (one.whole.value, one.whole.items) == (-0.5, 6)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["channels"]["noisy"]["outcomes"] == {"ok": 3, "empty": 3}
    assert '"verdict": "unscored"' not in (tmp_path / "records.jsonl").read_text()


def test_where_no_answer_can_be_judged_nothing_is_said(noisy: Path, tmp_path: Path) -> None:
    items = [Item("a", "What is 1 + 1?", "no number", "k", "en", "number")]
    gain = measured(asked(noisy, task="mine", others=()), tmp_path, asked={"mine": items})
    assert gain.changes == ()
    assert gain.verdict() == gain.as_data() == []
    assert gain.table().empty
    gain.figure().draw_without_rendering()
    with pytest.raises(UsageError, match="mine was not asked"):
        gain.of("mine")


def test_a_finite_task_is_asked_whole_where_it_has_fewer(noisy: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(f'{{"question": "What is {n} + 1?", "answer": {n + 1}}}\n' for n in range(5)))
    found = questions(asked(noisy, task=f"file:{path}", items=8))
    assert {name: len(items) for name, items in found.items()} == {f"file:{path}": 5, OTHER: 8}
    assert next(iter(found)) == f"file:{path}"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"adapters": {}}, "name at least one adapter"),
        ({"adapters": {"before": Path("a")}}, "and none 'before'"),
        ({"others": (TUNED,)}, "is the tuned task, and cannot be one of the others"),
        ({"items": 0}, "items must be at least 1, not 0"),
        ({"samples": 0}, "samples must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(changed: dict[str, Any], told: str) -> None:
    usual: dict[str, Any] = {"model": "tiny-r1", "adapters": {"a": Path("a")}, "task": TUNED}
    with pytest.raises(UsageError, match=told):
        GainSettings(**(usual | changed))


# --- counted by hand -----------------------------------------------------------------------------------------------


def items_of(task: str, count: int) -> list[Item]:
    return [Item(f"{task}-{at}", "?", "1", task, "en", "number") for at in range(count)]


def records(channel: str, task: str, right: int, count: int, cut: int = 0) -> list[dict[str, Any]]:
    """The first `right` of a task's questions answered rightly; the last `cut` of them cut off."""
    return [
        {
            "channel": channel, "item": f"{task}-{at}", "sample": 0, "verdict": "right" if at < right else "wrong",
            "outcome": "truncated" if at >= count - cut else "ok",
        }
        for at in range(count)
    ]  # fmt: skip


def compared(shares: Mapping[str, tuple[int, int]], count: int = 100, cut: tuple[int, int] = (0, 0)) -> Gain:
    """Of one adapter: right answers before and after, by task."""
    told = [
        record
        for task, (before, after) in shares.items()
        for record in (*records("before", task, before, count, cut[0]), *records("a", task, after, count, cut[1]))
    ]
    return Gain(changes(told, {task: items_of(task, count) for task in shares}, ["a"]), Path("nowhere"))


def test_what_is_better_worse_or_not_shown_is_said_as_that() -> None:
    gain = compared({"mine": (20, 80), "kept": (80, 80), "lost": (80, 50)})
    better, same, worse = gain.verdict()
    assert better.startswith("a: mine from 20.0%")
    assert "to 80.0%" in better
    assert better.endswith("points better.")
    assert "no change shown" in same
    assert worse.endswith("points worse: forgotten.")
    low, high = (100 * bound for bound in (gain.of("lost").difference.low, gain.of("lost").difference.high))
    assert f"{-high:.1f} to {-low:.1f} points worse" in worse
    assert 0 < -high < 30 < -low
    assert [one.differs for one in gain.changes] == [True, False, True]


def test_a_tuned_task_that_became_worse_was_not_forgotten_but_spoilt() -> None:
    (said,) = compared({"mine": (80, 50)}).verdict()
    assert said.endswith("points worse.")


def test_among_many_tasks_one_small_difference_is_not_called_one() -> None:
    alone = compared({"mine": (50, 56)})
    assert alone.changes[0].differs
    among = compared({"mine": (50, 56), **{f"other{at}": (50, 50) for at in range(9)}})
    assert among.changes[0].difference == alone.changes[0].difference
    assert not among.changes[0].differs
    assert "no change shown" in among.verdict()[0]


def test_without_the_answers_that_were_cut_another_difference_may_stand() -> None:
    # All that is lost was cut: the model did not learn less, it was stopped.
    gain = compared({"mine": (100, 70)}, cut=(0, 30))
    one = gain.changes[0]
    assert one.difference.value == pytest.approx(-0.3)
    assert one.whole is not None
    assert one.whole.value == 0
    assert one.whole.items == 70
    assert (one.cut_before, one.cut_after) == (0, 30)
    assert gain.verdict()[0].endswith("; cut by the token limit: 0 before, 30 after.")


def test_a_task_that_one_side_did_not_answer_is_left_out() -> None:
    told = [*records("before", "mine", 1, 2), *records("before", "other", 1, 2), *records("a", "other", 2, 2)]
    found = changes(told, {"mine": items_of("mine", 2), "other": items_of("other", 2)}, ["a"])
    assert [(one.task, one.tuned) for one in found] == [("other", False)]


def test_accuracy_by_the_number_of_examples_is_drawn_in_their_order() -> None:
    told = [*records("before", "mine", 10, 100)]
    for name, right in (("much", 90), ("little", 40)):
        told += records(name, "mine", right, 100)
    gain = Gain(changes(told, {"mine": items_of("mine", 100)}, ["much", "little"]), Path("nowhere"))
    assert isinstance(gain.of("mine", "little"), Change)
    (axes,) = size_figure(gain, {"much": 2000, "little": 100}).axes
    line = next(one for one in axes.lines if len(one.get_xdata()) == 2 and list(one.get_xdata()) == [100, 2000])
    assert list(line.get_ydata()) == pytest.approx([40, 90])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("examples trained on (log scale)", "right answers (%)")
    assert [text.get_text() for text in axes.get_xticklabels()] == ["100", "2,000"]
