"""API keys: found in the environment or in Colab's secrets, never written anywhere, redacted everywhere.

Knows nothing about channels; a key is a name and a value.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from dsr1kit.errors import MissingKey, UsageError

REDACTED = "[redacted]"
_COLAB_WAIT_S = 5.0
# Shorter values (an "x" given to a server that ignores its key) would redact ordinary text.
_SHORTEST_SECRET = 8

_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)", re.IGNORECASE)
_PREFIXES = ("sk", "hf", "gsk", "nvapi", "r8", "xai", "fw", "pk", "ghp")
# A key has digits, capitals or a length that words lack: "Bearer authentication", "hf-internal-testing" stay.
_SECRET_SHAPES = re.compile(
    r"(?:(?<=Bearer )|(?<=bearer ))(?=\S*[A-Z0-9]|\S{20})[A-Za-z0-9._~+/=-]{8,}"
    rf"|\b(?:{'|'.join(_PREFIXES)})[-_]"
    r"(?=[\w-]*?(?:(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{8}|[A-Za-z]{20}))"
    r"[A-Za-z0-9_-]{16,}"
    r"|\bAKIA[A-Z0-9]{16}\b"
)
# What every such shape holds: to look for these alone takes a tenth of the time, and nearly always finds none.
_SHAPE_MARKS = ("earer ", "AKIA", *(prefix + sign for prefix in _PREFIXES for sign in "-_"))
_used: set[str] = set()
_colab_asking: threading.Thread | None = None


def find_key(name: str) -> str | None:
    """The value of the key called `name`, from the environment, then from Colab's secrets; None if absent."""
    value = os.environ.get(name, "").strip() or _colab_secret(name)
    if value:
        _used.add(value)
    return value or None


def remember(value: str | None) -> None:
    """Have a secret that came from elsewhere redacted from now on (AWS keys out of a credentials file)."""
    if value:
        _used.add(value)


def require_key(name: str, channel: str) -> str:
    """Like find_key; raises MissingKey, naming the variable and the channel, where there is none.

    Raises:
        UsageError: the value cannot be sent in a header (a line break, a typographic quote).
    """
    value = find_key(name)
    if value is None:
        raise MissingKey(
            f"channel {channel!r} needs an API key and the variable {name} is not set: "
            f"export {name}=... (in Colab: add a secret called {name})"
        )
    if not (value.isascii() and value.isprintable()):
        raise UsageError(
            f"the variable {name} holds a character that no API key has (a line break, a typographic quote): "
            "copy the key again"
        )
    return value


def _colab_secret(name: str) -> str | None:
    global _colab_asking
    if "google.colab" not in sys.modules or (_colab_asking is not None and _colab_asking.is_alive()):
        return None  # its dialogue is still open: a second question would only wait as long again
    box: list[str | None] = [None]

    def look() -> None:
        try:
            from google.colab import userdata

            box[0] = userdata.get(name)
        except BaseException:
            box[0] = None

    # userdata blocks for ever while its permission dialogue is open or when run headless.
    _colab_asking = threading.Thread(target=look, daemon=True)
    _colab_asking.start()
    _colab_asking.join(_COLAB_WAIT_S)
    return box[0]


def secret_values() -> list[str]:
    """Values that must never be shown: keys used so far, and variables whose name speaks of a secret."""
    # Names alone first: each value that is read is decoded, and records ask while latency is being measured.
    named = [os.environ.get(name, "") for name in os.environ if _named_secret(name)]
    values = {value for value in named if not value.startswith(("/", "file:"))}
    return sorted((v for v in values | _used if len(v) >= _SHORTEST_SECRET), key=len, reverse=True)


@functools.lru_cache(maxsize=4096)
def _named_secret(name: str) -> bool:
    return _SECRET_NAME.search(name) is not None


def secret_name(name: str) -> bool:
    """Whether a name speaks of a secret: API_KEY, token, sig."""
    return _named_secret(name) or name.lower() in ("sig", "signature", "auth", "pwd")


def looks_secret(text: str) -> bool:
    """Whether some of `text` has the shape of a key, whoever's it is."""
    return _SECRET_SHAPES.search(text) is not None


def redact(text: str) -> str:
    """`text` with every known key, and everything that looks like one, replaced by `[redacted]`."""
    return _without(text, secret_values())


def _without(text: str, secrets: list[str]) -> str:
    for value in secrets:
        if value in text:
            text = text.replace(value, REDACTED)
    return _SECRET_SHAPES.sub(REDACTED, text) if any(mark in text for mark in _SHAPE_MARKS) else text


def _gather(parts: Iterable[Any], texts: list[str]) -> None:
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif part is None or isinstance(part, (int, float)):  # most of a record: no slower look at what they are
            continue
        elif isinstance(part, Mapping):
            _gather(part.values(), texts)
        elif isinstance(part, (list, tuple)):
            _gather(part, texts)


def redact_texts(value: Any) -> Any:
    """A JSON value with keys redacted in its texts alone, so that it stays the JSON that it was."""
    secrets = secret_values()  # once a value: records are written while latency is being measured
    # Nearly always there is nothing to hide: one look over all texts says so. No secret spans a line.
    found: list[str] = []
    _gather((value,), found)
    texts = "\n".join(found)
    if _without(texts, secrets) == texts:
        return value

    def clean(inner: Any) -> Any:
        if isinstance(inner, str):
            return _without(inner, secrets)
        if isinstance(inner, Mapping):
            return {name: clean(part) for name, part in inner.items()}
        if isinstance(inner, list | tuple):
            return [clean(part) for part in inner]
        return inner

    return clean(value)
