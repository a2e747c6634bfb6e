"""What a comparison comes to, in words for a person: one sentence a rival first, then a line on each matter.

Reads a summary as data and computes no statistics. The rule of honesty: a difference is called one only where its
95 % interval leaves "no difference" out; one that does not outlive Holm's correction over all pairs is said to be
shown only taken alone; and what the emulator sent is named so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsr1kit.backends import is_local

Channels = Mapping[str, Mapping[str, Any]]
Pairs = Sequence[Mapping[str, Any]]

_BOUNDS = {
    "first_token_s": "the first token",
    "first_answer_s": "the first answer",
    "inter_token_s": "the next token",
    "total_s": "the whole reply",
}


def name_of(name: str, summary: Mapping[str, Any]) -> str:
    """A channel's name, marked when it was emulated and its own name does not say so."""
    return f"{name} (emulated)" if summary["emulated"] and not name.startswith("emulated:") else name


def headline(summary: Mapping[str, Any], task: str = "") -> list[str]:
    """One sentence for each channel against the most accurate one: quality, speed and money together."""
    channels, pairs = summary["channels"], summary["pairs"]
    order = _by_accuracy(channels)
    if len(order) < 2:
        return []
    best = order[0]
    said = []
    for name in order[1:]:
        pair = _pair(pairs, name, best)
        if pair is None:
            continue
        parts = [_points(name, best, pair, channels) + (f" on {task}" if task else "") + _alone(pair, pairs)]
        parts.append(_speed_of_pair(name, pair))
        parts.append(_money_of_pair(name, best, channels))
        said.append(f"{_named(name, channels)} " + ", ".join(filter(None, parts[:-1])) + f", and {parts[-1]}.")
    return said


def verdict(summary: Mapping[str, Any]) -> list[str]:
    """Lines "Word: sentence": quality, speed, money with availability; then what else there is to know.

    Goodput where an objective was given; another model than was asked for; scores that others published; a client
    that was the limit.
    """
    channels, pairs = summary["channels"], summary["pairs"]
    others = [f"{_named(name, channels)} {said}" for name, c in channels.items() for said in c["substitutions"]]
    further = {
        "Goodput": _goodput(channels, summary.get("objective")),
        "Model": "; ".join(others),
        "Published": _published(channels, summary.get("published") or []),
        "Client": _client(summary.get("client") or []),
    }
    return [
        "Quality: " + _quality(channels, pairs),
        "Speed: " + _speed(channels, pairs),
        "Cost and availability: " + _money(channels),
        *(f"{word}: {said.rstrip('.')}." for word, said in further.items() if said),
    ]


def percent(interval: Mapping[str, float] | None) -> str:
    """`93% (90% to 96%)`."""
    if interval is None:
        return "unknown"
    return f"{interval['value']:.0%} ({interval['low']:.0%} to {interval['high']:.0%})"


