"""Public question sets, at the commits that data/tasks.toml pins, from the Hub or from files of the same columns.

Knows how a row becomes an item; nothing about scoring. No set's own code is ever run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dsr1kit.compare.items import Item, TaskFacts, hashed, with_instruction
from dsr1kit.errors import MissingExtra, RunError, UnknownName, UsageError
from dsr1kit.paths import data_dir

#: Names a folder whose files stand in for the Hub: NAME.jsonl, .parquet or .csv, or a saved set NAME/.
LOCAL_VARIABLE = "DSR1KIT_TASKS_DIR"
_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A table of data/tasks.toml: where a set lies and which of its columns hold what."""

    name: str
    title: str
    hub_id: str
    split: str
    revision: str
    question: str
    scorer: str
    language: str
    size: int
    samples: int
    license: str
    answer: str = ""
    configs: tuple[str, ...] = ()
    gated: bool = False
    id: str = ""
    kind: str = ""
    choices: tuple[str, ...] = ()
    correct: str = ""
    incorrect: tuple[str, ...] = ()
    gold_after: str = ""
    expected_completion_tokens: float | None = None
    tokens_source: str = ""


@cache
def recipes() -> Mapping[str, Recipe]:
    """All public sets by name."""
    tables = tomllib.loads((data_dir() / "tasks.toml").read_text(encoding="utf-8"))["task"]
    found = {}
    for name, table in tables.items():
        lists = {key: tuple(value) for key, value in table.items() if isinstance(value, list)}
        found[name] = Recipe(name=name, **(table | lists))
    return found


def facts(task: str) -> TaskFacts:
    """What is known about a public set, or one subject of it (`ceval:law`). Raises UnknownName."""
    recipe, subject = _recipe(task)
    local = local_folder(recipe.name) is not None
    return TaskFacts(
        name=task,
        title=f"{recipe.title}, {subject.replace('_', ' ')}" if subject else recipe.title,
        source=recipe.hub_id,
        revision=recipe.revision,
        license=recipe.license,
        size=None if subject or local else recipe.size,  # a file in its place may hold fewer
        offline=local,
        languages=(recipe.language,),
        samples=recipe.samples,
        expected_completion_tokens=recipe.expected_completion_tokens,
        tokens_source=recipe.tokens_source,
    )


def load(task: str) -> list[Item]:
    """All items of a public set, in its own order.

    Raises:
        UnknownName: no such set or subject.
        UsageError: the set is gated, or a local file is none of its schema.
        MissingExtra: the package datasets is not installed.
        RunError: the Hub could not be reached.
    """
    recipe, subject = _recipe(task)
    if importlib.util.find_spec("datasets") is None:
        raise MissingExtra(f"the task {task}", "tasks", "datasets")
    local = local_folder(recipe.name)
    if local is not None:
        items = _items(recipe, file_rows(recipe, local), str(local))
        items = [item for item in items if not subject or item.kind == subject]
        if not items:
            raise UsageError(f"{local} holds no question of {task}")
        return items
    wanted = (subject,) if subject else recipe.configs or ("",)
    unreached = _reached(recipe)
    try:
        with from_cache_only() if unreached else contextlib.nullcontext():
            rows = {config: _hub_rows(recipe, config) for config in wanted}
    except Exception as error:  # datasets, httpx, fsspec and pyarrow each have their own
        raise _told(recipe, unreached or error) from None
    return [item for config in wanted for item in _items(recipe, rows[config], recipe.hub_id, config)]


def _recipe(task: str) -> tuple[Recipe, str]:
    name, _, subject = task.partition(":")
    if name not in recipes():
        raise UnknownName("public set", name, recipes())
    recipe = recipes()[name]
    if subject or task.endswith(":"):
        several = recipe.configs if len(recipe.configs) > 1 else ()
        if not several:
            raise UsageError(f"task {name!r} has no parts: ask for it by its name alone")
        if subject not in several:
            raise UnknownName(f"subject of {name}", subject, several)
    return recipe, subject


