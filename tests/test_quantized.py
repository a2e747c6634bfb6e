"""What quantization costs: variants of tiny-r1 on real weights, and what is said of made-up measurements."""

from __future__ import annotations

import asyncio

import pytest

from dsr1kit.compare import quantized
from dsr1kit.compare.quantized import Pace, Quality, Weights
from dsr1kit.compare.stats import Interval, PairedDifference
from dsr1kit.compare.tasks import load_task
from dsr1kit.errors import UnknownName, UsageError
from dsr1kit.records import Sampling

GREEDY = Sampling(temperature=0.0, max_tokens=200)
ITEMS = load_task("arithmetic", 42)


def on_variants(names, scenario):
    """Open variants of tiny-r1, hand them to `scenario` (a coroutine function); its result."""

    async def inside():
        async with quantized.opened("tiny-r1", names, threads=1) as models:
            return await scenario(models)

    return asyncio.run(inside())


def test_each_variant_is_what_its_name_says_and_all_are_open_at_once():
    async def scenario(models):
        return {name: (m.loaded.dtype, m.loaded.quantization, m.loaded.precision) for name, m in models.items()}

    assert on_variants(("float32", "bfloat16", "8bit", "4bit"), scenario) == {
        "float32": ("float32", "none", "fp32"),
        "bfloat16": ("bfloat16", "none", "bf16"),
        "8bit": ("float32", "8bit", "8bit"),
        "4bit": ("float32", "4bit", "nf4"),
    }


def test_no_variant_stays_open():
    kept = {}

    async def scenario(models):
        kept.update(models)

    on_variants(("float32", "bfloat16"), scenario)
    for model in kept.values():
        with pytest.raises(UsageError, match="not open"):
            _ = model.loaded


@pytest.mark.parametrize("text", ["float32", "", "float32,float32"])
def test_fewer_than_two_variants_or_one_twice_are_refused(text):
    with pytest.raises(UsageError, match="two variants"):
        quantized.variants_named(text)


def test_an_unknown_variant_is_told_with_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'bfloat16'"):
        quantized.variants_named("float32, bfloat6")


def test_a_variant_that_is_the_first_itself_shows_no_difference():
    async def scenario(models):
        return await quantized.quality({"one": models["float32"], "again": models["float32"]}, ITEMS, sampling=GREEDY)

    found = on_variants(("float32", "bfloat16"), scenario)
    assert found["one"].difference is None
    again = found["again"]
    assert (again.difference.value, again.difference.items, again.changed) == (0.0, len(ITEMS), 0.0)
    assert again.difference.low < 0 < again.difference.high
    assert not again.differs


def test_the_difference_is_that_of_the_same_items_and_rounding_shows_in_the_texts():
    progress = []

    async def scenario(models):
        return await quantized.quality(models, ITEMS, sampling=GREEDY, on_progress=lambda *told: progress.append(told))

    found = on_variants(("float32", "4bit"), scenario)
    coarse = found["4bit"]
    assert coarse.difference.value == pytest.approx(coarse.accuracy.value - found["float32"].accuracy.value)
    assert 0 < coarse.changed < 1
    assert [told for told in progress if told[1] == told[2]] == [("float32", 42, 42), ("4bit", 42, 42)]


def test_every_round_makes_the_same_tokens_and_the_first_variant_is_its_own_measure():
    progress = []

    async def scenario(models):
        return await quantized.paces(
            models, ITEMS, batches=(1, 3), new_tokens=70, rounds=2, on_progress=lambda *told: progress.append(told)
        )

    # 70 is more than tiny-r1 thinks of its own accord.
    found = on_variants(("float32", "bfloat16"), scenario)
    assert {(pace.variant, pace.batch): pace.new_tokens for pace in found} == {
        ("float32", 1): 70, ("float32", 3): 210, ("bfloat16", 1): 70, ("bfloat16", 3): 210
    }  # fmt: skip
    assert all(len(pace.tokens_per_s) == 2 and min(pace.tokens_per_s) > 0 for pace in found)
    assert {pace.against_first for pace in found if pace.variant == "float32"} == {Interval(1.0, 1.0, 1.0)}
    assert progress == [("pace", done, 12) for done in range(13)]


def test_the_ratio_is_taken_within_a_round():
    async def scenario(models):
        return await quantized.paces(models, ITEMS, batches=(1,), new_tokens=8, rounds=3)

    first, other = on_variants(("float32", "bfloat16"), scenario)
    ratios = [b / a for a, b in zip(first.tokens_per_s, other.tokens_per_s, strict=True)]
    assert (other.against_first.low, other.against_first.high) == (min(ratios), max(ratios))
    assert other.against_first.value == sorted(ratios)[1]


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"batches": ()}, {"batches": (0,)}])
def test_sizes_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(UsageError, match="at least 1"):
        on_variants(("float32", "bfloat16"), lambda models: quantized.paces(models, ITEMS, **wrong))


