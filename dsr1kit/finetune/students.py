"""A smaller student made of a model's own layers, to be taught what the whole model says.

Leaving layers out and training the rest is how DistilBERT was made (Sanh et al., arXiv 1910.01108). Knows
transformers models whose blocks lie in `model.model.layers`; nothing about data or training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsr1kit.errors import UsageError
from dsr1kit.local.load import load, quiet


def student_of(source: str | Path, layers: Sequence[int]) -> tuple[Any, Any]:
    """A model of some of another's layers, and its tokenizer.

    Args:
        source: as for `LocalModel`; it is left as it is.
        layers: numbers of the blocks that are kept, from 0, rising.

    Returns:
        The model (fp32, on the processor, its embeddings and head those of the source) and the tokenizer.

    Raises:
        UsageError: no layer, one that is not there, or not rising.
        ModelError: the source cannot be loaded.
    """
    import torch

    with quiet():
        loaded = load(str(source), "none", "cpu", "float32", None)
    model: Any = loaded.model
    whole = model.model.layers
    kept = list(layers)
    if not kept or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < len(whole):
        raise UsageError(f"layers must be some of 0 to {len(whole) - 1}, rising, not {kept}")
    model.model.layers = torch.nn.ModuleList(whole[at] for at in kept)
    for at, block in enumerate(model.model.layers):
        block.self_attn.layer_idx = at  # its place in the cache of keys and values
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[at] for at in kept]
    return model, loaded.tokenizer
