"""Bedrock's Converse over real sockets: the request and its signature, the event stream, what goes wrong in it.

The far side is written by the emulator's own hand; AWS's client reads it as well, so that both hands agree.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import hmac
import json
import struct
import sys
import zlib
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import CLOSE, HANG, RESET, Scripted, response

from dsr1kit import keys
from dsr1kit.access import converse
from dsr1kit.access.channels import Channel
from dsr1kit.access.converse import BedrockConverse, ConverseReader, credentials_present
from dsr1kit.emulator.converse import ConverseShape, frame, question, refusal
from dsr1kit.errors import MissingExtra, MissingKey, UsageError
from dsr1kit.records import Outcome, Sampling

boto3 = pytest.importorskip("boto3")

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
VARIABLE = "AWS_BEARER_TOKEN_BEDROCK"
BEARER = "bedrock-api-key-0123456789ABCdef"
ACCESS, SECRET, TOKEN = "ASIAEXAMPLE012345678", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLE", "FwoGZXIvYXdz" * 20
MODEL = "us.deepseek.r1-v1:0"
TYPE = {"Content-Type": ConverseShape.content_type}
SLACK_S = 0.25  # for a busy machine
NOT_NEEDED = [HealthCheck.too_slow, HealthCheck.data_too_large]


@pytest.fixture(autouse=True)
def _no_aws(monkeypatch, tmp_path):
    """Nothing of this machine's own: no keys, no files, no proxies, no metadata service."""
    names = ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "PROFILE", "DEFAULT_REGION", "REGION")
    for name in (
        VARIABLE,
        *(f"AWS_{name}" for name in names),
        "http_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none-either"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(keys, "_used", set())


@pytest.fixture
def bearer(monkeypatch):
    monkeypatch.setenv(VARIABLE, BEARER)


@pytest.fixture
def signing(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)


def entry(server=None, **fields):
    urls = (server.url if server else "https://bedrock-runtime.us-east-1.amazonaws.com",)
    known = {"name": "bedrock", "base_urls": urls, "model": MODEL, "api_key_env": VARIABLE, "family": "r1"}
    return Channel(**{**known, "protocol": "bedrock-converse", **fields})


def play(script, *, fields=None, sampling=None, messages=QUESTION, on_delta=None, times=1, **clocks):
    """Ask a scripted Bedrock; the last reply and the server."""

    async def inside():
        async with Scripted(script) as server, entry(server, **fields or {}).open(**clocks) as r1:
            for _ in range(times):
                reply = await r1.ask(messages, sampling or Sampling(), on_delta=on_delta)
        return reply, server

    return asyncio.run(inside())


def frames(reasoning="17 + 25 is 42.", answer="The answer is 42.", finish="stop"):
    shape = ConverseShape()
    return [
        shape.begin(),
        shape.text(reasoning, ""),
        shape.text("", answer),
        shape.end(finish),
        shape.usage(7, 5, 4) + shape.done() + shape.keep_alive(),
    ]


def stream(*steps, **how):
    return response(*steps, headers=TYPE, **how)


def refused(status, outcome, message, name=None):
    headers, body = refusal(status, outcome, message)
    if name:
        headers["x-amzn-errortype"] = name
    return response(json.dumps(body).encode(), status=status, framing="length", headers=headers)


def read(pieces, *, mode="auto", broken="", sliced=False):
    """All that a reader tells of a body that comes in `pieces`; its promises for any bytes are asserted."""
    live = []
    reader = ConverseReader(mode, lambda: 0.0, live.extend)
    for at, piece in enumerate(pieces):
        reader.feed(piece, float(at))
        reader.parse_some(-1.0 if sliced else float("inf"))
    outcome, detail = reader.finish(broken=broken)
    usage, splitter = reader.usage("question"), reader.splitter
    assert isinstance(outcome, Outcome)
    assert detail or outcome is Outcome.OK
    assert len(detail) < 2000
    for text in (detail, splitter.reasoning, splitter.answer, reader.finish_reason or ""):
        text.encode()
    assert "".join(p.text for p in live) == "".join(p.text for p in splitter.pieces)
    facts = (reader.finish_reason, usage, reader.chunks, reader.keep_alives, reader.complete)
    return outcome, detail, splitter.reasoning, splitter.answer, *facts


def cut(whole, places):
    edges = [0, *sorted(p % (len(whole) + 1) for p in places), len(whole)]
    return [whole[a:b] for a, b in pairwise(edges)]


# The answer, over the wire.


@pytest.mark.usefixtures("bearer")
def test_a_whole_answer_is_read_and_timed():
    seen = []
    begin, thought, said, end, usage = frames()
    steps = ((0.0, begin), (0.1, thought), (0.1, said), (0.0, end), (0.1, usage))
    reply, server = play(stream(*steps), on_delta=seen.append)
    assert reply.outcome is Outcome.OK, reply.detail
    assert (reply.reasoning, reply.answer) == ("17 + 25 is 42.", "The answer is 42.")
    assert [(d.kind, d.text) for d in seen] == [("reasoning", reply.reasoning), ("answer", reply.answer)]
    assert reply.finish_reason == "stop"
    assert 0.1 <= reply.timing.first_token_s < 0.1 + SLACK_S
    assert 0.1 <= reply.timing.think_s < 0.1 + SLACK_S
    # The counts come after the end of the message, and are waited for.
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.source) == (7, 9, "provider")
    assert reply.usage.split_source == "estimated"
    request = server.requests[0]
    assert (request.method, request.target) == ("POST", "/v1/model/us.deepseek.r1-v1%3A0/converse-stream")
    assert request.headers["authorization"] == f"Bearer {BEARER}"
    assert "eventstream" in request.headers["accept"]


