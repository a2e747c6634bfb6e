"""Compiled decoding: a step's work on the GPU recorded once and replayed (CUDA graphs).

A decoding step of a small model is hundreds of short kernels, and launching them from Python takes longer than
running them. A recording needs fixed shapes, so rows and positions are rounded up to a few sizes, and one
recording a pair of sizes is kept. Knows tensors alone.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch

from dsr1kit.local.slots import SlotCache, read_one

if TYPE_CHECKING:
    from collections.abc import Sequence

_LEAST = 256  # positions of the smallest recording
_WARM_UP = 3  # passes before recording: libraries choose their kernels in them
_RECORDING = threading.Lock()  # of a process, torch records one at a time


class CannotRecord(RuntimeError):
    """A step of this model does what cannot be recorded, such as asking the processor in the middle of it."""


class Graphs:
    """Decoding steps of a model over a `SlotCache`.

    Args:
        model: whose steps.
        cache: where keys and values are; a recording is stale once its memory has moved.
        record: False runs the same fixed shapes without recording, on any device.
    """

    def __init__(self, model: Any, cache: SlotCache, *, record: bool = True) -> None:
        self._model, self._cache, self._record = model, cache, record
        self._device = model.device
        self._recorded: dict[tuple[int, int], tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._pool: Any = None
        self._version = -1

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Read in one token a row at its position; return scores [B, V].

        Raises:
            CannotRecord: recording failed; nothing has been read in.
        """
        count = len(tokens)
        # Rows beyond `count` write to position 0 of slots that nobody holds.
        rows = 1 if count == 1 else 2 if count == 2 else -(-count // 4) * 4
        self._cache.ensure(rows, max(positions) + 1)
        reach = _LEAST
        while reach <= max(positions):
            reach *= 2
        reach = min(reach, self._cache.capacity)
        if self._version != self._cache.version:
            self.forget()
        ids = torch.tensor([*tokens, *[0] * (rows - count)])[:, None]
        at = torch.tensor([*positions, *[0] * (rows - count)])
        if not self._record:
            return read_one(self._model, self._cache, ids.to(self._device), at.to(self._device), reach)[:count]
        if (rows, reach) not in self._recorded:
            try:
                self._recorded[rows, reach] = self._recording(ids, at, reach)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise CannotRecord(str(error)) from error
        graph, held_ids, held_at, scores = self._recorded[rows, reach]
        held_ids.copy_(ids, non_blocking=True)
        held_at.copy_(at, non_blocking=True)
        graph.replay()
        return scores[:count]

    def forget(self) -> None:
        """Drop all recordings."""
        self._recorded.clear()
        self._version = self._cache.version

    def _recording(
        self, ids: torch.Tensor, at: torch.Tensor, reach: int
    ) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.cuda.device(self._device):
            held_ids, held_at = ids.to(self._device), at.to(self._device)
            aside: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch's own
            aside.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UP):
                    read_one(self._model, self._cache, held_ids, held_at, reach)
            torch.cuda.current_stream(self._device).wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # On the stream of this model's device: torch's own is one of the device that recorded first.
            with _RECORDING, torch.cuda.graph(graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"):
                scores = read_one(self._model, self._cache, held_ids, held_at, reach)
            self._pool = self._pool or graph.pool()
            return graph, held_ids, held_at, scores
