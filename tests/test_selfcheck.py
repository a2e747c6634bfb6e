"""The gradient self-check: sound weights pass, weights packed for inference or wrong products are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("bitsandbytes", reason="the quantized weights are bitsandbytes'")
pytest.importorskip("peft", reason="the adapter is PEFT's")

from dsr1kit.errors import ModelError
from dsr1kit.finetune.base import keep_for_training, put_adapter
from dsr1kit.finetune.data import load_examples
from dsr1kit.finetune.encode import Encoded, encode
from dsr1kit.finetune.selfcheck import LEAST, check_gradients, require_gradients
from dsr1kit.finetune.settings import AdapterSettings
from dsr1kit.local.load import LoadedModel, load

Opened = tuple[Any, list[Encoded], LoadedModel]


def packs() -> bool:
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


@pytest.fixture
def opened() -> Callable[..., Opened]:
    """tiny-r1 quantized, an adapter on it, and a row to look at."""

    def make(bits: Any, *, keep: bool = True, before: Callable[[Any], None] | None = None, **adapter: Any) -> Opened:
        loaded = load("tiny-r1", bits, "cpu", "auto", 1)
        if keep:
            keep_for_training(loaded.model)
        if before is not None:
            before(loaded.model)
        model = put_adapter(loaded, AdapterSettings(**{"rank": 4, "alpha": 8, **adapter}), 0)
        (one,) = load_examples(["worked:arithmetic:sum2:1"])
        return model, [encode(loaded.tokenizer, loaded.marks, one)], loaded

    return make


def forward(model: Any) -> None:
    """What an evaluation does: a pass outside training."""
    import torch

    model.eval()
    with torch.no_grad():
        model(input_ids=torch.tensor([[0, 5, 6, 7]]), use_cache=False)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_gradients_through_fresh_quantized_weights_hold(opened: Callable[..., Opened], bits: str) -> None:
    model, rows, _ = opened(bits)
    found = check_gradients(model, rows)
    assert found.holds
    assert found.cosine > 0.99
    assert found.cosine >= found.worst - 1e-9
    assert found.worst > 0.9
    assert "lora_" in found.worst_layer
    assert found.packed == 0
    require_gradients(found)


@pytest.mark.parametrize("adapter", [{"dropout": 0.2}, {"method": "dora"}, {"method": "rslora"}])
def test_they_hold_whatever_the_adapter(opened: Callable[..., Opened], adapter: dict[str, Any]) -> None:
    model, rows, _ = opened("4bit", **adapter)
    assert check_gradients(model, rows).cosine > 0.999


@pytest.mark.parametrize("training", [True, False])
def test_everything_is_as_before_after_the_check(opened: Callable[..., Opened], training: bool) -> None:
    import torch

    model, rows, _ = opened("4bit")
    model.train(training)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    drawn = torch.random.get_rng_state()
    forwards = {name: type(module).forward for name, module in model.named_modules()}
    first, second = check_gradients(model, rows), check_gradients(model, rows)
    assert first == second
    assert model.training is training
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(drawn, torch.random.get_rng_state()), "dropout goes on as without the check"
    assert not any("forward" in vars(module) for module in model.modules() if hasattr(module, "quant_state"))
    assert forwards == {name: type(module).forward for name, module in model.named_modules()}


@pytest.mark.skipif(not packs(), reason="weights are packed on processors with avx512_bf16 alone")
def test_weights_packed_by_an_evaluation_are_refused_with_the_cause(opened: Callable[..., Opened]) -> None:
    model, rows, _ = opened("4bit", keep=False, before=forward)
    found = check_gradients(model, rows)
    assert not found.holds
    assert found.packed == 4 * 7
    with pytest.raises(ModelError) as caught:
        require_gradients(found)
    message = str(caught.value)
    assert f"cosine {found.cosine:.3f}, at least {LEAST} is needed" in message
    assert "Bitsandbytes has packed 28 layers for inference" in message
    assert "load the model afresh and train before you generate with it" in message


@pytest.mark.skipif(not packs(), reason="weights are packed on processors with avx512_bf16 alone")
def test_weights_kept_for_training_survive_an_evaluation(opened: Callable[..., Opened]) -> None:
    model, rows, _ = opened("4bit", keep=True, before=forward)
    found = check_gradients(model, rows)
    assert found.packed == 0
    assert found.cosine > 0.999


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_wrong_product_is_refused(opened: Callable[..., Opened], bits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes as bnb

    model, rows, _ = opened(bits)
    kind: Any = bnb.nn.Linear4bit if bits == "4bit" else bnb.nn.Linear8bitLt
    real = kind.forward

    def wrong(self: Any, x: Any) -> Any:
        # Right in value and wrong in gradient, as the loss does not tell.
        return real(self, x.detach()) + (x - x.detach()).flip(-1).sum(-1, keepdim=True)

    monkeypatch.setattr(kind, "forward", wrong)
    found = check_gradients(model, rows)
    assert found.cosine < LEAST
    with pytest.raises(ModelError, match="train with method lora instead of qlora"):
        require_gradients(found)


def test_training_with_wrong_products_is_refused_before_the_first_step(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", reason="the trainer is TRL's")
    import bitsandbytes as bnb

    from dsr1kit.finetune.settings import SftSettings
    from dsr1kit.finetune.sft import train_sft

    real: Any = bnb.nn.Linear4bit.forward
    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", lambda self, x: real(self, x.flip(-1)))
    steps: list[int] = []
    settings = SftSettings(model="tiny-r1", adapter=AdapterSettings(method="qlora", rank=4, alpha=8), device="cpu")
    with pytest.raises(ModelError, match="gradients do not agree"):
        train_sft(
            settings, load_examples(["worked:arithmetic:sum2:8"]), tmp_path, on_step=lambda at, *_: steps.append(at)
        )
    assert steps == []