@pytest.mark.usefixtures("bearer")
def test_one_connection_serves_the_next_question():
    _, server = play(stream(*frames()), times=2)
    assert server.connections == 1


@pytest.mark.usefixtures("bearer")
def test_a_response_that_stays_open_is_complete_with_its_counts():
    reply, _ = play(stream(*frames(), HANG))
    assert (reply.outcome, reply.usage.completion_tokens) == (Outcome.OK, 9)


@pytest.mark.usefixtures("bearer")
def test_the_body_is_converses():
    sampling = Sampling(temperature=0.5, top_p=0.9, max_tokens=99999, seed=3, max_thinking_tokens=8)
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION, {"role": "assistant", "content": "\ud800?"}]
    _, server = play(stream(*frames()), fields={"max_output": 8192}, sampling=sampling, messages=messages)
    body = server.requests[0].json
    assert body == {
        "system": [{"text": "Be brief."}],
        "messages": [
            {"role": "user", "content": [{"text": "What is 17 + 25?"}]},
            {"role": "assistant", "content": [{"text": "??"}]},
        ],
        "inferenceConfig": {"maxTokens": 8192, "temperature": 0.5, "topP": 0.9},
    }
    asked = question(body)
    assert [m["content"] for m in asked["messages"]] == ["Be brief.", "What is 17 + 25?", "??"]
    assert (asked["temperature"], asked["top_p"], asked["max_tokens"], asked["stream"]) == (0.5, 0.9, 8192, True)


@pytest.mark.parametrize("body", [None, [], {}, {"messages": 1}, {"messages": [{}]}, {"messages": [{"content": [1]}]}])
def test_what_is_no_question_raises_what_the_emulator_expects(body):
    with pytest.raises((KeyError, TypeError, AttributeError, ValueError)):
        question(body)


@pytest.mark.parametrize("mode", ["auto", "reasoning", "reasoning_content", "inline"])
@pytest.mark.usefixtures("bearer")
def test_reasoning_is_found_whatever_the_catalogue_calls_it(mode):
    reply, _ = play(stream(*frames()), fields={"reasoning": mode})
    assert (reply.reasoning, reply.answer) == ("17 + 25 is 42.", "The answer is 42.")


STOPS = {
    "end_turn": ("stop", Outcome.OK),
    "stop_sequence": ("stop", Outcome.OK),
    "max_tokens": ("length", Outcome.TRUNCATED),
    "model_context_window_exceeded": ("length", Outcome.TRUNCATED),
    "content_filtered": ("content_filter", Outcome.FILTERED),
    "guardrail_intervened": ("content_filter", Outcome.FILTERED),
    "tool_use": ("tool_use", Outcome.OK),
}


@pytest.mark.parametrize("reason", STOPS)
def test_stop_reasons(reason):
    begin, thought, said, _, usage = frames()
    outcome, _, _, _, finish, *_ = read([begin, thought, said, event("messageStop", {"stopReason": reason}), usage])
    assert (finish, outcome) == STOPS[reason]


@pytest.mark.parametrize("finish", ["stop", "length", "content_filter"])
def test_the_shapes_stop_reasons_come_back(finish):
    assert read(frames(finish=finish))[4] == finish


def event(kind, payload, message_type="event", **more):
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return frame({":event-type": kind, ":message-type": message_type, **more}, body)


