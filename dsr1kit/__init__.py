"""dsr1kit: which way to DeepSeek R1 works for me, how good and fast is it, what does it cost?

The names below are loaded when first used, so that `import dsr1kit` stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsr1kit.access.cache import ReplyCache
    from dsr1kit.access.channels import Channel, load_channels
    from dsr1kit.access.prices import Price
    from dsr1kit.access.router import Router
    from dsr1kit.backends import open_backend
    from dsr1kit.errors import Dsr1kitError
    from dsr1kit.local.model import LocalModel
    from dsr1kit.records import R1_SAMPLING, Backend, Delta, Message, Outcome, Reply, Sampling, Timing, Usage

__all__ = [
    "R1_SAMPLING",
    "Backend",
    "Channel",
    "Delta",
    "Dsr1kitError",
    "LocalModel",
    "Message",
    "Outcome",
    "Price",
    "Reply",
    "ReplyCache",
    "Router",
    "Sampling",
    "Timing",
    "Usage",
    "load_channels",
    "open_backend",
]

_HOMES = {
    "Channel": "access.channels",
    "Price": "access.prices",
    "ReplyCache": "access.cache",
    "Router": "access.router",
    "load_channels": "access.channels",
    "open_backend": "backends",
    "Dsr1kitError": "errors",
    "LocalModel": "local.model",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name == "__version__":
        from importlib.metadata import version

        return version("dsr1kit")
    if name not in __all__:
        raise AttributeError(f"module 'dsr1kit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dsr1kit.{_HOMES.get(name, 'records')}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
