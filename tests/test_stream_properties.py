"""The reader of Chat Completions bodies under generated input: what must hold for any bytes and any valid reply.

Replies are generated together with what they say, in every dialect and line end; then they are cut into reads,
spoiled, or built from wrong types. The checks for any bytes are those of the fuzz target.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from itertools import pairwise

import pytest
from fuzz.fuzz_stream import MODES, check, check_input, seeds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import DONE, delta, event

from dsr1kit.access.stream import CompletionReader
from dsr1kit.records import Outcome, Usage
from dsr1kit.thinking import ThinkSplitter

STOP = delta(finish="stop")
# No "<": tags are put where they belong. \x85 and \u2028 end lines for str.splitlines(), not in a stream.
TEXT = st.lists(
    st.sampled_from(["a", "42", " ", "\n", "好", "答案", "é", "😀", '"', "\\", "\x85", "\u2028", "data: ", ">"]),
    max_size=8,
).map("".join)  # fmt: skip
PLACES = st.lists(st.integers(0, 5000), max_size=12)
BROKEN = st.sampled_from(["", "the connection was reset"])


def calm(examples):
    """Generated bodies are large for hypothesis, and two cores are shared: neither is a fault of the reader."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, deadline=None, suppress_health_check=slow)


def cut(whole, places):
    """The parts between the places; None stands for every place."""
    if places is None:
        return [whole[i : i + 1] for i in range(len(whole))]
    edges = [0, *sorted(p % (len(whole) + 1) for p in places), len(whole)]
    return [whole[a:b] for a, b in pairwise(edges)]


@dataclass(frozen=True)
class Told:
    """A body, how to read it, and what it says."""

    body: bytes
    mode: str
    thinks: bool
    expected: tuple


@st.composite
def dialects(draw):
    """Reasoning, answer, and the deltas that tell them in one dialect; whole text for a body in one piece."""
    dialect = draw(st.sampled_from(["reasoning_content", "reasoning", "inline", "prefilled"]))
    reasoning, answer = draw(TEXT.filter(str.strip)), draw(TEXT)
    if dialect.startswith("reasoning"):
        deltas = [{dialect: t} for t in cut(reasoning, draw(PLACES))]
        deltas += [{"content": t} for t in cut(answer, draw(PLACES))]
        mode = draw(st.sampled_from(["auto", "inline", dialect]))
        whole = {dialect: reasoning, "content": answer}
    else:
        text = f"{'<think>' if dialect == 'inline' else ''}\n{reasoning}\n</think>\n\n{answer}"
        deltas = [{"content": t} for t in cut(text, draw(PLACES))]
        mode = draw(st.sampled_from(["auto", "inline"]))
        whole = {"content": text}
        # The line breaks that hug the tags belong to neither.
        reasoning, answer = reasoning.strip("\n"), answer.lstrip()
    return reasoning, answer, deltas, whole, mode


def verdict(answer, finish, done):
    if finish == "length":
        return Outcome.TRUNCATED
    if not done and finish is None:
        return Outcome.CUT
    return Outcome.OK if answer.strip() else Outcome.EMPTY


def counted(told):
    """A usage block and what is to come of it."""
    prompt, reasoning, answer = told
    block = {
        "prompt_tokens": prompt,
        "completion_tokens": reasoning + answer,
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }
    return block, Usage(prompt, reasoning, answer, "provider", "provider")


COUNTS = st.none() | st.tuples(st.integers(0, 99), st.integers(1, 10**6), st.integers(0, 99)).map(counted)
FINISH = st.sampled_from([None, "stop", "length"])


