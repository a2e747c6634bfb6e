"""Memory that nothing uses any more, given back: to the system, to a GPU's other programs. Knows no models."""

from __future__ import annotations

import contextlib
import ctypes
import gc


def give_back() -> None:
    """Memory of models that nobody holds any more, which their cycles keep until they are looked for."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def give_back_freed() -> None:
    """Return to the system what malloc keeps of freed memory, where it is glibc's.

    Converting and quantizing leave up to twice the weights behind in its arenas, by chance more or less.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
