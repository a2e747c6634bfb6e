"""Token by token, for all running requests at once: prompts in, one pass a step, rows that end make room.

`Decoder` runs rows of a causal language model of transformers. Models with plain attention share one pass a step
over slots (`SlotCache`); others (sliding windows, recurrent layers) run row by row with transformers' own cache.
Knows tensors and rows; nothing about threads, text or replies.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dsr1kit.local.draw import draw, generator_of
from dsr1kit.local.memory import CHUNK, TOGETHER
from dsr1kit.local.slots import SlotCache, read_one

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsr1kit.local.graphs import Graphs
    from dsr1kit.local.rows import Marks, Row

_log = logging.getLogger("dsr1kit.local")


class Memory(Protocol):
    """How running rows are remembered between passes."""

    def prefill(self, rows: Sequence[Row], first: int) -> torch.Tensor:
        """Read in prompts, with what was made before, as rows `first` and on; return scores [B, V]."""
        ...

    def step(self, rows: Sequence[Row]) -> torch.Tensor:
        """Read in the last token of all rows; return scores [B, V]."""
        ...

    def remove(self, at: int, rows: Sequence[Row]) -> None:
        """Forget row `at`; the last row takes its place."""
        ...

    def release(self, keep_bytes: int = 0) -> None:
        """Forget all rows and give memory back, unless it is no more than `keep_bytes`."""
        ...


class Decoder:
    """Runs rows to their ends.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        marks: its special ids.
        context: most tokens of a row.
        compiled: record each step's work on the GPU and replay it (CUDA graphs).

    Attributes:
        rows: the running rows, in slot order.
    """

    def __init__(self, model: Any, marks: Marks, context: int, *, compiled: bool = False) -> None:
        self._marks = marks
        self.rows: list[Row] = []
        self.memory: Memory = SlotMemory(model, context, compiled) if plain_attention(model) else RowByRow(model)

    @torch.inference_mode()
    def admit(self, rows: Sequence[Row]) -> list[Row]:
        """Read in prompts and draw their first tokens; returns the rows that are done at once.

        A row that ran before goes on where it was. Where reading in raises, none of the rows has been admitted.
        """
        for row in rows:
            # Anew each time: where memory ran out in the middle of a step, a number had been drawn in vain.
            row.generator = generator_of(row.sampling, len(row.made))
        scores = self.memory.prefill(rows, len(self.rows))
        self.rows.extend(rows)
        return self._deliver(rows, scores)

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Draw one token in every row; returns the rows that are done, which run no longer."""
        return self._deliver(list(self.rows), self.memory.step(self.rows))

    @torch.inference_mode()
    def remove(self, row: Row) -> None:
        """Take a running row out."""
        at = self.rows.index(row)
        self.memory.remove(at, self.rows)
        last = self.rows.pop()
        if last is not row:
            self.rows[at] = last

    def clear(self, keep_bytes: int = 0) -> list[Row]:
        """Take all rows out and give their memory back; returns them."""
        rows, self.rows = self.rows, []
        self.memory.release(keep_bytes)
        return rows

    def _deliver(self, rows: Sequence[Row], scores: torch.Tensor) -> list[Row]:
        tokens = draw(scores, [row.sampling for row in rows], [row.generator for row in rows])
        done = [row for row, token in zip(rows, tokens, strict=True) if row.take(token, self._marks)]
        for row in done:
            self.remove(row)
        return done


def run_rows(decoder: Decoder, rows: Sequence[Row], at_once: int = 64) -> None:
    """Run rows to their ends in the calling thread, those of like length side by side, at most so many at once."""
    waiting = sorted(rows, key=lambda row: len(row.prompt))
    while waiting or decoder.rows:
        free = at_once - len(decoder.rows)
        added, waiting = waiting[:free], waiting[free:]
        if added:
            decoder.admit(added)
        if decoder.rows:
            decoder.step()


