"""What a run is about to spend, a sentence a channel, told before the first request goes out.

By the run's own answers where it goes on from an earlier start, else by what was published; where nobody knows how
long answers are, only the upper bound is told. Asks nothing of anyone.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Mapping, Sequence

from dsr1kit.access.prices import Price
from dsr1kit.compare.asking import Question
from dsr1kit.compare.items import TaskFacts
from dsr1kit.compare.money import Estimate, Record, TokenGuess, expected_cost, observed_tokens
from dsr1kit.compare.plan import published_guess


def expected_costs(
    questions: Sequence[Question],
    prices: Mapping[str, Price | None],
    models: Mapping[str, str],
    limits: Mapping[str, int],
    task: TaskFacts,
    kept: Iterable[Record],
    at: dt.datetime,
) -> dict[str, Estimate]:
    """What asking `questions` from `at` on is expected to cost, by channel; those that charge nothing are left out.

    Args:
        prices, models, limits: of each channel, the last one its longest completion in tokens.
        kept: records that the run has already.
    """
    by_channel: dict[str, list[Record]] = {}
    for record in kept:
        by_channel.setdefault(record["channel"], []).append(record)
    found = {}
    for name, price in prices.items():
        items = [q.item for q in questions if q.channel == name]
        if not items or (price is not None and price.free):
            continue
        seen = observed_tokens(by_channel.get(name, ()))
        guess = (
            TokenGuess(most=limits[name], observed=seen, source="this run so far")
            if seen
            else published_guess(models[name], task, limits[name])
        )
        found[name] = expected_cost(items, 1, price, guess, at, None)
    return found


def in_words(found: Mapping[str, Estimate], max_cost: float | None, spent: Mapping[str, float]) -> Iterator[str]:
    """A sentence a channel, and one where the budget will not do.

    Args:
        max_cost: of the run, in each currency; spent: what it has cost so far, by currency.
    """
    whole: dict[str, float] = dict(spent)
    for name, estimate in found.items():
        asked = f"{name}: {estimate.requests:,} request{'s' if estimate.requests != 1 else ''}"
        if estimate.bound is None:
            yield f"{asked}, price unknown"
            continue
        limit = estimate.completion_most // estimate.requests
        most = f"at most {_money(estimate.bound, estimate)}, if every answer ran to {limit:,} tokens"
        if estimate.expected is None:
            yield f"{asked}, {most}; how long answers at this task are is not known"
            continue
        told = f"{asked}, about {_money(estimate.expected, estimate)}"
        if estimate.low is not None and estimate.high is not None:
            told += f" ({estimate.low:.3g} to {estimate.high:.3g})"
        yield f"{told} by {estimate.tokens_source}; {most}"
        whole[str(estimate.currency)] = whole.get(str(estimate.currency), 0.0) + estimate.expected
    for currency, amount in whole.items():
        if max_cost is not None and amount > max_cost:
            yield (
                f"{currency} {amount:.3g} in all is more than --max-cost {max_cost:g}: what it does not reach will be "
                "over_budget, and asked when the same command comes with more"
            )


def _money(amount: float, estimate: Estimate) -> str:
    return f"{estimate.currency} {amount:.3g}"
