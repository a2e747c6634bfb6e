"""What `transformers serve` is pointed at: a folder of links to the model's files, a few of them put right.

Left alone it answers greedily whatever is asked where the model's generation_config.json does not say otherwise, shows
DeepSeek's end mark as text and leaves the thinking in the answer; and it takes no adapter. Knows nothing about
processes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsr1kit.errors import MissingExtra, ModelError
from dsr1kit.local.engine_commands import Serving, chat_template, read_json

_LEFT_OUT = (".bin", ".pt", ".pth", ".ckpt", ".py", ".gguf")
_TURN, _END = "<｜Assistant｜>", "<｜end▁of▁sentence｜>"
#: How R1 writes, in the words of transformers' response templates; the prompt may have opened the thinking.
_R1_RESPONSE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": _TURN,
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "content": {"close_pattern": rf"\s*{_END}", "content": "text"},
    },
}
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def stage(serving: Serving, into: Path) -> Path:
    """Lay out `into/<name>` for `transformers serve` started in `into`; returns that folder.

    Raises:
        ModelError: the adapter is none, or a pickle.
        MissingExtra: an adapter, and PEFT is not installed.
    """
    folder = into / serving.name
    folder.mkdir(parents=True)
    for file in serving.weights.iterdir():
        if file.is_file() and file.suffix not in _LEFT_OUT:
            (folder / file.name).symlink_to(file.resolve())
    _replace(folder / "generation_config.json", _generation(serving.weights))
    if _TURN in chat_template(serving.weights):
        tokenizer = read_json(serving.weights / "tokenizer_config.json")
        _replace(folder / "tokenizer_config.json", {"response_template": _R1_RESPONSE} | tokenizer)
    if serving.adapter is not None:
        _adapt(folder, serving.weights, serving.adapter)
    return folder


def splits_thinking(weights: Path) -> bool:
    """Whether the thinking of this model, once staged, comes in a field of its own."""
    return _TURN in chat_template(weights)


def _generation(weights: Path) -> dict[str, Any]:
    given = read_json(weights / "generation_config.json")
    if not given:  # what it would have been made from
        config = read_json(weights / "config.json")
        given = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(k) is not None}
    # Temperature and top-p come with each request; without do_sample both would be ignored.
    return given | {"do_sample": True, "top_k": 0}


def _adapt(folder: Path, weights: Path, adapter: Path) -> None:
    import importlib.util

    if not all((adapter / name).is_file() for name in _ADAPTER_FILES):
        raise ModelError(f"{adapter} needs {' and '.join(_ADAPTER_FILES)}; save the adapter with save_pretrained()")
    if importlib.util.find_spec("peft") is None:
        raise MissingExtra("an adapter on transformers serve", "finetune", "peft")
    config = read_json(adapter / "adapter_config.json")
    # transformers loads the base from where this points, then the adapter from beside it.
    _replace(folder / "adapter_config.json", config | {"base_model_name_or_path": str(weights.resolve())})
    _replace(folder / "adapter_model.safetensors", adapter / "adapter_model.safetensors")


def _replace(path: Path, content: dict[str, Any] | Path) -> None:
    path.unlink(missing_ok=True)  # a link to the model's own file, which must not be written through
    if isinstance(content, Path):
        path.symlink_to(content.resolve())
    else:
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
