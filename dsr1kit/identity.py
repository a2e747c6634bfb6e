"""Is the model that answered the model that was asked for? By name: the only thing a provider tells.

Knows nothing about channels or records.
"""

from __future__ import annotations

import re
from typing import Literal

Match = Literal["same", "variant", "other"]


def match_models(requested: str, served: str | None) -> Match | None:
    """How the name that came back relates to the one that was asked for; None where nothing came back.

    `same`: equal but for case, and for an owner before it (`deepseek-ai/DeepSeek-R1`, `deepseek-r1`).
    `variant`: one name goes on where the other ends (`deepseek-r1`, `deepseek-r1-0528`): perhaps a more exact
    name, perhaps other weights.
    `other`: anything else.
    """
    if not served or not requested:
        return None
    a, b = _words(requested), _words(served)
    if a == b:
        return "same"
    short, long = sorted((a, b), key=len)
    rest = long[len(short) :]
    # A distill is another model that was taught by the one whose name it carries on.
    return "variant" if short and long[: len(short)] == short and "distill" not in rest else "other"


def told(requested: str, served: str | None) -> str:
    """A sentence where another model answered than was asked for; else an empty string."""
    match = match_models(requested, served)
    if match in (None, "same"):
        return ""
    how = "a name that differs" if match == "variant" else "another model"
    return f"asked for {requested}, answered by {served}: {how}"


def _words(name: str) -> list[str]:
    """The name's words after its owner, in lower case."""
    last = name.strip().rstrip("/").rpartition("/")[2].lower()
    return [word for word in re.split(r"[-_\s:]+", last) if word]