@st.composite
def streams(draw):
    """A valid stream in any dialect, with any line end, keep-alives, with or without usage, [DONE], a last line end."""
    reasoning, answer, deltas, _, mode = draw(dialects())
    finish, done, usage, ascii_only = draw(FINISH), draw(st.booleans()), draw(COUNTS), draw(st.booleans())
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    field = draw(st.sampled_from(["data: ", "data:", "id: 3{}data: ", "event: message{}data:", "retry: 3{}data: "]))
    field = field.format(end)
    payloads = [{"model": "served", "choices": [{"index": 0, "delta": d, "finish_reason": None}]} for d in deltas]
    if finish:
        payloads.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    if usage:
        payloads.append({"choices": [], "usage": usage[0]})
    lines = [json.dumps(p, ensure_ascii=ascii_only) for p in payloads] + ["[DONE]"] * done
    noise = draw(st.lists(st.tuples(st.integers(0, len(lines)), st.sampled_from(["blank", "comment"])), max_size=5))
    if end == "\r":  # before the form is known only LF counts
        noise = [(place, kind) for place, kind in noise if place > 0]
    text = ""
    for number in range(len(lines) + 1):
        text += "".join(end if kind == "blank" else f": wait{end}{end}" for place, kind in noise if place == number)
        text += field + lines[number] + end + end if number < len(lines) else ""
    if not any(place == len(lines) for place, _ in noise):
        text = text.removesuffix(draw(st.sampled_from(["", end, end + end])))
    body = draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + text.encode()
    outcome = verdict(answer, finish, done)
    chunks = sum(any(d.values()) for d in deltas)
    expected = (outcome, reasoning, answer, finish, "served", usage[1] if usage else None, len(noise), chunks)
    return Told(body, mode, draw(st.booleans()), expected)


@st.composite
def wholes(draw):
    """A valid answer that is no stream: one JSON object."""
    reasoning, answer, _, message, mode = draw(dialects())
    finish, usage, blank = draw(FINISH), draw(COUNTS), draw(st.sampled_from(["", "\n", "\n\r\n", " \n"]))
    payload = {"model": "served", "choices": [{"message": message, "finish_reason": finish}]}
    if usage:
        payload["usage"] = usage[0]
    text = json.dumps(payload, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
    body = draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + (blank + text).encode()
    outcome = verdict(answer, finish, True)
    expected = (outcome, reasoning, answer, finish, "served", usage[1] if usage else None, blank.count("\n"), 1)
    return Told(body, mode, draw(st.booleans()), expected)


VALID = st.one_of(streams(), streams(), wholes())


def agrees(read, expected):
    """Whether what was read is what was told; counts that were not told are estimates."""
    outcome, _, *facts = read
    usage = expected[5]
    return (outcome, *facts) == (*expected[:5], usage or read[6], *expected[6:]) and (
        usage is not None or read[6].source == "estimated"
    )


@calm(250)
@given(VALID)
def test_a_valid_reply_is_read_as_it_was_told(told):
    read = check([told.body], told.mode, thinks=told.thinks)
    assert agrees(read, told.expected), read


@calm(250)
@given(VALID, PLACES, BROKEN, st.booleans())
def test_any_split_of_a_valid_reply_gives_the_same_reply(told, places, broken, sliced):
    how = {"mode": told.mode, "thinks": told.thinks, "broken": broken}
    assert check(cut(told.body, places), sliced=sliced, **how) == check([told.body], **how)


@calm(60)
@given(VALID, BROKEN)
def test_a_valid_reply_byte_by_byte_gives_the_same_reply(told, broken):
    how = {"mode": told.mode, "thinks": told.thinks, "broken": broken}
    assert check(cut(told.body, None), **how) == check([told.body], **how)


@calm(200)
@given(st.binary(max_size=300), PLACES, st.sampled_from(MODES), st.booleans(), BROKEN)
def test_random_bytes_never_raise_and_do_not_depend_on_the_reads(body, places, mode, thinks, broken):
    how = {"mode": mode, "thinks": thinks, "broken": broken}
    assert check(cut(body, places), **how) == check([body], **how)


NASTY = st.one_of(
    st.binary(min_size=1, max_size=4),
    st.sampled_from(
        [
            b"\n", b"\r", b"\n\n", b"\x00", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xf0\x9f", b"data: ",
            b"event: error\n", b": ", b'"', b"\\", b"{", b"}", b"[" * 1200, b'{"a":' * 500, b"]" * 9, b"NaN",
            b"-Infinity", b"1e999", b"9" * 400, b"null", b'"\\ud83d"', b"\\udc00", b"<think>", b"</think>",
            b"[DONE]", b'"error":', b'"code":"\xc2\xb2",',
        ]
    ),
)  # fmt: skip
CHANGE = st.tuples(st.sampled_from(["flip", "insert", "delete", "double", "truncate"]), st.integers(0, 5000), NASTY)


def changed(body, changes):
    for kind, place, what in changes:
        at = place % (len(body) + 1)
        if kind == "flip":
            body = body[:at] + bytes(b ^ what[0] for b in body[at : at + 1]) + body[at + 1 :]
        elif kind == "insert":
            body = body[:at] + what + body[at:]
        elif kind == "delete":
            body = body[:at] + body[at + len(what) :]
        elif kind == "double":
            body = body[:at] + body[max(0, at - 40) :]
        elif len(body) > 50:  # what would cut everything away tests nothing
            body = body[: max(50, at)]
    return body


@calm(300)
@given(VALID, st.lists(CHANGE, min_size=1, max_size=6), PLACES, st.sampled_from(MODES), BROKEN)
def test_a_spoiled_reply_never_raises_and_does_not_depend_on_the_reads(told, changes, places, mode, broken):
    body = changed(told.body, changes)
    how = {"mode": mode, "thinks": told.thinks, "broken": broken}
    assert check(cut(body, places), **how) == check([body], **how)


DEEP = "deep-nesting-goes-here"  # replaced in the JSON text: hypothesis and json.dumps would not go that deep
SCALARS = st.one_of(
    st.none(), st.booleans(), st.floats(), st.integers(-5, 1000), st.just(10**400), st.text(max_size=5),
    st.sampled_from([DEEP, "", "\ud83d", "\ude00", "²", "٣", "429", "9" * 5000]),
    st.sampled_from(["<think>", "</think>", "stop", "length"]),
)  # fmt: skip
ANY = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "message", "code", "type", "error", "\ud800"]), inner, max_size=3)
    ),
    max_leaves=5,
)


