"""The report's figures: bounded in size, drawn in signs that exist, the same for the same data, told in words."""

from __future__ import annotations

import re
import warnings
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from matplotlib.figure import Figure

from dsr1kit.compare import descriptions, figures, run_figures
from dsr1kit.compare.summary import summarize

CHANNELS = ("hosted", "slow", "local:tiny")
RUN = {"identity": {"task": "arithmetic"}}


def record(channel: str, item: int, **more: Any) -> dict[str, Any]:
    first = {"hosted": 2.0, "slow": 20.0}.get(channel, 0.1) * (1 + (item * 7919 % 101) / 100)
    local = channel.startswith("local:")
    return {
        "channel": channel, "item": f"q{item}", "sample": 0, "kind": f"kind {item % 3}", "outcome": "ok", "detail": "",
        "verdict": "right" if item % 4 else "wrong", "from_cache": False, "emulated": False,
        "cost": 0.0 if local else 0.01, "currency": "USD", "due_at": f"2026-01-01T10:{item % 60:02d}:00+00:00",
        "queue_s": 0.0, "connect_s": None if local else 0.0, "connection_reused": True, "inter_token_s": 0.02,
        "first_token_s": first / 4, "first_answer_s": first, "total_s": first * 1.25, "reasoning_tokens": 3,
        "answer_tokens": 1, "model_requested": "m", "model_served": "m", "final": "1",
    } | more  # fmt: skip


def some(of: int = 40, channels: tuple[str, ...] = CHANNELS) -> list[dict[str, Any]]:
    return [record(name, i) for name in channels for i in range(of)]


def stopped(channel: str, item: int, total_s: float = 60.0) -> dict[str, Any]:
    """A request that a clock ended before any answer."""
    return record(channel, item, outcome="stalled", verdict="unscored", first_answer_s=None, total_s=total_s)


def texts(figure: Figure) -> str:
    from matplotlib.text import Text

    figure.draw_without_rendering()
    return " ".join(t.get_text() for t in figure.findobj(Text) if t.get_visible())


# --- channels -----------------------------------------------------------------------------------------------


def test_accuracy_stands_against_time_and_against_each_currency_on_one_axis() -> None:
    records = some() + [record("cny", i, cost=0.5, currency="CNY") for i in range(40)]
    figure = figures.tradeoffs(summarize(records, [*CHANNELS, "cny"], run=RUN))
    first, usd, cny = figure.axes
    assert first.get_xlabel() == "time to the first answer, median (s)"
    assert first.get_xscale() == "log"
    assert (usd.get_xlabel(), cny.get_xlabel()) == ("USD per 1,000 right answers", "CNY per 1,000 right answers")
    assert first.get_ylim() == usd.get_ylim() == cny.get_ylim()


def test_a_free_channel_has_a_place_on_a_logarithmic_axis_of_cost() -> None:
    records = some() + [record("dear", i, cost=5.0) for i in range(40)]
    figure = figures.tradeoffs(summarize(records, [*CHANNELS, "dear"], run=RUN))
    cost = figure.axes[1]
    figure.draw_without_rendering()
    assert cost.get_xscale() == "log"
    assert "free" in [t.get_text() for t in cost.get_xticklabels()]


def test_without_any_price_there_is_no_panel_of_cost() -> None:
    summary = summarize([r | {"cost": None, "currency": None} for r in some()], CHANNELS)
    assert len(figures.tradeoffs(summary).axes) == 1


@pytest.mark.parametrize("figure", ["tradeoffs", "accuracy_against_latency"])
def test_the_legend_names_every_channel_and_the_front_is_ringed(figure: str) -> None:
    summary = summarize(some(), CHANNELS, run=RUN)
    told = texts(getattr(figures, figure)(summary))
    assert all(name in told for name in CHANNELS)
    assert ("not beaten" in told) == (figure == "tradeoffs")


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("short", ["short"]),
        ("local:deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B@4bit", 3),
        ("x" * 70, 3),
        ("two words " * 6, 3),
        ("", []),
    ],
)
def test_long_names_are_wrapped_without_losing_a_sign(name: str, lines: Any) -> None:
    shown = figures.wrapped(name).split("\n")
    assert all(len(line) <= 26 for line in shown)
    assert "".join(shown).replace(" ", "") == name.replace(" ", "")
    assert len([line for line in shown if line]) == (lines if isinstance(lines, int) else len(lines))


