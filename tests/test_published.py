"""Published scores: found by every name of a model, told with their source, and never another model's."""

from __future__ import annotations

import pytest

from dsr1kit.access.channels import load_channels
from dsr1kit.compare.published import maker_name, mean_tokens, scores
from dsr1kit.local.shapes import distinct

R1, NEW = "DeepSeek-R1", "DeepSeek-R1-0528"


@pytest.mark.parametrize(
    ("name", "maker"),
    [
        ("deepseek-ai/DeepSeek-R1", R1),
        ("deepseek/deepseek-r1", R1),
        ("us.deepseek.r1-v1:0", R1),
        ("deepseek/deepseek-r1-0528", NEW),
        ("deepseek-r1-250528", NEW),
        ("accounts/fireworks/models/deepseek-r1-0528", NEW),
        ("@cf/deepseek-ai/deepseek-r1-distill-qwen-32b", "DeepSeek-R1-Distill-Qwen-32B"),
        ("deepseek-r1:7b", "DeepSeek-R1-Distill-Qwen-7B"),
        ("deepseek-r1:70b", "DeepSeek-R1-Distill-Llama-70B"),
        ("local:deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B@4bit", "DeepSeek-R1-Distill-Qwen-1.5B"),
        ("unsloth/DeepSeek-R1-Distill-Qwen-7B-GGUF", "DeepSeek-R1-Distill-Qwen-7B"),
        ("models/DeepSeek-R1-0528-Qwen3-8B-UD-Q4_K_XL.gguf", "DeepSeek-R1-0528-Qwen3-8B"),
    ],
)
def test_a_model_is_known_by_the_names_that_places_give_it(name: str, maker: str) -> None:
    assert maker_name(name) == maker
    assert all(score.model == maker for score in scores(name, "aime24"))
    assert scores(name, "aime24")


@pytest.mark.parametrize(
    "name",
    ["", "tiny-r1", "local:tiny-r1", "deepseek-flash", "deepseek-r1-distill", "deepseek-r1-distill-qwen",
     "DeepSeek-R1-Distill-Qwen-7B-abliterated", "deepseek-r1-0528-turbo", "scripted-r1"],
)  # fmt: skip
def test_another_model_finds_no_score(name: str) -> None:
    assert scores(name, "aime24") == ()
    assert mean_tokens(name, "aime25") is None


@pytest.mark.parametrize("name", ["deepseek-r1:8b", "deepseek-r1:671b", "deepseek-r1:latest"])
def test_a_name_that_has_stood_for_two_models_finds_no_score(name: str) -> None:
    assert scores(name, "aime24") == ()


def test_r1_and_its_later_version_are_told_apart() -> None:
    assert {s.value for s in scores(R1, "aime24")} == {79.8}
    assert {s.value for s in scores(NEW, "aime24")} == {91.4}


def test_a_score_says_how_it_was_measured_and_where_it_was_read() -> None:
    own, *_ = (s for s in scores("deepseek-r1-distill-qwen-1.5b", "aime24") if s.metric == "pass@1")
    assert (own.value, own.samples, own.max_tokens) == (28.9, 64, 32768)
    assert "2501.12948" in own.source
    assert own.as_of is not None


def test_the_makers_score_comes_before_a_reproduction() -> None:
    found = scores("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "math500")
    assert [s.value for s in found] == [92.8, 93.0]
    assert "Open R1" in found[-1].source
    assert found[-1].samples == 1


def test_a_part_of_a_task_and_a_task_without_scores_find_nothing() -> None:
    assert scores(R1, "ceval")
    assert scores(R1, "ceval:law") == ()
    assert scores(R1, "arithmetic") == ()


def test_scores_agree_with_the_planners_table_of_models() -> None:
    """models.toml tells AIME 2024 of the same cards; one fact must not stand there with two values."""
    compared = 0
    for shape in distinct():
        own = [s.value for s in scores(shape.hub_id, "aime24") if s.metric == "pass@1" and "README of" not in s.source]
        if shape.aime_2024 is not None:
            assert set(own) == {shape.aime_2024}, shape.hub_id
            compared += 1
    assert compared >= 8


def test_published_lengths_of_answers_are_those_of_the_very_model() -> None:
    old, new = mean_tokens("deepseek-ai/DeepSeek-R1", "aime25"), mean_tokens("deepseek-r1-0528", "aime25")
    assert old is not None
    assert new is not None
    assert old.tokens < new.tokens
    assert "0528" in new.source
    assert mean_tokens("deepseek-r1:7b", "aime25") is None


def test_every_r1_of_the_catalogue_is_known_or_left_open_on_purpose() -> None:
    family = {c.model for c in load_channels().values() if c.family in ("r1", "r1-distill")}
    unknown = {model for model in family if not maker_name(model)}
    assert unknown == {"deepseek-reasoner", "deepseek-r1-distill"}