class SlotMemory:
    """All rows in one pass a step."""

    def __init__(self, model: Any, context: int, compiled: bool) -> None:
        self._model, self._device = model, model.device
        # Recordings are stale when memory moves: it moves less often where there are any.
        self._cache = SlotCache(context, step=512 if compiled else 64)
        self._slack = 1.1 if self._device.type == "cpu" else 2.0  # padding costs a processor, launches a GPU
        self._graphs: Graphs | None = None
        if compiled:
            from dsr1kit.local.graphs import Graphs

            self._graphs = Graphs(model, self._cache)

    def prefill(self, rows: Sequence[Row], first: int) -> torch.Tensor:
        """Prompts of like length together, padded on the right, where causal attention never looks."""
        prompts = [row.prompt + row.made for row in rows]
        # A place more than the prompt: the first step then moves nothing.
        self._cache.ensure(first + len(rows), max(map(len, prompts)) + 1)
        scores: list[torch.Tensor] = []
        at = 0
        while at < len(rows):
            group = [prompts[at]]
            for prompt in prompts[at + 1 : at + TOGETHER]:
                sizes = [len(prompt), *map(len, group)]
                if max(sizes) > self._slack * min(sizes):
                    break
                group.append(prompt)
            scores.extend(self._read_in(group, first + at))
            at += len(group)
        return torch.stack(scores)

    def _read_in(self, prompts: Sequence[list[int]], first: int) -> list[torch.Tensor]:
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        for at, prompt in enumerate(prompts):
            ids[at, : len(prompt)] = torch.tensor(prompt)
        lasts = [len(prompt) - 1 for prompt in prompts]
        scores: dict[int, torch.Tensor] = {}
        for begin in range(0, width, CHUNK):
            part = ids[:, begin : begin + CHUNK].to(self._device)
            here = sorted({last - begin for last in lasts if begin <= last < begin + part.shape[1]})
            self._cache.prefill(first, len(prompts), begin)
            logits = self._model(
                input_ids=part,
                position_ids=torch.arange(begin, begin + part.shape[1], device=self._device)[None],
                past_key_values=self._cache,
                use_cache=True,
                # Scores of the last tokens alone: those of all would be the largest tensor of the pass.
                logits_to_keep=torch.tensor(here or [0], device=self._device),
            ).logits
            for row, last in enumerate(lasts):
                if last - begin in here:
                    scores[row] = logits[row, here.index(last - begin)].float()
        return [scores[row] for row in range(len(prompts))]

    def step(self, rows: Sequence[Row]) -> torch.Tensor:
        """One pass over the last token of every row."""
        positions = [row.held for row in rows]
        reach = max(positions) + 1
        self._cache.ensure(len(rows), reach)
        last = [row.made[-1] for row in rows]
        if self._graphs is not None:
            from dsr1kit.local.graphs import CannotRecord

            try:
                return self._graphs.step(last, positions)
            except CannotRecord as error:
                _log.warning("steps of this model cannot be recorded, so decoding is slower: %s", error)
                self._graphs = None
        ids = torch.tensor(last, device=self._device)[:, None]
        at = torch.tensor(positions, device=self._device)
        alike = min(positions) == max(positions)
        if alike:
            self._cache.prefill(0, len(rows), positions[0])
        return read_one(self._model, self._cache, ids, at, None if alike else reach)

    def remove(self, at: int, rows: Sequence[Row]) -> None:
        """The last row moves into the gap."""
        last = len(rows) - 1
        if at != last:
            self._cache.move(last, at, rows[last].held)

    def release(self, keep_bytes: int = 0) -> None:
        """Memory that recorded work points to is kept, unless all must go."""
        if keep_bytes == 0 or (self._graphs is None and self._cache.held_bytes() > keep_bytes):
            if self._graphs is not None:
                self._graphs.forget()
            self._cache.release()


class RowByRow:
    """Each row with a cache of transformers' own, one after another."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._caches: list[Any] = []

    def prefill(self, rows: Sequence[Row], first: int) -> torch.Tensor:
        """Whole prompts: a cache with windows may not be filled in parts."""
        from transformers.cache_utils import DynamicCache

        added, scores = [], []
        for row in rows:
            added.append(DynamicCache(config=self._model.config.get_text_config(decoder=True)))
            scores.append(self._pass(row.prompt + row.made, added[-1]))
        self._caches[first:] = added
        return torch.stack(scores)

    def step(self, rows: Sequence[Row]) -> torch.Tensor:
        """One pass a row."""
        return torch.stack([self._pass([row.made[-1]], cache) for row, cache in zip(rows, self._caches, strict=True)])

    def _pass(self, ids: list[int], cache: Any) -> torch.Tensor:
        tensor = torch.tensor([ids], device=self._model.device)
        logits = self._model(input_ids=tensor, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        scores: torch.Tensor = logits[0, -1].float()
        return scores

    def remove(self, at: int, rows: Sequence[Row]) -> None:
        """Its cache goes with it."""
        last = self._caches.pop()
        if at < len(self._caches):
            self._caches[at] = last

    def release(self, keep_bytes: int = 0) -> None:
        """Drop all caches."""
        self._caches.clear()


def plain_attention(model: Any) -> bool:
    """Whether every layer attends to all earlier tokens, so that rows can share slots."""
    config = model.config.get_text_config(decoder=True)
    layers = getattr(config, "layer_types", None)
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if layers is None and windowed:
        return False
    return set(layers or ["full_attention"]) == {"full_attention"} and config._attn_implementation == "sdpa"
