"""Public sets of reasoning traces as training examples: those of data/trainsets.toml, and any set of a hub.

From the Hub, or from files of the same columns in the folder that DSR1KIT_TASKS_DIR names. Knows columns and where a
set lies; nothing about what makes an example good, beyond what a set says of its own rows. No set's own code is run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

from dsr1kit.compare.task_sets import LOCAL_VARIABLE, Recipe, file_rows, from_cache_only, local_folder, quietly
from dsr1kit.errors import Dsr1kitError, MissingExtra, RunError, UnknownName, UsageError
from dsr1kit.finetune.data import Example, example
from dsr1kit.finetune.forms import read_row, split
from dsr1kit.paths import data_dir
from dsr1kit.thinking import CLOSE

_GOLD = "GOLD"
#: org/name, with a configuration behind a colon and a commit or branch behind an at sign where wanted.
_HUB_NAME = re.compile(r"(?P<hub_id>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSet:
    """A table of data/trainsets.toml, or a hub id as one: where a set lies and which of its columns hold what.

    Attributes:
        name, title: the kit's name for it, and its own.
        hub_id, config, split, revision: where it lies; an empty revision: the newest.
        question, reasoning, answer: columns; the first that a row has counts. No question: rows are read by their form.
        generations: column with a list of whole answers, in place of reasoning and answer.
        all_true: columns with a list of true or false, one for each of those.
        right: columns, and the value that a row to keep has there.
        gold, kind: columns with the right answer and the kind of question.
        answer_of_gold: the answer, where the set has none of its own, with GOLD for the gold.
        language, license, source: of the set, and who wrote it.
    """

    name: str
    title: str
    hub_id: str
    split: str = "train"
    revision: str = ""
    config: str = ""
    question: tuple[str, ...] = ()
    reasoning: tuple[str, ...] = ()
    answer: tuple[str, ...] = ()
    generations: str = ""
    all_true: tuple[str, ...] = ()
    right: Mapping[str, str] = field(default_factory=dict)
    gold: str = ""
    kind: str = ""
    answer_of_gold: str = ""
    language: str = ""
    license: str = ""
    source: str = ""


@cache
def trainsets() -> Mapping[str, TrainSet]:
    """The sets of data/trainsets.toml by name."""
    tables = tomllib.loads((data_dir() / "trainsets.toml").read_text(encoding="utf-8"))["set"]
    found = {}
    for name, table in tables.items():
        lists = {key: tuple(value) for key, value in table.items() if isinstance(value, list)}
        found[name] = TrainSet(name=name, **(table | lists))
    return found


def load(name: str, limit: int | None = None) -> list[Example]:
    """The examples of a public set, in its own order.

    Rows that their set calls wrong, or whose trace it calls incomplete, are left out. With a limit only the beginning
    of a set is fetched.

    Args:
        name: a set of `trainsets()`, or `org/name[:CONFIG][@REVISION]` on the Hub, whose rows have one of the forms of
            `forms.read_row`.
        limit: at most so many examples.

    Raises:
        UnknownName: no such set.
        UsageError: a row is none of its schema, or no example is left.
        MissingExtra: the package datasets is not installed.
        RunError: the Hub could not be reached.
    """
    wanted = find(name)
    if limit is not None and limit < 1:
        raise UsageError(f"set:{name} must give at least one example")
    if importlib.util.find_spec("datasets") is None:
        raise MissingExtra(f"the set {name}", "finetune", "datasets")
    local = local_folder(wanted.name)
    found: list[Example] = []
    rows: Iterable[Mapping[str, Any]]
    if local is not None:
        rows, place = file_rows(cast(Recipe, wanted), local), str(local)  # of which it asks name, split and hub_id
    else:
        rows, place = _from_hub(wanted, limit)
    try:
        for number, row in enumerate(rows, 1):
            found += examples_of(wanted, row, f"{place}, row {number}")
            if limit is not None and len(found) >= limit:
                break
    except Dsr1kitError:
        raise
    except Exception as error:  # read row by row: the Hub may go while rows come
        raise told(wanted, error) from None
    if not found:
        raise UsageError(f"{place} holds no example that is complete and right: look at its rows, or take another set")
    return found[:limit]


def find(name: str) -> TrainSet:
    """The set that a name means, by the kit's name or its hub id. Raises UnknownName."""
    known = trainsets()
    if (low := name.lower()) in known:
        return known[low]
    if matched := _HUB_NAME.fullmatch(name):
        same = next((one for one in known.values() if one.hub_id.lower() == matched["hub_id"].lower()), None)
        hub_id, config, revision = matched["hub_id"], matched["config"] or "", matched["revision"] or ""
        if same is not None:
            return replace(same, config=config or same.config, revision=revision or same.revision)
        return TrainSet(name=hub_id, title=hub_id, hub_id=hub_id, config=config, revision=revision)
    raise UnknownName("training set", name, known, hint="(or set:org/name, a set on the Hub; or a .jsonl file)")


