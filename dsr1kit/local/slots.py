"""The keys and values of running requests, each in a slot of its own from position 0, never padded on the left.

A slot keeps its tokens where they are while others come and go: nothing is copied from step to step (a
`DynamicCache` copies all of it at every token), and a row that ends hands its place to the last one. Knows
tensors alone; nothing about requests, drawing or threads.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from dsr1kit.local.memory import GROWTH


class SlotCache(Cache):
    """Keys and values as [slots, heads, capacity, head size], one pair of tensors a layer.

    Before each forward pass `prefill` or `decode` says where it writes; the model then calls `update`.

    Args:
        context: most tokens a slot may ever hold.
        step: lengths are rounded up to so many tokens; memory moves less often with larger ones.

    Attributes:
        slots, capacity: how many rows and tokens a row there is memory for now.
        version: changes when the memory moves, so that recorded work on it is known to be stale.
    """

    is_compileable = False

    def __init__(self, context: int, step: int = 64) -> None:
        super().__init__(layers=[])
        self._context, self._step = context, step
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self.slots, self.capacity, self.version = 0, 0, 0
        self._first, self._count, self._begin, self._reach = 0, 0, 0, 0
        self._at: torch.Tensor | None = None
        self._rows: torch.Tensor | None = None

    def ensure(self, slots: int, length: int) -> None:
        """Make room for so many rows of so many tokens; what is held stays. Layer by layer, old memory freed."""
        if slots <= self.slots and length <= self.capacity:
            return
        if length > self.capacity:
            grown = max(length, int(self.capacity * GROWTH))
            length = max(length, min(-(-grown // self._step) * self._step, self._context))
        slots, length = max(slots, self.slots), max(length, self.capacity)
        for tensors in (self._keys, self._values):
            for layer, old in enumerate(tensors):
                if old.shape[0] >= slots and old.shape[2] >= length:
                    continue  # grown by an attempt that ran out of memory further on
                # Zeros: what a mask hides is multiplied by 0, and memory as found may hold NaN.
                new = old.new_zeros(slots, old.shape[1], length, old.shape[3])
                new[: old.shape[0], :, : old.shape[2]] = old
                tensors[layer] = new
        self.slots, self.capacity = slots, length
        self.version += 1

    def release(self) -> None:
        """Give all memory back."""
        self._keys, self._values = [], []
        self._at = self._rows = None
        self.slots, self.capacity = 0, 0
        self.version += 1

    def held_bytes(self) -> int:
        """Memory of all slots, used or not."""
        return sum(t.numel() * t.element_size() for t in (*self._keys, *self._values))

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot into another."""
        for tensor in (*self._keys, *self._values):
            tensor[target, :, :length] = tensor[source, :, :length]

    def prefill(self, first: int, count: int, begin: int) -> None:
        """The next pass writes rows `first` and on, `count` of them, all from position `begin`."""
        self._first, self._count, self._begin, self._at = first, count, begin, None

    def decode(self, positions: torch.Tensor, reach: int) -> None:
        """The next pass writes one token into each of the first rows.

        Args:
            positions: where, one a row, [B].
            reach: positions that attention sees, masked by the caller where rows are shorter.
        """
        self._at, self._reach = positions, reach
        self._rows = torch.arange(len(positions), device=positions.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a layer's new keys and values [B, heads, T, head size]; return all that attention reads."""
        while layer_idx >= len(self._keys):
            for tensors, like in ((self._keys, key_states), (self._values, value_states)):
                tensors.append(like.new_zeros(self.slots, like.shape[1], self.capacity, like.shape[3]))
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        if self._at is not None:
            keys[self._rows, :, self._at] = key_states[:, :, 0]
            values[self._rows, :, self._at] = value_states[:, :, 0]
            count = len(self._at)
            return keys[:count, :, : self._reach], values[:count, :, : self._reach]
        rows, end = slice(self._first, self._first + self._count), self._begin + key_states.shape[2]
        keys[rows, :, self._begin : end] = key_states
        values[rows, :, self._begin : end] = value_states
        if self._begin == 0:
            return key_states, value_states
        return keys[rows, :, :end], values[rows, :, :end]

    # What transformers asks to build masks, where the caller gives none.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that are there before the pass."""
        return self._begin

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the pass's first token."""
        return self._begin

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """How many positions attention reads, and which is the first."""
        return self._begin + query_length, 0


def read_one(model: Any, cache: SlotCache, ids: torch.Tensor, at: torch.Tensor, reach: int | None) -> torch.Tensor:
    """One pass of a causal language model over one token a row; returns scores [B, V].

    Args:
        model, cache: of transformers; the cache of its rows.
        ids: the tokens, [B, 1].
        at: their positions, [B].
        reach: positions that attention sees, those behind a row's own masked; None: they are the same in all
            rows and set on the cache, and nothing is masked.
    """
    mask = None
    if reach is not None:
        cache.decode(at, reach)
        mask = (torch.arange(reach, device=at.device)[None] <= at[:, None])[:, None, None]
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=at[:, None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits
    scores: torch.Tensor = logits[:, -1].float()
    return scores
