"""The report as a page: one file, readable by eye and by ear, honest about what it shows."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dsr1kit.compare import report
from dsr1kit.compare.show import pairs_table, summary_table
from dsr1kit.compare.slim import load_records
from dsr1kit.compare.summary import summarize

CHANNELS = (
    "hosted",
    "硅基流动-deepseek-r1-with-a-name-that-goes-on-and-on-and-on",
    "local:tiny-r1@4bit",
    "emulated:busy",
)
NOTE: dict[str, Any] = {
    "bias": {
        "streams": 8, "requests": 64, "first_token_ms": 0.21, "first_token_p99_ms": 0.9, "inter_token_share": 0.002,
        "cpu_ms_per_request": 1.2,
    },
    "lag_ms": {"p50": 0.1, "p99": 2.4, "max": 12.0}, "in_flight": {"asked": 8, "mean": 7.8, "peak": 8},
    "cpu_share": 0.2, "late_ms": {"p50": 0.1, "p99": 1.0}, "limited": "",
}  # fmt: skip
RUN: dict[str, Any] = {
    "run": "2026-01-01-abc",
    "identity": {
        "channels": list(CHANNELS), "task": "arithmetic", "items": 30, "samples": 2, "concurrency": 8, "rate": None,
        "seed": 7, "warm_up": 2, "digest": "0123456789abcdef", "first_token_s": 120.0, "stall_s": 60.0,
        "deadline_s": None, "sampling": {"temperature": 0.6, "top_p": 0.95, "max_tokens": 32768},
    },
    "versions": {"python": "3.11"},
    "hardware": {"cores": 2, "ram_bytes": 2**34, "gpus": [], "platform": "Linux"},
    "starts": ["2026-01-01T10:00:00+00:00", "2026-01-02T10:00:00+00:00"],
    "warnings": ["hosted retires soon"],
    "objective": {"first_token_s": 2.0, "first_answer_s": None, "inter_token_s": None, "total_s": 60.0},
    "client": [NOTE, {**NOTE, "bias": None, "limited": "the client was the limit; ask with fewer streams"}],
}  # fmt: skip


def record(channel: str, item: int, sample: int, **more: Any) -> dict[str, Any]:
    local, number = channel.startswith("local:"), CHANNELS.index(channel)
    first = (0.1 if local else 2.0 + number) * (1 + (item * 7919 % 101) / 100)
    return {
        "run": "r", "channel": channel, "item": f"q{item}", "sample": sample, "kind": ("sums", "逻辑")[item % 2],
        "outcome": "ok", "detail": "", "verdict": "right" if (item + sample) % (number + 2) else "wrong",
        "from_cache": False, "emulated": channel.startswith("emulated:"), "cost": 0.0 if local else 0.01,
        "currency": "USD", "due_at": f"2026-01-0{sample + 1}T10:{item:02d}:00+00:00", "queue_s": 0.001,
        "connect_s": None if local else 0.01, "connection_reused": bool(item % 3), "inter_token_s": 0.02,
        "first_token_s": first / 4, "first_answer_s": first, "total_s": first * 1.25, "reasoning_tokens": 30,
        "answer_tokens": 10, "model_requested": "m", "model_served": "m", "final": str((item + sample) % 5),
        "question": f"question {item} <b>bold</b>?", "gold": "42", "reasoning": "hm </pre><script>alert(1)</script>",
        "answer": "\\boxed{42} & more",
    } | more  # fmt: skip


def some() -> list[dict[str, Any]]:
    records = [record(name, i, s) for s in (0, 1) for i in range(30) for name in CHANNELS]
    for number, r in enumerate(records):
        if r["channel"] == "emulated:busy" and number % 5 == 0:
            nothing = {"verdict": "unscored", "first_token_s": None, "first_answer_s": None, "answer": ""}
            r |= nothing | {
                "outcome": ("stalled", "overloaded")[number % 2],
                "detail": "HTTP 503 <busy>",
                "total_s": 60.0,
            }
        elif r["channel"] == "hosted" and number % 13 == 0:
            r |= {"outcome": "truncated", "first_answer_s": None, "detail": "cut"}
        elif r["channel"] == "hosted" and number % 7 == 0:
            r["verdict"] = "unscored"
    return records


def page_of(records: Sequence[Any], run: dict[str, Any] = RUN) -> str:
    identity = run["identity"]
    summary = summarize(records, identity["channels"], run=run)
    facts = {name: identity[name] for name in ("task", "items", "samples")}
    return report.render(run, records, summary | {"run": run["run"], **facts})


@pytest.fixture(scope="module")
def page() -> str:
    return page_of(some())


class Page(HTMLParser):
    """Elements in their order as (tag, attributes, text inside), and the texts."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "path", "use", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.parents: list[tuple[str, ...]] = []
        self._open: list[int] = []
        self.feed(text)
        assert not self._open, f"never closed: {[self.elements[i][0] for i in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.parents.append(tuple(self.elements[i][0] for i in self._open))
        self.elements.append((tag, {k: v or "" for k, v in attrs}, []))
        if tag not in self.VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.parents.append(tuple(self.elements[i][0] for i in self._open))
        self.elements.append((tag, {k: v or "" for k, v in attrs}, []))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.elements[self._open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for i in self._open:
            self.elements[i][2].append(data)

    def all(self, *tags: str) -> list[tuple[str, dict[str, str], str]]:
        return [(t, a, "".join(d).strip()) for t, a, d in self.elements if t in tags]


@pytest.fixture(scope="module")
def parsed(page: str) -> Page:
    return Page(page)


# --- one file -----------------------------------------------------------------------------------------------


def test_nothing_is_loaded_from_anywhere(parsed: Page, page: str) -> None:
    for tag, attributes, _ in parsed.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "img")
        for name in ("src", "srcset", "href", "xlink:href", "action", "poster", "data"):
            value = attributes.get(name, "")
            assert value == "" or value.startswith("#"), (tag, name, value)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"(?i)@import|url\(\s*[\"']?(https?:)?//", page)


