"""The steps of a generation: seeded draws, the cap on thinking, stopping, batches.

Everything here runs in the worker thread and imports torch at the top; `local.model` imports it late. Knows
tensors and token ids; nothing about replies, timing or files.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dsr1kit.records import Sampling


class SeededDraw(LogitsProcessor):
    """Draws each row's next token with that row's own seed, then leaves only that token possible.

    One uniform number a row and step picks from the nucleus by inverse cumulative probability, so greedy
    decoding on top of this samples exactly. A row's draws depend on its seed and its own logits, never on
    its neighbours in the batch or on the order of requests. Rows with temperature 0 pass unchanged.
    """

    def __init__(self, samplings: Sequence[Sampling]) -> None:
        self._samplings = list(samplings)
        self._generators = [torch.Generator() for _ in samplings]
        for generator, sampling in zip(self._generators, samplings, strict=True):
            seed = sampling.draw_seed()
            if seed is None:
                generator.seed()
            else:
                generator.manual_seed(seed)

    def __call__(
        self,
        input_ids: torch.Tensor,  # the interface of transformers
        scores: torch.Tensor,
    ) -> torch.Tensor:
        """Return scores [B, V] in which sampled rows keep a single finite entry."""
        drawn = [row for row, sampling in enumerate(self._samplings) if sampling.temperature > 0]
        if not drawn:
            return scores
        uniform = torch.tensor([float(torch.rand((), generator=self._generators[row])) for row in drawn])
        heat = torch.tensor([self._samplings[row].temperature for row in drawn], dtype=torch.float64)
        top_p = torch.tensor([self._samplings[row].top_p for row in drawn], dtype=torch.float64)
        device = scores.device
        picked = scores if len(drawn) == len(scores) else scores[torch.tensor(drawn, device=device)]
        # Double precision: a sum over 150,000 probabilities must not lose the tail's mass.
        probabilities = (picked.double() / heat.to(device)[:, None]).softmax(-1)
        ordered, tokens = probabilities.sort(descending=True, stable=True)
        upto = ordered.cumsum(-1)
        # The nucleus: the fewest likeliest tokens that reach top_p, the one that crosses it included.
        inside = (upto - ordered) < top_p.to(device)[:, None]
        mass = (ordered * inside).sum(-1)
        place = torch.searchsorted(upto, (uniform.double().to(device) * mass)[:, None], right=True)
        place = place.clamp(max=int(scores.shape[-1]) - 1).minimum(inside.sum(-1, keepdim=True) - 1)
        chosen = tokens.gather(-1, place)
        rows = torch.tensor(drawn, device=device)
        out = scores.clone()
        out[rows] = float("-inf")
        out[rows, chosen[:, 0]] = 0.0
        return out


class ThinkingCap(LogitsProcessor):
    """Forces the closing tag on rows that have thought for as many tokens as they may.

    Args:
        caps: tokens of thinking a row, None for no cap.
        prompt_length: tokens before the first generated one, padding included.
        end_think: id of the closing tag.
    """

    def __init__(self, caps: Sequence[int | None], prompt_length: int, end_think: int) -> None:
        self._caps, self._start, self._end_think = list(caps), prompt_length, end_think

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [B, V], the closing tag alone possible in rows at their cap."""
        done = input_ids.shape[1] - self._start
        for row, cap in enumerate(self._caps):
            if cap is not None and done == cap and not bool((input_ids[row, self._start :] == self._end_think).any()):
                scores = scores.clone()
                scores[row] = float("-inf")
                scores[row, self._end_think] = 0.0
        return scores


class StopWhen(StoppingCriteria):
    """Stops all rows once `event` is set; stops a single row once it has its own number of tokens."""

    def __init__(self, event: threading.Event, limits: Sequence[int], prompt_length: int) -> None:
        self._event, self._limits, self._start = event, torch.tensor(list(limits)), prompt_length

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,  # the interface of transformers
        **_: Any,
    ) -> torch.Tensor:
        """Return which rows [B] are done."""
        if self._event.is_set():
            return torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        return (input_ids.shape[1] - self._start >= self._limits).to(input_ids.device)


class TokenStream(BaseStreamer):
    """Hands every generated token id of a batch of one to `on_token` as it comes."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token, self._prompt_seen = on_token, False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, which is not passed on, then one token a call."""
        if self._prompt_seen:
            self._on_token(int(value.reshape(-1)[-1]))
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is held back here."""


@dataclass(frozen=True, slots=True)
class Marks:
    """Token ids with a meaning: closing and opening think tag (None: it has none), ends, padding."""

    end_think: int | None
    think: int | None
    ends: frozenset[int]
    pad: int


def marks_of(tokenizer: Any, model: Any) -> Marks:
    """Read the marks from a tokenizer and a model's generation config."""

    def single(text: str) -> int | None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return int(ids[0]) if len(ids) == 1 else None

    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    ends = {int(end) for end in [*listed, tokenizer.eos_token_id] if end is not None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    return Marks(single("</think>"), single("<think>"), frozenset(ends), int(pad))


def generate_rows(
    model: Any,
    marks: Marks,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    *,
    limits: Sequence[int],
    stop: threading.Event | None = None,
    on_token: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Generate for all prompts at once, left-padded, and return each row's new ids, the end mark included.

    Args:
        model: a causal language model of transformers.
        marks: its special ids.
        prompts: token ids, one list a row.
        samplings: how to draw, one a row.
        limits: most new tokens, one a row.
        stop: when set, generation ends after the token at hand.
        on_token: called with each new id; only for a single row.
    """
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[marks.pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    processors = LogitsProcessorList([SeededDraw(samplings)])
    caps = [sampling.max_thinking_tokens for sampling in samplings]
    if marks.end_think is not None and any(cap is not None for cap in caps):
        processors.append(ThinkingCap(caps, width, marks.end_think))
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=False,  # SeededDraw has drawn already
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=max(limits),
            pad_token_id=marks.pad,
            eos_token_id=sorted(marks.ends),
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([StopWhen(stop or threading.Event(), limits, width)]),
            streamer=TokenStream(on_token) if on_token else None,
        )
    rows = []
    for row, limit in zip(output[:, width:].tolist(), limits, strict=True):
        cut = next((at for at, token in enumerate(row) if token in marks.ends), len(row) - 1)
        rows.append(row[: min(cut + 1, limit)])
    return rows
