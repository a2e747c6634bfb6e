"""Why a model that is here could not be loaded, by what the libraries say, and what mends it."""

from __future__ import annotations

from collections.abc import Callable


def why_not(source: str, quantization: str, device: str, error: Exception, fitting: Callable[[], str]) -> str:
    """What failed, the likely cause, and what mends it.

    Args:
        source, quantization, device: as asked for.
        error: what the libraries raised.
        fitting: says what would fit; asked where memory ran out.
    """
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    said = (" ".join(lines[:2]) or type(error).__name__).rstrip(".:")
    text = str(error).lower()
    head = f"could not load {source} ({quantization}, {device}): {said}"
    if "no space left" in text:
        return f"{head}. The disk is full: make room and open it again"
    if "out of memory" in text or "can't allocate memory" in text:
        return f"{head}. {fitting()}"
    if "not compiled with cuda" in text or "no nvidia driver" in text or "cuda-capable device" in text:
        return f"{head}. This torch or machine has no CUDA: leave device at 'auto'"
    if "safetensor" in text or "header" in text:
        return f"{head}. The weights are damaged or cut short: fetch them again (dsr1kit weights checks every byte)"
    if isinstance(error, ImportError) or "please install" in text:
        return f"{head}. Install what it asks for, or take a model that needs none of it"
    return f"{head}. A file of it is damaged or no decoder's: copy or fetch it again, whole"
