"""Which R1 runs on a machine, in which precision, how far its context reaches, and what to do where none does.

Every figure is computed by `dsr1kit.local.memory.need`; nothing is loaded. Speeds are upper bounds, from how long it
takes to read the weights once a token. Knows nothing about downloads or engines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from dsr1kit.local.hardware import SMALL, Choice, Hardware, look
from dsr1kit.local.machines import bandwidth, find_hardware
from dsr1kit.local.memory import (
    GIB,
    Need,
    available,
    half_precision,
    need,
    purpose_named,
    read_bytes,
)
from dsr1kit.local.shapes import Shape, distinct, find_shape, least_blocks

__all__ = ["Fit", "Need", "advise", "best", "need", "plan", "precisions_for", "recommend"]

State = Literal["fits", "tight", "no"]
MARGIN = 0.10  # share of the memory below which what is left counts as tight: fragments, a display, other programs
ROOM = 16_384  # tokens that a recommended model has room for: half of what R1's card lets it think and answer in
BIGGER = 2.0  # models within this factor are of like size: the better score decides
SLOWEST = 5.0  # tokens a second, by the bound, below which minutes of thinking become an hour
_USUAL_CPU = 40e9  # bytes a second of a processor's memory where nothing is known: two channels, not the fastest
_SLOWER = {"nf4": "4-bit, slower than 16 bits where those fit (T4: 13.6 against 25.7 tokens/s for a 3B)",
           "8bit": "LLM.int8, slower than 16 bits and than 4-bit for one request"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fit:
    """A model in a precision on a machine.

    Attributes:
        shape: the model's.
        precision: of its weights.
        need: bytes, by part, at the context and batch asked for.
        available_bytes: what the machine has free for it.
        state: `fits`, `tight` (less than a tenth of the memory is left) or `no`.
        context: tokens that were counted: those asked for, at most the model's own context.
        possible: whether the model can be had in this precision at all; else the state is `no`, whatever is free.
        longest_context: tokens, at most the model's own context, over all GPUs; 0 where it does not fit at all.
        tokens_per_s_bound: an estimate from above for one request, by memory bandwidth, never a measurement; for
            bitsandbytes' formats that of 16 bits, which they have not exceeded; None: unknown.
        note: what to know about it.
    """

    shape: Shape
    precision: str
    need: Need
    available_bytes: int
    state: State
    context: int
    possible: bool
    longest_context: int
    tokens_per_s_bound: float | None
    note: str

    @property
    def model(self) -> str:
        """The model's short name, as `7b`."""
        return self.shape.name

    @property
    def parameters(self) -> int:
        """The model's number of weights."""
        return self.shape.parameters

    @property
    def free_after_bytes(self) -> int:
        """What is left of the memory; negative: what is short."""
        return self.available_bytes - self.need.total

    def as_dict(self) -> dict[str, Any]:
        """Flat, for JSON and for a table: `pandas.DataFrame([fit.as_dict() for fit in plan(...)])`."""
        return {
            "model": self.model,
            "hub_id": self.shape.hub_id,
            "parameters": self.parameters,
            "precision": self.precision,
            "state": self.state,
            "need_bytes": self.need.total,
            **{f"{name}_bytes": size for name, size in self.need.parts()},
            "available_bytes": self.available_bytes,
            "context": self.context,
            "possible": self.possible,
            "free_after_bytes": self.free_after_bytes,
            "longest_context": self.longest_context,
            "tokens_per_s_bound": self.tokens_per_s_bound,
            "note": self.note,
        }


def _machine(hardware: Hardware | str | None) -> Hardware:
    if hardware is None:
        return look()
    return find_hardware(hardware) if isinstance(hardware, str) else hardware


def precisions_for(hardware: Hardware, purpose: str = "inference") -> tuple[str, ...]:
    """The precisions that make sense there, from the most exact; raises UnknownName for the purpose."""
    what, half = purpose_named(purpose), half_precision(hardware)
    if what == "qlora":
        return ("nf4",)
    if what == "lora":
        return (half, "8bit") if hardware.gpus else tuple(dict.fromkeys(("fp32", half)))
    return (half, "8bit", "nf4", "q4_k_m") if hardware.gpus else ("fp32", "bf16", "8bit", "nf4", "q4_k_m")


def plan(
    hardware: Hardware | str | None = None,
    *,
    context: int = 4096,
    batch: int = 1,
    purpose: str = "inference",
    model: Shape | str | None = None,
) -> list[Fit]:
    """Every R1 model (or `model` alone) in every precision on a machine (a name, or None: this one), largest first.

    Where a model's own context is shorter than the one asked for, that is counted (`Fit.context`, and its note).

    Raises:
        UnknownName: a machine, model or purpose that does not exist.
        UsageError: a context or batch below 1.
    """
    at = _machine(hardware)
    wanted = find_shape(model) if isinstance(model, str) else model
    chosen = [wanted] if wanted else [shape for shape in distinct() if shape.kind != "check"]
    return [_fit(shape, precision, at, context, batch, purpose)
            for shape in chosen for precision in precisions_for(at, purpose)]  # fmt: skip


