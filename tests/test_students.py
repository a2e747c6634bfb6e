"""A student made of a model's own layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsr1kit.errors import UsageError
from dsr1kit.finetune.data import load_examples
from dsr1kit.finetune.pretrain import Recipe, save, train
from dsr1kit.finetune.students import student_of

IDS = torch.arange(5, 25).reshape(1, 20)


def said(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_all_layers_are_the_model_itself_and_fewer_are_its_own_blocks() -> None:
    whole, tokenizer = student_of("tiny-r1", range(4))
    fewer, _ = student_of("tiny-r1", (0, 1, 3))
    assert len(tokenizer) == whole.config.vocab_size
    assert fewer.num_parameters() < whole.num_parameters()
    for at, origin in enumerate((0, 1, 3)):
        kept, block = fewer.model.layers[at].state_dict(), whole.model.layers[origin].state_dict()
        assert all(torch.equal(kept[name], block[name]) for name in block)
    assert not torch.allclose(said(whole), said(fewer))


def test_it_generates_with_a_cache_as_without_and_is_saved_as_a_model_of_its_own(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    student, tokenizer = student_of("tiny-r1", (0, 2))
    made = [student.generate(IDS, max_new_tokens=12, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*made)
    again = AutoModelForCausalLM.from_pretrained(save(student, tokenizer, tmp_path / "s"), dtype="float32")
    assert again.config.num_hidden_layers == 2
    assert torch.allclose(said(again), said(student), atol=0.05)  # saved in half precision


def test_it_learns_from_a_teachers_examples() -> None:
    student, tokenizer = student_of("tiny-r1", (0, 1, 3))
    recipe = Recipe(steps=12, batch_size=8, learning_rate=0.003, instructed=0.0)
    curve = train(student, tokenizer, recipe, examples=load_examples(["worked:arithmetic:sum2:40"]), every=4)
    assert curve.losses[-1] < curve.losses[0] / 2


@pytest.mark.parametrize("layers", [(), (4,), (-1, 0), (1, 0), (2, 2)])
def test_layers_that_are_not_there_or_not_rising_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="0 to 3, rising"):
        student_of("tiny-r1", layers)