def test_what_is_no_text_is_passed_over():
    begin, thought, said, end, usage = frames()
    delta = "contentBlockDelta"
    extra = [
        event(delta, {"delta": {"reasoningContent": {"signature": "c2ln"}}}),
        event(delta, {"delta": {"reasoningContent": {"redactedContent": "aGlk"}}}),
        event(delta, {"delta": {"reasoningContent": ["?"], "text": 7}}),
        event(delta, {"delta": None}),
        event(delta, b""),
        event("contentBlockStart", {"start": {}}),
        event("somethingNew", {"text": "?"}),
        event("metadata", {"usage": {"inputTokens": "many", "outputTokens": -1}}),
        event("messageStop", {"stopReason": None}),
    ]
    assert read([begin, *extra, thought, *extra, said, end, usage]) == read([begin, thought, said, end, usage])


# What goes wrong.

IN_STREAM = [
    ("throttlingException", "Too many tokens, please wait.", Outcome.THROTTLED),
    ("serviceQuotaExceededException", "no", Outcome.THROTTLED),
    ("modelStreamErrorException", "The model produced an error.", Outcome.OVERLOADED),
    ("serviceUnavailableException", "Bedrock is unable to process your request.", Outcome.OVERLOADED),
    ("internalServerException", "The system encountered an unexpected error.", Outcome.OVERLOADED),
    ("modelTimeoutException", "Timed out.", Outcome.OVERLOADED),
    ("validationException", "Malformed input request: quota of fields.", Outcome.BAD_REQUEST),
    ("validationException", "The provided model identifier is invalid.", Outcome.UNKNOWN_MODEL),
    ("accessDeniedException", "no", Outcome.UNAUTHORIZED),
    ("somethingNewException", "Rate limit reached", Outcome.THROTTLED),
    ("somethingNewException", "?", Outcome.OVERLOADED),
]


@pytest.mark.parametrize(("name", "words", "outcome"), IN_STREAM)
def test_exceptions_in_the_stream(name, words, outcome):
    headers = {":exception-type": name, ":content-type": "application/json", ":message-type": "exception"}
    begin, thought, *_ = frames()
    told = read([begin, thought, frame(headers, json.dumps({"message": words}).encode())])
    assert told[0] is outcome, told
    assert f'"{name}: {words}"' in told[1]
    assert told[2] == "17 + 25 is 42."  # what came before stays


@pytest.mark.parametrize("payload", [b"", b"no json", b"[]", b'{"message": 7}', b'{"message": "\\ud800"}'])
def test_exceptions_with_strange_payloads(payload):
    headers = {":exception-type": "throttlingException", ":message-type": "exception"}
    assert read([frame(headers, payload)])[0] is Outcome.THROTTLED


def test_error_frames_and_their_headers():
    headers = {":message-type": "error", ":error-code": "InternalFailure", ":error-message": "went wrong"}
    outcome, detail, *_ = read([frame(headers, b"")])
    assert outcome is Outcome.OVERLOADED
    assert "InternalFailure: went wrong" in detail
    assert read([frame({":message-type": "error"}, b"")])[0] is Outcome.OVERLOADED


@pytest.mark.parametrize("name", ["throttled", "overloaded", "bad_request"])
@pytest.mark.usefixtures("bearer")
def test_the_shapes_exceptions_come_back(name):
    begin, thought, *_ = frames()
    reply, _ = play(stream(begin, thought, ConverseShape().error(name, "told")))
    assert reply.outcome == name
    assert "told" in reply.detail


REFUSALS = [
    (429, "ThrottlingException", "Too many requests, please wait before trying again.", Outcome.THROTTLED),
    (400, "ServiceQuotaExceededException", "Your request exceeds the quota.", Outcome.THROTTLED),
    (403, "AccessDeniedException", "You don't have access to the model with the specified ID.", Outcome.UNAUTHORIZED),
    (403, "UnrecognizedClientException", "The security token included is invalid.", Outcome.UNAUTHORIZED),
    (403, "ExpiredTokenException", "The security token included in the request is expired", Outcome.UNAUTHORIZED),
    (403, "InvalidSignatureException", "The request signature does not match.", Outcome.UNAUTHORIZED),
    (404, "ResourceNotFoundException", "Could not resolve the foundation model.", Outcome.UNKNOWN_MODEL),
    (404, "ResourceNotFoundException", "This model version has reached the end of its life.", Outcome.RETIRED),
    (404, "ResourceNotFoundException", "This Model is marked by provider as Legacy and ...", Outcome.RETIRED),
    (400, "ValidationException", "The provided model identifier is invalid.", Outcome.UNKNOWN_MODEL),
    (400, "ValidationException", "Invocation with on-demand throughput isn't supported.", Outcome.BAD_REQUEST),
    (400, "ValidationException", "1 validation error detected: temperature", Outcome.BAD_REQUEST),
    (429, "ModelNotReadyException", "Model is not ready for inference.", Outcome.OVERLOADED),
    (408, "ModelTimeoutException", "Model has timed out.", Outcome.OVERLOADED),
    (424, "ModelErrorException", "The system encountered an error.", Outcome.OVERLOADED),
    (503, "ServiceUnavailableException", "Bedrock is unable to process your request.", Outcome.OVERLOADED),
    (500, "InternalServerException", "unexpected", Outcome.OVERLOADED),
    (404, "UnknownOperationException", "", Outcome.UNKNOWN_MODEL),
]


