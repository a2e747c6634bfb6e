"""What fewer bits cost and gain: the same model in several precisions, side by side in one run.

Answers to the same items (paired), new tokens a second in rounds that take turns, bytes of the weights beside the
planner's figure. Knows items and local models; nothing about how weights are packed.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from dsr1kit.compare.curve import percent
from dsr1kit.compare.figures import COLOURS
from dsr1kit.compare.judge import verdict_of
from dsr1kit.compare.stats import Interval, PairedDifference, clustered_share, median_interval, paired_difference
from dsr1kit.compare.tasks import Item
from dsr1kit.errors import UnknownName, UsageError
from dsr1kit.local.memory import MIB, weight_bytes
from dsr1kit.local.shapes import shape_of_config
from dsr1kit.records import Sampling

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from dsr1kit.local.model import LocalModel

OnProgress = Callable[[str, int, int], None]
BATCHES = (1, 8, 32)
#: What a variant's name means to `LocalModel`.
VARIANTS: Mapping[str, Mapping[str, str]] = MappingProxyType({
    "float32": {"dtype": "float32"},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "8bit": {"quantization": "8bit"},
    "4bit": {"quantization": "4bit"},
})  # fmt: skip
#: Tokens a second of Qwen2.5-3B-Instruct on a T4 at batch 1, 8 and 32, bitsandbytes 0.45. What the kit loads is
#: `int8, outliers apart` as its 8bit and `nf4, double` as its 4bit.
T4_PUBLISHED: Mapping[str, tuple[float, ...]] = MappingProxyType({
    "float16": (25.66, 189.56, 532.30),
    "nf4": (16.45, 83.37, 278.32),
    "nf4, double (the kit's 4bit)": (13.58, 76.80, 263.36),
    "int8": (11.08, 87.01, 339.21),
    "int8, outliers apart (the kit's 8bit)": (5.98, 44.15, 167.37),
})  # fmt: skip
T4_SOURCE = "https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/benchmarking/README.md"


@dataclass(frozen=True, slots=True)
class Quality:
    """How one variant answers.

    Attributes:
        accuracy: share of right answers among all items; one that never came is not right.
        difference: its accuracy less that of the first variant on the same items; None for the first itself.
        changed: share of items to which it did not give the first variant's text, thinking and answer, to the letter.
    """

    accuracy: Interval
    difference: PairedDifference | None
    changed: float

    @property
    def differs(self) -> bool:
        """Whether the paired interval excludes zero."""
        return self.difference is not None and self.difference.excludes_zero


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast one variant answers so many requests at once.

    Attributes:
        tokens_per_s: of all requests together, the reading of the prompts included; one figure a round.
        against_first: its pace over that of the first variant in the same round: median over the rounds and its
            interval; below six rounds their range, which covers less than 95 %.
        new_tokens: that each round made, of all requests together.
    """

    variant: str
    batch: int
    tokens_per_s: tuple[float, ...]
    against_first: Interval
    new_tokens: int

    @property
    def median(self) -> float:
        """Tokens a second in the median round."""
        return float(np.median(self.tokens_per_s))


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of one variant's weights: as transformers counts them, and as the planner computed them."""

    precision: str
    held_bytes: int
    planned_bytes: int