def _possible(shape: Shape, precision: str, purpose: str) -> bool:
    # bitsandbytes replaces linear layers, not the experts' stacked tensors, and packs no fp8; nobody tunes adapters on
    # fp8.
    packed = shape.experts is not None or shape.native == "fp8"
    return not packed or not (precision == "nf4" or (precision == "8bit" and purpose != "inference"))


def best(fits: list[Fit], hardware: Hardware, *, of_r1: bool = True) -> Fit | None:
    """The one to run first; None where nothing of R1 (or, if not `of_r1`, nothing) fits. The rule is in `recommend`."""
    pool = [fit for fit in fits if fit.state != "no" and (not of_r1 or fit.shape.kind in ("r1", "distill"))]
    reach = max((fit.context for fit in pool), default=0)
    pool = [fit for fit in pool if fit.context == reach]
    tuning = any(fit.need.optimizer for fit in pool)
    if not tuning and not hardware.gpus:
        rate = bandwidth(hardware) or _USUAL_CPU
        quick = [fit for fit in pool if rate / read_bytes(fit.shape, fit.precision, 0) >= SLOWEST]
        pool = quick or pool
    if not tuning:
        roomy = [fit for fit in pool if fit.state == "fits" and fit.longest_context >= ROOM]
        pool = roomy or pool
    else:
        pool = [fit for fit in pool if fit.state == "fits"] or pool
    first = _strongest([fit for fit in pool if _unpacked(fit, hardware)])
    packed = _strongest([fit for fit in pool if _packed(fit, hardware)])
    if first is None:
        return packed or _strongest(pool)
    if packed and packed.parameters > first.parameters and _score(packed) > _score(first):
        return packed
    return first


def _unpacked(fit: Fit, hardware: Hardware) -> bool:
    """As exact as its weights were published."""
    if fit.shape.native == "fp8":
        return fit.precision == "8bit"
    return fit.precision == half_precision(hardware) and bool(hardware.gpus)


def _packed(fit: Fit, hardware: Hardware) -> bool:
    by_llama_cpp = not hardware.gpus or fit.shape.experts is not None
    return fit.precision == ("q4_k_m" if by_llama_cpp else "nf4")


def recommend(
    hardware: Hardware | str | None = None, *, context: int = 4096, batch: int = 1, purpose: str = "inference"
) -> Choice:
    """The R1 to run first on a machine, as `NAME PRECISION`, and the reason.

    Models whose own context is shorter than the one asked for are left out where others reach further. They must leave
    room for 16,384 tokens, half of what R1 may think in, where any does. On a GPU: the biggest that
    fits in 16 bits (R1 itself in its own fp8), or a bigger one in 4-bit if its published score is higher, since NF4
    decodes more slowly where 16 bits fit; of models of like size the one with the better AIME 2024 score on its card.
    On a processor: the biggest Q4_K_M file that could give 5 tokens a second. Where nothing fits: tiny-r1, no R1.
    """
    at = _machine(hardware)
    fits = plan(at, context=context, batch=batch, purpose=purpose)
    chosen = best(fits, at)
    if chosen is None:
        small = precisions_for(at, purpose)[-1]
        why = advise("1.5b", at, precision=small, context=context, batch=batch, purpose=purpose)
        return Choice("tiny-r1 fp32", f"no R1 fits: {why} The embedded model runs anywhere, and is no R1.")
    reason = _reason(chosen, fits, at)
    if chosen.context < context:
        reason += f"; no R1 that fits reaches further than {chosen.context:,} tokens"
    return Choice(f"{chosen.model} {chosen.precision}", reason)


