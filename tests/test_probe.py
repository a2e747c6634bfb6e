"""Each check of the probe, passed, failed and unknown, by weathers of the emulator and by scripted providers."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
from dataclasses import replace

import pytest
from scripted import DONE, ROLE, Scripted, delta, refusal, response, usage

from dsr1kit.access.prices import Price, Tariff
from dsr1kit.access.probe import probe
from dsr1kit.emulator.channel import channel_of
from dsr1kit.emulator.server import Emulator
from dsr1kit.emulator.weather import load_weather
from dsr1kit.errors import MissingKey, UsageError

CHECKS = ["thinks", "easy_prompts", "temperature", "system_prompt", "output_ceiling", "usage", "streaming"]
SECRET = "correct-horse-battery-staple-78"  # noqa: S105 - a made-up value that must not leak
THOUGHT = "<think>\nLet me see: 17 * 23 is 391, less 46 is 345. Yes, that will do.\n</think>\n\nIt is 345, I am sure."
OTHERS = [
    f"<think>\n{word} is where I begin, and then I go on to {word}.\n</think>\n\n{word} is my answer to you."
    for word in ("Alpha", "Bravo", "Charlie", "Delta", "Echo", "Foxtrot", "Golf", "Hotel", "India", "Juliet")
]
PACE = "[latency]\nfirst_token_s = 0.01\ninter_token_s = 0.001\n"


@pytest.fixture
def emulated(tmp_path):
    """Probes an emulator of the weather; returns the conformance and what the emulator served."""

    def run(text="", scripts=THOUGHT, model="", change=None, **arguments):
        path = tmp_path / "w.toml"
        path.write_text(f"[model]\nscript = {json.dumps(scripts)}\n{model}\n{PACE}{text}", encoding="utf-8")

        async def inside():
            emulator = Emulator(load_weather(path))
            async with emulator.listen() as url:
                channel = channel_of(emulator.weather, url, "e", dt.datetime.now(dt.UTC))
                channel = replace(channel, **(change or {}))
                clocks = {"first_token_s": 2.0, "stall_s": 1.0, "ceiling_tokens": 16, **arguments}
                return await probe(channel, **clocks), emulator.served

        return asyncio.run(inside())

    return run


def scripted(script, change=None, **arguments):
    async def inside():
        async with Scripted(script) as server:
            channel = server.channel(model="served-r1", **(change or {}))
            return await probe(channel, first_token_s=1.0, stall_s=0.5, **{"ceiling_tokens": 16, **arguments}), server

    return asyncio.run(inside())


def verdicts(result):
    return {c.name: c.verdict for c in result.checks}


def check(result, name):
    (found,) = [c for c in result.checks if c.name == name]
    return found


def says(reasoning="Let me think.", answer="It is so.", completion=None, told=None, finish="stop"):
    """A response of one thought and one answer; `told`: the reasoning tokens in its usage."""
    parts = [delta(reasoning_content=reasoning)] if reasoning else []
    parts += [delta(content=answer)] if answer else []
    counted = usage(completion, told) if completion is not None else b""
    return response(ROLE + b"".join(parts) + delta(finish=finish) + counted + DONE)


# --- the whole -------------------------------------------------------------------------------------------------


def test_r1_as_its_card_has_it_passes_all_and_each_check_is_told_as_it_is_settled(emulated):
    heard = []
    result, served = emulated('[how]\nsystem = "obey"\n', [THOUGHT, *OTHERS], on_check=heard.append)
    assert [c.name for c in result.checks] == CHECKS
    assert verdicts(result) == dict.fromkeys(CHECKS, "pass"), result.checks
    assert tuple(heard) == result.checks
    assert result.requests == sum(served.values()) == 14
    assert all(c.evidence for c in result.checks)
    assert result.emulated
    told = result.to_json()
    assert json.loads(json.dumps(told)) == told
    assert [c["name"] for c in told["checks"]] == CHECKS


@pytest.mark.parametrize("fault", ["overloaded", "unauthorized", "empty", "not_an_answer", "queued"])
def test_a_channel_that_fails_at_once_is_asked_once_and_all_stays_unknown(emulated, fault):
    dialect = '[dialect]\nkeep_alive = "comment"\nkeep_alive_s = 0.1\n'
    result, served = emulated(
        f"[faults]\n{fault} = 1\n{dialect}[price]\ninput = 1\noutput = 2\n",
        first_token_s=0.5 if fault in ("queued", "stalled") else 10.0,
    )
    assert verdicts(result) == dict.fromkeys(CHECKS, "unknown")
    assert result.requests == sum(served.values()) == 1
    assert all(fault in c.evidence for c in result.checks)
    assert result.cost in (0.0, None) or result.cost < 1e-4


def test_a_retired_channel_is_sent_nothing(monkeypatch):
    monkeypatch.setenv("PROBE_KEY", SECRET)
    result, server = scripted(says(), {"retires": dt.date(2020, 1, 1), "api_key_env": "PROBE_KEY"})
    assert set(verdicts(result).values()) == {"unknown"}
    assert server.connections == 0
    assert "2020-01-01" in result.checks[0].evidence


def test_what_cannot_be_meant_is_told_before_anything_is_asked():
    async def inside(**fields):
        async with Scripted(says()) as server:
            with pytest.raises(UsageError) as error:
                await probe(server.channel(**fields.pop("channel", {})), **fields)
            assert server.connections == 0
            return error

    assert "ceiling_tokens" in str(asyncio.run(inside(ceiling_tokens=0)).value)
    assert "first_token_s" in str(asyncio.run(inside(first_token_s=0.0)).value)
    missing = asyncio.run(inside(channel={"api_key_env": "NOBODY_HAS_THIS_KEY"}))
    assert missing.type is MissingKey


def test_the_limits_of_a_channel_are_kept():
    flight = []

    async def inside():
        async with Scripted(lambda r: flight.append(server.open_connections) or says()) as server:
            return await probe(server.channel(max_in_flight=1), ceiling_tokens=16)

    assert asyncio.run(inside()).requests == 14
    assert max(flight) == 1


# --- money -----------------------------------------------------------------------------------------------------


def test_the_cost_of_all_requests_is_summed_by_the_tariff():
    tariff = Tariff(name="always", timezone="UTC", hours=((0.0, 24.0),), factor=3.0)
    result, server = scripted(says(completion=100, told=60), {"price": Price(1.0, 10.0, "CNY", tariff=tariff)})
    assert result.requests == len(server.requests) > 10
    assert result.cost == pytest.approx(len(server.requests) * 3 * (7 * 1.0 + 100 * 10.0) / 1e6)
    assert result.currency == "CNY"


def test_without_a_price_the_cost_is_unknown_and_without_a_fee_nothing(emulated):
    assert (emulated()[0].cost, emulated()[0].currency) == (None, None)
    free = emulated("[price]\ninput = 0\noutput = 0\ncurrency = 'EUR'\n")[0]
    assert (free.cost, free.currency) == (0.0, "EUR")


# --- does it think ---------------------------------------------------------------------------------------------


def test_a_model_without_thinking_fails_and_says_nothing_about_easy_prompts(emulated):
    result, _ = emulated(scripts="It is 345, and that is all that I say about it.")
    assert verdicts(result)["thinks"] == "fail"
    assert verdicts(result)["easy_prompts"] == "unknown"


@pytest.mark.parametrize("dialect", ["inline", "prefilled", "reasoning", "reasoning_content"])
def test_thinking_is_found_in_every_field(emulated, dialect):
    result, _ = emulated(f'[dialect]\nreasoning = "{dialect}"\n')
    assert (verdicts(result)["thinks"], verdicts(result)["easy_prompts"]) == ("pass", "pass")


def test_thinking_that_is_counted_and_not_shown_is_thinking():
    result, _ = scripted(says(reasoning="", completion=80, told=70))
    assert check(result, "thinks").verdict == "pass"
    assert "70 tokens" in check(result, "thinks").evidence
    assert "not shown" in check(result, "thinks").evidence
    assert verdicts(result)["easy_prompts"] == "pass"


def test_a_think_block_that_is_bypassed_on_easy_prompts_is_found_and_the_prompts_are_named():
    def script(request):
        easy = request.json["messages"][-1]["content"] in ("Hi!", "Say yes.")
        return says(reasoning="\n\n" if easy else "Well, let me see.")

    result, _ = scripted(script)
    assert verdicts(result)["thinks"] == "pass"
    found = check(result, "easy_prompts")
    assert found.verdict == "fail"
    assert '"Hi!"' in found.evidence
    assert "2 of 4" in found.evidence


def test_easy_prompts_that_are_not_answered_say_nothing():
    def script(request):
        return says() if "17 * 23" in request.json["messages"][-1]["content"] else refusal(503, "busy")

    result, _ = scripted(script)
    assert verdicts(result)["easy_prompts"] == "unknown"
    assert verdicts(result)["temperature"] == "unknown"
    assert verdicts(result)["system_prompt"] == "unknown"
    assert verdicts(result)["output_ceiling"] == "unknown"
    assert "overloaded" in check(result, "easy_prompts").evidence


# --- temperature -----------------------------------------------------------------------------------------------


def test_a_temperature_without_effect_is_found(emulated):
    assert verdicts(emulated()[0])["temperature"] == "fail"


def test_a_temperature_that_is_honoured_is_found(emulated):
    assert verdicts(emulated(scripts=[THOUGHT, *OTHERS])[0])["temperature"] == "pass"


def test_a_temperature_of_zero_that_is_drawn_like_any_other_is_found(emulated):
    found = check(emulated(scripts=OTHERS, model="temperature = 1.0")[0], "temperature")
    assert (found.verdict, "freely" in found.evidence) == ("fail", True)


def drawn(cold, hot):
    """A provider whose draws at temperature 0 and 1 are those given, in turn."""
    turns = {0: iter(cold), 1: iter(hot)}

    def script(request):
        if "the sea" not in request.json["messages"][-1]["content"]:
            return says()
        text = next(turns[request.json["temperature"]])
        return refusal(503, "busy") if text is None else says(reasoning="", answer=text)

    return script


@pytest.mark.parametrize(
    ("cold", "hot", "verdict"),
    [
        (["x" * 90 + "a", "x" * 90 + "b", "x" * 80 + "c"], ["a" * 90, "b" * 90, "c" * 90], "pass"),
        (["same"] * 3, ["same"] * 3, "fail"),
        (["a" * 9, "b" * 9, "c" * 9], ["d" * 9, "e" * 9, "f" * 9], "fail"),
        (["xxxxxxa", "xxxxxxb", "xxxxxxc"], ["xxxxxae", "xxxxxbf", "xxxxxcg"], "unknown"),
        (["same", None, None], ["a", "b", "c"], "unknown"),
        (["same"] * 3, ["a", None, None], "unknown"),
        (["same", "same", None], ["a", "b", None], "pass"),
        (["same"] * 3, ["", "", ""], "unknown"),
    ],
)
def test_what_draws_say_about_the_temperature(cold, hot, verdict):
    result, _ = scripted(drawn(cold, hot))
    assert check(result, "temperature").verdict == verdict, check(result, "temperature").evidence


# --- system prompt ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "verdict"), [("obey", "pass"), ("refuse", "fail"), ("accept", "unknown")])
def test_a_system_prompt_followed_refused_or_not_seen_to_be_read(emulated, how, verdict):
    assert verdicts(emulated(f'[how]\nsystem = "{how}"\n')[0])["system_prompt"] == verdict


# --- the ceiling -----------------------------------------------------------------------------------------------


def test_a_limit_that_a_refusal_names_is_the_ceiling(emulated):
    found = check(emulated("[limits]\nrefuse_above = 8192\n")[0], "output_ceiling")
    assert found.verdict == "pass"
    assert "8192" in found.evidence
    less = check(emulated("[limits]\nrefuse_above = 8192\n", change={"max_output": 32768})[0], "output_ceiling")
    assert less.verdict == "fail"
    assert "32768" in less.evidence


@pytest.mark.parametrize(
    ("words", "limit"),
    [
        ("Invalid max_tokens value, the valid range of max_tokens is [1, 8192]", 8192),
        ("Range of max_tokens should be [1,8192]", 8192),
        ("max_tokens must be at most 32,768", 32768),
        ("'max_tokens' is too large: 10000000. This model supports at most 16384 completion tokens", 16384),
        (
            "the maximum context length is 65536 tokens, you requested 10000007 (7 in messages, 10000000 to complete)",
            65536,
        ),
        ("max_tokens too large (request id: 20261123224939123456)", None),
        ("request 2f1a-4096-8192a: no such value", None),
        ("max_tokens too large", None),
    ],
)
def test_the_limit_is_read_out_of_the_words_of_a_refusal(words, limit):
    def script(request):
        return refusal(400, words) if request.json["max_tokens"] > 100_000 else says()

    result, server = scripted(script)
    found = check(result, "output_ceiling")
    if limit is None:  # then a long answer is asked for
        assert found.verdict == "unknown"
        assert server.requests[-1].json["max_tokens"] == 16
    else:
        assert found.verdict == "pass"
        assert f"more than {limit} tokens" in found.evidence


def test_an_answer_as_long_as_was_asked_for_passes_as_far_as_it_was_asked_for(emulated):
    found = check(emulated(scripts=THOUGHT, ceiling_tokens=16)[0], "output_ceiling")
    assert (found.verdict, "at least 16 tokens" in found.evidence) == ("pass", True)


def test_answers_that_are_stopped_early_fail(emulated):
    found = check(emulated("[limits]\nmax_output = 9\n", ceiling_tokens=200)[0], "output_ceiling")
    assert (found.verdict, "9 of 200" in found.evidence) == ("fail", True)


def test_a_long_answer_that_ends_by_itself_says_nothing_about_the_ceiling(emulated):
    assert verdicts(emulated(ceiling_tokens=4000)[0])["output_ceiling"] == "unknown"


def test_no_more_is_asked_for_than_the_catalogue_states():
    result, server = scripted(says(), {"max_output": 12}, ceiling_tokens=4096)
    assert server.requests[-1].json["max_tokens"] == 12
    assert verdicts(result)["output_ceiling"] == "unknown"


# --- usage and stream ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counts", "verdict"), [("split", "pass"), ("sum", "pass"), ("none", "fail")])
def test_token_counts_told_apart_as_a_sum_or_not_at_all(emulated, counts, verdict):
    found = check(emulated(f'[dialect]\nusage = "{counts}"\n')[0], "usage")
    assert found.verdict == verdict
    assert ("not told apart" in found.evidence) == (counts == "sum")


def test_reasoning_that_is_left_out_of_the_counts_is_found():
    result, _ = scripted(says(reasoning="so and so " * 40, completion=4))
    assert verdicts(result)["usage"] == "fail"


def test_an_answer_that_comes_all_at_once_is_found(emulated):
    found = check(emulated("[dialect]\nburst = true\n")[0], "streaming")
    assert (found.verdict, "1 moments" in found.evidence or "2 moments" in found.evidence) == ("fail", True)
    assert verdicts(emulated()[0])["streaming"] == "pass"


def test_two_words_say_nothing_about_streaming():
    result, _ = scripted(says(completion=4, told=2))
    assert verdicts(result)["streaming"] == "unknown"


# --- keys ------------------------------------------------------------------------------------------------------


def test_a_key_that_is_said_back_is_in_no_evidence(monkeypatch):
    monkeypatch.setenv("PROBE_KEY", SECRET)

    def script(request):
        told = request.headers["authorization"]
        if any(m["role"] == "system" for m in request.json["messages"]) or request.json["max_tokens"] > 100_000:
            return refusal(400, f"wrong key {told}")
        return says(reasoning=told, answer=told)

    result, server = scripted(script, {"api_key_env": "PROBE_KEY"})
    assert server.requests[0].headers["authorization"] == f"Bearer {SECRET}"
    assert SECRET not in json.dumps(result.to_json())
    assert "[redacted]" in check(result, "system_prompt").evidence
    first, _ = scripted(lambda r: refusal(401, r.headers["authorization"]), {"api_key_env": "PROBE_KEY"})
    assert SECRET not in json.dumps(first.to_json())