def variants_named(text: str) -> tuple[str, ...]:
    """The variants in a list such as `float32,bfloat16,8bit,4bit`; the first is what the others are held against.

    Raises:
        UnknownName: there is no such variant.
        UsageError: fewer than two, or one twice.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in VARIANTS:
            raise UnknownName("variant", name, VARIANTS)
    if len(names) < 2 or len(set(names)) < len(names):
        raise UsageError(f"name two variants or more, each once, such as float32,4bit; not {text!r}")
    return names


@asynccontextmanager
async def opened(source: str, variants: Sequence[str], **options: Any) -> AsyncIterator[dict[str, LocalModel]]:
    """One model in several variants, all open at once, so that their rounds can take turns.

    Args:
        source: as for `LocalModel`.
        variants: names in `VARIANTS`.
        options: for every one of them, as `threads` or `device`.

    Raises:
        UnknownName, UsageError: as `variants_named`.
        ModelError: one does not fit beside those before it; name fewer, or a smaller model.
    """
    from dsr1kit.local.load import quiet
    from dsr1kit.local.model import LocalModel

    names = variants_named(",".join(variants))
    async with AsyncExitStack() as stack:
        models: dict[str, LocalModel] = {}
        for name in names:
            chosen: dict[str, Any] = {**options, **VARIANTS[name]}
            models[name] = await stack.enter_async_context(LocalModel(source, name=f"{source} {name}", **chosen))
        # Each model alone restores the loggers that its neighbour still needs quiet.
        with quiet(python_warnings=False):
            yield models


async def quality(
    models: Mapping[str, LocalModel],
    items: Sequence[Item],
    *,
    sampling: Sampling,
    batch_size: int = 64,
    on_progress: OnProgress | None = None,
) -> dict[str, Quality]:
    """Put the same items to every variant, one variant after the other.

    Args:
        models: as `opened` gives them, the first being what the others are held against.
        items: the questions.
        sampling: for all; greedy, or with a seed, so that nothing but the precision differs.
        batch_size: questions answered at once.
        on_progress: called with (variant, answers so far, answers in all).

    Raises:
        UsageError: no models or no items.
        ModelError: generation failed.
    """
    if not models or not items:
        raise UsageError("quality needs at least one variant and one item")
    right: dict[str, dict[str, list[bool]]] = {}
    texts: dict[str, list[tuple[str, str]]] = {}
    for name, model in models.items():

        def tell(done: int, total: int, stage: str = name) -> None:
            if on_progress is not None:
                on_progress(stage, done, total)

        tell(0, len(items))
        replies = await model.generate_many(
            [item.messages() for item in items], [sampling] * len(items), batch_size=batch_size, on_progress=tell
        )
        pairs = list(zip(items, replies, strict=True))
        right[name] = {item.id: [verdict_of(reply, item) == "right"] for item, reply in pairs}
        texts[name] = [(reply.reasoning, reply.answer) for reply in replies]
    first = next(iter(models))
    found = {}
    for name in models:
        accuracy = clustered_share(right[name])
        assert accuracy is not None  # noqa: S101 - there are items
        difference = None if name == first else paired_difference(right[name], right[first])
        changed = sum(a != b for a, b in zip(texts[name], texts[first], strict=True)) / len(items)
        found[name] = Quality(accuracy, difference, changed)
    return found


async def paces(
    models: Mapping[str, LocalModel],
    items: Sequence[Item],
    *,
    batches: Sequence[int] = BATCHES,
    new_tokens: int = 32,
    rounds: int = 7,
    on_progress: OnProgress | None = None,
) -> list[Pace]:
    """Measure new tokens a second of every variant at every batch size, in rounds in which all take turns.

    All get the same prompts. A model that thinks in tags is held thinking for all `new_tokens`; another one may end
    sooner, and what it did make is counted. A round before the first is not counted; the order moves on by one each
    round, so that none is always measured behind the same other.

    Args:
        models: as `opened` gives them, the first being what the others are held against.
        items: the questions, repeated where a batch is larger.
        batches: requests at once.
        new_tokens: for each request.
        rounds: six or more for an interval of 95 %.
        on_progress: called with (`pace`, measurements so far, measurements in all).

    Raises:
        UsageError: no models or items, or a size below 1.
        ModelError: generation failed.
    """
    if not models or not items or rounds < 1 or min(batches, default=0) < 1:
        raise UsageError("paces needs variants, items, and batches and rounds of at least 1")
    sampling = Sampling(temperature=0.0, max_tokens=new_tokens, min_thinking_tokens=new_tokens)
    names = list(models)
    speeds: dict[tuple[str, int], list[float]] = {(name, batch): [] for name in names for batch in batches}
    made: dict[tuple[str, int], int] = {}
    done, total = 0, (rounds + 1) * len(names) * len(batches)
    if on_progress is not None:
        on_progress("pace", done, total)
    for number in range(rounds + 1):
        turn = number % len(names)
        for batch in batches:
            prompts = [items[at % len(items)].messages() for at in range(batch)]
            for name in names[turn:] + names[:turn]:
                began = time.perf_counter()
                replies = await models[name].generate_many(prompts, [sampling] * batch, batch_size=batch)
                spent = time.perf_counter() - began
                made[name, batch] = sum(reply.usage.completion_tokens or 0 for reply in replies)
                if number:
                    speeds[name, batch].append(made[name, batch] / spent)
                done += 1
                if on_progress is not None:
                    on_progress("pace", done, total)
    found = []
    for name, batch in speeds:
        own, base = speeds[name, batch], speeds[names[0], batch]
        ratio = median_interval([a / b for a, b in zip(own, base, strict=True)])
        assert ratio is not None  # noqa: S101 - there is a round
        found.append(Pace(name, batch, tuple(own), ratio, made[name, batch]))
    return found


def weights(models: Mapping[str, LocalModel]) -> dict[str, Weights]:
    """Bytes that each variant's weights take. Raises ModelError for an architecture that the planner cannot read."""
    found = {}
    for name, model in models.items():
        loaded = model.loaded
        shape = shape_of_config(loaded.model.config.to_dict())
        held = int(loaded.model.get_memory_footprint())
        found[name] = Weights(loaded.precision, held, weight_bytes(shape, loaded.precision))
    return found