def advise(
    model: Shape | str,
    hardware: Hardware | str | None = None,
    *,
    precision: str,
    context: int,
    batch: int = 1,
    purpose: str = "inference",
) -> str:
    """What is short when a model does not fit, by how much, and what would, in order of least harm.

    Shorter context or smaller batch, then fewer bits, then a smaller distill. Also for a model that fits by the
    figures and ran out of memory all the same.

    Raises:
        UnknownName: no such model, machine, precision or purpose.
    """
    at = _machine(hardware)
    shape = find_shape(model) if isinstance(model, str) else model
    now = _fit(shape, precision, at, context, batch, purpose)
    ways = _ways(shape, now, at, precision, context, batch, purpose)
    name = shape.title or "the model"
    place = "GPU memory" if at.gpus else "memory"
    size, free = now.need.total / GIB, now.available_bytes / GIB
    if not now.possible:
        what = f"be loaded in {precision}" if purpose == "inference" else f"be tuned on {precision} weights"
        said = f"{name} cannot {what}: {_why_not_so(shape, precision)}."
    elif now.state == "no":
        said = f"{name} in {precision} needs {size:.1f} GiB at {context:,} tokens of context" + (
            f" and batch {batch}" if batch > 1 else ""
        ) + f", and {free:.1f} GiB of {place} are free: {size - free:.1f} GiB short."  # fmt: skip
    else:
        said = (f"{name} in {precision} should fit ({size:.1f} of {free:.1f} GiB of {place} at {context:,} tokens); "
                "close other programs that hold some, or leave more room.")  # fmt: skip
    lead = "What would fit" if now.state == "no" else "Lighter"
    return f"{said} {lead}: {'; '.join(ways)}." if ways else (
        f"{said} No R1 fits here: ask a hosted one (dsr1kit channels), or run tiny-r1, which is no R1."
    )  # fmt: skip


def _why_not_so(shape: Shape, precision: str) -> str:
    if precision == "8bit" and shape.native == "fp8":
        return "8 bits are its native fp8, on which adapters do not train"
    if not shape.experts:
        return "it is stored in fp8, which bitsandbytes does not pack again"
    return ("bitsandbytes packs linear layers, and nearly all of its weights are experts, stacked in tensors that it "
            "leaves in 16 bits")  # fmt: skip


def _ways(
    shape: Shape, now: Fit, at: Hardware, precision: str, context: int, batch: int, purpose: str
) -> list[str]:  # fmt: skip
    def fitting(other: Shape, bits: str, tokens: int, rows: int) -> bool:
        fit = _fit(other, bits, at, tokens, rows, purpose)
        return fit.state != "no" and fit.need.total < now.need.total

    ways = []
    possible = _possible(shape, precision, purpose)
    if possible and 512 <= now.longest_context < context:
        ways.append(f"a context of at most {now.longest_context:,} tokens")
    if possible and (
        rows := next((rows for rows in range(batch - 1, 0, -1) if fitting(shape, precision, context, rows)), 0)
    ):
        ways.append(f"batch {rows}")
    kinds = precisions_for(at, purpose)
    fewer = kinds[kinds.index(precision) + 1 :] if precision in kinds else kinds
    usable = [bits for bits in fewer if bits not in _wrong(shape, at) and _possible(shape, bits, purpose)]
    if bits := [bits for bits in usable if fitting(shape, bits, context, batch)]:
        ways.append("the same model in " + " or ".join(bits))
    smaller = [s for s in distinct() if s.kind in ("r1", "distill") and s.parameters < shape.parameters]
    for other in smaller:
        if bits := [bits for bits in kinds if fitting(other, bits, context, batch)]:
            ways.append(f"{other.title} in {bits[0]}")
            break
    return ways


def _wrong(shape: Shape, at: Hardware) -> tuple[str, ...]:
    # bitsandbytes' 4-bit kernels on a processor are wrong for rows that are no whole blocks.
    return () if at.gpus or least_blocks(shape, 64) else ("nf4",)


def _fit(shape: Shape, precision: str, at: Hardware, context: int, batch: int, purpose: str) -> Fit:
    many, device = max(len(at.gpus), 1), "cuda" if at.gpus else "cpu"
    possible = _possible(shape, precision, purpose)
    asked, context = context, min(context, shape.context)

    def wants(tokens: int, gpus: int) -> Need:
        return need(shape, precision=precision, context=tokens, batch=batch, purpose=purpose, device=device, gpus=gpus)

    alone = at.gpus[0].free_bytes if at.gpus else at.memory_free_bytes
    wanted, room, split = wants(context, 1), alone, False
    if wanted.total > alone and many > 1:
        wanted, room, split = wants(context, many), available(at), True
    left = room - wanted.total
    state: State = "no" if left < 0 or not possible else "tight" if left < MARGIN * room else "fits"
    # A context too long for one GPU may still fit over all of them.
    longest = reach = 0
    if possible and not split:
        longest = reach = _longest(shape.context, lambda tokens: wants(tokens, 1).total <= alone)
    if many > 1 and possible and longest < shape.context:
        longest = max(longest, _longest(shape.context, lambda tokens: wants(tokens, many).total <= available(at)))
    rate = bandwidth(at) if purpose == "inference" and shape.parameters >= SMALL else None
    # bitsandbytes' formats have decoded no faster than 16 bits, few as their bytes are.
    read_as = half_precision(at) if precision in _SLOWER and shape.native != "fp8" else precision
    # llama.cpp gives each GPU some of the layers, so that one reads at a time; the others split every layer.
    reading = many if split and precision != "q4_k_m" else 1
    bound = rate * reading / read_bytes(shape, read_as, context) if rate else None
    notes = [_splitting(precision, many, purpose)] if split and state != "no" else []
    if 0 < reach < longest:
        notes.append(
            f"more than {reach:,} tokens take all {_splitting(precision, many, purpose).removeprefix('over ')}"
        )
    notes += _notes(shape, precision, at, asked, purpose) if possible else [
        f"cannot be had so: {_why_not_so(shape, precision)}"
    ]  # fmt: skip
    return Fit(
        shape, precision, wanted, room, state, context, possible, longest,
        None if bound is None or state == "no" else bound, "; ".join(notes),
    )  # fmt: skip