@pytest.mark.parametrize(("status", "name", "words", "outcome"), REFUSALS)
@pytest.mark.usefixtures("bearer")
def test_refusals(status, name, words, outcome):
    header = f"{name}:http://internal.amazon.com/coral/com.amazon.bedrock/"
    wire = BedrockConverse(entry(), BEARER)
    told, detail = wire.refusal(status, {"x-amzn-errortype": header}, json.dumps({"message": words}).encode())
    assert told is outcome, detail
    assert f"HTTP {status}" in detail
    assert name in detail
    assert words in detail
    assert "/v1" not in detail  # advice for other places
    # Gateways put the name into the body.
    body = json.dumps({"__type": f"com.amazon.coral.service#{name}", "Message": words}).encode()
    assert wire.refusal(status, {}, body) == (told, detail)


@pytest.mark.parametrize("body", [b"", b"[]", b"<html><title>Forbidden</title></html>", b"\xff\xfe", b"[" * 100_000])
def test_refusals_without_a_name_go_by_status(body):
    wire = BedrockConverse(entry(), BEARER)
    assert wire.refusal(403, {}, body)[0] is Outcome.UNAUTHORIZED
    assert wire.refusal(503, {"x-amzn-errortype": ":"}, body)[0] is Outcome.OVERLOADED


