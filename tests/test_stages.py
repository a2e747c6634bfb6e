"""A recipe's stages, measured on the same questions."""

from __future__ import annotations

import asyncio

import pytest

from dsr1kit import Sampling
from dsr1kit.compare.tasks import load_task
from dsr1kit.errors import UsageError
from dsr1kit.finetune.pretrain import save
from dsr1kit.finetune.stages import measure_stages, stages_figure, stages_table
from dsr1kit.finetune.students import student_of

ITEMS = 24


def measured(*arguments, **options):
    return asyncio.run(measure_stages(*arguments, **options))


@pytest.fixture
def models(tmp_path):
    student, tokenizer = student_of("tiny-r1", (0, 2))
    return {"whole": "tiny-r1", "half": save(student, tokenizer, tmp_path / "half")}


def test_stages_are_paired_over_the_same_questions(models) -> None:
    asked = {"arithmetic:sum2": load_task("arithmetic:sum2", ITEMS), "arithmetic": load_task("arithmetic", ITEMS)}
    told = []
    whole, half = measured(models, asked, sampling=Sampling(max_tokens=160), on_progress=lambda *at: told.append(at))
    assert whole.accuracy["arithmetic:sum2"].value > 0.6 > half.accuracy["arithmetic:sum2"].value
    assert whole.gained["arithmetic:sum2"] is None
    lost = half.gained["arithmetic:sum2"]
    assert lost is not None
    assert lost.excludes_zero
    assert lost.value == pytest.approx(half.accuracy["arithmetic:sum2"].value - whole.accuracy["arithmetic:sum2"].value)
    assert half.parameters < whole.parameters
    assert told[-1] == ("half, arithmetic", ITEMS, ITEMS)
    table = stages_table([whole, half])
    assert table.loc["whole", "arithmetic:sum2, gained"] == ""
    assert table.loc["half", "arithmetic:sum2, gained"].startswith("-")
    (axes,) = stages_figure([whole, half]).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["whole", "half"]


def test_cut_answers_are_counted_and_accuracy_is_told_without_them(models) -> None:
    asked = {"arithmetic": load_task("arithmetic", ITEMS)}
    (long,) = measured({"whole": "tiny-r1"}, asked, sampling=Sampling(temperature=0.0, max_tokens=320))
    # Enough for short traces, not for long ones.
    (short,) = measured({"cut short": "tiny-r1"}, asked, sampling=Sampling(temperature=0.0, max_tokens=50))
    assert long.cut == {"arithmetic": 0}
    assert long.whole == long.accuracy
    assert 0 < short.cut["arithmetic"] < ITEMS
    assert short.whole["arithmetic"].value > short.accuracy["arithmetic"].value
    assert "arithmetic, cut" not in stages_table([long])
    cell = stages_table([long, short])["arithmetic, cut"]
    assert cell.iloc[0] == "0"
    assert cell.iloc[1] == f"{short.cut['arithmetic']}; {100 * short.whole['arithmetic'].value:.1f} % without"


def test_a_task_whose_answers_are_all_cut_has_no_accuracy_without_them() -> None:
    asked = {"arithmetic": load_task("arithmetic", 4)}
    (stage,) = measured({"whole": "tiny-r1"}, asked, sampling=Sampling(max_tokens=2))
    assert stage.cut == {"arithmetic": 4}
    assert stage.whole == {}
    assert stages_table([stage]).loc["whole", "arithmetic, cut"] == "4"


@pytest.mark.parametrize(("models", "asked"), [({}, {"t": load_task("arithmetic", 2)}), ({"a": "tiny-r1"}, {"t": []})])
def test_nothing_to_measure_is_refused(models, asked) -> None:
    with pytest.raises(UsageError, match="at least one model and one question"):
        measured(models, asked, sampling=Sampling())
