"""Reasoning and answer are told apart in every mode, however the text is split, with exact times."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsr1kit.thinking import ThinkSplitter

INLINE = "<think>\n17 + 25: carry 1 < 2.\n</think>\n\nIt is \\boxed{42}."
PREFILLED = INLINE.removeprefix("<think>\n")
TEXT = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "</", "think>", "\n", " ", "a", "42", "好", "</thin"]),
    max_size=12,
).map("".join)


def feed(pieces, mode="auto", **end):
    """A splitter that was given the pieces as content, the i-th at the time i."""
    splitter = ThinkSplitter(mode)
    for at, piece in enumerate(pieces):
        splitter.add_content(piece, float(at))
    splitter.finish(**end)
    return splitter


def both(splitter):
    return splitter.reasoning, splitter.answer


def cut(text, places):
    edges = [0, *sorted(p % (len(text) + 1) for p in places), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


@pytest.mark.parametrize("mode", ["auto", "inline"])
@pytest.mark.parametrize("text", [INLINE, PREFILLED])
def test_tags_split_at_every_position_give_the_same_parts(mode, text):
    for i in range(len(text) + 1):
        for j in range(i, min(i + 10, len(text) + 1)):
            got = both(feed([text[:i], text[i:j], text[j:]], mode))
            assert got == ("17 + 25: carry 1 < 2.", "It is \\boxed{42}."), (i, j)


@settings(max_examples=300, deadline=None)
@given(TEXT, st.lists(st.integers(0, 200), max_size=8), st.sampled_from(["auto", "inline", "reasoning"]))
def test_any_split_of_any_text_gives_the_same_parts(text, places, mode):
    assert both(feed(cut(text, places), mode)) == both(feed([text], mode))


@settings(max_examples=200, deadline=None)
@given(TEXT, st.lists(st.integers(0, 200), max_size=8), st.sampled_from(["auto", "inline"]))
def test_nothing_but_tags_and_white_space_is_lost(text, places, mode):
    splitter = feed(cut(text, places), mode)
    kept = "".join(p.text for p in splitter.pieces)
    missing = len("".join(text.split())) - len("".join(kept.split()))
    assert missing in (0, len("<think>"), len("</think>"), len("<think></think>"))


def test_thinking_that_never_closes_is_all_reasoning():
    assert both(feed(["<think>", "so far"], truncated=True)) == ("so far", "")
    assert both(feed(["so far"], "inline", truncated=True)) == ("so far", "")


def test_inline_text_without_any_tag_that_ended_by_itself_is_the_answer():
    assert both(feed(["just ", "42"], "inline")) == ("", "just 42")


def test_auto_without_tags_is_the_answer():
    assert both(feed(["  just ", "42"])) == ("", "  just 42")


def test_unfinished_tags_at_the_end_are_text():
    assert both(feed(["<thi"])) == ("", "<thi")
    assert both(feed(["<think>a</thin"])) == ("a</thin", "")


@pytest.mark.parametrize("mode", ["auto", "inline", "reasoning_content"])
def test_tags_in_an_answer_after_a_reasoning_field_are_the_answers_own(mode):
    splitter = ThinkSplitter(mode)
    splitter.add_reasoning("hm", 1.0)
    splitter.add_content("write <think>x</think> so", 2.0)
    splitter.finish()
    assert both(splitter) == ("hm", "write <think>x</think> so")


@pytest.mark.parametrize("mode", ["reasoning_content", "reasoning"])
def test_field_modes_leave_tags_alone(mode):
    assert both(feed(["<think>a</think>b"], mode)) == ("", "<think>a</think>b")


def test_a_second_pair_of_tags_belongs_to_the_answer():
    assert both(feed(["<think>a</think>b <think>c</think>"])) == ("a", "b <think>c</think>")


def test_a_lone_closing_tag_makes_what_came_before_reasoning_and_keeps_its_time():
    splitter = feed(["I add.", " Done.", "</think>", "\n\n", "42"])
    assert both(splitter) == ("I add. Done.", "42")
    assert splitter.first_at() == 0.0
    assert splitter.first_at("answer") == 4.0


def test_first_answer_is_the_first_text_that_is_not_white_space():
    splitter = ThinkSplitter("auto")
    splitter.add_reasoning("hm", 1.0)
    for at, text in enumerate(["\n\n", "  ", "42"], 2):
        splitter.add_content(text, float(at))
    assert splitter.first_at("answer") == 4.0
    assert splitter.first_at("reasoning") == splitter.first_at() == 1.0


def test_a_tag_alone_is_not_a_first_token():
    assert feed(["<thi", "nk>", "a", "</think>", "b"]).first_at() == 2.0


def test_text_that_shares_a_piece_with_a_tag_keeps_the_time_of_its_piece():
    splitter = feed(["<think>a", "b</thi", "nk> 4", "2"])
    assert [(p.kind, p.text, p.at) for p in splitter.pieces] == [
        ("reasoning", "a", 0.0),
        ("reasoning", "b", 1.0),
        ("answer", "4", 2.0),
        ("answer", "2", 3.0),
    ]


def test_without_an_answer_there_is_no_first_answer():
    assert feed(["<think>a</think>\n \n"]).first_at("answer") is None


def test_pieces_shown_live_add_up_to_the_text():
    splitter = ThinkSplitter("inline")
    live = []
    for character in PREFILLED:
        live += splitter.add_content(character, 0.0)
    live += splitter.finish()
    assert live == splitter.pieces


def test_halves_of_a_character_are_joined_and_lone_ones_replaced():
    assert feed(["a\ud83d", "\ude00b"], "reasoning").answer == "a\U0001f600b"
    assert feed(["a\ud83db"], "reasoning").answer == "a\ufffdb"
