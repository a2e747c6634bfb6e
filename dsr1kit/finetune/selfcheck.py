"""The gradient self-check: before the first step on quantized weights, are the adapter's gradients what they must be?

They are held against those through the same weights dequantized, on one batch. bitsandbytes on a processor is a case
where they are not: once weights are packed for inference the loss still falls and only a warning tells. Knows torch
and bitsandbytes' modules; nothing about trainers or data.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dsr1kit.errors import ModelError
from dsr1kit.finetune.encode import Encoded
from dsr1kit.local.load import LoadedModel

#: Below this cosine training is refused.
LEAST = 0.99
_TOKENS = 512  # of a batch: enough to see a wrong product


@dataclass(frozen=True, slots=True)
class GradientCheck:
    """How the adapter's gradients compare.

    Attributes:
        cosine: of all of them together, as one vector.
        worst, worst_layer: the lowest cosine of one adapter matrix, and its name.
        packed: layers whose weights lie packed for inference.
    """

    cosine: float
    worst: float
    worst_layer: str
    packed: int

    @property
    def holds(self) -> bool:
        """Whether training may go on."""
        return self.cosine >= LEAST


def check_gradients(model: Any, rows: Sequence[Encoded], *, seed: int = 0) -> GradientCheck:
    """Compare adapter gradients through the quantized weights with those through a dequantized copy of them.

    The adapter's second matrices, which start at zero and would hide the first ones' gradients, are small random
    numbers meanwhile; everything is as before afterwards. No whole copy is made: a layer is dequantized when it is
    needed, forth and back.

    Args:
        model: a PEFT model on a base quantized by bitsandbytes.
        rows: a few of the training rows; the first 512 tokens of the first is what is looked at.
        seed: of the random numbers.
    """
    import torch

    device = next(model.parameters()).device
    row = rows[0]
    ids = torch.tensor([row.input_ids[:_TOKENS]], device=device)
    labels = torch.tensor([row.labels[:_TOKENS]], device=device)
    if not bool((labels != -100).any()):
        labels = ids
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items() if "lora_B" in name}
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.train()

    def gradients() -> dict[str, Any]:
        model.zero_grad(set_to_none=True)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)  # dropout drops the same
            model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        return {name: p.grad.detach().float().cpu() for name, p in trained.items() if p.grad is not None}

    try:
        with torch.no_grad():
            for name in before:
                noise = torch.randn(trained[name].shape, generator=generator) * 0.02
                trained[name].copy_(noise.to(trained[name]))
        with _dequantized(model) as packed:
            wanted = gradients()
        actual = {}
        try:
            actual = gradients()
        except RuntimeError:
            if not packed:  # what is packed knows no way back beside a bias
                raise
    finally:
        with torch.no_grad():
            for name, value in before.items():
                trained[name].copy_(value)
        model.zero_grad(set_to_none=True)
        model.train(was_training)
    found = {name: actual.get(name, torch.zeros_like(value)) for name, value in wanted.items()}
    each = {name: _cosine([found[name]], [wanted[name]]) for name in wanted}
    worst = min(each, key=each.__getitem__)
    return GradientCheck(_cosine(list(found.values()), list(wanted.values())), each[worst], worst, packed)


def require_gradients(found: GradientCheck) -> None:
    """Raise ModelError, saying why, where the gradients are wrong."""
    if found.holds:
        return
    why = (
        f"bitsandbytes has packed {found.packed} layers for inference on this processor, as it does in the first "
        "forward pass outside training, and does not unpack them for it: load the model afresh and train before you "
        "generate with it"
        if found.packed
        else "the products of these quantized weights are wrong on this device: train with method lora instead of qlora"
    )
    raise ModelError(
        f"the adapter's gradients do not agree with the dequantized weights' (cosine {found.cosine:.3f}, at least "
        f"{LEAST} is needed; {found.worst:.3f} in {found.worst_layer}): the loss would fall and the model learn "
        f"nothing. {why[0].upper()}{why[1:]}"
    )


def checked_gradients(
    loaded: LoadedModel, model: Any, row: Callable[[], Encoded], tell: Callable[[str], None]
) -> GradientCheck | None:
    """The self-check before the first step, told where it holds; None for weights that are not quantized.

    Args:
        loaded, model: the base, and it with its adapter.
        row: one row to train on; asked for where it is needed.
        tell: called with a line.

    Raises:
        ModelError: the gradients are wrong.
    """
    if loaded.quantization == "none":
        return None
    found = check_gradients(model, [row()])
    require_gradients(found)
    tell(f"gradients agree with the dequantized weights' (cosine {found.cosine:.4f})")
    return found


def _cosine(a: Sequence[Any], b: Sequence[Any]) -> float:
    import torch

    one, other = (torch.cat([part.flatten().double() for part in parts]) for parts in (a, b))
    scale = float(one.norm() * other.norm())
    return float(one @ other) / scale if scale > 0 else float(torch.equal(one, other))


@contextlib.contextmanager
def _dequantized(model: Any) -> Iterator[int]:
    """Quantized linear layers compute with their dequantized weights inside; gives how many were packed."""
    nn: Any = importlib.import_module("bitsandbytes.nn")
    changed: list[Any] = []
    packed = 0
    for module in model.modules():
        if isinstance(module, nn.Linear4bit | nn.Linear8bitLt):  # PEFT's wrappers have the same names
            packed += bool(getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False))
            module.forward = _reference(module)
            changed.append(module)
    try:
        yield packed
    finally:
        for module in changed:
            del module.forward


def _reference(module: Any) -> Any:
    import torch

    class Product(torch.autograd.Function):
        """x W^T, the weights dequantized anew for the way back, so that none are kept."""

        @staticmethod
        def forward(ctx: Any, x: Any, bias: Any) -> Any:
            ctx.dtype = x.dtype
            return torch.nn.functional.linear(x, _weights(module, x.dtype), bias)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return grad @ _weights(module, ctx.dtype), None

    def forward(x: Any) -> Any:
        kind = module.compute_dtype if getattr(module, "compute_dtype", None) is not None else x.dtype
        # The bias is added before the product is rounded, as in the layer: in half precision gradients are noisy enough
        # to tell one rounding more.
        bias = None if module.bias is None else module.bias.to(kind)
        product: Any = Product.apply(x.to(kind), bias)  # type: ignore[no-untyped-call]  # torch's own
        return product.to(x.dtype)

    return forward


def _weights(module: Any, dtype: Any) -> Any:
    """The weights [out, in] that a quantized layer stands for, whatever form they lie in."""
    import bitsandbytes.functional as functional

    weight: Any = module.weight
    if type(module).__name__ == "Linear8bitLt":
        scales = weight.SCB if weight.SCB is not None else module.state.SCB
        values = weight.CB if weight.CB is not None else weight.data
        return (values.float() * scales.float().unsqueeze(1) / 127.0).to(dtype)
    data, state = weight.data, weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
    return functional.dequantize_4bit(data, state).to(dtype)