def duration(seconds: float) -> str:
    """`340 ms`, `2.31 s`, `14 s`, `4.5 min`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms" if seconds >= 0.001 else f"{seconds * 1000:.1g} ms"
    if seconds < 600:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s" if seconds < 100 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min"


def listed(words: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *most, last = [*words] or [""]
    return f"{', '.join(most)} and {last}" if most else last


def _named(name: str, channels: Channels) -> str:
    return name_of(name, channels[name])


def _by_accuracy(channels: Channels) -> list[str]:
    scored = [n for n, c in channels.items() if c["accuracy"]]
    return sorted(scored, key=lambda n: -float(channels[n]["accuracy"]["value"]))


def _pair(pairs: Pairs, one: str, other: str) -> Mapping[str, Any] | None:
    return next((p for p in pairs if {p["a"], p["b"]} == {one, other}), None)


# --- quality -----------------------------------------------------------------------------------------------


def _quality(channels: Channels, pairs: Pairs) -> str:
    order = _by_accuracy(channels)
    if not order:
        return "no reply could be judged."
    best = order[0]
    parts = [f"{_named(best, channels)} is right in {percent(channels[best]['accuracy'])}"]
    for name in order[1:]:
        pair = _pair(pairs, name, best)
        if pair is None:
            parts.append(f"{_named(name, channels)} shares no item with it")
        elif pair["differs"]:
            parts.append(f"{_named(name, channels)} {_points(name, best, pair, channels)}{_alone(pair, pairs)}")
        else:
            low, high = _of(name, pair)
            settle = pair["items_to_settle"]
            more = f"about {_round_up(settle)} items would settle it" if settle else "no gap seen to settle"
            parts.append(f"no difference shown to {_named(name, channels)} ({low:+.0f} to {high:+.0f} points; {more})")
    return "; ".join([*parts, *_left_out(channels)]) + "."


def _of(name: str, pair: Mapping[str, Any]) -> tuple[float, float]:
    """The interval of the difference in points, seen from the channel that is not `name`."""
    sign = -1 if pair["a"] == name else 1
    low, high = sorted(100 * sign * pair["accuracy_difference"][k] for k in ("low", "high"))
    return low, high


def _points(name: str, best: str, pair: Mapping[str, Any], channels: Channels) -> str:
    """What the pair shows of `name`, to be read after its name."""
    low, high = _of(name, pair)
    if pair["differs"] and low > 0:
        return f"is {low:.0f} to {high:.0f} points behind {_named(best, channels)}"
    if pair["differs"]:
        # The best over all items need not be so over those that both answered.
        shared = f"on the {pair['items']} items both answered (against {_named(best, channels)})"
        return f"is {-high:.0f} to {-low:.0f} points ahead {shared}"
    return f"shows no difference to {_named(best, channels)} ({-high:+.0f} to {-low:+.0f} points)"


def _alone(pair: Mapping[str, Any], pairs: Pairs) -> str:
    if not pair["differs"] or pair.get("differs_after_holm", True):
        return ""
    return f" (shown only taken alone: not after correction for {len(pairs)} pairs)"


def _left_out(channels: Channels) -> list[str]:
    cut = [
        f"{_named(name, channels)} {percent(c['accuracy_without_truncated'])} ({c['outcomes']['truncated']} cut)"
        for name, c in channels.items()
        if c["outcomes"].get("truncated") and c["accuracy"]
    ]
    said = [f"without the replies that the token limit cut: {', '.join(cut)}"] if cut else []
    unscored = {name: c["n_unscored"] for name, c in channels.items() if c["n_unscored"]}
    if unscored:
        of = listed(f"{n} of {_named(name, channels)}" for name, n in unscored.items())
        said.append(f"answers that could not be judged count neither way: {of}")
    return said


def _round_up(n: int) -> str:
    step = 10 ** max(0, len(str(n)) - 2)
    return f"{-(-n // step) * step:,}"


# --- speed -------------------------------------------------------------------------------------------------


def _speed(channels: Channels, pairs: Pairs) -> str:
    medians = {n: c["first_answer_s"]["p50"] for n, c in channels.items() if c["first_answer_s"]}
    if not medians:
        return "no answer arrived."
    order = sorted(medians, key=lambda n: medians[n])
    told = [
        f"{_named(n, channels)} {duration(medians[n])} (p95 {duration(channels[n]['first_answer_s']['p95'])})"
        for n in order
    ]
    parts = ["first answer after (median) " + ", ".join(told), *_fastest(order, channels, pairs)]
    late = {n: c["first_answer_s_censored"] for n, c in channels.items() if c["first_answer_s_censored"]["censored"]}
    if late:
        medians_told = [
            f"{_named(n, channels)} {duration(c['p50']['value']) if c.get('p50') else 'not reached'} "
            f"({c['censored']} of {c['n']})"
            for n, c in late.items()
        ]
        parts.append(
            "counting requests that a clock or the token limit ended before any answer, the medians are "
            + ", ".join(medians_told)
        )
    return "; ".join(parts) + "."


def _fastest(order: Sequence[str], channels: Channels, pairs: Pairs) -> list[str]:
    """By how much the fastest is faster than each other, where that is shown."""
    first, *others = order
    shown: list[str] = []
    same: list[str] = []
    turned: list[str] = []
    for other in others:
        pair = _pair(pairs, other, first)
        ratio = None if pair is None else times_faster(first, pair)
        if ratio is None:
            continue
        if ratio[1] > 1:
            times = f"{_times(ratio[0])} times ({_times(ratio[1])} to {_times(ratio[2])})"
            faster = "" if shown else f"{_named(first, channels)} is "
            shown.append(f"{faster}{times}{'' if shown else ' faster'} than {_named(other, channels)}")
        elif ratio[2] < 1:
            # The fastest over all items need not be so over those that both answered.
            said = _speed_of_pair(first, pair) if pair is not None else ""
            turned.append(f"on the items that {_named(other, channels)} answered too it is {said}")
        else:
            same.append(_named(other, channels))
    parts = [", ".join(shown)] if shown else []
    if same:
        parts.append(f"no difference in speed shown between {_named(first, channels)} and {listed(same)}")
    return parts + turned


def times_faster(name: str, pair: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """How many times as long the other channel of the pair takes to its first answer as `name`, with interval."""
    ratio = pair["first_answer_ratio_interval"]
    if ratio is None:
        return None
    if pair["b"] == name:
        return ratio["value"], ratio["low"], ratio["high"]
    low, high = (float("inf") if ratio[k] <= 0 else 1 / ratio[k] for k in ("high", "low"))
    return 1 / max(1e-9, ratio["value"]), low, high


def _speed_of_pair(name: str, pair: Mapping[str, Any]) -> str:
    """`3.1 times faster to the first answer (2.8 to 3.4)`; empty where too few answered to say."""
    ratio = times_faster(name, pair)
    if ratio is None:
        return ""
    value, low, high = ratio
    if low <= 1 <= high:
        return "with no difference in speed shown"
    word = "faster" if value > 1 else "slower"
    value, low, high = (value, low, high) if value > 1 else (1 / value, 1 / high, 1 / low)
    return f"{_times(value)} times {word} to the first answer ({_times(low)} to {_times(high)})"


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 1.95 else f"{value:.1f}" if value < 20 else f"{value:.0f}"


# --- money and availability --------------------------------------------------------------------------------


def _money(channels: Channels) -> str:
    said = []
    for name, c in channels.items():
        answered = c["availability"]
        share = f"{answered['value']:.1%} answered" if answered else "nothing asked"
        if answered:
            share += f" ({answered['low']:.1%} to {answered['high']:.1%})"
        said.append(f"{_named(name, channels)} {_cost(name, c)}, {share}" + _promise(c["promise"]))
    return "; ".join(said) + "."


def _cost(name: str, c: Mapping[str, Any]) -> str:
    if c["cost_total"] is None:
        return "price unknown"
    if c["cost_total"] == 0:
        return "costs nothing per request" + (" (hardware not counted)" if is_local(name) else "")
    if c["cost_per_right"] is None:
        return f"{c['currency']} {c['cost_total']:.3g} spent, nothing right"
    interval = c["cost_per_right_interval"]
    sure = f" ({interval['low'] * 1000:.3g} to {interval['high'] * 1000:.3g})" if interval else ""
    return f"{c['currency']} {c['cost_per_right'] * 1000:.3g} per 1,000 right answers{sure}"


def _money_of_pair(name: str, best: str, channels: Channels) -> str:
    one, other = channels[name], channels[best]
    if one["cost_total"] == 0:
        return "costs nothing per request" + (" (hardware not counted)" if is_local(name) else "")
    if one["cost_per_right"] is None:
        return "what it costs is not known" if one["cost_total"] is None else "was paid for no right answer"
    here = f"costs {one['currency']} {one['cost_per_right'] * 1000:.3g} per 1,000 right answers"
    if other["cost_per_right"] is None or other["currency"] != one["currency"]:
        return here
    return f"{here} against " + (f"{other['cost_per_right'] * 1000:.3g}" if other["cost_per_right"] else "nothing")


def _promise(promise: Mapping[str, Any] | None) -> str:
    if promise is None:
        return ""
    verdicts = {"kept": "kept", "broken": "broken", "open": "neither kept nor broken for certain"}
    return f" ({100 * promise['promised']:.6g}% promised: {verdicts[promise['held']]})"


# --- what else there is to know ----------------------------------------------------------------------------


def objective_told(objective: Mapping[str, float]) -> str:
    """`the first token within 2 s and the whole reply within 60 s`."""
    return listed(f"{_BOUNDS[name]} within {bound:g} s" for name, bound in objective.items())


def _goodput(channels: Channels, objective: Mapping[str, float] | None) -> str:
    if not objective:
        return ""
    said = []
    for name, c in channels.items():
        good = c["goodput"]
        if good and good["share"]:
            pace = f", {good['per_s']:.3g} a second" if good["per_s"] is not None else ""
            said.append(f"{_named(name, channels)} {percent(good['share'])}{pace}")
    return f"with {objective_told(objective)}: " + "; ".join(said) if said else ""


def _published(channels: Channels, scores: Sequence[Mapping[str, Any]]) -> str:
    said = []
    for model in dict.fromkeys(score["model"] for score in scores):
        own = [s for s in scores if s["model"] == model]
        figures = dict.fromkeys(f"{s['value']:g}% {s['metric']} ({s['source']})" for s in own)
        here = [
            f"{_named(name, channels)} {percent(channels[name]['accuracy'])}"
            for name in dict.fromkeys(s["channel"] for s in own)
            if channels[name]["accuracy"]
        ]
        said.append(f"{model} {', '.join(figures)}" + (f"; measured here: {', '.join(here)}" if here else ""))
    return "; ".join(said)


def _client(notes: Sequence[Mapping[str, Any]]) -> str:
    return " ".join(dict.fromkeys(note["limited"] for note in notes if note.get("limited")))