def _items(recipe: Recipe, rows: Sequence[Mapping[str, Any]], source: str, config: str = "") -> list[Item]:
    choices = recipe.choices or ((recipe.correct, *recipe.incorrect) if recipe.correct else ())
    needed = {column for column in (recipe.question, recipe.answer, *choices) if column}
    items, seen = [], set()
    for number, row in enumerate(rows, 1):
        if missing := sorted(needed - row.keys()):
            raise UsageError(
                f"{source}, row {number}: no column {missing[0]!r}, which {recipe.name} has; columns there: "
                + ", ".join(map(repr, row))
            )
        question = str(row[recipe.question] or "").strip()
        gold = str(row[recipe.answer] or "") if recipe.answer else ""
        if recipe.gold_after:
            gold = gold.rpartition(recipe.gold_after)[2]
        if not question:
            raise UsageError(f"{source}, row {number}: the question is empty")
        own_id = str(row[recipe.id]) if recipe.id and row.get(recipe.id) is not None else hashed(question)
        name = "-".join(part for part in (recipe.name, config if len(recipe.configs) > 1 else "", own_id) if part)
        if choices:
            texts = [str(row[column]).strip() for column in choices]
            if recipe.correct:
                # By the question alone: the same order whatever else is asked, and in every run.
                order = list(range(len(texts)))
                random.Random(f"{recipe.name}/{hashed(question)}").shuffle(order)
                gold, texts = _LETTERS[order.index(0)], [texts[place] for place in order]
            question += "\n\n" + "\n".join(f"{letter}) {text}" for letter, text in zip(_LETTERS, texts, strict=False))
        kind = str(row.get(recipe.kind) or "") if recipe.kind else config or str(row.get("subject") or "")
        while name in seen:  # the same question twice in the set
            name += "+"
        seen.add(name)
        items.append(
            Item(
                id=name,
                prompt=with_instruction(question, recipe.scorer, recipe.language),
                gold=gold.strip(),
                kind=kind or recipe.name,
                language=recipe.language,
                scorer=recipe.scorer,
            )
        )
    return items


def local_folder(name: str) -> Path | None:
    """The file or folder that stands in for a set; None: it comes from the Hub."""
    folder = os.environ.get(LOCAL_VARIABLE, "").strip()
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise UsageError(f"{LOCAL_VARIABLE} names {folder}, which is no folder")
    found = [path for end in ("", *_FORMATS) if (path := Path(folder) / f"{name}{end}").exists()]
    return found[0] if found else None


def file_rows(recipe: Recipe, path: Path) -> Sequence[Mapping[str, Any]]:
    """The rows of a set that lies in a file or folder. Raises UsageError where it cannot be read as that set."""
    import datasets

    try:
        with quietly():
            if path.is_dir():
                saved: Any = datasets.load_from_disk(str(path))
            else:
                saved = datasets.load_dataset(_FORMATS[path.suffix], data_files=str(path))
    except Exception as error:  # whatever pyarrow and pandas make of it
        told = str(error.__cause__ or error).strip().partition("\n")[0]
        raise UsageError(
            f"{path} cannot be read as the set {recipe.name} ({told[:200] or type(error).__name__}); {LOCAL_VARIABLE} "
            f"wants {recipe.name}.jsonl, .parquet or .csv with the columns of {recipe.hub_id}, or what "
            "datasets' save_to_disk wrote"
        ) from None
    if isinstance(saved, dict):
        if recipe.split not in saved and len(saved) != 1:
            raise UsageError(f"{path} has no split {recipe.split!r}; splits there: {', '.join(map(repr, saved))}")
        saved = saved[recipe.split] if recipe.split in saved else next(iter(saved.values()))
    return list(saved)


def _hub_rows(recipe: Recipe, config: str) -> Sequence[Mapping[str, Any]]:
    import datasets

    with quietly():
        rows = datasets.load_dataset(recipe.hub_id, config or None, split=recipe.split, revision=recipe.revision)
    # Without the Hub the library takes the newest commit that it holds, whichever was asked for.
    if any(recipe.revision not in Path(one["filename"]).parts for one in rows.cache_files):
        raise RunError(f"the commit {recipe.revision} of it is not cached, only another")
    return list(rows)


def _reached(recipe: Recipe) -> Exception | None:
    """Why the Hub does not answer; None: it does. Asked once, as loading asks six times, over half a minute."""
    import huggingface_hub

    try:
        huggingface_hub.HfApi().dataset_info(recipe.hub_id, revision=recipe.revision, timeout=15)
    except Exception as error:  # httpx's, the Hub's, and those of a proxy in between
        return error
    return None


@contextlib.contextmanager
def from_cache_only() -> Iterator[None]:
    """What was loaded once is loaded again without the Hub."""
    import datasets
    import huggingface_hub

    places: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _told(recipe: Recipe, error: Exception) -> RunError | UsageError:
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    endpoint = huggingface_hub.constants.ENDPOINT
    cause = str(error).strip().partition("\n")[0][:300].rstrip(".") or type(error).__name__
    head = f"{recipe.title} ({recipe.hub_id}) could not be loaded from {endpoint}: {cause}."
    refused = isinstance(error, GatedRepoError | datasets.exceptions.DatasetNotFoundError)
    if recipe.gated and refused:
        return UsageError(
            f"{head} The set is gated: accept its terms at {endpoint}/datasets/{recipe.hub_id}, then set HF_TOKEN to a "
            f"token of that account, or put {recipe.name}.csv into the folder that {LOCAL_VARIABLE} names"
        )
    gate = " and HF_TOKEN (it is gated)" if recipe.gated else ""
    return RunError(
        f"{head} Set HF_ENDPOINT to a mirror (export HF_ENDPOINT=https://hf-mirror.com){gate}, or {LOCAL_VARIABLE} to "
        f"a folder with {recipe.name}.jsonl, .parquet or .csv. Without a network there are: arithmetic, questions, "
        "reasoning-gym:NAME and file:PATH"
    )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """No bars of the library for what takes seconds."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