def objects(**fields):
    """Objects in which any field may be missing, or of any type."""
    return st.fixed_dictionaries({}, optional={name: value | ANY for name, value in fields.items()})


MESSAGE = objects(role=ANY, content=ANY, reasoning=ANY, reasoning_content=ANY)
CHOICE = objects(index=st.just(0), delta=MESSAGE, message=MESSAGE, finish_reason=ANY, error=ANY)
CHUNK = objects(
    model=ANY,
    object=st.just("error"),
    error=objects(code=ANY, type=ANY, message=ANY),
    choices=st.lists(CHOICE, min_size=1, max_size=2),
    usage=objects(
        prompt_tokens=ANY, completion_tokens=ANY, completion_tokens_details=objects(reasoning_tokens=ANY)
    ),
)  # fmt: skip
NESTINGS = st.tuples(
    st.sampled_from([("[", "]"), ('{"a":', "}"), ('[{"text":', "}]"), ('{"error":', "}")]),
    st.sampled_from([1, 100, 330, 480, 495, 978, 983, 985, 990, 1100, 20_000]),
)


@calm(400)
@given(st.lists(CHUNK | ANY, min_size=1, max_size=3), NESTINGS, PLACES, st.sampled_from(MODES), st.booleans(), BROKEN)
def test_wrong_types_in_any_field_never_raise(chunks, nesting, places, mode, whole, broken):
    (before, after), depth = nesting
    deep = before * depth + '"a"' + after * depth
    texts = [json.dumps(c).replace(f'"{DEEP}"', deep) for c in chunks]
    body = (texts[0] if whole else "".join(f"data: {text}\n\n" for text in texts)).encode()
    how = {"mode": mode, "thinks": True, "broken": broken}
    assert check(cut(body, places), **how) == check([body], **how)


@pytest.mark.parametrize("name", sorted(seeds()))
def test_the_seeds_of_the_fuzz_target_pass(name):
    check_input(seeds()[name])
    check_input(b"")


def read(body, **how):
    return check([body], **how)


@pytest.mark.parametrize("code", ["²", "9" * 5000])
def test_an_error_code_of_digits_that_make_no_number_is_an_error_like_any_other(code):
    outcome, detail, *_ = read(event({"error": {"code": code}}))
    assert outcome is Outcome.OVERLOADED
    assert detail