FAULTS = {
    "throttled": 429, "overloaded": 503, "no_balance": 402, "unauthorized": 401, "unknown_model": 404,
    "retired": 410, "bad_request": 400,
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.usefixtures("bearer")
def test_the_shapes_refusals_come_back(name):
    reply, _ = play(refused(FAULTS[name], name, "told"))
    assert (reply.outcome, reply.http_status) == (name, FAULTS[name])
    assert "Exception: told" in reply.detail


@pytest.mark.parametrize("how", [CLOSE, RESET])
@pytest.mark.usefixtures("bearer")
def test_a_cut_stream(how):
    begin, thought, said, *_ = frames()
    reply, _ = play(stream(begin, thought, said[: len(said) // 2], (0.05, b""), how))
    assert (reply.outcome, reply.reasoning) == (Outcome.CUT, "17 + 25 is 42.")
    assert "inside the reasoning" in reply.detail


@pytest.mark.usefixtures("bearer")
def test_a_stream_that_ends_early_by_itself():
    begin, thought, said, *_ = frames()
    reply, _ = play(stream(begin, thought, said))
    assert reply.outcome is Outcome.CUT
    assert "without messageStop, inside the answer" in reply.detail


@pytest.mark.usefixtures("bearer")
def test_silence_is_told():
    begin, thought, *_ = frames()
    assert play(stream(begin, HANG), first_token_s=0.2)[0].outcome is Outcome.STALLED
    assert play(stream(begin, thought, HANG), stall_s=0.2)[0].outcome is Outcome.STALLED


@pytest.mark.parametrize(
    ("body", "outcome", "words"),
    [
        (b"<!DOCTYPE html><title>Sign in</title>", Outcome.NOT_AN_ANSWER, "HTML page"),
        (b'{"message": "no"}', Outcome.NOT_AN_ANSWER, "JSON without choices"),
        (b"upstream connect error", Outcome.NOT_AN_ANSWER, 'HTTP 200 with "upstream con..."'),
        (b"busy", Outcome.NOT_AN_ANSWER, 'HTTP 200 with "busy..."'),
        (b'data: {"choices": []}\n\n', Outcome.NOT_AN_ANSWER, "in place of a frame"),
        (b"", Outcome.EMPTY, "empty body"),
    ],
)
@pytest.mark.usefixtures("bearer")
def test_what_is_no_event_stream(body, outcome, words):
    reply, _ = play(stream(body))
    assert reply.outcome is outcome, reply.detail
    assert words in reply.detail
    assert outcome is Outcome.EMPTY or "bedrock-runtime" in reply.detail


def raw(total, headers, rest=b"", crc=None):
    prelude = struct.pack("!II", total, headers)
    return prelude + struct.pack("!I", zlib.crc32(prelude) if crc is None else crc) + rest


def spoiled(place):
    body = bytearray(b"".join(frames()[1:2]))
    body[place] ^= 0x40
    return bytes(body)


BROKEN_FRAMES = {
    "checksum of the prelude": raw(16, 0, crc=7),
    "checksum of the frame": spoiled(-1),
    "a byte of the text": spoiled(-30),
    "a byte of the headers": spoiled(14),
    "shorter than itself": raw(12, 0),
    "headers longer than the frame": raw(40, 30, bytes(28)),
    "of no length": raw(0, 0),
    "of a gigabyte": raw(2**30, 0),
    "headers of a megabyte": raw(2**20, 2**20 - 16),
    "without headers": frame({}, b"{}"),
    "of an unknown type": frame({":message-type": "letter"}, b"{}"),
    "with broken JSON": event("contentBlockDelta", b'{"delta": '),
    "with a list": event("contentBlockDelta", b"[]"),
    "nested too deep": event("contentBlockDelta", b"[" * 200_000),
}


@pytest.mark.parametrize("what", BROKEN_FRAMES)
def test_nothing_after_a_broken_frame_is_read(what):
    begin, thought, *rest = frames()
    body = b"".join([begin, thought, BROKEN_FRAMES[what], *rest])
    told = read([body])
    assert told[0] is Outcome.NOT_AN_ANSWER
    assert "broken frame" in told[1]
    assert told[2:5] == ("17 + 25 is 42.", "", None)
    assert read([body[i : i + 1] for i in range(len(body))] if len(body) < 9999 else [body]) == told


@pytest.mark.usefixtures("bearer")
def test_a_broken_frame_over_the_wire():
    reply, _ = play(stream(*frames()[:2], BROKEN_FRAMES["checksum of the frame"]))
    assert (reply.outcome, reply.reasoning) == (Outcome.NOT_AN_ANSWER, "17 + 25 is 42.")


# Any bytes.

TEXT = st.text(st.sampled_from("ab 42\n好😀<>\"\\é"), max_size=12)  # fmt: skip
PLACES = st.lists(st.integers(0, 5000), max_size=12)


@st.composite
def streams(draw):
    shape = ConverseShape()
    body = shape.begin()
    texts = draw(st.lists(st.tuples(TEXT, TEXT), max_size=6))
    for reasoning, answer in texts:
        body += shape.text(reasoning, answer)
    if draw(st.integers(0, 5)) == 0:
        body += shape.error(draw(st.sampled_from(["throttled", "bad_request"])), "told")
    body += shape.end(draw(st.sampled_from(["stop", "length"]))) + shape.usage(3, 4, 5)
    return body, "".join(r for r, _ in texts), "".join(a for _, a in texts)


@settings(max_examples=80, deadline=None, suppress_health_check=NOT_NEEDED)
@given(told=streams(), places=PLACES, sliced=st.booleans())
def test_reads_do_not_matter(told, places, sliced):
    body, reasoning, answer = told
    whole = read([body])
    assert whole[2:4] == (reasoning, answer)
    assert read(cut(body, places), sliced=sliced) == whole
    assert read([body[i : i + 1] for i in range(len(body))], sliced=sliced) == whole


@settings(max_examples=150, deadline=None, suppress_health_check=NOT_NEEDED)
@given(told=streams(), places=PLACES, end=PLACES, flips=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255))))
def test_spoiled_streams_never_raise_and_reads_do_not_matter(told, places, end, flips):
    body = bytearray(told[0])
    for place, value in flips:
        body[place % len(body)] = value
    body = bytes(body[: sum(end) % len(body) + 1] if end else body)
    for broken in ("", "the connection was reset"):
        assert read(cut(body, places), broken=broken, sliced=True) == read([body], broken=broken)


@settings(max_examples=150, deadline=None, suppress_health_check=NOT_NEEDED)
@given(
    body=st.binary(max_size=200),
    headers=st.none() | st.binary(max_size=60),
    json_like=st.recursive(st.none() | st.integers() | TEXT, lambda s: st.lists(s) | st.dictionaries(TEXT, s)),
    kind=st.sampled_from(["messageStart", "contentBlockDelta", "messageStop", "metadata"]),
    keys_=st.sampled_from(["delta", "usage", "stopReason", "role"]),
    places=PLACES,
)
def test_any_bytes_in_any_frame_never_raise(body, headers, json_like, kind, keys_, places):
    if headers is not None:  # a frame that is whole, but for what is in its headers
        prelude = struct.pack("!II", 16 + len(headers) + len(body), len(headers))
        whole = prelude + struct.pack("!I", zlib.crc32(prelude)) + headers + body
        body = whole + struct.pack("!I", zlib.crc32(whole))
    body += event(kind, {keys_: json_like}) + event(kind, body)
    assert read(cut(body, places)) == read([body])


def test_slices_look_at_the_clock():
    shape = ConverseShape()
    body = shape.begin() + b"".join(shape.text("", f"{n} ") for n in range(200))
    ticks = iter(range(10_000))
    reader = ConverseReader("auto", lambda: float(next(ticks)), None)
    reader.feed(body, 0.5)
    slices = 0
    while reader.parse_some(0.0):
        slices += 1
        assert slices < 1000
    assert 20 <= slices <= 30  # 16 steps are 8 frames
    assert reader.splitter.answer.split() == [str(n) for n in range(200)]
    assert reader.last_text_at == 0.5


# Signatures.


def derived(request, secret, day, region):
    """AWS's own recipe for version 4, written out once more: the signature of a request as it came."""
    told = dict(part.strip().split("=", 1) for part in request.headers["authorization"].split(" ", 1)[1].split(","))
    names = told["SignedHeaders"].split(";")
    path, _, query = request.target.partition("?")
    path = path.replace("%", "%25")
    headers = "".join(f"{name}:{request.headers[name]}\n" for name in names)
    digest = hashlib.sha256(request.body).hexdigest()
    canonical = "\n".join(["POST", path, query, headers, ";".join(names), digest])
    scope = f"{day}/{region}/bedrock/aws4_request"
    hashed = hashlib.sha256(canonical.encode()).hexdigest()
    text = "\n".join(["AWS4-HMAC-SHA256", request.headers["x-amz-date"], scope, hashed])
    key = f"AWS4{secret}".encode()
    for step in (day, region, "bedrock", "aws4_request"):
        key = hmac.new(key, step.encode(), hashlib.sha256).digest()
    return told, names, hmac.new(key, text.encode(), hashlib.sha256).hexdigest(), scope


def botocores(request, region, host):
    """The Authorization line that botocore gives the request as it came, at the time it was signed."""
    from botocore.auth import SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    names = request.headers["authorization"].split("SignedHeaders=")[1].split(",")[0].split(";")
    headers = {n: request.headers[n] for n in names}
    again = AWSRequest(method="POST", url=f"http://{host}{request.target}", data=request.body, headers=headers)
    again.context["timestamp"] = request.headers["x-amz-date"]
    signer = SigV4Auth(Credentials(ACCESS, SECRET, TOKEN), "bedrock", region)
    signature = signer.signature(signer.string_to_sign(again, signer.canonical_request(again)), again)
    signer._inject_signature_to_request(again, signature)
    return again.headers["Authorization"]


@pytest.mark.parametrize("query", ["", "?a=1&b=2"])
@pytest.mark.usefixtures("signing")
def test_the_signature_is_that_of_the_request_as_it_is_sent(query, monkeypatch):
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")

    async def inside():
        async with Scripted(stream(*frames())) as server:
            arn = "arn:aws:bedrock:us-east-1:123456789012:inference-profile/us.deepseek.r1-v1:0"
            async with entry(server, model=arn, base_urls=(server.url + query,)).open() as r1:
                reply = await r1.ask([{"role": "user", "content": "17 + 25 等于几?"}])
        return reply, server

    reply, server = asyncio.run(inside())
    assert reply.outcome is Outcome.OK, reply.detail
    request = server.requests[0]
    assert "inference-profile%2Fus.deepseek.r1-v1%3A0/converse-stream" in request.target
    assert request.headers["x-amz-security-token"] == TOKEN
    signed_at = dt.datetime.strptime(request.headers["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=dt.UTC)
    assert abs(dt.datetime.now(dt.UTC) - signed_at) < dt.timedelta(minutes=1)
    told, names, signature, scope = derived(request, SECRET, f"{signed_at:%Y%m%d}", "eu-central-1")
    assert told["Credential"] == f"{ACCESS}/{scope}"
    assert {"content-type", "host", "x-amz-date", "x-amz-security-token"} == set(names)
    assert told["Signature"] == signature
    assert request.headers["authorization"] == botocores(request, "eu-central-1", f"127.0.0.1:{server.port}")
    for secret in (SECRET, TOKEN, signature):
        assert secret not in repr(reply)


@pytest.mark.parametrize(
    ("url", "own", "region", "host"),
    [
        ("https://bedrock-runtime.us-west-2.amazonaws.com", "eu-west-1", "us-west-2", None),
        ("https://Bedrock-Runtime.US-WEST-2.amazonaws.com:443", "", "us-west-2", None),
        ("https://bedrock-runtime-fips.us-gov-west-1.amazonaws.com", "", "us-gov-west-1", None),
        ("https://vpce-1.bedrock-runtime.us-east-2.vpce.amazonaws.com", "", "us-east-2", None),
        ("https://gateway.example", "eu-west-1", "eu-west-1", None),
        ("http://[::1]:8080/aws", "", "us-east-1", "[::1]:8080"),
    ],
)
@pytest.mark.usefixtures("signing")
def test_the_region_is_the_hosts(url, own, region, host, monkeypatch):
    from dsr1kit.access.pool import Pool

    if own:
        monkeypatch.setenv("AWS_DEFAULT_REGION", own)
    wire = BedrockConverse(entry(base_urls=(url,)), None)
    path, headers = wire.request(url, b"{}")

    async def wired():
        return Pool(url).request("POST", path, headers, b"{}")

    sent = asyncio.run(wired()).decode().split("\r\n")
    request = Sent(sent[0].split(" ")[1], {k.lower(): v for k, _, v in (line.partition(": ") for line in sent[1:8])})
    if host:
        assert request.headers["host"] == host
    told, _, signature, scope = derived(request, SECRET, headers["X-Amz-Date"][:8], region)
    assert told["Credential"] == f"{ACCESS}/{scope}"
    assert told["Signature"] == signature


class Sent:
    body = b"{}"

    def __init__(self, target, headers):
        self.target, self.headers = target, headers


@pytest.mark.usefixtures("signing")
def test_no_session_token_no_header(monkeypatch):
    monkeypatch.delenv("AWS_SESSION_TOKEN")
    _, headers = BedrockConverse(entry(), None).request("https://bedrock-runtime.us-east-1.amazonaws.com", b"{}")
    assert "X-Amz-Security-Token" not in headers
    assert headers["Authorization"].startswith("AWS4-HMAC-SHA256 ")


def test_credentials_out_of_a_file_sign_and_are_redacted(monkeypatch, tmp_path):
    file = tmp_path / "credentials"
    file.write_text(
        f"[default]\naws_access_key_id = {ACCESS}\naws_secret_access_key = {SECRET}\naws_session_token = {TOKEN}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    # The canonical request that AWS quotes names the token, here across the place where words are shortened.
    quoted = f"The Canonical String should have been '{'x' * 90} x-amz-security-token:{TOKEN}' {SECRET} {ACCESS}"
    reply, server = play(refused(403, "", quoted, name="InvalidSignatureException"))
    assert server.requests[0].headers["x-amz-security-token"] == TOKEN
    assert reply.outcome is Outcome.UNAUTHORIZED
    assert "[redacted]" in reply.detail
    for secret in (ACCESS, SECRET, TOKEN):
        assert secret[:12] not in reply.detail
        assert secret not in keys.redact(f"({secret})")
    headers = {":exception-type": "validationException", ":message-type": "exception"}
    assert TOKEN[:12] not in read([frame(headers, json.dumps({"message": quoted}).encode())])[1]


def test_a_login_that_cannot_be_renewed_is_the_services_to_refuse(monkeypatch):
    from botocore.credentials import Credentials
    from botocore.exceptions import CredentialRetrievalError

    class Login:
        left = 1

        def get_frozen_credentials(self):
            if not self.left:
                raise CredentialRetrievalError(provider="sso", error_msg="expired")
            self.left -= 1
            return Credentials(ACCESS, SECRET, TOKEN).get_frozen_credentials()

    login = Login()
    monkeypatch.setattr(boto3.Session, "get_credentials", lambda self: login)
    reply, server = play(refused(403, "", "The security token is expired", name="ExpiredTokenException"))
    assert (reply.outcome, len(server.requests)) == (Outcome.UNAUTHORIZED, 1)
    with pytest.raises(MissingKey, match="expired"):
        play(stream(*frames()))


def test_neither_key_nor_credentials():
    with pytest.raises(MissingKey, match=rf"'bedrock'.*{VARIABLE}.*AWS_ACCESS_KEY_ID.*AWS_PROFILE"):
        play(stream(*frames()))


def test_a_profile_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(MissingKey, match="nobody"):
        play(stream(*frames()))


@pytest.mark.usefixtures("signing")
def test_keys_that_cannot_be_sent(monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a\nb: c")
    with pytest.raises(UsageError, match="line break"):
        play(stream(*frames()))
    monkeypatch.setenv(VARIABLE, "“key”")
    with pytest.raises(UsageError, match=VARIABLE):
        play(stream(*frames()))


@pytest.mark.usefixtures("bearer", "signing")
def test_the_api_key_goes_before_credentials_and_is_shown_nowhere():
    reply, server = play(refused(403, "", f"Bad key {BEARER}", name="AccessDeniedException"))
    assert server.requests[0].headers["authorization"] == f"Bearer {BEARER}"
    assert "x-amz-date" not in server.requests[0].headers
    assert BEARER not in repr(reply)
    assert BEARER not in repr(BedrockConverse(entry(), BEARER))


# What is there and what is not.


def test_credentials_present(monkeypatch, tmp_path):
    assert not credentials_present(VARIABLE)
    assert not credentials_present("")
    assert entry().key_present() is False

    def present(**values):
        with monkeypatch.context() as m:
            for name, value in values.items():
                m.setenv(name, str(value))
            return credentials_present(VARIABLE)

    assert present(AWS_BEARER_TOKEN_BEDROCK=BEARER)
    assert present(AWS_ACCESS_KEY_ID=ACCESS, AWS_SECRET_ACCESS_KEY=SECRET)
    assert not present(AWS_ACCESS_KEY_ID=ACCESS)
    assert not present(AWS_SECRET_ACCESS_KEY=SECRET)
    assert not present(AWS_ACCESS_KEY_ID=ACCESS, AWS_SECRET_ACCESS_KEY=" ")  # noqa: S106 - none at all
    assert present(AWS_PROFILE="work")
    assert not present(AWS_PROFILE="")
    (tmp_path / ".aws").mkdir()
    monkeypatch.delenv("AWS_SHARED_CREDENTIALS_FILE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not credentials_present(VARIABLE)
    (tmp_path / ".aws" / "credentials").write_text("[default]\n")
    assert credentials_present(VARIABLE)
    assert not present(AWS_SHARED_CREDENTIALS_FILE=tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("[default]\n")
    assert present(AWS_SHARED_CREDENTIALS_FILE=tmp_path / "elsewhere")


@pytest.mark.parametrize("missing", ["botocore", "botocore.eventstream"])
@pytest.mark.usefixtures("bearer")
def test_without_botocore_opening_says_what_to_install(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    assert credentials_present(VARIABLE)
    with pytest.raises(MissingExtra, match=r"dsr1kit\[bedrock\]"):
        play(stream(*frames()))


@pytest.mark.usefixtures("signing")
def test_without_boto3_credentials_cannot_sign(monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(MissingExtra, match="AWS keys"):
        play(stream(*frames()))


def test_the_catalogues_module_needs_no_botocore():
    assert not {"boto3", "botocore"} & set(vars(converse))


# The other hand: AWS's own client.


def aws(server):
    from botocore.config import Config

    config = Config(retries={"total_max_attempts": 1}, proxies={})
    url = f"http://127.0.0.1:{server.port}"
    return boto3.client("bedrock-runtime", endpoint_url=url, region_name="us-east-1", config=config)


def converse_stream(server):
    reply = aws(server).converse_stream(modelId=MODEL, messages=[{"role": "user", "content": [{"text": "17 + 25?"}]}])
    return list(reply["stream"])


@pytest.mark.usefixtures("signing")
def test_awss_own_client_reads_the_same():
    from botocore.exceptions import ClientError, EventStreamError

    broken = stream(*frames()[:2], ConverseShape().error("throttled", "too fast"))

    async def inside():
        async with Scripted(stream(*frames()), broken, refused(429, "throttled", "too fast")) as server:
            events = await asyncio.to_thread(converse_stream, server)
            with pytest.raises(EventStreamError, match=r"throttlingException.*too fast"):
                await asyncio.to_thread(converse_stream, server)
            with pytest.raises(ClientError, match=r"ThrottlingException.*too fast"):
                await asyncio.to_thread(converse_stream, server)
        return events, server.requests[0]

    events, request = asyncio.run(inside())
    named = [(kind, told) for event in events for kind, told in event.items()]
    kinds = ["messageStart", "contentBlockDelta", "contentBlockStop", "contentBlockDelta", "contentBlockStop"]
    assert [kind for kind, _ in named] == [*kinds, "messageStop", "metadata"]
    told = dict(enumerate(told for _, told in named))
    assert told[1] == {"contentBlockIndex": 0, "delta": {"reasoningContent": {"text": "17 + 25 is 42."}}}
    assert told[3] == {"contentBlockIndex": 1, "delta": {"text": "The answer is 42."}}
    assert told[5] == {"stopReason": "end_turn"}
    assert told[6]["usage"] == {"inputTokens": 7, "outputTokens": 9, "totalTokens": 16}
    # The path that AWS's client asks for is ours, and so is the name that it signs for.
    assert request.target == BedrockConverse(entry(), BEARER).request("", b"")[0]
    assert "/us-east-1/bedrock/aws4_request" in request.headers["authorization"]
