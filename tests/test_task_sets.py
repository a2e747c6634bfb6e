"""Public sets: rows of their schema become items, from files and from a hub, whose absence is told with what helps."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from sets_hub import SetsHub, serving

from dsr1kit.compare.items import Item
from dsr1kit.compare.runner import load_items
from dsr1kit.compare.scoring import SCORERS
from dsr1kit.compare.settings import RunSettings
from dsr1kit.compare.task_sets import LOCAL_VARIABLE, recipes
from dsr1kit.compare.tasks import digest, facts, load_task, task_names
from dsr1kit.errors import UnknownName, UsageError

FILES = Path(__file__).parent / "data" / "tasks"


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOCAL_VARIABLE, str(FILES))


@pytest.mark.parametrize("name", recipes())
@pytest.mark.usefixtures("local")
def test_every_set_is_read_from_a_file_of_its_schema_and_its_golds_are_judged_right(name: str) -> None:
    items = load_task(name, 0)
    assert items
    assert len({item.id for item in items}) == len(items)
    for item in items:
        assert "\\boxed" in item.prompt
        assert item.messages() == [{"role": "user", "content": item.prompt}]
        assert SCORERS[item.scorer](rf"\boxed{{{item.gold}}}", item.gold) == "right"
        assert item.scorer == recipes()[name].scorer
        assert item.language == recipes()[name].language


@pytest.mark.usefixtures("local")
def test_golds_are_what_the_sets_mean_by_them() -> None:
    assert [item.gold for item in sorted(load_task("gsm8k", 0), key=lambda i: i.prompt)] == ["1,198", "20"]
    assert {item.gold for item in load_task("aime24", 0)} == {"025", "343"}
    assert SCORERS["number"](r"\boxed{25}", "025") == "right"
    assert {item.kind for item in load_task("math500", 0)} == {"Prealgebra", "Precalculus", "Algebra"}


@pytest.mark.parametrize(
    ("name", "count"), [("math500", 4), ("ceval:high_school_geography", 1), ("questions", 50), ("arithmetic", 50)]
)
@pytest.mark.usefixtures("local")
def test_without_a_number_fifty_are_asked_or_all_that_there_are(name: str, count: int) -> None:
    assert load_items(RunSettings(channels=("a",), task=name)) == load_task(name, count)


@pytest.mark.usefixtures("local")
def test_mathematics_is_asked_as_the_card_says() -> None:
    (item,) = load_task("aime25", 0)
    assert item.prompt == (
        "Compute $1 + 2 + \\dots + 40$.\nPlease reason step by step, and put your final answer within \\boxed{}."
    )


@pytest.mark.usefixtures("local")
def test_choices_stand_in_an_order_of_their_own_whatever_else_is_asked() -> None:
    items = load_task("gpqa-diamond", 0)
    right = {"rec01": "Mercury", "rec02": "Carbon dioxide", "rec03": "Na", "rec04": "newton"}
    for item in items:
        shown = dict(re.findall(r"^([A-D])\) (.+)$", item.prompt, re.MULTILINE))
        assert shown[item.gold] == right[item.id.removeprefix("gpqa-diamond-")]
        assert sorted(shown) == list("ABCD")
        assert item.prompt.endswith("put the letter of your final answer within \\boxed{}.")
    assert len({item.gold for item in items}) > 1
    by_id = {item.id: item for item in items}
    for seed in range(5):
        for item in load_task("gpqa-diamond", 2, seed):
            assert item == by_id[item.id]


@pytest.mark.usefixtures("local")
def test_a_subject_of_ceval_is_asked_alone_and_in_chinese() -> None:
    (item,) = load_task("ceval:middle_school_mathematics", 0)
    assert item.prompt == (
        "1+1等于____\n\nA) 1\nB) 3\nC) 2\nD) 4\n请逐步推理，并把最终答案的选项字母放在 \\boxed{} 中。"
    )
    assert (item.gold, item.kind, item.language) == ("C", "middle_school_mathematics", "zh")
    assert {i.kind for i in load_task("ceval", 0)} == {"high_school_geography", "middle_school_mathematics"}
    with pytest.raises(UsageError, match="holds no question of ceval:law"):
        load_task("ceval:law", 0)
    with pytest.raises(UnknownName, match=r"unknown subject of ceval 'lwa'; did you mean 'law'"):
        load_task("ceval:lwa", 1)
    with pytest.raises(UsageError, match="'aime24' has no parts"):
        load_task("aime24:law", 1)


@pytest.mark.usefixtures("local")
def test_fewer_items_are_the_beginning_of_more_with_the_kinds_in_turn_and_too_many_are_refused() -> None:
    everything = load_task("math500", 0, seed=3)
    for wanted in range(1, 5):
        assert load_task("math500", wanted, seed=3) == everything[:wanted]
    assert len({item.kind for item in everything[:3]}) == 3
    assert digest(everything[:3]) != digest(everything)
    assert digest(everything) == digest(load_task("math500", 4, seed=3))
    with pytest.raises(UsageError, match=r"'math500' has 4 questions, not 5"):
        load_task("math500", 5)
    with pytest.raises(UsageError, match="at least one item, not -1"):
        load_task("math500", -1)


@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl", "folder", "folder with splits"])
def test_a_set_is_the_same_from_any_kind_of_file(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.loads(line) for line in (FILES / "gsm8k.jsonl").read_text(encoding="utf-8").splitlines()]
    made = datasets.Dataset.from_list(rows)
    if form == "parquet":
        made.to_parquet(tmp_path / "gsm8k.parquet")
    elif form == "csv":
        made.to_csv(tmp_path / "gsm8k.csv")
    elif form == "jsonl":
        shutil.copy(FILES / "gsm8k.jsonl", tmp_path)
    elif form == "folder":
        made.save_to_disk(str(tmp_path / "gsm8k"))
    else:
        datasets.DatasetDict(train=made.select([0]), test=made).save_to_disk(str(tmp_path / "gsm8k"))
    monkeypatch.setenv(LOCAL_VARIABLE, str(tmp_path))
    found = load_task("gsm8k", 0)
    monkeypatch.setenv(LOCAL_VARIABLE, str(FILES))
    assert found == load_task("gsm8k", 0)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"problem": "1 + 1?", "answr": "2"}\n', r"row 1: no column 'answer', which aime24 has; .* 'answr'"),
        ('{"problem": "", "answer": "2"}\n', "row 1: the question is empty"),
        ("not json\n", r"cannot be read as the set aime24 .* wants aime24\.jsonl"),
        ("", "cannot be read as the set aime24"),
    ],
)
def test_a_file_of_another_schema_is_refused_by_name(
    content: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "aime24.jsonl").write_text(content, encoding="utf-8")
    monkeypatch.setenv(LOCAL_VARIABLE, str(tmp_path))
    with pytest.raises(UsageError, match=told) as caught:
        load_task("aime24", 0)
    assert str(tmp_path / "aime24.jsonl") in str(caught.value)


def test_a_folder_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(LOCAL_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"DSR1KIT_TASKS_DIR names .*nowhere, which is no folder"):
        load_task("aime24", 0)


def test_every_set_is_pinned_and_its_facts_are_told_without_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LOCAL_VARIABLE, raising=False)
    for name, recipe in recipes().items():
        told = facts(name)
        assert re.fullmatch(r"[0-9a-f]{40}", told.revision)
        assert told.size == recipe.size
        assert told.license
        assert told.samples >= 1
        assert not told.offline
        assert (told.expected_completion_tokens is None) == (told.tokens_source == "")
        assert name in task_names()
    monkeypatch.setenv(LOCAL_VARIABLE, str(FILES))
    assert facts("aime24").offline
    assert facts("ceval:law").size is None


# --- the hub


@pytest.fixture
def hub() -> Iterator[SetsHub]:
    with serving() as running:
        yield running


def put(hub: SetsHub, name: str, file: str, configuration: str = "") -> None:
    recipe = recipes()[name]
    card = (
        f"---\nconfigs:\n- config_name: {configuration}\n  data_files: {file}\n---\n" if configuration else "# A set\n"
    )
    content = (FILES / f"{name}{Path(file).suffix}").read_bytes()
    hub.sets[recipe.hub_id] = {recipe.revision: {"README.md": card.encode(), file: content}}


def loaded(task: str, home: Path, endpoint: str, **environment: str) -> list[Item] | str:
    """The items, or the error, as a fresh process with that hub finds them: the endpoint is read on import."""
    code = (
        "import dataclasses, json, sys\n"
        "from dsr1kit.compare.tasks import load_task\n"
        "from dsr1kit.errors import Dsr1kitError\n"
        "try:\n"
        "    print(json.dumps([dataclasses.asdict(item) for item in load_task(sys.argv[1], 0)]))\n"
        "except Dsr1kitError as error:\n"
        "    print(json.dumps(f'{type(error).__name__}: {error}'))\n"
    )
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", LOCAL_VARIABLE: ""}
    kept = {key: value for key, value in os.environ.items() if key not in ("HF_TOKEN", "HF_DATASETS_CACHE")}
    done = subprocess.run(
        [sys.executable, "-c", code, task], env=kept | own | environment, capture_output=True, text=True, timeout=120,
        check=True,
    )  # fmt: skip
    told = json.loads(done.stdout)
    return told if isinstance(told, str) else [Item(**one) for one in told]


NOWHERE = "http://127.0.0.1:9"


def test_a_set_comes_from_the_hub_at_its_commit_and_afterwards_without_it(
    hub: SetsHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(hub, "math500", "test.jsonl")
    found = loaded("math500", tmp_path, hub.url)
    assert all(recipes()["math500"].revision in one for one in hub.asked if "/MATH-500/" in one)
    monkeypatch.setenv(LOCAL_VARIABLE, str(FILES))
    assert found == load_task("math500", 0)
    assert loaded("math500", tmp_path, NOWHERE) == found


def test_a_cache_that_holds_another_commit_is_not_taken_for_the_pinned_one(hub: SetsHub, tmp_path: Path) -> None:
    recipe = recipes()["math500"]
    put(hub, "math500", "test.jsonl")
    other = "0" * 40
    hub.sets[recipe.hub_id][other] = hub.sets[recipe.hub_id][recipe.revision]
    code = f"import datasets; datasets.load_dataset({recipe.hub_id!r}, split='test', revision={other!r})"
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    subprocess.run([sys.executable, "-c", code], env=os.environ | own, capture_output=True, timeout=120, check=True)
    told = loaded("math500", tmp_path, NOWHERE)
    assert isinstance(told, str)
    assert "could not be loaded" in told


def test_a_gated_set_says_what_opens_it(hub: SetsHub, tmp_path: Path) -> None:
    put(hub, "gpqa-diamond", "gpqa_diamond.csv", "gpqa_diamond")
    hub.tokens["Idavidrein/gpqa"] = "hf_good"
    told = loaded("gpqa-diamond", tmp_path, hub.url)
    assert isinstance(told, str)
    for word in ("UsageError", "gated", "HF_TOKEN", f"{hub.url}/datasets/Idavidrein/gpqa", LOCAL_VARIABLE):
        assert word in told
    opened = {"HF_TOKEN": "hf_good"}
    found = loaded("gpqa-diamond", tmp_path, hub.url, **opened)
    assert isinstance(found, list)
    assert len(found) == 4


def test_a_hub_that_cannot_be_reached_is_told_once_with_what_helps(tmp_path: Path) -> None:
    told = loaded("aime24", tmp_path, NOWHERE)
    assert isinstance(told, str)
    for word in ("RunError", NOWHERE, "Connection refused", "HF_ENDPOINT", LOCAL_VARIABLE, "arithmetic", "file:PATH"):
        assert word in told
    assert "HF_TOKEN" not in told
    told = loaded("gpqa-diamond", tmp_path, NOWHERE)
    assert "HF_TOKEN" in told
    assert "offline mode" in str(loaded("aime24", tmp_path, NOWHERE, HF_HUB_OFFLINE="1"))


def test_a_hub_without_the_commit_is_told(hub: SetsHub, tmp_path: Path) -> None:
    told = loaded("aime24", tmp_path, hub.url)
    assert isinstance(told, str)
    assert "404" in told


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'dsr1kit\[tasks\]'"):
        load_task("aime24", 1)
    with pytest.raises(UsageError, match=r"pip install 'dsr1kit\[tasks\]'"):
        load_task("reasoning-gym:chain_sum", 1)
