"""What a run says of its cost before it asks anything: by its own answers, by what was published, or a bound alone."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dsr1kit.access.prices import Price
from dsr1kit.cli import app
from dsr1kit.compare.asking import Question
from dsr1kit.compare.beforehand import expected_costs, in_words
from dsr1kit.compare.items import Item, TaskFacts
from dsr1kit.compare.money import Estimate

AT = dt.datetime(2026, 11, 24, 12, 0, tzinfo=dt.UTC)
ITEMS = [Item(f"q{n}", f"What is {n} + 1?", str(n + 1), "sum", "en") for n in range(10)]
UNKNOWN = TaskFacts(name="mine", title="Mine", source="here")


def costs(*names: str, kept: Any = (), task: TaskFacts = UNKNOWN, model: str = "x", **prices: Price) -> Any:
    known = {name: prices.get(name) for name in names}
    questions = [Question(name, item, 0) for item in ITEMS for name in reversed(names)]
    return expected_costs(
        questions, known, dict.fromkeys(names, model), dict.fromkeys(names, 1000), task, kept, AT
    )  # fmt: skip


def record(item: str, tokens: int, channel: str = "a") -> dict[str, Any]:
    return {
        "channel": channel, "item": item, "kind": "sum", "outcome": "ok", "from_cache": False,
        "prompt_tokens": 20, "reasoning_tokens": tokens - 10, "answer_tokens": 10,
    }  # fmt: skip


def test_where_nobody_knows_how_long_answers_are_the_bound_alone_is_told() -> None:
    found = costs("a", a=Price(1.0, 10.0))
    assert found["a"].expected is None
    assert found["a"].bound == pytest.approx(10 * 1000 * 10 / 1e6, rel=0.05)
    (line,) = in_words(found, None, {})
    assert line.startswith("a: 10 requests, at most USD 0.1")
    assert "1,000 tokens" in line
    assert "not known" in line


def test_a_task_whose_answers_were_counted_by_others_is_priced_by_that() -> None:
    told = TaskFacts(name="mine", title="Mine", source="here", expected_completion_tokens=500, tokens_source="a card")
    (line,) = in_words(costs("a", a=Price(0.0, 10.0), task=told), None, {})
    assert line.startswith("a: 10 requests, about USD 0.05 by a card; at most USD 0.1,")


def test_a_run_that_goes_on_is_priced_by_its_own_answers() -> None:
    kept = [record(f"old{n}", 200 + n) for n in range(20)] + [record("x", 900, "b")]
    found = costs("a", "b", a=Price(0.0, 10.0), b=Price(0.0, 10.0), kept=kept)
    a: Estimate = found["a"]
    assert a.low is not None
    assert a.expected is not None
    assert a.high is not None
    assert a.low < a.expected < a.high
    assert a.expected == pytest.approx(10 * 209.5 * 10 / 1e6)
    assert found["b"].expected == pytest.approx(10 * 900 * 10 / 1e6)
    assert "by this run so far" in next(iter(in_words(found, None, {})))


def test_channels_come_in_their_order_and_what_charges_nothing_is_left_out() -> None:
    found = costs("a", "free", "b", a=Price(1.0, 1.0), free=Price(0.0, 0.0))
    assert list(found) == ["a", "b"]
    assert list(in_words(found, None, {}))[1] == "b: 10 requests, price unknown"


def test_a_budget_that_will_not_do_is_told_with_what_is_spent_already() -> None:
    told = TaskFacts(name="mine", title="Mine", source="here", expected_completion_tokens=500, tokens_source="a card")
    found = costs("a", "b", a=Price(0.0, 10.0), b=Price(0.0, 10.0), task=told)
    assert len(list(in_words(found, 0.11, {}))) == 2
    assert list(in_words(found, 0.09, {}))[-1].startswith("USD 0.1 in all is more than --max-cost 0.09")
    assert list(in_words(found, 0.11, {"USD": 0.02}))[-1].startswith("USD 0.12 in all is more than --max-cost 0.11")
    assert len(list(in_words(found, 0.11, {"CNY": 0.1}))) == 2


def test_compare_tells_it_before_and_what_the_budget_kept_back_after(tmp_path: Path) -> None:
    weather = tmp_path / "paid.toml"
    weather.write_text('[model]\nscript = "<think>a b c</think>\\\\boxed{1}"\n[price]\ninput = 0.0\noutput = 1000000\n')
    run = ["compare", "--channels", f"emulated:{weather}", "--items", "8", "--concurrency", "1", "--max-tokens", "50",
           "--no-client-check", "--out", str(tmp_path / "run")]  # fmt: skip
    first = CliRunner().invoke(app, [*run, "--max-cost", "1"])
    assert first.exit_code == 0, first.output
    name = f"emulated:{weather}"
    assert f"expected cost: {name}: 8 requests, at most USD 400" in first.stderr
    assert "7 requests kept back by --max-cost; the same command with more asks them" in first.stderr
    assert "--retry-failed" not in first.stderr
    noted = json.loads((tmp_path / "run" / "run.json").read_text())["expected_cost"]
    assert noted[0].startswith(f"{name}: 8 requests, at most USD 400")
    assert "cost expected" in (tmp_path / "run" / "report.html").read_text()

    second = CliRunner().invoke(app, run)
    assert second.exit_code == 0, second.output
    assert f"expected cost: {name}: 7 requests, about USD " in second.stderr
    assert "by this run so far" in second.stderr
    assert "kept back" not in second.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["expected_cost"] == noted
    quiet = CliRunner().invoke(app, [*run, "--quiet"])
    assert "expected cost" not in quiet.stderr