def test_texts_of_others_stay_texts(page: str) -> None:
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "question 0 <b>" not in page
    assert "HTTP 503 &lt;busy&gt;" in page


def test_the_page_is_well_formed_and_no_id_is_there_twice(parsed: Page) -> None:
    ids = [a["id"] for _, a, _ in parsed.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes, _ in parsed.elements:
        for wanted in attributes.get("aria-labelledby", "").split():
            assert wanted in ids
        if attributes.get("href", "").startswith("#"):
            assert attributes["href"][1:] in ids


# --- by ear -------------------------------------------------------------------------------------------------


def test_every_figure_tells_its_findings_and_has_a_table_after_it(parsed: Page) -> None:
    figures = [a for t, a, _ in parsed.all("svg")]
    assert len(figures) == 7
    texts = {a.get("id"): text for _, a, text in parsed.all("title", "desc")}
    for attributes in figures:
        assert attributes["role"] == "img"
        title, description = (texts[i] for i in attributes["aria-labelledby"].split())
        assert title
        assert "hosted" in description
        assert re.search(r"\d", description)
    order = [t for t, _, _ in parsed.elements if t in ("svg", "table", "h2")]
    for number, tag in enumerate(order):
        if tag == "svg":
            assert order[number + 1] == "table"


def test_tables_have_captions_and_headers_with_a_scope(parsed: Page) -> None:
    tables = [a for t, a, _ in parsed.all("table")]
    captions = [text for _, _, text in parsed.all("caption")]
    assert len(captions) == len(tables) >= 12
    assert all(captions)
    for _, attributes, _ in parsed.all("th"):
        assert attributes.get("scope") in ("col", "row", "rowgroup")
    rows_without = [
        i for i, (t, _, _) in enumerate(parsed.elements)
        if t == "tr" and "tbody" in parsed.parents[i] and parsed.elements[i + 1][0] != "th"
        and "colspan" not in parsed.elements[i + 1][1]
    ]  # fmt: skip
    assert not rows_without
    for _, attributes, _ in (e for e in parsed.elements if e[1].get("class") == "scroll"):
        assert attributes["tabindex"] == "0"
        assert attributes["aria-label"]


def test_headings_come_in_order_and_the_verdict_first(parsed: Page, page: str) -> None:
    levels = [int(t[1]) for t, _, _ in parsed.all("h1", "h2", "h3")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    headings = [text for _, _, text in parsed.all("h2")]
    assert headings[0] == "Verdict"
    assert headings[-1] == "Method"
    assert page.index('class="skip"') < page.index("<main")
    assert '<html lang="en">' in page


def test_right_and_wrong_are_told_by_sign_and_word(page: str) -> None:
    assert "✓ right" in page
    assert "✗ wrong" in page


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_has_contrast_by_day_and_by_night(page: str) -> None:
    day, night = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", root)) for root in re.findall(r":root \{(.*?)\}", page)
    )
    for theme in (day, night):
        for text in ("ink", "soft", "accent", "think"):
            for ground in ("paper", "wash"):
                assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground)
        assert contrast(theme["ink"], theme["note"]) >= 4.5


# --- what it says -------------------------------------------------------------------------------------------