def test_a_name_in_signs_no_font_here_has_gets_one_that_can_be_drawn() -> None:
    strange = "way \U00012345 in"  # cuneiform
    summary = summarize(some(channels=("a", strange)), ["a", strange])
    assert figures.missing_signs(strange)
    assert figures.label(strange, summary["channels"]) == "channel 2 (way  in)"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of signs that it draws as boxes
        figures.to_svg(figures.tradeoffs(summary))


def test_chinese_names_and_kinds_are_drawn_or_replaced_but_never_as_boxes() -> None:
    name = "硅基流动-deepseek-r1"
    records = [record(name, i, kind="逻辑" if i % 2 else "算术") for i in range(40)]
    summary = summarize(records, [name])
    expected = "channel 1 (deepseek-r1)" if figures.missing_signs(name) else name
    assert figures.label(name, summary["channels"]) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in (
            figures.tradeoffs(summary),
            figures.outcomes(summary["channels"]),
            figures.accuracy_by_kind(summary["channels"]),
            run_figures.distributions(records, summary["channels"]),
            run_figures.where_time_goes(summary["channels"]),
        ):
            figures.to_svg(figure)


def test_dollar_signs_are_no_mathematics() -> None:
    summary = summarize(some(channels=("$a$", "b")), ["$a$", "b"])
    assert figures.to_svg(figures.tradeoffs(summary)).count("<svg") == 1


def test_many_kinds_make_a_figure_that_still_ends() -> None:
    records = [record("a", i, kind=f"subject {i % 60}") for i in range(240)]
    figure = figures.accuracy_by_kind(summarize(records, ["a"])["channels"])
    assert figure.get_figheight() < 16


# --- SVG ----------------------------------------------------------------------------------------------------


def test_an_svg_says_what_it_shows_and_shares_no_id_with_another() -> None:
    summary = summarize(some(), CHANNELS, run=RUN)
    drawn = [
        figures.to_svg(figures.outcomes(summary["channels"]), "Outcomes", "all <well> & good", key=key)
        for key in ("one", "two")
    ]
    ids = []
    for text, key in zip(drawn, ("one", "two"), strict=True):
        svg = ET.fromstring(text)  # noqa: S314 - our own text
        space = "{http://www.w3.org/2000/svg}"
        assert svg.get("role") == "img"
        assert svg.get("aria-labelledby") == f"{key}-title {key}-desc"
        assert svg.find(f"{space}title").text == "Outcomes"
        assert svg.find(f"{space}desc").text == "all <well> & good"
        own = [e.get("id") for e in svg.iter() if e.get("id")]
        assert len(own) == len(set(own))
        asked = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text))
        assert asked <= set(own)
        ids.append(set(own))
    assert not ids[0] & ids[1]
    assert "<style" not in drawn[0]


def test_the_same_data_give_the_same_bytes() -> None:
    summary = summarize(some(), CHANNELS, run=RUN)
    first, second = (figures.to_svg(figures.tradeoffs(summary), "t", "d", "k") for _ in range(2))
    assert first == second


# --- how a run went -----------------------------------------------------------------------------------------


def test_requests_that_a_clock_ended_get_a_panel_of_their_own_with_ticks() -> None:
    records = some() + [stopped("slow", 40 + i) for i in range(20)]
    channels = summarize(records, CHANNELS)["channels"]
    naive, counted = run_figures.distributions(records, channels).axes
    ends = {axes: {line.get_label(): line.get_ydata()[-1] for line in axes.lines} for axes in (naive, counted)}
    assert ends[naive]["slow"] == pytest.approx(100)
    assert ends[counted]["slow"] == pytest.approx(100 * 40 / 60)
    assert any(line.get_marker() == "|" for line in counted.lines)
    assert len(run_figures.distributions(some(), summarize(some(), CHANNELS)["channels"]).axes) == 1


def test_the_curve_that_counts_them_is_kaplan_and_meiers() -> None:
    from statsmodels.duration.survfunc import SurvfuncRight

    records = [record("slow", i) for i in range(60)] + [stopped("slow", 60 + i, 21.0 + i) for i in range(15)]
    channels = summarize(records, ["slow"])["channels"]
    counted = run_figures.distributions(records, channels).axes[1].lines[0]
    times = [r["first_answer_s"] or r["total_s"] for r in records]
    theirs = SurvfuncRight(times, [r["first_answer_s"] is not None for r in records])
    ours = dict(zip(counted.get_xdata(), counted.get_ydata(), strict=True))
    for time, survival in zip(theirs.surv_times, theirs.surv_prob, strict=True):
        assert ours[time] == pytest.approx(100 * (1 - survival))


