"""The reader of Chat Completions bodies: any bytes, split anywhere, give the same reply and no error."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scripted import ANSWER, DONE, ROLE, delta, event, usage

from dsr1kit.access.stream import CompletionReader, estimate_tokens
from dsr1kit.records import Outcome

STOP = delta(finish="stop")
PLACES = st.lists(st.integers(0, 10_000), max_size=12)


def read(body, mode="auto", broken="", until=float("inf")):
    """Feed the body, whole or as a list of pieces; the i-th piece comes at the time i."""
    seen = []
    reader = CompletionReader(mode, lambda: 0.0, seen.extend)
    for at, piece in enumerate([body] if isinstance(body, bytes) else body):
        reader.feed(piece, float(at))
        while reader.parse_some(until):
            pass
    outcome, detail = reader.finish(broken=broken)
    assert detail or outcome is Outcome.OK
    return reader, outcome, detail, seen


def outcome_of(body, **how):
    return read(body, **how)[1]


def facts(body, **how):
    reader, outcome, detail, _ = read(body, **how)
    splitter = reader.splitter
    return (
        splitter.reasoning, splitter.answer, outcome, detail, reader.finish_reason, reader.model_served,
        reader.usage("question"), reader.keep_alives, reader.chunks,
    )  # fmt: skip


def cut(body, places):
    edges = [0, *sorted(p % (len(body) + 1) for p in places), len(body)]
    return [body[a:b] for a, b in pairwise(edges)]


CRLF = ANSWER.replace(b"\n", b"\r\n")
CHINESE = ROLE + delta(content="<think>\n先算个位。\n</think>\n\n答案是 42 😀。", finish="stop") + DONE
WHOLE = json.dumps(
    {"model": "m", "choices": [{"message": {"reasoning": "嗯", "content": "42"}, "finish_reason": "stop"}]},
    indent=1,
    ensure_ascii=False,
).encode()
BODIES = [
    ANSWER, CRLF, CHINESE, WHOLE, b": wait\n\n\n\n" + ANSWER, b"\n \n" + WHOLE, b"<html>busy</html>", b"no",
    b"\xef\xbb\xbf" + ANSWER, ANSWER.removesuffix(b"\n\n"),
    b'event: error\r\ndata: {"message": "busy"}\r\n\r\n',
    b'data: {"choices": [{"delta":\ndata: {"content": "42"}}]}\n\n' + STOP, b"data: {\n\n", b"{", b"",
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(BODIES), PLACES, st.sampled_from(["", "reset"]))
def test_any_split_of_the_bytes_gives_the_same_reply(body, places, broken):
    assert facts(cut(body, places), broken=broken) == facts(body, broken=broken)


def test_bytes_one_by_one_give_the_same_reply():
    for body in BODIES:
        assert facts([body[i : i + 1] for i in range(len(body))]) == facts(body)


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=30),
            st.sampled_from(
                [
                    b"data: ",
                    b"\n",
                    b"\r\n",
                    b"\n\n",
                    b": x\n",
                    b"event: error\n",
                    b'{"choices":[{"delta":{"content":"a"}}]}',
                    b'{"choices":[{"delta":[]}]}',
                    b'{"choices":{}}',
                    b'{"choices":[7]}',
                    b'{"error":7}',
                    b'{"usage":{"completion_tokens":"x"}}',
                    b"null",
                    b"[1]",
                    b'"a"',
                    b"NaN",
                    b"[DONE]",
                    b"<think>",
                    b'{"choices":[{"finish_reason":{}}],"model":3}',
                    b"[" * 3000,
                    b'{"choices":[{"delta":{"content":[{"text":{}},7]},"error":{"code":true}}]}',
                ]
            ),
        ),
        max_size=12,
    ),
    st.sampled_from(["auto", "inline", "reasoning", "reasoning_content"]),
    st.sampled_from(["", "reset"]),
)
@example([b"data: " + b"[" * 100_000 + b"\n\n"], "auto", "")
@example([b"data: " + b"9" * 5000 + b"\n\n"], "auto", "")
@example([b"[" * 100_000], "auto", "")
def test_arbitrary_bytes_never_raise(pieces, mode, broken):  # fmt: skip
    reader, outcome, _, _ = read(pieces, mode, broken)
    assert isinstance(outcome, Outcome)
    reader.usage("question")


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(ANSWER)))
def test_a_stream_that_breaks_off_anywhere_is_cut_until_its_ending_is_known(length):
    known = ANSWER.index(b'"finish_reason": "stop"')
    line_end = ANSWER.index(b"\n", known)
    assert outcome_of(ANSWER[:length], broken="reset") is (Outcome.OK if length >= line_end else Outcome.CUT)


def test_the_usual_stream():
    reader, outcome, detail, seen = read(ANSWER)
    assert (outcome, detail) == (Outcome.OK, "")
    assert (reader.splitter.reasoning, reader.splitter.answer) == ("17 + 25 is 42.", "The answer is 42.")
    assert (reader.finish_reason, reader.model_served, reader.done) == ("stop", "served-r1", True)
    assert (reader.chunks, reader.keep_alives) == (2, 0)
    counted = reader.usage("")
    assert (counted.prompt_tokens, counted.reasoning_tokens, counted.answer_tokens) == (7, 5, 4)
    assert (counted.source, counted.split_source) == ("provider", "provider")
    assert [p.kind for p in seen] == ["reasoning", "answer"]


def test_text_keeps_the_time_of_the_read_that_completed_its_line():
    one = delta(content="42")
    reader, *_ = read([ROLE, one[:10], one[10:], STOP])
    assert reader.splitter.first_at() == 2.0


def test_role_only_and_empty_chunks_are_no_text():
    reader, outcome, _, _ = read(ROLE + delta(content="", reasoning_content=None) + delta(content="42") + STOP)
    assert (reader.chunks, outcome) == (1, Outcome.OK)


def test_several_tokens_in_a_chunk_and_several_chunks_in_a_read():
    reader, *_ = read([ROLE + delta(reasoning_content="a b") + delta(content="c d e"), STOP])
    assert (reader.splitter.reasoning, reader.splitter.answer, reader.chunks) == ("a b", "c d e", 2)


def test_missing_usage_is_estimated_and_says_so():
    counted = read(delta(reasoning="x" * 100, content="答" * 10) + STOP + DONE)[0].usage("q" * 20)
    assert (counted.reasoning_tokens, counted.answer_tokens, counted.prompt_tokens) == (30, 6, 6)
    assert (counted.source, counted.split_source) == ("estimated", "estimated")


def test_a_sum_without_split_is_split_by_length_and_says_so():
    counted = read(delta(reasoning="x" * 90, content="y" * 30) + STOP + usage(40, 0))[0].usage("")
    assert (counted.reasoning_tokens, counted.answer_tokens) == (30, 10)
    assert (counted.source, counted.split_source) == ("provider", "estimated")


def test_without_text_and_usage_nothing_is_counted():
    assert read(ROLE + STOP)[0].usage("q").completion_tokens is None


@pytest.mark.parametrize("end", [STOP, STOP + DONE, DONE])
def test_a_finish_reason_or_done_completes_a_stream(end):
    assert outcome_of(delta(content="42") + end) is Outcome.OK


def test_what_follows_done_spoils_nothing():
    assert outcome_of(ANSWER + b"data: {broken\n\nbye\n") is Outcome.OK


def test_plain_json_where_a_stream_was_asked():
    reader, outcome, _, _ = read([b"\n\n\n", WHOLE[:30], WHOLE[30:]])
    assert (reader.splitter.reasoning, reader.splitter.answer, outcome) == ("嗯", "42", Outcome.OK)
    assert reader.keep_alives == 3
    assert reader.splitter.first_at() == 2.0


def test_comments_and_blank_lines_are_keep_alives_only_outside_events():
    assert read(b": wait\n\n: wait\n\n" + ANSWER)[0].keep_alives == 2
    assert read(b": wait\n: wait\n" + ANSWER)[0].keep_alives == 2
    assert read(b"\n\r\n\n" + ANSWER)[0].keep_alives == 3
    inside = b'data: {"choices": [{"delta":\n: inside\ndata: {"content": "42"}}]}\n\n'
    reader, outcome, _, _ = read(inside + STOP)
    assert (reader.keep_alives, reader.splitter.answer, outcome) == (0, "42", Outcome.OK)
    assert read(delta(content="a") + b"\n" + delta(content="b") + STOP)[0].keep_alives == 1


def test_unknown_fields_and_missing_spaces_are_taken():
    body = b'id: 3\nretry: 10\nevent: message\ndata:{"choices":[{"delta":{"content":"42"}}]}\n\n' + STOP
    assert read(body)[0].splitter.answer == "42"


def test_lines_that_end_in_cr_alone():
    assert facts(ANSWER.replace(b"\n", b"\r"))[:3] == facts(ANSWER)[:3]


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        (event({"error": {"message": "The server is busy"}}), Outcome.OVERLOADED),
        (b'event: error\ndata: {"message": "busy"}\n\n', Outcome.OVERLOADED),
        (b"event: error\ndata: The server is busy\n\n", Outcome.OVERLOADED),
        (event({"error": "Rate limit reached"}), Outcome.THROTTLED),
        (event({"error": {"code": 429, "message": "slow"}}), Outcome.THROTTLED),
        (event({"error": {"code": "503", "message": ""}}), Outcome.OVERLOADED),
        (event({"error": {"code": 402, "message": ""}}), Outcome.NO_BALANCE),
        (event({"error": {"message": "Insufficient Balance"}}), Outcome.NO_BALANCE),
        (event({"error": {"message": "Incorrect API key provided"}}), Outcome.UNAUTHORIZED),
        (event({"error": {"message": "too long", "type": "invalid_request_error"}}), Outcome.BAD_REQUEST),
        (event({"object": "error", "message": "bad", "type": "BadRequestError"}), Outcome.BAD_REQUEST),
        (event({"object": "error", "message": "no", "code": 404}), Outcome.UNKNOWN_MODEL),
        (b'{"error": {"message": "Model Not Exist"}}', Outcome.UNKNOWN_MODEL),
        (b'{"object": "error", "message": "busy"}', Outcome.OVERLOADED),
        (delta(content="4") + event({"error": {"message": "busy", "code": 502}}), Outcome.OVERLOADED),
        (event({"choices": [{"error": {"code": 502}, "finish_reason": "error"}]}), Outcome.OVERLOADED),
    ],
)  # fmt: skip
def test_error_objects_inside_a_200(body, outcome):
    got = read(body)
    assert got[1] is outcome, got[2]


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [
        ("stop", Outcome.OK),
        ("eos", Outcome.OK),
        ("length", Outcome.TRUNCATED),
        ("max_tokens", Outcome.TRUNCATED),
        ("content_filter", Outcome.FILTERED),
        ("insufficient_system_resource", Outcome.OVERLOADED),
        ("error", Outcome.OVERLOADED),
    ],
)
def test_finish_reasons_become_outcomes(reason, outcome):
    assert outcome_of(delta(content="42") + delta(finish=reason) + DONE) is outcome


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        (b"", Outcome.EMPTY),
        (b" ", Outcome.EMPTY),
        (ROLE + STOP + DONE, Outcome.EMPTY),
        (delta(reasoning_content="hm") + STOP + DONE, Outcome.EMPTY),
        (delta(content=" \n") + STOP + DONE, Outcome.EMPTY),
        (DONE, Outcome.EMPTY),
        (b'{"choices": []}', Outcome.EMPTY),
        (b"\n\n", Outcome.CUT),
        (b": wait\n\n", Outcome.CUT),
        (ROLE, Outcome.CUT),
        (delta(content="4"), Outcome.CUT),
        (delta(content="4") + delta(content="2")[:20], Outcome.CUT),
        (b"<!DOCTYPE html><title>busy</title>", Outcome.NOT_AN_ANSWER),
        (b"\n<html>", Outcome.NOT_AN_ANSWER),
        (b"hello", Outcome.NOT_AN_ANSWER),
        (b"hello\nworld\n", Outcome.NOT_AN_ANSWER),
        (b'{"choices": [', Outcome.NOT_AN_ANSWER),
        (b'{"object": "list", "data": []}', Outcome.NOT_AN_ANSWER),
        (b"[]", Outcome.NOT_AN_ANSWER),
        (b"data: {broken\n\n", Outcome.NOT_AN_ANSWER),
        (b"data: hello\n\n", Outcome.NOT_AN_ANSWER),
        (b"data: hello", Outcome.NOT_AN_ANSWER),
        (b"data: 7\n\n", Outcome.NOT_AN_ANSWER),
    ],
)
def test_what_is_not_a_whole_answer(body, outcome):
    got = read(body)
    assert got[1] is outcome, got[2]


def test_a_cut_says_where():
    assert "inside the reasoning" in read(delta(reasoning="hm"))[2]
    assert "inside the answer" in read(delta(content="hm"))[2]
    assert "after 2 keep-alives" in read(b": a\n\n: b\n\n")[2]


def test_a_cut_while_thinking_with_a_prefilled_tag_leaves_reasoning_reasoning():
    reader, outcome, _, _ = read(delta(content="first I add"), "inline")
    assert (reader.splitter.reasoning, reader.splitter.answer, outcome) == ("first I add", "", Outcome.CUT)
    reader, outcome, _, _ = read(delta(content="first I add") + delta(finish="length"), "inline")
    assert (reader.splitter.reasoning, outcome) == ("first I add", Outcome.TRUNCATED)


def test_content_as_a_list_of_parts():
    parts = [{"type": "text", "text": "4"}, {"type": "image"}, {"type": "text", "text": "2"}]
    assert read(delta(content=parts) + STOP)[0].splitter.answer == "42"


@pytest.mark.parametrize("mode", ["auto", "inline", "reasoning", "reasoning_content"])
def test_both_reasoning_fields_do_not_double_the_text(mode):
    reader, *_ = read(delta(reasoning="hm", reasoning_content="hm") + delta(content="42") + STOP, mode)
    assert (reader.splitter.reasoning, reader.splitter.answer) == ("hm", "42")


def test_parsing_goes_on_where_a_slice_stopped():
    long = b"".join(delta(content=f"{i} ") for i in range(200)) + STOP + DONE
    assert facts(long, until=-1.0) == facts(long)
    reader = CompletionReader("auto", lambda: 0.0)
    reader.feed(long, 1.0)
    assert reader.parse_some(-1.0)
    assert 0 < reader.chunks < 100
    reader.feed(b"", 2.0)
    assert reader.finish()[0] is Outcome.OK
    assert reader.chunks == 200
    assert reader.last_text_at == 1.0


def test_tokens_are_estimated_by_script():
    assert estimate_tokens("") == 0
    assert estimate_tokens("a") == 1
    assert estimate_tokens("abcdefghij") == 3
    assert estimate_tokens("一二三四五") == 3
