"""What others have published for the same model and task: scores to lay beside a run's own, and token counts.

Knows data/published.toml and how names of models relate; nothing about runs. Where nothing was published, or a name
could mean two models, nothing is given.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from dsr1kit.config import Table, read_toml
from dsr1kit.errors import ConfigError
from dsr1kit.identity import match_models
from dsr1kit.paths import data_dir

# Endings that say how the weights are stored, not which they are.
_STORED = re.compile(
    r"(\.gguf|@(none|4bit|8bit|auto)|[-_. :](gguf|awq|gptq|bnb|bf16|fp16|f16|fp8|[48]bit|ud|unsloth|i?q\d\w*))$"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One published score.

    Attributes:
        model: whose it is, by the name its maker gave it.
        task: the kit's name of the task.
        metric: `pass@1`, `cons@64` (the answer of the majority of 64), `exact match`.
        value: in percent, as it was published.
        samples: answers a question that the mean is over; None where the source does not tell.
        max_tokens: longest answer allowed there; None where the source does not tell.
        source: where it was read; as_of: when.
    """

    model: str
    task: str
    metric: str
    value: float
    samples: int | None
    max_tokens: int | None
    source: str
    as_of: dt.date | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """A published mean length of answers: `tokens` of one completion, thinking included."""

    model: str
    task: str
    tokens: float
    source: str
    as_of: dt.date | None


def scores(model: str, task: str) -> tuple[Score, ...]:
    """The published scores of a model at a task, its maker's own first; empty where there are none.

    Args:
        model: a hub id, a catalogue entry's model, Ollama's name, `local:MODEL@4bit`, a GGUF's file name. Copies in
            other precisions find the score of the weights as released, to be held against it.
        task: the kit's name, as `aime24` or `gpqa-diamond`; part of a task (`ceval:law`) has no published score.
    """
    maker = maker_name(model)
    return tuple(score for score in _read()[1] if score.model == maker and score.task == task)


def mean_tokens(model: str, task: str) -> Length | None:
    """How many tokens the model's answers at the task took, where that was published."""
    maker = maker_name(model)
    return next((length for length in _read()[2] if length.model == maker and length.task == task), None)


def maker_name(model: str) -> str:
    """The name that its maker gave to the model which `model` means; empty where it is none of R1's family."""
    bare = model.strip().removeprefix("local:").rstrip("/").lower()
    while (shorter := _STORED.sub("", bare)) != bare:
        bare = shorter
    for name, also in _read()[0].items():
        if any(match_models(known, bare) == "same" for known in (name, *also)):
            return name
    return ""


@cache
def _read() -> tuple[dict[str, tuple[str, ...]], tuple[Score, ...], tuple[Length, ...]]:
    path = data_dir() / "published.toml"
    top = Table(path, "", read_toml(path))
    models: dict[str, tuple[str, ...]] = {}
    named = top.table("model")
    for name, values in ({} if named is None else named.raw_all()).items():
        entry = Table(path, f"model.{name}", values)
        models[name] = entry.texts("also")
        entry.finish()
    found = tuple(
        Score(
            model=model,
            task=task,
            metric=t.text("metric", required=True),
            value=value,
            samples=t.whole("samples", low=1),
            max_tokens=t.whole("max_tokens", low=1),
            source=t.text("source", required=True),
            as_of=t.date("as_of"),
        )
        for t in _tables(top, "scores")
        for model, task, value in _cells(t, models)
    )
    lengths = tuple(
        Length(model=model, task=task, tokens=value, source=t.text("source", required=True), as_of=t.date("as_of"))
        for t in _tables(top, "tokens")
        for model, task, value in _cells(t, models)
    )
    top.finish()
    return models, found, lengths


def _tables(top: Table, key: str) -> Iterator[Table]:
    raw = top.raw(key)
    if not isinstance(raw, list) or not raw:
        raise top.error(key, f"expected tables [[{key}]]")
    for number, values in enumerate(raw, 1):
        yield Table(top.path, f"{key} {number}", values)


def _cells(t: Table, models: dict[str, tuple[str, ...]]) -> list[tuple[str, str, float]]:
    tasks, rows = t.texts("tasks"), t.table("rows")
    cells: list[tuple[str, str, float]] = []
    for model, values in ({} if rows is None else rows.raw_all()).items():
        if model not in models or not isinstance(values, list) or len(values) != len(tasks):
            raise ConfigError(f"{t.path}: [{t.where}] {model}: expected a known model and {len(tasks)} numbers")
        cells += [(model, task, float(value)) for task, value in zip(tasks, values, strict=True)]
    return cells
