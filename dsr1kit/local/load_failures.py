"""Why a model could not be loaded, by what the libraries say, and what mends it. Asks the hub where that would tell."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from dsr1kit.local.folder import HUB_ID, PICKLES, WEIGHTS


def why_not(source: str, quantization: str, device: str, error: Exception, fitting: Callable[[], str]) -> str:
    """What failed, the likely cause, and what mends it.

    Args:
        source, quantization, device: as asked for.
        error: what the libraries raised.
        fitting: says what would fit; asked where memory ran out.
    """
    here = Path(source).expanduser().exists()  # such a name means nothing to a hub, whatever it looks like
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    said = (" ".join(lines[:2]) or type(error).__name__).rstrip(".:")
    text = str(error).lower()
    head = f"could not load {source} ({quantization}, {device}): {said}"
    if not here and (advice := hub_advice(text)):
        return f"{head}. {advice}"
    if "out of memory" in text or "can't allocate memory" in text:
        return f"{head}. {fitting()}"
    if "not compiled with cuda" in text or "no nvidia driver" in text or "cuda-capable device" in text:
        return f"{head}. This torch or machine has no CUDA: leave device at 'auto'"
    if not here and HUB_ID.fullmatch(source) and (told := held_instead(source)):
        return told
    if "safetensor" in text or "header" in text:
        return f"{head}. The weights are damaged or cut short: fetch them again (dsr1kit weights checks every byte)"
    if here:
        return f"{head}. A file of it is damaged or no decoder's: copy or fetch it again, whole"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON") and "/" in source:
        return (
            f"could not load {source}: it is not on this machine, and HF_HUB_OFFLINE is set, so nothing was asked for. "
            f"Unset it, and fetch the model: dsr1kit weights {source}"
        )
    if "connect" in text or "couldn't find them in the cached files" in text:
        return (
            f"{head}. The hub could not be reached: set HF_ENDPOINT to a mirror, or fetch the model elsewhere with "
            f"dsr1kit weights {source} --source modelscope"
        )
    if "can't load the model for" in text and "/" in source:
        return (
            f"could not load {source}: its download broke off. dsr1kit weights {source} goes on where it stopped and "
            "checks every byte; then the same name opens it"
        )
    return f"{head}. Check the name, that it is a model of transformers, and that it has safetensors weights"


def hub_advice(said: str) -> str:
    """What mends it where a hub refuses a model or its files have no room; empty where it is something else.

    Args:
        said: by the hub's client.
    """
    text = said.lower()
    if "no space left" in text:
        return (
            "The disk is full: make room, or set HF_HOME to a folder on a larger one; dsr1kit weights tells before how "
            "much a model takes"
        )
    # First: of a model that is not there the client also says that it may be gated.
    if "is not a local folder and is not a valid model identifier" in text or "repository not found" in text:
        return "Check the spelling of the hub id; a private model also needs HF_TOKEN"
    if "gated repo" in text or "access to model" in text or "restricted" in text:
        return "Accept the licence on the model's page, then set HF_TOKEN to a token of that account"
    return ""


def held_instead(model: str) -> str:
    """What a model of a hub holds in place of safetensors, and what to do; empty where it has some, or cannot be seen.

    Asks the hub once: only for a model that could not be loaded.
    """
    from huggingface_hub import HfApi

    try:
        files = sorted(file.rfilename for file in HfApi().model_info(model, timeout=10).siblings or ())
    except Exception:  # not reached, not allowed: what failed before is told instead
        return ""
    safetensors, gguf = ([file for file in files if file.endswith(form)] for form in WEIGHTS)
    pickles = [file for file in files if file.lower().endswith(PICKLES)]
    if safetensors:
        return ""
    if gguf:
        return f"{model} holds GGUF files ({len(gguf)}): fetch one (dsr1kit weights {model}), and open its folder"
    if pickles:
        return (
            f"{model} holds its weights only as pickles ({', '.join(pickles[:3])}), which can run any code when they "
            "are loaded, and never are: look for a repository of the same model with safetensors"
        )
    return f"{model} holds no weights, neither safetensors nor GGUF: check the hub id"
