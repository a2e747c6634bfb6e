"""An earlier run as a pilot: what its answers took in tokens and seconds, and how right they were.

Reads a run's folder; refuses one of another task. Knows nothing about prices or power.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from dsr1kit.compare.journal import read_records
from dsr1kit.errors import UsageError
from dsr1kit.identity import match_models
from dsr1kit.records import ANSWERED

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class EarlierRun:
    """A run that was made before.

    Attributes:
        folder: where it lies.
        records: by channel, those that were answered anew; none of a channel without answers.
        max_tokens: longest completion that was allowed there; None where the run does not tell.
    """

    folder: Path
    records: Mapping[str, Sequence[Record]]
    max_tokens: int | None

    def like(self, channel: str, model: str) -> str:
        """The channel of the earlier run that asked what `channel` asks: itself, or one with the same model.

        Empty where there is none: how long another model thinks says nothing about this one.
        """
        if channel in self.records:
            return channel
        same = (n for n, rs in self.records.items() if match_models(str(rs[0].get("model_requested")), model) == "same")
        return next(same, "")

    def seconds(self, channel: str) -> float | None:
        """Mean seconds that an answered request of the channel took, its wait for this client left out."""
        times = [r["total_s"] - (r.get("queue_s") or 0.0) for r in self.records.get(channel, ()) if r.get("total_s")]
        return fmean(times) if times else None

    def truncated(self, channel: str) -> int:
        """How many of its answers were stopped by length."""
        return sum(r["outcome"] == "truncated" for r in self.records.get(channel, ()))

    def emulated(self, channel: str) -> bool:
        """Whether its answers came from the kit's own emulator."""
        return any(r.get("emulated") for r in self.records.get(channel, ()))

    def judged(self, channel: str) -> dict[str, list[bool]]:
        """For each item, right or not of each sample that has a verdict."""
        found: dict[str, list[bool]] = {}
        for r in self.records.get(channel, ()):
            if r["verdict"] != "unscored":
                found.setdefault(r["item"], []).append(r["verdict"] == "right")
        return found


def read_run(folder: Path, task: str) -> EarlierRun:
    """The earlier run in `folder`.

    Raises:
        UsageError: no run lies there, it is of another task than `task`, or nothing in it was answered.
    """
    try:
        identity = json.loads((folder / "run.json").read_text(encoding="utf-8"))["identity"]
        its_task = str(identity["task"])
        limit = identity.get("sampling", {}).get("max_tokens")
    except FileNotFoundError:
        raise UsageError(
            f"{folder} is no run's folder: it holds no run.json; name the --out of an earlier run"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{folder / 'run.json'} is not a run of this kit ({type(error).__name__}: {error})") from None
    if its_task != task:
        raise UsageError(
            f"{folder} is a run of another task ({its_task!r} there, {task!r} here), and says nothing about this one: "
            f"name a run of {task!r}, or plan without one"
        )
    if not (folder / "records.jsonl").exists():
        raise UsageError(f"{folder} holds no records.jsonl, so nothing can be learnt from it: name another run")
    records: dict[str, list[Record]] = {}
    for r in read_records(folder / "records.jsonl"):
        if r["outcome"] in ANSWERED and not r.get("from_cache"):
            records.setdefault(r["channel"], []).append(r)
    if not records:
        raise UsageError(
            f"no request of the run in {folder} was answered, so nothing can be learnt from it: name another"
        )
    return EarlierRun(folder, records, limit if isinstance(limit, int) else None)