def claim(measured: Sequence[Pace], variant: str, factor: float) -> list[dict[str, Any]]:
    """Whether a variant is `factor` times as fast as the first, batch by batch.

    `yes` and `no` only where the interval settles it; nothing is settled by fewer than six rounds.
    """
    rows = []
    for pace in (pace for pace in measured if pace.variant == variant):
        ratio, enough = pace.against_first, len(pace.tokens_per_s) >= 6
        holds = "yes" if ratio.low >= factor else "no" if ratio.high < factor else "not settled"
        rows.append({"batch": pace.batch, "claimed": f"{factor:.2f}", "measured": _ratio(ratio),
                     "holds": holds if enough else "not settled"})  # fmt: skip
    return rows


# --- what is shown -------------------------------------------------------------------------------------------------


def quality_table(found: Mapping[str, Quality]) -> pd.DataFrame:
    """One row a variant: accuracy in percent and its difference to the first in points, with 95 % intervals."""
    import pandas as pd

    rows = {}
    for name, one in found.items():
        gap = one.difference
        rows[name] = {
            "right %": percent(one.accuracy),
            "against the first, points": "" if gap is None else percent(gap, sign="+"),
            "a difference": "" if gap is None else "yes" if one.differs else "not shown",
            "items to settle": "" if gap is None or gap.items_to_settle is None else f"{gap.items_to_settle:,}",
            "texts changed %": round(100 * one.changed, 1),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def pace_table(measured: Sequence[Pace]) -> pd.DataFrame:
    """Tokens a second in the median round, and the ratio to the first variant with its interval, a column a batch."""
    import pandas as pd

    rows: dict[str, dict[str, str]] = {}
    for pace in measured:
        row = rows.setdefault(pace.variant, {})
        row[f"batch {pace.batch}, tokens/s"] = f"{pace.median:,.0f}"
        row[f"batch {pace.batch}, ratio"] = _ratio(pace.against_first)
    return pd.DataFrame.from_dict(rows, orient="index")


def weights_table(found: Mapping[str, Weights]) -> pd.DataFrame:
    """MiB of the weights beside the planner's figure."""
    import pandas as pd

    rows = {
        name: [one.precision, *(round(n, 2) for n in (held / MIB, planned / MIB, held / planned))]
        for name, one in found.items()
        for held, planned in [(one.held_bytes, one.planned_bytes)]
    }
    columns = ["planner's name", "held MiB", "planned MiB", "held / planned"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def published_table() -> pd.DataFrame:
    """Other people's figures for a T4 (`T4_SOURCE`): tokens a second and, in brackets, the ratio to float16."""
    import pandas as pd

    whole = T4_PUBLISHED["float16"]
    rows = {
        name: [f"{speed:.2f} ({speed / base:.2f})" for speed, base in zip(speeds, whole, strict=True)]
        for name, speeds in T4_PUBLISHED.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=[f"batch {batch}" for batch in BATCHES])


def verdict(found: Mapping[str, Quality], measured: Sequence[Pace]) -> list[str]:
    """A sentence for each variant but the first: what it costs in answers, and what it gains in pace."""
    first, *others = found
    told = []
    for name in others:
        gap = found[name].difference
        assert gap is not None  # noqa: S101 - only the first has none
        low, high = 100 * gap.low, 100 * gap.high
        if not found[name].differs:
            settle = gap.items_to_settle
            more = f"about {settle:,} items would settle it" if settle else "no gap seen to settle"
            answers = f"no difference in answers shown ({low:+.1f} to {high:+.1f} points; {more})"
        elif high < 0:
            answers = f"{-high:.1f} to {-low:.1f} points fewer right answers"
        else:
            answers = f"{low:.1f} to {high:.1f} points more right answers"
        speed = ", ".join(
            f"{_ratio(pace.against_first)} at batch {pace.batch}" for pace in measured if pace.variant == name
        )
        told.append(f"{name} against {first}: {answers}; pace times {speed}.")
    return told


def figure(found: Mapping[str, Quality], measured: Sequence[Pace]) -> Figure:
    """Difference in accuracy to the first variant (left) and pace over the first one's (right), with intervals."""
    from matplotlib.figure import Figure

    first, *others = found
    drawing = Figure(figsize=(9.6, 1.9 + 0.55 * len(others)), layout="constrained")
    left, right = drawing.subplots(1, 2, sharey=True)
    for row, name in enumerate(others):
        gap = found[name].difference
        if gap is not None:
            _bar(left, Interval(100 * gap.value, 100 * gap.low, 100 * gap.high), row, "D", "black")
    batches = list(dict.fromkeys(pace.batch for pace in measured))
    spread = np.linspace(-0.22, 0.22, len(batches)) if len(batches) > 1 else np.zeros(1)
    for number, batch in enumerate(batches):
        colour, marker = COLOURS[number % len(COLOURS)], "osD^vPX*"[number % 8]
        for pace in measured:
            if pace.batch == batch and pace.variant in others:
                label = f"batch {batch}" if pace.variant == others[0] else None
                _bar(right, pace.against_first, others.index(pace.variant) + spread[number], marker, colour, label)
    left.set_yticks(range(len(others)), others)
    left.set_ylim(len(others) - 0.5, -0.5)
    left.axvline(0, color="#777777", linewidth=1)
    left.set_xlabel(f"right answers against {first} (points)")
    right.axvline(1, color="#777777", linewidth=1)
    right.set_xlim(left=0)
    right.set_xlabel(f"tokens a second over {first}'s")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
        axes.grid(axis="x", alpha=0.25)
    drawing.legend(loc="outside lower right", ncols=max(1, len(batches)), frameon=False, fontsize=9)
    return drawing


def _bar(axes: Any, at: Interval, row: float, marker: str, colour: str, label: str | None = None) -> None:
    axes.errorbar(at.value, row, xerr=[[at.value - at.low], [at.high - at.value]], fmt=marker, color=colour,
                  markersize=6, capsize=3, linewidth=1.4, label=label)  # fmt: skip


def _ratio(value: Interval) -> str:
    return f"{value.value:.2f} ({value.low:.2f} to {value.high:.2f})"
