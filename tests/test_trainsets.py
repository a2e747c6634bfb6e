"""Public sets of traces: rows of their schema become examples, from files and from a hub, whose absence is told."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
from sets_hub import SetsHub, serving

from dsr1kit.compare.scoring import SCORERS
from dsr1kit.compare.task_sets import LOCAL_VARIABLE
from dsr1kit.errors import UnknownName, UsageError
from dsr1kit.finetune.data import Example, load_examples
from dsr1kit.finetune.trainsets import find, load, trainsets

FILES = Path(__file__).parent / "data" / "trainsets"


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOCAL_VARIABLE, str(FILES))


@pytest.mark.parametrize("name", trainsets())
@pytest.mark.usefixtures("local")
def test_every_set_is_read_from_a_file_of_its_schema(name: str) -> None:
    found = load_examples([f"set:{name}"])
    assert found
    for one in found:
        assert one.reasoning.strip()
        assert one.answer
        assert "think>" not in one.reasoning + one.answer
        assert str(FILES / name) in one.source
        assert one.language == "en"
        if one.gold:
            assert SCORERS[one.scorer](one.answer, one.gold) == "right"


@pytest.mark.usefixtures("local")
def test_of_openr1_math_only_complete_and_correct_answers_are_kept() -> None:
    found = load("openr1-math")
    assert [(one.question, one.reasoning, one.gold) for one in found] == [
        ("Compute $2 + 3$.", "2 + 3 = 5.", "5"),
        ("Compute $7 \\cdot 8$.", "7 times 8 is 56.", "56"),
        ("Compute $7 \\cdot 8$.", "Seven eights: 56.", "56"),
        ("Compute $\\frac{1}{2} + \\frac{1}{3}$.", "3/6 + 2/6 = 5/6.", "\\frac{5}{6}"),
    ]
    assert [one.kind for one in found] == ["Algebra", "Number Theory", "Number Theory", "Algebra"]
    assert found[1].answer == "It is $\\boxed{56}$."
    assert found[2].source.endswith("openr1-math.jsonl, row 2, answer 2")


@pytest.mark.usefixtures("local")
def test_of_s1k_deepseeks_traces_are_taken_where_they_were_graded_right() -> None:
    assert [(one.question, one.reasoning, one.answer) for one in load("s1k-1.1")] == [
        ("What is 3 times 4?", "Okay, 3 times 4 is 12.", "The answer is \\boxed{12}."),
        ("What is He?", "Helium, element two.", "Helium."),
    ]
    first = load("s1k")
    assert [(one.reasoning, one.kind) for one in first] == [
        ("Three fours are twelve.", "math"), ("Two hydrogens and an oxygen: water.", "science"),
    ]  # fmt: skip


@pytest.mark.usefixtures("local")
def test_limos_answer_is_made_of_its_gold() -> None:
    found = load("limo")
    assert [(one.answer, one.gold, one.scorer) for one in found] == [
        ("The answer is \\boxed{2}.", "2", "number"),
        ("The answer is \\boxed{1024}.", "1024", "number"),
    ]
    assert found[0].reasoning.startswith("98 is 14 sevens")


@pytest.mark.usefixtures("local")
def test_any_set_is_read_by_the_form_of_its_rows_and_a_limit_holds() -> None:
    found = load("someone/traces")
    assert [(one.question, one.reasoning.strip(), one.answer, one.language) for one in found] == [
        ("1 + 1?", "One and one.", "2", "en"), ("二加二？", "二加二等于四。", "四", "zh"),
    ]  # fmt: skip
    assert load("someone/traces", 1) == found[:1]
    assert load("openr1-math", 2) == load("openr1-math")[:2]
    with pytest.raises(UsageError, match="at least one example"):
        load("limo", 0)


def test_a_set_is_meant_by_its_name_or_its_hub_id_and_a_commit_can_be_named() -> None:
    assert find("LIMO") == find("GAIR/LIMO") == trainsets()["limo"]
    assert find("gair/limo@0123abc").revision == "0123abc"
    assert find("open-r1/OpenR1-Math-220k:extended").config == "extended"
    mine = find("someone/traces:small@main")
    assert (mine.hub_id, mine.config, mine.revision, mine.question) == ("someone/traces", "small", "main", ())
    with pytest.raises(
        UnknownName, match=r"unknown training set 's1k-1.2'; did you mean 's1k-1.1'\? \(or set:org/name"
    ):
        find("s1k-1.2")


def test_every_set_says_where_it_comes_from_and_a_commit_is_whole_or_left_out() -> None:
    for one in trainsets().values():
        assert re.fullmatch(r"[0-9a-f]{40}|", one.revision)
        assert one.license
        assert one.source
        assert one.hub_id.count("/") == 1
    assert sum(not one.revision for one in trainsets().values()) <= 1


@pytest.mark.parametrize("form", ["parquet", "folder"])
def test_a_set_is_the_same_from_other_kinds_of_file(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.loads(line) for line in (FILES / "openr1-math.jsonl").read_text(encoding="utf-8").splitlines()]
    made = datasets.Dataset.from_list(rows)
    if form == "parquet":
        made.to_parquet(tmp_path / "openr1-math.parquet")
    else:
        made.save_to_disk(str(tmp_path / "openr1-math"))
    monkeypatch.setenv(LOCAL_VARIABLE, str(tmp_path))
    found = load("openr1-math")
    monkeypatch.setenv(LOCAL_VARIABLE, str(FILES))
    assert [one.id for one in found] == [one.id for one in load("openr1-math")]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("limo", {"question": "1 + 1?", "answer": "2"}, r"row 1: no column 'solution', which LIMO has; columns there"),
        ("limo", {"question": {"text": "x"}, "solution": "y", "answer": "2"}, "row 1: question must be text, not dict"),
        ("openr1-math", {"problem": "1 + 1?", "answer": "2", "generations": "2"}, "'generations' must be a list"),
        (
            "openr1-math",
            {
                "problem": "1?",
                "answer": "2",
                "generations": ["2"],
                "is_reasoning_complete": [True],
                "correctness_math_verify": [True],
            },
            "no example that is complete and right",
        ),
        ("s1k-1.1", {"question": "1?", "deepseek_grade": "No"}, "no example that is complete and right"),
        ("someone/traces", {"text": "a story"}, r"row 1: no training example; expected messages"),
        ("limo", "no json", r"cannot be read as the set limo"),
    ],
)
def test_a_file_of_another_schema_is_refused_by_name(
    name: str, content: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    monkeypatch.setenv(LOCAL_VARIABLE, str(tmp_path))
    with pytest.raises(UsageError, match=told) as caught:
        load(name)
    assert str(path) in str(caught.value)


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'dsr1kit\[finetune\]'"):
        load("limo")


def test_of_a_set_without_a_commit_the_newest_is_read_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LOCAL_VARIABLE, raising=False)
    rows = [json.loads(line) for line in (FILES / "limo.jsonl").read_text(encoding="utf-8").splitlines()]
    asked: list[dict[str, Any]] = []

    def load_dataset(hub_id: str, config: str | None, **given: Any) -> Any:
        asked.append({"hub_id": hub_id, "config": config, **given})
        return rows

    newest = SimpleNamespace(sha="ab" * 20)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **given: newest)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [one.source for one in load("limo")] == ["GAIR/LIMO@abababababab, row 1", "GAIR/LIMO@abababababab, row 2"]
    assert asked == [{"hub_id": "GAIR/LIMO", "config": None, "split": "train", "revision": "ab" * 20}]


# --- the hub


@pytest.fixture
def hub() -> Iterator[SetsHub]:
    with serving() as running:
        yield running


def put(hub: SetsHub, name: str, revision: str = "", config: str = "") -> str:
    wanted = find(name)
    card = f"---\nconfigs:\n- config_name: {config}\n  data_files: train.jsonl\n---\n" if config else "# A set\n"
    content = (FILES / f"{wanted.name}.jsonl").read_bytes()
    commit = revision or wanted.revision
    hub.sets[wanted.hub_id] = {commit: {"README.md": card.encode(), "train.jsonl": content}}
    return commit


def loaded(
    name: str, home: Path, endpoint: str, limit: int | None = None, **environment: str
) -> list[dict[str, Any]] | str:
    """The examples, or the error, as a fresh process with that hub finds them: the endpoint is read on import."""
    code = (
        "import dataclasses, json, sys\n"
        "from dsr1kit.finetune.trainsets import load\n"
        "from dsr1kit.errors import Dsr1kitError\n"
        "try:\n"
        "    found = load(sys.argv[1], json.loads(sys.argv[2]))\n"
        "    print(json.dumps([dataclasses.asdict(one) for one in found]))\n"
        "except Dsr1kitError as error:\n"
        "    print(json.dumps(f'{type(error).__name__}: {error}'))\n"
    )
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", LOCAL_VARIABLE: ""}
    kept = {key: value for key, value in os.environ.items() if key not in ("HF_TOKEN", "HF_DATASETS_CACHE")}
    done = subprocess.run(
        [sys.executable, "-c", code, name, json.dumps(limit)], env=kept | own | environment, capture_output=True,
        text=True, timeout=120, check=True,
    )  # fmt: skip
    told: list[dict[str, Any]] | str = json.loads(done.stdout)
    return told


def same(told: list[dict[str, Any]] | str, examples: list[Example]) -> bool:
    assert isinstance(told, list), told
    return [one["id"] for one in told] == [dataclasses.asdict(one)["id"] for one in examples]


NOWHERE = "http://127.0.0.1:9"


def test_a_set_comes_from_the_hub_at_its_commit_and_afterwards_without_it(
    hub: SetsHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = put(hub, "openr1-math", config="default")
    found = loaded("openr1-math", tmp_path, hub.url)
    assert all(commit in one for one in hub.asked if "OpenR1" in one)
    monkeypatch.setenv(LOCAL_VARIABLE, str(FILES))
    assert same(found, load("openr1-math"))
    assert isinstance(found, list)
    assert found[0]["source"] == "open-r1/OpenR1-Math-220k@e4e141ec9dea, row 1, answer 1"
    assert same(loaded("openr1-math", tmp_path, NOWHERE), load("openr1-math"))
    assert same(loaded("openr1-math", tmp_path, NOWHERE, limit=2), load("openr1-math", 2))
    assert "could not be loaded" in loaded(f"openr1-math@{'0' * 40}".replace("openr1-math", "open-r1/OpenR1-Math-220k"),
                                           tmp_path, NOWHERE)  # fmt: skip


def test_with_a_limit_rows_are_read_as_they_come(hub: SetsHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(hub, "s1k-1.1")
    monkeypatch.setenv(LOCAL_VARIABLE, str(FILES))
    assert same(loaded("s1k-1.1", tmp_path, hub.url, limit=1), load("s1k-1.1", 1))
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_any_set_of_the_hub_is_read_at_a_commit_that_is_named(
    hub: SetsHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = put(hub, "someone/traces", "cd" * 20)
    monkeypatch.setenv(LOCAL_VARIABLE, str(FILES))
    assert same(loaded(f"someone/traces@{commit}", tmp_path, hub.url), load("someone/traces"))


def test_a_hub_that_cannot_be_reached_is_told_once_with_what_helps(tmp_path: Path) -> None:
    for limit in (None, 5):
        told = loaded("openr1-math", tmp_path, NOWHERE, limit)
        assert isinstance(told, str)
        for word in ("RunError", NOWHERE, "Connection refused", "HF_ENDPOINT", LOCAL_VARIABLE, "openr1-math.jsonl",
                     "FILE.jsonl", "worked:arithmetic"):  # fmt: skip
            assert word in told
    assert "offline mode" in loaded("limo", tmp_path, NOWHERE, HF_HUB_OFFLINE="1")


def test_a_set_that_is_not_there_or_is_gated_is_told(hub: SetsHub, tmp_path: Path) -> None:
    told = loaded("someone/nothing", tmp_path, hub.url)
    assert isinstance(told, str)
    assert "404" in told
    put(hub, "s1k")
    hub.tokens["simplescaling/s1K"] = "hf_good"
    told = loaded("s1k", tmp_path, hub.url)
    assert isinstance(told, str)
    assert "HF_TOKEN" in told
    opened = {"HF_TOKEN": "hf_good"}
    assert len(loaded("s1k", tmp_path, hub.url, **opened)) == 2
