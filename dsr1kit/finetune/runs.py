"""The folder of one training: what it is, its checkpoints, its adapter and what came of it.

    run.json      settings, digest of the data, versions, hardware; at the end the result
    checkpoints/  whole ones alone (`checkpoints`)
    adapter/      as PEFT writes it, put in place at once

Knows files and how a trainer is started; nothing about data or losses.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dsr1kit import about
from dsr1kit.errors import Dsr1kitError, RunError, UsageError
from dsr1kit.finetune import checkpoints
from dsr1kit.finetune.base import disk_told
from dsr1kit.keys import redact_texts
from dsr1kit.local.places import is_id


class Run:
    """A training's folder; made where it is not there.

    Args:
        folder: of the run.
        identity: what makes it this run: settings and data.

    Raises:
        UsageError: the folder holds another run (says what differs), or cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.checkpoints, self.adapter = folder, folder / "checkpoints", folder / "adapter"
        self._path = folder / "run.json"
        self._facts: dict[str, Any] = {"identity": redact_texts(json.loads(json.dumps(identity)))}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            before = _read(self._path) if self._path.exists() else None
        except OSError as error:
            raise UsageError(f"{folder} cannot be used: {error.strerror}") from None
        self._fresh = before is None
        if before is not None:
            if different := _differences(before["identity"], self._facts["identity"]):
                raise UsageError(
                    f"{folder} holds another training: {'; '.join(different[:5])}. Choose another --out, or the same "
                    "settings and data to go on with it"
                )
            self._facts = before
        else:
            self._facts |= {"versions": about.versions(), "hardware": about.hardware()}
            self._write()

    def result(self) -> dict[str, Any] | None:
        """What came of it; None while it is not complete."""
        done: dict[str, Any] | None = self._facts.get("result")
        return done if done is not None and (self.adapter / "adapter_config.json").is_file() else None

    def note(self, **facts: Any) -> None:
        """Write facts into run.json. Raises RunError."""
        self._facts |= json.loads(json.dumps(facts, default=str))
        self._write()

    @contextlib.contextmanager
    def unused_if_refused(self) -> Iterator[None]:
        """Leave no trace of a run whose model is refused inside, so that a corrected command may use its folder."""
        try:
            yield
        except Dsr1kitError:
            if self._fresh and is_first():
                self._path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # it holds what is not ours
                    self.folder.rmdir()
            raise

    def train(self, trainer: Any, tell: Callable[[str], None]) -> int:
        """Start the trainer, from the newest whole checkpoint where there is one; returns its step, 0 for none.

        Raises:
            RunError: a checkpoint could not be written.
        """
        from transformers import PrinterCallback

        trainer.remove_callback(PrinterCallback)  # the kit tells how it goes
        if is_first():
            checkpoints.clear_halves(self.checkpoints)
        last = checkpoints.newest(self.checkpoints)
        if last is not None:
            tell(f"going on after step {checkpoints.step_of(last)}")
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        return 0 if last is None else checkpoints.step_of(last)

    def finish(self, model: Any, result: Mapping[str, Any], weights: Mapping[str, Any] | None = None) -> None:
        """Put the adapter in place, note the result, and remove the checkpoints, which are then of no use.

        Args:
            model: with the adapter.
            result: what came of it.
            weights: the model's, gathered, where it lies in parts on several devices.

        Raises:
            RunError: the adapter could not be written; the checkpoints are kept.
        """
        part = self.folder / "adapter.part"
        try:
            shutil.rmtree(part, ignore_errors=True)
            model.save_pretrained(str(part), safe_serialization=True, state_dict=weights)
            self._name_base(part / "adapter_config.json")
            shutil.rmtree(self.adapter, ignore_errors=True)
            part.replace(self.adapter)
        except Exception as error:
            full = disk_told(error)
            if full is None:
                raise
            shutil.rmtree(part, ignore_errors=True)
            raise RunError(
                f"the adapter could not be written to {self.adapter}: {full}. Make room, then the same command goes on "
                "from the last checkpoint"
            ) from None
        (self.adapter / "README.md").unlink(missing_ok=True)  # PEFT's empty form; the kit writes a card when exporting
        self.note(result={key: value for key, value in result.items() if key != "adapter"})
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _name_base(self, config: Path) -> None:
        """Have an adapter name its base by its hub id: the folder where that lay means nothing on another machine."""
        identity = self._facts["identity"]
        model = str((identity.get("sft") or identity.get("grpo") or {}).get("model", ""))
        if is_first() and is_id(model):
            told = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": model}
            config.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")

    def _write(self) -> None:
        if not is_first():
            return
        part = self._path.with_suffix(".part")
        try:
            part.write_text(json.dumps(self._facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            part.replace(self._path)
        except OSError as error:
            raise RunError(f"{self._path} cannot be written: {error.strerror}") from None


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        facts = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(facts, dict) and "identity" in facts:
            return facts
    raise UsageError(f"{path} is no file of a run: was it edited? Choose another --out")


def processes() -> int:
    """How many train together; each takes its share of a step's rows."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes and tells, of several that train together."""
    return os.environ.get("RANK", "0") == "0"


def _differences(before: Any, now: Any, at: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [d for key in keys for d in _differences(before.get(key), now.get(key), f"{at}.{key}" if at else key)]
    return [] if before == now else [f"{at or 'it'} was {before!r:.60} and is {now!r:.60}"]
