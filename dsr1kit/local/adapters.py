"""LoRA adapters on a loaded model: checked against it, loaded once, swapped without loading it again.

Knows PEFT's files and transformers' interface to them; nothing about requests.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsr1kit.errors import MissingExtra, ModelError, UnknownName
from dsr1kit.local.identity import same_model
from dsr1kit.local.load import quiet

if TYPE_CHECKING:
    from dsr1kit.local.load import LoadedModel

WEIGHTS = "adapter_model.safetensors"
_MAGNITUDE = ".lora_magnitude_vector"


class Adapters:
    """The adapters of one model.

    Attributes:
        active: the one in use; None: the model as it is.
    """

    def __init__(self, loaded: LoadedModel, source: str) -> None:
        self._model, self._source = loaded.model, source
        self._inner: dict[str, str] = {}  # PEFT makes names parts of module names: no dots, none of the model's own
        self.active: str | None = None
        self._loads = 0

    @property
    def names(self) -> list[str]:
        """Those that are loaded."""
        return list(self._inner)

    def add(self, path: Path, name: str | None) -> str:
        """Load an adapter and use it; returns its name, the folder's where None. Raises as `load` does."""
        called = name or path.resolve().name
        self.load(path, called)
        self.use(called)
        return called

    def load(self, path: Path, name: str) -> None:
        """Load an adapter from a folder as PEFT saves it; it is not yet in use.

        Raises:
            MissingExtra: PEFT is not installed.
            ModelError: no adapter there, a pickle, or one for another model.
        """
        if importlib.util.find_spec("peft") is None:
            raise MissingExtra("an adapter", "local", "peft")
        base = str(adapter_config(path).get("base_model_name_or_path") or "")
        own = str(getattr(self._model, "name_or_path", ""))
        if base and Path(base).is_dir() and Path(own).is_dir() and not same_model(base, own):
            raise ModelError(
                f"the adapter in {path} was trained on {base}, not on {self._source}: on other weights it would mean "
                f"nothing. Open {base}"
            )
        if name in self.names:
            raise ModelError(f"there is an adapter {name!r} already; give this one another name")
        inner = f"adapter_{self._loads}_"
        self._loads += 1
        try:
            with quiet():  # it reports the other adapters' weights as missing
                info = self._model.load_adapter(str(path), adapter_name=inner, is_trainable=False)
            scaled = self._put_magnitudes(path, inner)
            lacking = [key for key in info.missing_keys if f".{inner}." in key and not _of(key, scaled)]
            unknown = [key for key in info.unexpected_keys if not _of(key, scaled)]
            if wrong := [*lacking, *unknown]:
                raise ValueError(f"{len(wrong)} of its weights have no counterpart, such as {sorted(wrong)[0]}")
        except Exception as error:  # PEFT raises what it likes: the model may hold half of the adapter now
            self._forget(inner)
            told = f"; it was trained on {base}" if base else ""
            raise ModelError(
                f"the adapter in {path} does not go with {self._source}{told}: {str(error).strip()[:300]}"
            ) from error
        self._inner[name] = inner
        self.use(self.active)

    def use(self, name: str | None) -> None:
        """Switch to a loaded adapter, or with None to the model as it is.

        Raises:
            UnknownName: no such adapter is loaded.
        """
        if name is not None and name not in self._inner:
            hint = "(load it first: await model.load_adapter(folder))"
            if not self._inner:
                hint = "; none is loaded yet: await model.load_adapter(folder)"
            raise UnknownName("adapter", name, self.names, hint=hint)
        if name is not None:
            self._model.enable_adapters()
            self._model.set_adapter(self._inner[name])
        elif self._inner:
            self._model.disable_adapters()
        self.active = name

    def _put_magnitudes(self, path: Path, inner: str) -> set[str]:
        """Put a DoRA's magnitudes in place, which transformers looks for under another name than PEFT writes;
        returns the names of the layers that have theirs now."""
        from safetensors import safe_open

        found = set()
        with safe_open(str(path / "adapter_model.safetensors"), "pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping, though it looks like one
                if not key.endswith(_MAGNITUDE):
                    continue
                name = key.removeprefix("base_model.model.").removesuffix(_MAGNITUDE)
                vectors = self._model.get_submodule(name).lora_magnitude_vector
                weight = vectors[inner].weight
                weight.data = file.get_tensor(key).to(weight.device, weight.dtype).reshape(weight.shape)
                found.add(name)
        return found

    def _forget(self, inner: str) -> None:
        if inner in getattr(self._model, "peft_config", {}):
            with quiet():
                self._model.delete_adapter(inner)
        if self._inner:
            self.use(self.active)


def _of(key: str, scaled: set[str]) -> bool:
    """Whether a key is of the magnitudes of one of these layers."""
    name, sign, _ = key.removeprefix("base_model.model.").partition(_MAGNITUDE)
    return bool(sign) and name in scaled


def adapter_config(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter whose weights may be loaded.

    Raises:
        ModelError: there is none, or it is damaged, or its weights are a pickle.
    """
    config = folder / "adapter_config.json"
    if not config.is_file():
        raise ModelError(f"{folder} holds no adapter_config.json: name the folder that PEFT's save_pretrained wrote")
    if not (folder / WEIGHTS).is_file():
        raise ModelError(
            f"{folder} needs {WEIGHTS}; adapter_model.bin is a pickle and never loaded: save it again with a PEFT of "
            "today where you trust it"
        )
    try:
        settings: Any = json.loads(config.read_text(encoding="utf-8"))
        return dict(settings.items())
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{config} cannot be read: {error}") from error
