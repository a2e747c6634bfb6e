"""Drawing the next token: nucleus sampling with every row's own seed, or the likeliest one.

A row's draws depend on its seed and its own scores, never on its neighbours or on the order of requests.
Knows scores and samplings; nothing about models or text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsr1kit.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsr1kit.records import Sampling

_LIKELY = 256  # tokens looked at before all are sorted: a vocabulary has 150,000
_COLDEST = 1e-6  # temperature below which scores over it leave single precision


def generator_of(sampling: Sampling, drawn: int = 0) -> torch.Generator:
    """The source of a row's draws: seeded by the sampling, or by the system where it has no seed.

    Args:
        sampling: the row's.
        drawn: tokens that it has drawn before; the source goes on behind them.
    """
    generator, seed = torch.Generator(), sampling.draw_seed()
    if seed is None:
        generator.seed()
        return generator
    generator.manual_seed(seed)
    for _ in range(drawn):
        torch.rand((), generator=generator)
    return generator


def draw(scores: torch.Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator]) -> list[int]:
    """Draw one token a row.

    One uniform number a row picks from the nucleus (the fewest likeliest tokens that reach `top_p`, the one
    that crosses it included) by inverse cumulative probability. Rows with temperature 0 take the likeliest.

    Args:
        scores: logits [B, V].
        samplings, generators: one a row.

    Raises:
        ModelError: a row's scores are no numbers.
    """
    if not bool(scores.amax(-1).isfinite().all()):
        raise ModelError("its scores are no numbers, as where 16 bits overflow; open it with dtype='float32'")
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    tokens = scores.argmax(-1) if len(drawn) < len(samplings) else scores.new_empty(len(samplings), dtype=torch.long)
    if drawn:
        device = scores.device
        picked = scores if len(drawn) == len(scores) else scores[torch.tensor(drawn, device=device)]
        heat = torch.tensor([max(samplings[row].temperature, _COLDEST) for row in drawn], device=device)
        top_p = torch.tensor([samplings[row].top_p for row in drawn], dtype=torch.float64, device=device)
        uniform = torch.tensor([float(torch.rand((), generator=generators[row])) for row in drawn])
        chosen = _nucleus(picked.float() / heat[:, None], top_p, uniform.double().to(device))
        if len(drawn) == len(scores):
            tokens = chosen
        else:
            tokens[torch.tensor(drawn, device=device)] = chosen
    return [int(token) for token in tokens.tolist()]


def _nucleus(scores: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor, width: int = _LIKELY) -> torch.Tensor:
    """Tokens [B] from scores [B, V] over their temperature, nucleus masses [B] and numbers [B] in 0 .. 1.

    Args:
        width: tokens looked at; rows whose nucleus is larger look at all.
    """
    # Double precision: a sum over 150,000 probabilities must not lose the tail's mass.
    total = scores.double().logsumexp(-1, keepdim=True)
    partly = width < scores.shape[-1]
    ordered, tokens = scores.topk(width, dim=-1) if partly else scores.sort(descending=True, stable=True)
    upto = (ordered.double() - total).exp().cumsum(-1)
    before = torch.cat([upto.new_zeros(len(upto), 1), upto[:, :-1]], -1)
    inside = before < top_p[:, None]
    size = inside.sum(-1, keepdim=True)
    mass = upto.gather(-1, size - 1)
    place = torch.searchsorted(upto, uniform[:, None] * mass, right=True)
    chosen = tokens.gather(-1, place.minimum(size - 1))[:, 0]
    if partly and bool((short := upto[:, -1] < top_p).any()):
        # These rows alone: the order of equal scores differs, and a row's draw must not hang on its neighbours'.
        chosen[short] = _nucleus(scores[short], top_p[short], uniform[short], scores.shape[-1])
    return chosen
