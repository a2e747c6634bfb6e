"""The catalogue as rows: which ways there are, which are open to this person now, at what price.

Asks nothing of the network, save that a server on this machine is looked for on its port.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any

from dsr1kit.access.channels import Channel
from dsr1kit.access.prices import Price


def overview(
    channels: Mapping[str, Channel], *, now: dt.datetime | None = None, only_open: bool = False
) -> list[dict[str, Any]]:
    """One dict a channel, ready for JSON or a frame.

    Args:
        now: the moment that prices and retirements are told for (timezone-aware).
        only_open: only those that could be used now.
    """
    now = now or dt.datetime.now(dt.UTC)
    rows = []
    for c in channels.values():
        closed = c.closed_because(now)
        if only_open and closed:
            continue
        warning = c.retirement_warning(now)
        price, later = (None, None) if c.price is None else (c.price.at(now), c.price.next_cheaper(now))
        rows.append(
            {
                "name": c.name,
                "title": c.title,
                "open": not closed,
                "status": closed or ("open, soon retired" if warning else "open"),
                "model": c.model,
                "family": c.family,
                "region": c.region,
                "price": price and _amounts(price),
                "peak_price": price is not None and c.peak is not None and c.peak.peak(now),
                "cheaper_from": later,
                "tariff": c.tariff or None,
                "holidays_known": c.peak is None or c.peak.holidays_known(now),
                "context": c.context,
                "max_output": c.max_output,
                "retires": c.retires,
                "api_key_env": c.api_key_env or None,
                "key_present": False if "api_key_env" in c.fill_in else c.key_present(),
                "fill_in": list(c.fill_in),
                "note": c.note,
                "warning": warning,
                "source": c.source,
                "as_of": c.as_of,
            }
        )
    return rows


def price_text(row: Mapping[str, Any]) -> str:
    """A row's price as text: input and output per million tokens; `?` where it is not known."""
    price = row["price"]
    if price is None:
        return "?"
    if price["input"] == price["output"] == 0:
        return "no fee"
    return f"{price['input']:g}/{price['output']:g} {price['currency']}" + (" (peak)" if row["peak_price"] else "")


def _amounts(price: Price) -> dict[str, Any]:
    return {"input": price.input, "output": price.output, "currency": price.currency, "as_of": price.as_of}