def test_the_verdict_is_the_summarys(page: str, parsed: Page) -> None:
    summary = summarize(some(), CHANNELS, run=RUN)
    said = [text for _, _, text in parsed.all("li")]
    assert said == summary["verdict"]
    leads = [text for _, a, text in parsed.all("p") if a.get("class") == "lead"]
    assert leads == summary["headline"]
    assert len(leads) == 3


def test_emulated_soon_retired_and_limited_by_the_client_stand_at_the_top(parsed: Page) -> None:
    notices = [text for _, a, text in parsed.all("p") if a.get("class") == "notice"]
    assert notices[0].startswith("Emulated: emulated:busy.")
    assert notices[1:] == [
        "Soon retired: hosted retires soon",
        "Limited by the client: the client was the limit; ask with fewer streams",
    ]


@pytest.mark.parametrize(
    "told",
    [
        "p after Holm", "McNemar", "not judged", "0123456789abcdef", "Cut by the token limit".lower(),
        "cold requests", "Kaplan-Meier", "Goodput: requests answered with the first token within 2 s",
        "time between tokens off by", "2 requests to each channel went ahead", "a pause of", "python 3.11",
        "Agresti and Min", "without a system prompt",
    ],
)  # fmt: skip
def test_what_a_reader_may_ask_for_is_there(page: str, told: str) -> None:
    assert told in page


def test_how_the_client_did_is_a_column_a_start_and_a_row_a_measure(page: str) -> None:
    table = page[page.index("<caption>What the client added") :]
    table = table[: table.index("</table>")]
    rows = {
        label: re.findall("<td>(.*?)</td>", cells)
        for label, cells in re.findall('<th scope="row">(.*?)</th>(.*?)</tr>', table)
    }
    assert rows["first token later by, mean"] == ["0.21 ms", "–"]
    assert rows["time between tokens off by"] == ["+0.20%", "–"]
    assert rows["event loop late, p99"] == ["2.40 ms"] * 2
    assert rows["requests in flight, asked for"] == ["8", "8"]
    assert rows["share of one core"] == ["20%", "20%"]


def test_a_run_without_notes_of_the_client_or_objective_has_a_report_too() -> None:
    bare = {k: v for k, v in RUN.items() if k not in ("client", "objective", "warnings")}
    bare["identity"] = {k: v for k, v in RUN["identity"].items() if k not in ("digest", "warm_up")}
    page = page_of([r | {"sample": 0, "item": f"{r['item']}/{r['sample']}"} for r in some()], bare)
    assert "was not measured in this run" in page
    assert "Several samples" not in page
    assert "Goodput" not in page


def test_a_run_without_a_record_has_a_report_too() -> None:
    page = page_of([])
    Page(page)
    assert "no reply could be judged" in page


def test_a_task_that_is_no_longer_there_does_not_take_the_report_along(tmp_path: Path) -> None:
    gone = RUN | {"identity": RUN["identity"] | {"task": f"file:{tmp_path / 'gone.jsonl'}"}}
    assert "gone.jsonl" in page_of(some(), gone)


def test_examples_are_one_of_each_kind_first_and_long_thoughts_are_cut_in_their_middle() -> None:
    records = [r | {"reasoning": "a" * 50_000 + "the end"} for r in some()]
    labels = {name: name for name in CHANNELS}
    examples = report.disagreements(records, labels)
    assert len(examples) == 6
    assert {e["replies"][0]["kind"] for e in examples[:2]} == {"sums", "逻辑"}
    for example in examples:
        assert {r["verdict"] for r in example["replies"]} == {"right", "wrong"}
        for reply in example["replies"]:
            assert len(reply["reasoning"]) < 5000
            assert "46,007 characters left out" in reply["reasoning"]
            assert reply["reasoning"].endswith("the end")


def test_slim_records_make_the_same_report(tmp_path: Path, page: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in some()), encoding="utf-8")
    assert page_of(load_records(path)) == page


def test_keys_are_redacted() -> None:
    page = page_of([r | {"answer": "sk-abcdEFGH1234567890abcdEFGH"} for r in some()])
    assert "sk-abcdEFGH1234567890" not in page


def test_notebooks_get_the_same_as_tables() -> None:
    summary = summarize(some(), CHANNELS, run=RUN)
    table = summary_table(summary)
    assert list(table.index) == list(CHANNELS)
    assert table.loc["hosted", "not judged"] == summary["channels"]["hosted"]["n_unscored"] > 0
    pairs = pairs_table(summary)
    assert len(pairs) == 6
    assert list(pairs["p after Holm"]) == [round(p["p_holm"], 4) for p in summary["pairs"]]
    assert set(pairs["shown"]) <= {"no difference", "a difference", "a difference, taken alone"}
