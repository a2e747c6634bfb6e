"""Which outcome a far side's status and words mean, and a sentence a person can act on.

Knows the vocabulary of providers; nothing about connections or timing.
"""

from __future__ import annotations

import json
import re
from typing import Any

from dsr1kit.keys import redact
from dsr1kit.records import Outcome

_WORDS: tuple[tuple[Outcome, re.Pattern[str]], ...] = tuple(
    (outcome, re.compile(pattern, re.IGNORECASE))
    for outcome, pattern in (
        (Outcome.NO_BALANCE, r"insufficient[ _](account )?balance|arrear|余额不足|欠费|overdue payment"),
        (
            Outcome.RETIRED,
            # A parameter can be deprecated or no longer supported too.
            (
                r"\bretired\b|decommission|\bsunset|end[- ]of[- ](its )?life|provider as legacy|已下线|停止服务|"
                r"^(?!.*\b(parameter|field|argument|option|header)\b)"
                r".*(\bdeprecated\b|no longer (available|supported|served))"
            ),
        ),
        (
            Outcome.UNKNOWN_MODEL,
            (
                r"model([^.]|\.(?=\S)){0,80}(not exist|not found|is not available|unknown|is invalid)|"
                r"(unknown|invalid|no such|unsupported|unrecognized) model|model_not_found|模型不存在"
            ),
        ),
        (Outcome.FILTERED, r"content[ _-]?(filter|policy|exists risk)|data_inspection_failed|敏感|违规"),
    )
)
_ERROR_WORDS: tuple[tuple[Outcome, re.Pattern[str]], ...] = (
    (Outcome.THROTTLED, re.compile(r"rate[ _-]?limit|too many requests|quota|throttl|限流", re.IGNORECASE)),
    (
        Outcome.UNAUTHORIZED,
        re.compile(r"api[ _-]?key|unauthori[sz]ed|authentication|forbidden", re.IGNORECASE),
    ),
    (Outcome.BAD_REQUEST, re.compile(r"invalid[ _]?request|bad[ _]?request", re.IGNORECASE)),
)

_ADVICE = {
    Outcome.TRUNCATED: "stopped by the token limit; raise max_tokens or the channel's max_output",
    Outcome.FILTERED: "stopped by the provider's content filter; rephrase, or use another channel",
    Outcome.THROTTLED: "too many requests for this account; slow down, lower max_in_flight, or add a channel",
    Outcome.OVERLOADED: 'the provider is overloaded (the famous "server busy"); use another channel or wait',
    Outcome.QUEUED: "accepted but kept in a queue; use another channel or raise the first-token limit",
    Outcome.STALLED: "the stream fell silent; use another channel or raise the limits",
    Outcome.CUT: "the stream ended early; ask again or use another channel",
    Outcome.EMPTY: "the answer is empty; ask again or use another channel",
    Outcome.NOT_AN_ANSWER: "this is not a Chat Completions answer; check base_url (it usually ends in /v1)",
    Outcome.NO_BALANCE: "the account has no balance left; top it up or use another channel",
    Outcome.UNAUTHORIZED: "the key was not accepted; check the key and what it is allowed to use",
    Outcome.UNKNOWN_MODEL: "the model or path does not exist here; check model and base_url (it usually ends in /v1)",
    Outcome.RETIRED: "the provider no longer serves this model; use another channel or run your own",
    Outcome.BAD_REQUEST: "the provider refused the request itself; its words say why",
    Outcome.UNREACHABLE: "no connection; check the network, the proxy and base_url",
    Outcome.DEADLINE: "the caller's deadline passed before the answer was complete; raise it, lower max_tokens, "
    "or use a faster channel",
    Outcome.OVER_BUDGET: "not asked: the cost limit was reached; raise --max-cost to go on",
    Outcome.CANCELLED: "cancelled by the caller",
}


def detail(outcome: Outcome, fact: str = "") -> str:
    """One sentence or two: the fact, then what to do about an outcome of this kind."""
    advice = _ADVICE.get(outcome, "")
    return redact(f"{fact}: {advice}" if fact and advice else fact or advice)


def from_status(status: int, body: bytes) -> tuple[Outcome, str]:
    """Outcome and detail of a response that is not 200."""
    words = _words_of(body)
    fact = f"HTTP {status}" + (f' "{words}"' if words else "")
    if "thinking_budget" in words:
        fact += " (this server cannot cap the thinking: ask without --max-thinking-tokens)"
    return (outcome := _of_status(status, words)), detail(outcome, fact)


def from_error_event(error: Any) -> tuple[Outcome, str]:
    """Outcome and detail of an error object found inside a response with status 200."""
    words = _message(error)
    code = error.get("code") if isinstance(error, dict) else None
    fact = f'error in the response "{words}"' if words else "error in the response"
    if isinstance(code, str) and len(code) <= 9 and code.isascii() and code.isdigit():
        code = int(code)
    if isinstance(code, int) and 400 <= code <= 599:
        outcome = _of_status(code, words)
    else:
        kind = error.get("type") if isinstance(error, dict) else None
        text = " ".join((words, *(_short(part) for part in (code, kind) if isinstance(part, str))))
        outcome = _by_words(text, _WORDS) or _by_words(text, _ERROR_WORDS) or Outcome.OVERLOADED
    return outcome, detail(outcome, fact)


def _of_status(status: int, words: str) -> Outcome:
    if status == 429:
        return Outcome.THROTTLED
    if status >= 500:
        return Outcome.OVERLOADED
    if status == 402:
        return Outcome.NO_BALANCE
    if status == 407:  # a proxy on the way wants a login
        return Outcome.UNREACHABLE
    if status == 410:
        return Outcome.RETIRED
    if status >= 400:
        said = _by_words(words, _WORDS)
        if status in (401, 403):
            return Outcome.NO_BALANCE if said is Outcome.NO_BALANCE else Outcome.UNAUTHORIZED
        if status == 404:
            return Outcome.RETIRED if said is Outcome.RETIRED else Outcome.UNKNOWN_MODEL
        return said or Outcome.BAD_REQUEST
    return Outcome.NOT_AN_ANSWER  # 1xx that never ended, 2xx other than 200, redirects


def _by_words(text: str, table: tuple[tuple[Outcome, re.Pattern[str]], ...]) -> Outcome | None:
    return next((outcome for outcome, pattern in table if pattern.search(text)), None)


def _words_of(body: bytes) -> str:
    text = body.decode("utf-8", "replace").strip()
    try:
        return _message(json.loads(text))
    except (ValueError, RecursionError):
        if text[:1] == "<":
            title = re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
            return _short(title.group(1)) if title else "an HTML page"
        return _short(text)


def _message(value: Any) -> str:
    for _ in range(4):
        if not isinstance(value, dict):
            break
        value = next(
            (value[k] for k in ("error", "message", "msg", "detail", "error_msg", "code", "type") if value.get(k)),
            "",
        )
    if isinstance(value, str):
        return _short(value)
    try:
        return _short(json.dumps(value, ensure_ascii=False, default=str))
    except RecursionError:  # nesting that can be read but not written
        return ""


def _short(text: str) -> str:
    text = redact(" ".join(text[:2000].split()))  # before it is cut: half a key is still one
    return text if len(text) <= 200 else text[:199] + "…"
