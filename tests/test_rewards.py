"""Rewards for reinforcement, and the alarms for one that learns nothing."""

from __future__ import annotations

import math
import re

import pytest
import typer.main
from hypothesis import given
from hypothesis import strategies as st

from dsr1kit.commands.finetune import commands
from dsr1kit.errors import UsageError
from dsr1kit.finetune.alarms import COLAB_HOURS, WINDOW, Alarm, Watch, too_long
from dsr1kit.finetune.rewards import Rewards, answer_of, cut_off, form_of, length_of

# --- the reply's parts ---------------------------------------------------------------------------------------------

WELL = "1+1=2\n</think>\n\nThe answer is \\boxed{2}."


@pytest.mark.parametrize(
    ("completion", "thinks", "answer", "form"),
    [
        (WELL, True, "\n\nThe answer is \\boxed{2}.", 1.0),
        ("The answer is \\boxed{2}.", False, "The answer is \\boxed{2}.", 1.0),
        ("1+1=2, so \\boxed{2}", True, "", 0.0),
        ("", True, "", 0.0),
        ("", False, "", 0.0),
        ("a</think>\\boxed{1}</think>\\boxed{2}", True, "\\boxed{2}", 0.0),
        (WELL, False, "\n\nThe answer is \\boxed{2}.", 1.0),
        ("1+1=2\n</think>\n\nThe answer is 2.", True, "\n\nThe answer is 2.", 0.0),
        ("so \\boxed{2}\n</think>\n\nThe answer is 2.", True, "\n\nThe answer is 2.", 0.0),
        ("so \\boxed{3}? no\n</think>\\boxed{2}", True, "\\boxed{2}", 1.0),
        ("x</think>\\boxed{1} or \\boxed{2}", True, "\\boxed{1} or \\boxed{2}", 0.0),
        ("x</think>\\boxed{2", True, "\\boxed{2", 0.0),
        ("x</think>\\boxed{}", True, "\\boxed{}", 0.0),
        ("x</think>\\boxed{\\frac{1}{2}}", True, "\\boxed{\\frac{1}{2}}", 1.0),
    ],
    ids=[
        "well formed", "of a model without tags", "unclosed", "empty", "empty without tags", "closed twice",
        "tags from a model that need not", "no box", "the box in the thinking alone", "a box on each side",
        "two boxes", "a box that is not closed", "an empty box", "braces in the box",
    ],
)  # fmt: skip
def test_the_answer_is_what_stands_behind_the_thinking_and_the_form_is_one_close_and_one_box(
    completion: str, thinks: bool, answer: str, form: float
) -> None:
    assert answer_of(completion, thinks) == answer
    assert form_of(completion, thinks) == form


@given(tokens=st.integers(0, 5000), more=st.integers(0, 500), limit=st.integers(1, 4000))
def test_brevity_pays_right_answers_alone_and_costs_one_at_the_limit(tokens: int, more: int, limit: int) -> None:
    of_right = length_of(tokens, limit, 1.0)
    assert -1 <= length_of(tokens + more, limit, 1.0) <= of_right <= 0
    assert length_of(0, limit, 1.0) == 0
    assert length_of(limit, limit, 1.0) == length_of(limit + more, limit, 1.0) == -1
    assert length_of(tokens, limit, 0.0) == length_of(tokens, limit, None) == 0


@pytest.mark.parametrize(
    ("ids", "cut"), [([5, 6, 7], True), ([5, 6, 1], False), ([5, 1], False), ([], False), ([5, 6], False)]
)
def test_a_completion_is_cut_where_it_is_as_long_as_the_limit_and_did_not_end(ids: list[int], cut: bool) -> None:
    assert cut_off(ids, 3, {1}) is cut


