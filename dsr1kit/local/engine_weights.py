"""Where the weights of an engine come from: a folder, or a hub's cache. Knows nothing about engines."""

from __future__ import annotations

from pathlib import Path

from dsr1kit.errors import MissingExtra, ModelError
from dsr1kit.local.load import locate
from dsr1kit.local.load_failures import held_instead, hub_advice

_FETCHED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def config_of(place: str) -> Path | None:
    """A folder with a hub id's configuration, fetched alone, so that what does not fit is told before gigabytes are.

    None for a folder, and where it cannot be had: the download tells why.
    """
    if Path(place).is_dir():
        return None
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(place, "config.json")).parent
    except Exception:  # the hub's client raises what it likes
        return None


def folder_of(place: str) -> Path:
    """The folder of a model; a hub id is downloaded into the hub's cache first, without pickles."""
    if Path(place).is_dir():
        return Path(place)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtra(f"downloading {place}", "local", "huggingface_hub") from None
    try:
        folder = snapshot_download(place, allow_patterns=_FETCHED, ignore_patterns=["*/*"])
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        if advice := hub_advice(str(error)):
            raise ModelError(f"{place} could not be downloaded: {first}. {advice}") from None
        raise ModelError(
            f"{place} could not be downloaded: {first}. Check the name and the network (HF_ENDPOINT names a mirror; "
            f"with HF_HUB_OFFLINE set nothing is fetched), or run dsr1kit weights {place} and serve its folder"
        ) from None
    if not list(Path(folder).glob("*.safetensors")) and (told := held_instead(place)):
        raise ModelError(told)
    return Path(locate(folder)[0])