def test_an_error_nested_as_deep_as_json_can_be_read_does_not_raise():
    for depth in range(850, 1000):  # where reading works and telling does not depends on the caller's depth
        read(b'data: {"error":' + b"[" * depth + b"]" * depth + b"}\n\n")


@pytest.mark.parametrize("depth", [2, 330, 400])
def test_text_parts_nested_in_text_parts_are_no_text(depth):
    nested = b'[{"text":' * depth + b'"a"' + b"}]" * depth
    body = b'data: {"choices":[{"delta":{"content":' + nested + b"}}]}\n\n" + STOP
    assert read(body)[0] is Outcome.EMPTY


@pytest.mark.parametrize("count", [10**400, 2**53])
def test_a_count_that_no_reply_can_have_is_not_taken(count):
    body = delta(reasoning="hm", content="42") + event({"usage": {"completion_tokens": count}}) + STOP
    assert read(body)[6].source == "estimated"


def test_names_and_reasons_with_halves_of_characters_can_be_written():
    half = b'"\\ud800"'
    body = b'data: {"model":%b,"choices":[{"delta":{"content":"a"},"finish_reason":%b}]}\n\n' % (half, half)
    assert read(body)[4:6] == ("�", "�")
    assert "�" in read(b'data: {"error":{"message":%b}}\n\n' % half)[1]


def shown(*fields):
    """The pieces shown live for chunks with these fields, then an end."""
    live = []
    reader = CompletionReader("auto", lambda: 0.0, live.extend)
    for at, one in enumerate(fields):
        payload = {"choices": [{"delta": one}]}
        reader.feed(b"data: " + json.dumps(payload).encode() + b"\n\n", float(at))
        reader.parse_some(float("inf"))
    reader.feed(DONE, float(len(fields)))
    reader.finish()
    return [(p.kind, p.text, p.at) for p in live]


def test_a_character_cut_between_two_chunks_is_shown_whole_when_its_second_half_comes():
    assert shown({"content": "a\ud83d"}, {"content": "\ude00b"}) == [("answer", "a", 0.0), ("answer", "😀b", 1.0)]
    assert shown({"content": "\ud83d"}, {"content": "\ude00"}) == [("answer", "😀", 1.0)]


def test_half_a_character_whose_other_half_never_comes_is_replaced_in_its_place():
    assert shown({"reasoning": "a\ud83d"}, {"content": "b"}) == [
        ("reasoning", "a", 0.0), ("reasoning", "�", 1.0), ("answer", "b", 1.0),
    ]  # fmt: skip
    assert shown({"content": "a\ud83d"}) == [("answer", "a", 0.0), ("answer", "�", 0.0)]
    assert shown({"content": "a\ud83d"}, {"content": "b"})[-1] == ("answer", "�b", 1.0)


def test_events_end_at_blank_lines_also_where_lines_end_in_cr_alone():
    lines = b'data: {"choices": [{"delta":\ndata: {"content": "42"}}]}\n\n' * 2 + b": wait\n\n\n" + STOP
    for body in (lines, lines.replace(b"\n", b"\r\n"), lines.replace(b"\n", b"\r")):
        assert read(body)[3] == "4242"
        assert read(body)[7] == 2
    assert read(b"data: {broken\r\rdata: {}\r\r")[0] is Outcome.NOT_AN_ANSWER


def test_a_long_key_in_a_body_that_is_no_answer_stays_out_of_the_detail():
    assert len(read(b'{"' + b"k" * 100_000 + b'": 1}')[1]) < 500


def test_a_long_line_in_many_reads_costs_time_in_proportion():
    began = time.process_time()
    read_in_parts = [b'data: {"model": "', *[b"a" * 1024] * 8192, b'"}\n\n', STOP]
    assert check(read_in_parts)[0] is Outcome.EMPTY
    assert time.process_time() - began < 2.0  # 8 MiB; copied with every read they were tens of seconds


def test_line_breaks_without_end_cost_time_in_proportion():
    splitter, began = ThinkSplitter("auto"), time.process_time()
    for _ in range(40_000):
        splitter.add_content("\n", 0.0)
    splitter.add_content("<think>a</think>b", 1.0)
    assert (splitter.reasoning, splitter.answer) == ("a", "b")
    assert time.process_time() - began < 2.0  # joined anew with each one they were tens of seconds
