"""LoRA adapters on a loaded model: checked against it, loaded once, swapped without loading it again.

Knows PEFT's files and transformers' interface to them; nothing about requests.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsr1kit.errors import MissingExtra, ModelError, UnknownName

if TYPE_CHECKING:
    from dsr1kit.local.load import LoadedModel


class Adapters:
    """The adapters of one model.

    Attributes:
        names: those that are loaded.
        active: the one in use; None: the model as it is.
    """

    def __init__(self, loaded: LoadedModel, source: str) -> None:
        self._model, self._source = loaded.model, source
        self.names: list[str] = []
        self.active: str | None = None

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
        base = _check(path)
        if name in self.names:
            raise ModelError(f"there is an adapter {name!r} already; give this one another name")
        try:
            self._model.load_adapter(str(path), adapter_name=name, is_trainable=False)
        except Exception as error:  # PEFT raises what it likes: the model may hold half of the adapter now
            self._forget(name)
            told = f"; it was trained on {base}" if base else ""
            raise ModelError(
                f"the adapter in {path} does not go with {self._source}{told}: {str(error).strip()[:300]}"
            ) from error
        self.names.append(name)
        self.use(self.active)

    def use(self, name: str | None) -> None:
        """Switch to a loaded adapter, or with None to the model as it is.

        Raises:
            UnknownName: no such adapter is loaded.
        """
        if name is not None and name not in self.names:
            raise UnknownName("adapter", name, self.names, hint="(load it first: await model.load_adapter(folder))")
        if name is not None:
            self._model.enable_adapters()
            self._model.set_adapter(name)
        elif self.names:
            self._model.disable_adapters()
        self.active = name

    def _forget(self, name: str) -> None:
        if name in getattr(self._model, "peft_config", {}):
            self._model.delete_adapter(name)
        if self.names:
            self.use(self.active)


def _check(path: Path) -> str:
    """The base model that the adapter names; raises ModelError where the folder holds no safe adapter."""
    config = path / "adapter_config.json"
    if not config.is_file():
        raise ModelError(f"{path} holds no adapter_config.json: name the folder that PEFT's save_pretrained wrote")
    if not (path / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"{path} needs adapter_model.safetensors; adapter_model.bin is a pickle and never loaded: save it again "
            "with a PEFT of today where you trust it"
        )
    try:
        settings: Any = json.loads(config.read_text(encoding="utf-8"))
        return str(settings.get("base_model_name_or_path") or "")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{config} cannot be read: {error}") from error
