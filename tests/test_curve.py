"""Accuracy against thinking tokens, on tiny-r1's real weights: budgets kept, paired with free thinking, shown."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace

import pytest

from dsr1kit.compare.curve import Budget, Point, curve_table, figure, thinking_curve
from dsr1kit.compare.stats import Interval, PairedDifference
from dsr1kit.compare.tasks import load_task
from dsr1kit.errors import UsageError
from dsr1kit.local.model import LocalModel
from dsr1kit.paths import data_dir
from dsr1kit.records import Sampling

GREEDY = Sampling(temperature=0.0, max_tokens=300)
ITEMS = load_task("arithmetic", 28)


def on_tiny(scenario, source="tiny-r1"):
    """Open tiny-r1 (or another model), hand it to `scenario` (a coroutine function); its result."""

    async def inside():
        async with LocalModel(source, threads=1) as model:
            return await scenario(model)

    return asyncio.run(inside())


def curve(items=ITEMS, sampling=GREEDY, **options):
    return on_tiny(lambda model: thinking_curve(model, items, sampling=sampling, **options))


@pytest.fixture(scope="module")
def points():
    return curve(caps=(32, 4), least=(64,))


def test_points_run_from_the_tightest_cap_over_free_thinking_to_the_longest(points):
    assert [point.budget.label for point in points] == ["at most 4", "at most 32", "as it likes", "at least 64"]
    used = [point.thinking_tokens for point in points]
    assert used == sorted(used)
    assert used[0] <= 4
    assert used[1] <= 32
    assert used[3] >= 64


def test_a_tight_cap_costs_answers_and_the_paired_interval_says_so(points):
    tight, free = points[0], points[2]
    assert tight.accuracy.value < free.accuracy.value
    assert tight.differs
    assert tight.against_free.value == pytest.approx(tight.accuracy.value - free.accuracy.value)
    assert tight.against_free.items == len(ITEMS)


def test_free_thinking_is_what_the_others_are_held_against_and_what_the_model_does_unbounded(points):
    replies = on_tiny(lambda model: model.generate_many([i.messages() for i in ITEMS], [GREEDY] * len(ITEMS)))
    free = points[2]
    assert free.against_free is None
    assert not free.differs
    assert free.thinking_tokens == pytest.approx(sum(r.usage.reasoning_tokens for r in replies) / len(replies))
    assert free.answered == sum(r.outcome == "ok" for r in replies) / len(replies)


def test_bounds_of_the_sampling_itself_are_replaced():
    (capped, free) = curve(ITEMS[:4], replace(GREEDY, max_thinking_tokens=2), caps=(8,))
    assert capped.thinking_tokens > 2
    assert free.thinking_tokens > 8


def test_an_answer_that_never_came_is_not_right():
    (free,) = curve(ITEMS[:7], replace(GREEDY, max_tokens=5), caps=())
    assert (free.accuracy.value, free.answered) == (0.0, 0.0)
    assert free.accuracy.high > 0


def test_progress_counts_the_answers_of_all_budgets():
    told = []
    curve(ITEMS[:6], caps=(4, 8), on_progress=lambda *progress: told.append(progress))
    assert list(dict.fromkeys(told)) == [("thinking", done, 18) for done in range(19)]


@pytest.mark.parametrize("options", [{"caps": (0,)}, {"least": (-1,)}])
def test_a_budget_that_cannot_be_meant_is_told_before_any_work(options):
    told = []
    with pytest.raises(UsageError, match="thinking_tokens"):
        curve(on_progress=lambda *progress: told.append(progress), **options)
    assert not told


def test_no_items_are_refused():
    with pytest.raises(UsageError, match="at least one item"):
        curve(items=[])


def test_a_model_without_think_tags_is_refused(tmp_path):
    folder = shutil.copytree(data_dir() / "tiny-r1", tmp_path / "untagged")
    tokens = folder / "tokenizer.json"
    tokens.write_text(tokens.read_text(encoding="utf-8").replace("</think>", "</other>"), encoding="utf-8")
    with pytest.raises(UsageError, match="no think tags"):
        on_tiny(lambda model: thinking_curve(model, ITEMS, sampling=GREEDY), folder)


def test_both_bounds_make_a_label_of_their_own():
    assert Budget(most=64, least=16).label == "16 to 64"
    assert Budget(most=64, least=16).on(GREEDY) == replace(GREEDY, max_thinking_tokens=64, min_thinking_tokens=16)


SHOWN = [
    Point(Budget(most=8), 8.0, Interval(0.25, 0.2, 0.31), PairedDifference(-0.5, -0.6, -0.4, 99, None, 0.0), 1.0),
    Point(Budget(), 40.0, Interval(0.75, 0.7, 0.8), None, 1.0),
    Point(Budget(least=64), 80.5, Interval(0.73, 0.68, 0.78), PairedDifference(-0.02, -0.05, 0.01, 99, 400, 0.2), 0.9),
]


def test_the_table_calls_a_difference_one_only_where_its_interval_excludes_zero():
    table = curve_table(SHOWN)
    assert list(table.index) == ["at most 8", "as it likes", "at least 64"]
    assert list(table["a difference"]) == ["yes", "", "not shown"]
    assert list(table["items to settle"]) == ["", "", "400"]
    assert table.loc["at least 64", "against free, points"] == "-2.0 (-5.0 to +1.0)"
    assert table.loc["as it likes", "right %"] == "75.0 (70.0 to 80.0)"


def test_the_figure_shows_every_point_with_its_budget_in_three_kinds(tmp_path):
    drawing = figure(SHOWN)
    (axes,) = drawing.axes
    drawing.savefig(tmp_path / "curve.png")
    assert [text.get_text() for text in axes.texts] == ["≤ 8", "≥ 64"]
    assert len(drawing.legends[0].get_texts()) == 3
    low, high = axes.get_xlim()
    assert low < 8.0 < 80.5 < high