def test_half_the_limit_costs_half() -> None:
    assert length_of(32, 64, 1.0) == -0.5


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"right": 0.0}, "the weight of right answers must be above 0, not 0.0: nothing else teaches them"),
        ({"right": -1.0}, "the weight of right answers must be above 0, not -1.0"),
        ({"right": math.nan}, "the weight of right answers must be above 0, not nan"),
        ({"form": -0.1}, "weights of rewards must be 0 or more"),
        ({"length": -0.1}, "weights of rewards must be 0 or more"),
        ({"form": math.nan}, "weights of rewards must be 0 or more"),
        ({"length": math.nan}, "weights of rewards must be 0 or more"),
    ],
)
def test_weights_that_teach_nothing_or_the_wrong_thing_are_refused(values: dict[str, float], told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        Rewards(**values)


def test_weights_of_zero_leave_a_reward_out() -> None:
    assert (Rewards(form=0.0, length=0.0).form, Rewards().length) == (0.0, 0.0)


# --- alarms --------------------------------------------------------------------------------------------------------


def metrics(even: float = 0.0, clipped: float = 0.0, right: float | None = 0.5) -> dict[str, float | None]:
    return {"frac_reward_zero_std": even, "completions/clipped_ratio": clipped, "rewards/right/mean": right}


def looked(watch: Watch, *steps: dict[str, float | None]) -> list[Alarm]:
    return [alarm for at, one in enumerate(steps, 1) for alarm in watch.look(at, one)]


def test_a_sound_reinforcement_raises_nothing() -> None:
    watch = Watch(64)
    assert looked(watch, *[metrics(even=0.8, clipped=0.5, right=0.4)] * (3 * WINDOW)) == []
    assert watch.raised == []
    assert not watch.dead


def test_completions_that_the_limit_cuts_are_told_once_with_what_mends_it() -> None:
    watch = Watch(64)
    (alarm,) = looked(watch, *[metrics(clipped=0.6)] * (4 * WINDOW))
    assert (alarm.step, alarm.name) == (WINDOW, "clipped"), "one step says little"
    assert "60% of the completions reach 64 tokens and are cut" in alarm.said
    assert "raise --max-tokens, or reward shorter ones (--length-reward" in alarm.said
    assert watch.raised == [alarm]
    assert not watch.dead


@pytest.mark.parametrize(
    ("right", "why", "mend"),
    [
        (0.0, "all wrong", "take easier questions, or tune on examples first (finetune sft)"),
        (1.0, "all right", "take harder questions"),
        (0.5, "alike", "raise --generations or --temperature"),
        (None, "no gold can be read", "the scorer"),
    ],
)
def test_groups_without_spread_are_told_once_with_why_and_what_mends_it(
    right: float | None, why: str, mend: str
) -> None:
    watch = Watch(64)
    (alarm,) = looked(watch, *[metrics(even=0.9, right=right)] * (4 * WINDOW))
    assert (alarm.step, alarm.name) == (WINDOW, "no spread")
    assert f"in 90% of the groups all completions earn the same ({why})" in alarm.said
    assert mend in alarm.said


def test_a_few_bad_steps_are_no_alarm_and_each_kind_is_told_when_it_comes() -> None:
    watch = Watch(64)
    assert looked(watch, *[metrics(even=1.0, clipped=1.0), *[metrics()] * 9]) == []
    assert [a.name for a in looked(watch, *[metrics(clipped=1.0)] * WINDOW)] == ["clipped"]
    assert [a.name for a in looked(watch, *[metrics(even=1.0, clipped=1.0)] * WINDOW)] == ["no spread"]
    assert [a.name for a in watch.raised] == ["clipped", "no spread"]


def test_a_step_without_any_readable_gold_does_not_hide_what_the_others_say() -> None:
    watch = Watch(64)
    steps = [metrics(even=1.0, right=0.0)] * (WINDOW - 1) + [metrics(even=1.0, right=None)]
    (alarm,) = looked(watch, *steps)
    assert "(all wrong)" in alarm.said


@pytest.mark.parametrize("patience", [1, 3, 7, 20])
def test_a_signal_is_dead_after_so_many_silent_steps_in_a_row_and_not_before(patience: int) -> None:
    watch = Watch(64, patience)
    silent, speaking = metrics(even=1.0, right=0.0), metrics(even=0.99, right=0.1)
    looked(watch, *[silent] * (patience - 1), speaking, *[silent] * (patience - 1))
    assert not watch.dead, "a step that teaches begins the count anew"
    looked(watch, silent)
    assert watch.dead


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_who_has_little_patience_is_told_why_before_it_ends(patience: int) -> None:
    watch = Watch(64, patience)
    told = looked(watch, *[metrics(even=1.0, right=0.0)] * patience)
    assert watch.dead
    assert [(alarm.step, alarm.name) for alarm in told] == [(patience, "no spread")]
    assert "take easier questions" in told[0].said


def test_what_a_trainer_logs_besides_its_steps_counts_for_nothing() -> None:
    watch = Watch(64, patience=1)
    assert looked(watch, {"train_runtime": 3.0}, {}) == []
    assert not watch.dead


def test_what_the_alarms_advise_are_options_of_the_command() -> None:
    options = {
        name
        for command in typer.main.get_command(commands).commands.values()  # type: ignore[attr-defined]  # a group
        for parameter in command.params
        for name in parameter.opts
    }
    watch = Watch(64)
    looked(watch, *[metrics(even=1.0, clipped=1.0)] * WINDOW)
    said = " ".join(alarm.said for alarm in watch.raised)
    said += f" {too_long(99, colab=True, save_every=0)} {too_long(99, colab=True, save_every=5)}"
    advised = set(re.findall(r"--[a-z-]+", said))
    assert len(advised) >= 5
    assert advised <= options


def test_colabs_limit_is_told_on_colab_alone_and_only_to_who_will_meet_it() -> None:
    assert too_long(100.0, colab=False, save_every=50) == ""
    assert too_long(COLAB_HOURS, colab=True, save_every=50) == ""
    kept = too_long(13.2, colab=True, save_every=50)
    assert kept.startswith("about 13 hours left, and Colab ends a session after 12 at most: checkpoints every 50 steps")
    assert "mounted Drive" in kept
    assert "set --save-every" in too_long(13.2, colab=True, save_every=0)