def test_weights_are_what_the_planner_computed_where_nothing_is_quantized():
    async def scenario(models):
        return quantized.weights(models)

    found = on_variants(("float32", "bfloat16", "8bit", "4bit"), scenario)
    for name in ("float32", "bfloat16"):
        assert found[name].held_bytes == pytest.approx(found[name].planned_bytes, rel=0.001)
    sizes = [one.held_bytes for one in found.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert [one.precision for one in found.values()] == ["fp32", "bf16", "8bit", "nf4"]


def pace(variant, ratio, batch=1, rounds=7):
    return Pace(variant, batch, (100.0 * ratio[0],) * rounds, Interval(*ratio), 32 * batch)


@pytest.mark.parametrize(
    ("ratio", "rounds", "holds"),
    [
        ((1.6, 1.5, 1.7), 7, "yes"),
        ((1.1, 1.0, 1.2), 7, "no"),
        ((1.4, 1.2, 1.6), 7, "not settled"),
        ((1.6, 1.5, 1.7), 5, "not settled"),
    ],
)
def test_a_claim_holds_or_not_only_where_the_interval_settles_it(ratio, rounds, holds):
    (row,) = quantized.claim([pace("float32", (1, 1, 1)), pace("bfloat16", ratio, rounds=rounds)], "bfloat16", 1.4)
    assert (row["batch"], row["claimed"], row["holds"]) == (1, "1.40", holds)


FOUND = {
    "float32": Quality(Interval(0.8, 0.75, 0.85), None, 0.0),
    "8bit": Quality(Interval(0.79, 0.74, 0.84), PairedDifference(-0.01, -0.03, 0.01, 300, 1200, 0.33), 0.1),
    "4bit": Quality(Interval(0.7, 0.65, 0.75), PairedDifference(-0.1, -0.15, -0.05, 300, None, 0.0001), 0.4),
    "float16": Quality(Interval(0.9, 0.85, 0.95), PairedDifference(0.1, 0.05, 0.15, 300, None, 0.0001), 0.4),
    "bfloat16": Quality(Interval(0.8, 0.75, 0.85), PairedDifference(0.0, -0.01, 0.01, 300, None, 1.0), 0.0),
}
PACES = [pace(name, (0.5, 0.4, 0.6), batch) for name in FOUND for batch in (1, 8)]


def test_the_verdict_calls_a_difference_one_only_where_it_is_shown():
    told = quantized.verdict(FOUND, PACES)
    assert [line.partition(": ")[2].partition(";")[0] for line in told] == [
        "no difference in answers shown (-3.0 to +1.0 points",
        "5.0 to 15.0 points fewer right answers",
        "5.0 to 15.0 points more right answers",
        "no difference in answers shown (-1.0 to +1.0 points",
    ]
    assert "about 1,200 items would settle it" in told[0]
    assert "no gap seen to settle" in told[3]
    assert told[0].endswith("pace times 0.50 (0.40 to 0.60) at batch 1, 0.50 (0.40 to 0.60) at batch 8.")


def test_tables_hold_a_row_for_each_variant():
    table = quantized.quality_table(FOUND)
    assert list(table["a difference"]) == ["", "not shown", "yes", "yes", "not shown"]
    assert table.loc["4bit", "against the first, points"] == "-10.0 (-15.0 to -5.0)"
    assert quantized.pace_table(PACES).loc["8bit", "batch 8, ratio"] == "0.50 (0.40 to 0.60)"
    sizes = quantized.weights_table({"4bit": Weights("nf4", 3 << 20, 2 << 20)})
    assert list(sizes.loc["4bit"]) == ["nf4", 3.0, 2.0, 1.5]


def test_the_published_figures_say_that_every_quantized_variant_is_slower_on_a_t4():
    whole = quantized.T4_PUBLISHED["float16"]
    for name, speeds in quantized.T4_PUBLISHED.items():
        assert name == "float16" or all(a < b for a, b in zip(speeds, whole, strict=True))
    assert quantized.published_table().loc["nf4", "batch 1"] == "16.45 (0.64)"


def test_the_figure_shows_each_variant_but_the_first_and_each_batch(tmp_path):
    drawing = quantized.figure(FOUND, PACES)
    drawing.savefig(tmp_path / "quantized.png")
    left, right = drawing.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["8bit", "4bit", "float16", "bfloat16"]
    assert [text.get_text() for text in drawing.legends[0].get_texts()] == ["batch 1", "batch 8"]
    assert len(right.containers) == 8