def test_a_figure_is_as_large_for_many_records_as_for_few() -> None:
    def size(of: int) -> int:
        records = [record("a", i, first_answer_s=1 + (i * 7919 % 10007) / 1000) for i in range(of)]
        records += [stopped("a", of + i, 1 + i / of) for i in range(of)]
        channels = summarize(records, ["a"])["channels"]
        passed = run_figures.passage(records)
        assert passed is not None
        drawn = (run_figures.distributions(records, channels), run_figures.over_time(passed, channels))
        return sum(len(figures.to_svg(figure)) for figure in drawn)

    assert size(10_000) < 1.5 * size(1_000)


def test_outcomes_over_time_count_every_request_once_and_cut_pauses_out() -> None:
    records = [record("a", i, due_at=f"2026-01-01T10:00:{i:02d}+00:00") for i in range(60)]
    records += [record("a", i, due_at=f"2026-01-03T09:00:{i:02d}+00:00", outcome="overloaded") for i in range(60)]
    passed = run_figures.passage(records)
    assert passed is not None
    assert len(passed.begins) <= 60
    assert {o: sum(n) for o, n in passed.counts["a"].items()} == {"ok": 60, "overloaded": 60}
    ((place, lasted),) = passed.pauses.items()
    assert lasted == pytest.approx(47 * 3600 - 59)
    assert sum(passed.counts["a"]["ok"][:place]) == 60
    assert sum(passed.counts["a"]["overloaded"][place:]) == 60
    channels = summarize(records, ["a"])["channels"]
    assert "pause 1.96 d" in texts(run_figures.over_time(passed, channels))


@pytest.mark.parametrize("span_s", [0, 1, 59, 3600, 40 * 86400])
def test_any_length_of_run_fits_the_axis_of_time(span_s: int) -> None:
    import datetime as dt

    begun = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    dues = [(begun + dt.timedelta(seconds=span_s * i / 99)).isoformat() for i in range(100)]
    passed = run_figures.passage([record("a", i, due_at=due) for i, due in enumerate(dues)])
    assert passed is not None
    assert 1 <= len(passed.begins) <= 61
    assert sum(passed.counts["a"]["ok"]) == 100
    assert not passed.pauses


def test_records_that_do_not_tell_when_make_no_passage() -> None:
    assert run_figures.passage([record("a", 0, due_at=None)]) is None


def test_stages_of_time_are_stacked_to_the_whole_and_local_ones_come_last() -> None:
    records = some(channels=("local:tiny", "hosted"))
    channels = summarize(records, ["local:tiny", "hosted"])["channels"]
    seconds, shares = run_figures.where_time_goes(channels).axes
    assert [t.get_text() for t in seconds.get_yticklabels()] == ["hosted", "local:tiny"]
    for row, name in enumerate(("hosted", "local:tiny")):
        whole = sum(p.get_width() for p in seconds.patches if round(p.get_y() + p.get_height() / 2) == row)
        assert whole == pytest.approx(sum(channels[name]["time_split"].values()))
        assert sum(p.get_width() for p in shares.patches if round(p.get_y() + p.get_height() / 2) == row) == (
            pytest.approx(100)
        )
    looks = {(p.get_facecolor(), p.get_hatch()) for p in seconds.patches}
    assert len(looks) == len(run_figures.STAGES)


# --- in words -----------------------------------------------------------------------------------------------


def test_every_figure_is_told_in_its_findings() -> None:
    records = some() + [stopped("slow", 40 + i) for i in range(20)]
    records += [r | {"sample": 1, "verdict": "right"} for r in records]
    summary = summarize(records, CHANNELS, run=RUN)
    channels = summary["channels"]
    assert "Not beaten on accuracy, speed and cost at once: local:tiny." in descriptions.tradeoffs(summary)
    assert "slow: half of its answers had begun by" in descriptions.distributions(channels)
    assert "40 of 120 requests ended before any answer" in descriptions.distributions(channels)
    assert re.search(r"hosted: .+, of it 60% thinking, 20% .+ and 20% .+\.", descriptions.where_time_goes(channels))
    assert "slow: 66.7% ok and 33.3% stalled." in descriptions.outcomes(channels)
    assert re.search(r"hosted: most often right on kind \d, .+; least often on kind \d", descriptions.kinds(channels))
    assert "with 1 sample, 100% (" in descriptions.pass_at_k(channels)
    passed = run_figures.passage(records)
    assert passed is not None
    assert "hosted: all ended well. slow: 40 did not end as ok" in descriptions.over_time(passed, channels)
