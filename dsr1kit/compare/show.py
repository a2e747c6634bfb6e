"""What notebooks show of a comparison: tables as pandas frames, figures as pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dsr1kit.compare.figures import dress
from dsr1kit.compare.verdict import name_of

if TYPE_CHECKING:
    import pandas as pd
    from IPython.display import Image
    from matplotlib.figure import Figure


def summary_table(summary: Mapping[str, Any]) -> pd.DataFrame:
    """One row a channel: shares in percent with 95 % intervals, times in seconds, cost per right answer."""
    import pandas as pd

    rows = {}
    for name, c in summary["channels"].items():
        first = c["first_answer_s"] or {}
        rows[name_of(name, c)] = {
            "requests": c["n"],
            "answered %": _share(c["availability"]),
            "right %": _share(c["accuracy"]),
            "right, untruncated %": _share(c["accuracy_without_truncated"]),
            "not judged": c["n_unscored"],
            "first answer p50 s": first.get("p50"),
            "p95 s": first.get("p95"),
            "tokens/s": c["tokens_per_s"],
            "cost per 1,000 right": None if c["cost_per_right"] is None else c["cost_per_right"] * 1000,
            "currency": c["currency"],
        }
    return pd.DataFrame.from_dict(rows, orient="index").round(
        {"first answer p50 s": 3, "p95 s": 3, "tokens/s": 0, "cost per 1,000 right": 4}
    )


def pairs_table(summary: Mapping[str, Any]) -> pd.DataFrame:
    """One row a pair: difference in points with its 95 % interval, p alone and after Holm, and what may be said.

    "first over second" is the ratio of the medians to the first answer, with its 95 % interval.
    """
    import pandas as pd

    channels, rows = summary["channels"], {}
    for pair in summary["pairs"]:
        d, ratio = pair["accuracy_difference"], pair["first_answer_ratio_interval"]
        alone = "" if pair["differs_after_holm"] else ", taken alone"
        rows[f"{name_of(pair['a'], channels[pair['a']])} − {name_of(pair['b'], channels[pair['b']])}"] = {
            "points": f"{d['value'] * 100:+.1f} ({d['low'] * 100:+.1f} to {d['high'] * 100:+.1f})",
            "items": pair["items"],
            "p": pair["p"],
            "p after Holm": pair["p_holm"],
            "shown": f"a difference{alone}" if pair["differs"] else "no difference",
            "items to settle": pair["items_to_settle"],
            "first over second": f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "–",
        }
    return pd.DataFrame.from_dict(rows, orient="index").round({"p": 4, "p after Holm": 4})


def picture(figure: Figure, *, dpi: int = 110) -> Image:
    """The figure as a PNG that any notebook front end shows."""
    from IPython.display import Image

    dress(figure)
    box = io.BytesIO()
    figure.savefig(box, format="png", dpi=dpi)
    return Image(box.getvalue())  # type: ignore[no-untyped-call]  # IPython is untyped


def _share(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return "–"
    return f"{interval['value']:.1%} ({interval['low']:.1%} to {interval['high']:.1%})".replace("%", "")