def examples_of(wanted: TrainSet, row: Mapping[str, Any], where: str) -> list[Example]:
    """The examples of one row; none where the set itself calls it wrong or its trace incomplete.

    Args:
        wanted: the set.
        row: as data.
        where: set and row, for messages.

    Raises:
        UsageError: a column is missing, or a value of a wrong type.
    """
    if not wanted.question:
        return read_row(row, where)
    if any(row.get(column) is not None and row[column] != value for column, value in wanted.right.items()):
        return []
    question = _text(wanted, row, wanted.question, where).strip()
    gold = _text(wanted, row, (wanted.gold,), where).strip() if wanted.gold else ""
    kind = str(row.get(wanted.kind) or "") if wanted.kind else ""
    facts: dict[str, Any] = {"gold": gold, "kind": kind, "language": wanted.language}
    if wanted.generations:
        return [
            example(question, *split(text, place), **facts, source=place)
            for number, text in _generations(wanted, row, where)
            for place in (f"{where}, answer {number}",)
        ]
    reasoning = _text(wanted, row, wanted.reasoning, where).strip()
    if wanted.answer_of_gold:
        answer = wanted.answer_of_gold.replace(_GOLD, gold) if gold else ""
    else:
        answer = _text(wanted, row, wanted.answer, where).strip()
    return [example(question, reasoning, answer, **facts, source=where)] if reasoning and answer else []


def _text(wanted: TrainSet, row: Mapping[str, Any], columns: Iterable[str], where: str) -> str:
    """The first of the columns that the row has, as text; of a list, its first; empty where it is null."""
    columns = tuple(columns)
    name = next((column for column in columns if row.get(column) is not None), None)
    if name is None:
        if not any(column in row for column in columns):
            raise UsageError(
                f"{where}: no column {columns[0]!r}, which {wanted.title} has; columns there: "
                + ", ".join(map(repr, row))
            )
        return ""
    value = row[name]
    if isinstance(value, list | tuple):
        value = value[0] if value else ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"{where}: {name} must be text, not {type(value).__name__}")
    return str(value)


def _generations(wanted: TrainSet, row: Mapping[str, Any], where: str) -> Iterator[tuple[int, str]]:
    """The answers of a row that are complete and right, with their numbers from 1."""
    for column in (wanted.generations, *wanted.all_true):
        if not isinstance(row.get(column, ()), list):
            raise UsageError(
                f"{where}: {column!r} must be a list with an entry for each answer, as {wanted.title} has it; columns "
                f"there: {', '.join(map(repr, row))}"
            )
    for at, text in enumerate(row[wanted.generations]):
        marks = [row[column][at] if at < len(row[column]) else False for column in wanted.all_true]
        if isinstance(text, str) and all(mark is True for mark in marks) and CLOSE in text:
            yield at + 1, text


# --- the Hub ---------------------------------------------------------------------------------------------------------


def _from_hub(wanted: TrainSet, limit: int | None) -> tuple[Iterable[Mapping[str, Any]], str]:
    """Rows and their place, with the commit: as they come where there is a limit, else after all was fetched."""
    import datasets

    revision, unreached = _commit(wanted)
    place = f"{wanted.hub_id}@{revision[:12]}" if revision else wanted.hub_id
    given: dict[str, Any] = {"split": wanted.split, "revision": revision or None}
    try:
        with quietly():
            if limit is not None and unreached is None:
                return datasets.load_dataset(wanted.hub_id, wanted.config or None, streaming=True, **given), place
            with from_cache_only() if unreached else contextlib.nullcontext():
                rows = datasets.load_dataset(wanted.hub_id, wanted.config or None, **given)
        if unreached and wanted.revision and not _of_commit(rows, wanted.revision):
            raise RunError(f"the commit {wanted.revision} of it is not cached, only another")
    except Exception as error:  # datasets, httpx, fsspec and pyarrow each have their own
        raise told(wanted, unreached or error) from None
    return rows, place


def _commit(wanted: TrainSet) -> tuple[str, Exception | None]:
    """The commit to read; and why the Hub does not answer, None where it does. Asked once: loading asks six times."""
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().dataset_info(wanted.hub_id, revision=wanted.revision or None, timeout=15)
    except Exception as error:  # httpx's, the Hub's, and those of a proxy in between
        return wanted.revision, error
    return str(info.sha or wanted.revision), None


def _of_commit(rows: Any, revision: str) -> bool:
    """Without the Hub the library takes the newest commit that it holds, whichever was asked for."""
    return all(revision in Path(one["filename"]).parts for one in rows.cache_files)


def told(wanted: TrainSet, error: Exception) -> RunError:
    """Why a set could not be loaded, and what else can be done."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    endpoint = huggingface_hub.constants.ENDPOINT
    cause = str(error).strip().partition("\n")[0][:300].rstrip(".") or type(error).__name__
    head = f"{wanted.title} ({wanted.hub_id}) could not be loaded from {endpoint}: {cause}."
    if isinstance(error, GatedRepoError) or "gated" in cause:
        return RunError(
            f"{head} Accept its terms at {endpoint}/datasets/{wanted.hub_id}, then set HF_TOKEN to a token of that "
            "account"
        )
    named = "Check the hub id (a private set needs HF_TOKEN). " if isinstance(error, RepositoryNotFoundError) else ""
    return RunError(
        f"{head} {named}Set HF_ENDPOINT to a mirror (export HF_ENDPOINT=https://hf-mirror.com), or {LOCAL_VARIABLE} to "
        f"a folder with {wanted.name}.jsonl or .parquet. No network is needed for files (--data FILE.jsonl) and for "
        "worked problems (--data worked:arithmetic)"
    )