def _longest(most: int, holds: Callable[[int], bool]) -> int:
    """The longest context up to `most` that holds, by halving; 0: none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _splitting(precision: str, gpus: int, purpose: str) -> str:
    if purpose != "inference":
        return f"over {gpus} GPUs, by a trainer that splits the model"
    if precision == "q4_k_m":
        return f"over {gpus} GPUs, which llama.cpp uses one after the other"
    return f"over {gpus} GPUs, by an engine that splits the model (vLLM, SGLang)"


def _notes(shape: Shape, precision: str, at: Hardware, context: int, purpose: str) -> list[str]:
    notes = []
    if purpose == "inference" and precision != "q4_k_m":
        if shape.latent:
            notes.append("served by vLLM or SGLang, not by transformers")
        if precision == "8bit" and shape.native == "fp8":
            notes.append("8bit is its native fp8")
        elif precision in _SLOWER and not shape.latent:
            notes.append(_SLOWER[precision])
    if precision in _wrong(shape, at):
        notes.append("wrong on a processor: rows are no multiple of 64 weights")
    if precision == "q4_k_m":
        notes.append("a GGUF file, by llama.cpp")
    if precision == "bf16" and half_precision(at) == "fp32":
        notes.append("this processor emulates bf16: slow")
    if context > shape.context:
        notes.append(f"its own context ends at {shape.context:,} tokens")
    if not shape.exact:
        notes.append("an architecture that is only estimated")
    return notes


def _score(fit: Fit) -> float:
    return fit.shape.aime_2024 or 0.0


def _strongest(pool: list[Fit]) -> Fit | None:
    if not pool:
        return None
    biggest = max(fit.parameters for fit in pool)
    alike = [fit for fit in pool if fit.parameters * BIGGER > biggest]
    return max(alike, key=lambda fit: (_score(fit), fit.parameters, -pool.index(fit)))


def _reason(chosen: Fit, fits: list[Fit], at: Hardware) -> str:
    need_gib, room_gib = chosen.need.total / GIB, chosen.available_bytes / GIB
    said = [f"it takes {need_gib:.1f} of {room_gib:.1f} GiB"]
    if chosen.need.optimizer:
        slow = "; a processor takes hours for what a T4 does in minutes" if not at.gpus else ""
        if chosen.state == "tight":
            return f"the strongest that trains here: {said[0]}, tightly{slow}"
        tight = [f"{fit.model} {fit.precision}" for fit in fits
                 if fit.state == "tight" and fit.shape.kind in ("r1", "distill")
                 and (_score(fit), fit.parameters) > (_score(chosen), chosen.parameters)]  # fmt: skip
        where = "with room to spare" if tight else "here"
        return f"the strongest that trains {where}: {said[0]}{'; tightly: ' if tight else ''}{', '.join(tight)}{slow}"
    said.append(f"has room for {chosen.longest_context:,} tokens")
    if score := _score(chosen):
        said.append(f"solves {score:.1f} % of AIME 2024 by its card")
    text = ", ".join(said)
    if not at.gpus:
        return f"the biggest that thinks at a bearable pace on a processor, as a GGUF by llama.cpp: {text}"
    if chosen.precision == "8bit":
        return f"R1 itself, in the fp8 that it was published in: {text}"
    if chosen.precision not in ("nf4", "q4_k_m"):
        return f"the strongest that fits in 16 bits, which decode faster than 4-bit: {text}"
    whole = [fit for fit in fits if fit.precision == half_precision(at) and fit.state == "fits"]
    fast = _strongest([
        fit for fit in whole if fit.shape.kind == "distill" and fit.model != chosen.model
        and (fit.tokens_per_s_bound or 0.0) > (chosen.tokens_per_s_bound or float("inf"))
    ])  # fmt: skip
    quick = f"; faster by the bounds, and weaker: {fast.model} {fast.precision}" if fast else ""
    squeezed = any(fit.model == chosen.model and fit.state != "no" and _unpacked(fit, at) for fit in fits)
    more = "fit only tightly" if squeezed else "do not fit"
    return f"the strongest that leaves room to think, in 4-bit, since more bits {more}: {text}{quick}"
