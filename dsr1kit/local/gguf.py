"""GGUF files: checked, dequantized once, and kept as a folder of safetensors that loads in a second.

transformers reads a GGUF for half a minute even where the model is small, and such a model can neither be saved nor
trained; so the first use converts and every later one takes the folder. Knows files and transformers' loader.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsr1kit.errors import ModelError, UsageError
from dsr1kit.local.hardware import look
from dsr1kit.local.identity import sha256_of
from dsr1kit.local.load import refuse_lacking
from dsr1kit.local.memory import GIB
from dsr1kit.local.room import PLANNED_CONTEXT
from dsr1kit.local.shapes import Shape, shape_of_config

if TYPE_CHECKING:
    from gguf import GGUFReader

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's kinds of tokens
_PLANNED = ("llama", "qwen2", "qwen3")  # architectures whose sizes a header tells by the same names
_LEFT_S = 24 * 3600  # after which a conversion that is not done is nobody's


def cache_dir() -> Path:
    """Where converted files lie: `dsr1kit/gguf` below `$XDG_CACHE_HOME`, or below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsr1kit" / "gguf"


def dequantized(path: Path, *, cache: Path | None = None) -> Path:
    """The folder with the model of a GGUF file, converted to 16 bits (32 where 16 overflow) on first use.

    Args:
        path: the file.
        cache: where folders are kept; None: `cache_dir()`. Named by the file's content, so a changed file is
            converted anew and a moved one is not.

    Raises:
        UsageError: the package `gguf` is missing.
        ModelError: no GGUF, truncated, of an architecture that transformers cannot read, or memory or disk are
            too small.
    """
    reader = _check(path)
    place = (cache or cache_dir()) / f"{path.stem}-{_fingerprint(path)}"
    if (place / "config.json").is_file():
        return place
    # In 32 bits at first, and a GGUF may have fewer than five.
    weights = sum(int(t.n_elements) for t in reader.tensors)
    if (needed := 4 * weights) > (free := look().memory_free_bytes):
        instead = fitting_instead(path)
        raise ModelError(
            f"{path} would take {needed / GIB:.1f} GiB of memory to convert, and {free / GIB:.1f} GiB are free. "
            + (instead or f"Serve it with llama.cpp, which needs no more than the file: dsr1kit serve {path}")
        )
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for left in place.parent.glob(".partial-*"):  # of conversions that were killed
            if time.time() - left.stat().st_mtime > _LEFT_S:
                shutil.rmtree(left, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=place.parent))
        try:
            _convert(path, partial)
            _put_in_place(partial, place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise ModelError(
            f"{path} could not be converted into {place.parent}: {error}. A model takes about 2 bytes a parameter "
            "there; free some space, or set XDG_CACHE_HOME to a folder on a larger disk"
        ) from error
    return place


def fitting_instead(path: Path) -> str:
    """What would fit, where a GGUF file alone exceeds all memory that is free; empty where it does not."""
    from dsr1kit.local.fits import advise
    from dsr1kit.local.memory import available

    here = look()
    size, free = path.stat().st_size, max(available(here), here.memory_free_bytes)
    if size <= free:
        return ""
    head = f"The file alone has {size / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free."
    try:
        shape = shape_of_gguf(path)
    except ModelError:
        return f"{head} What fits here: dsr1kit fits"
    return f"{head} {advise(shape, here, precision='q4_k_m', context=min(PLANNED_CONTEXT, shape.context))}"


def shape_of_gguf(path: Path) -> Shape:
    """The shape that a GGUF file's header tells.

    Raises:
        UsageError: the package `gguf` is missing.
        ModelError: no whole GGUF file, or of an architecture that the planner does not know.
    """
    reader = _check(path)

    def told(name: str) -> Any:
        field = reader.fields.get(name)
        return None if field is None else field.contents()

    family = str(told("general.architecture"))
    if family not in _PLANNED:
        known = ", ".join(_PLANNED)
        raise ModelError(f"{path} is of the architecture {family}; of GGUF files the planner knows {known}")
    names = {
        "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length",
        "max_position_embeddings": "context_length",
    }  # fmt: skip
    config = {key: told(f"{family}.{name}") for key, name in names.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config |= {"model_type": family, "tie_word_embeddings": "output.weight" not in tensors}
    # Its shape stands the other way round than torch's.
    words = tensors.get("token_embd.weight")
    config["vocab_size"] = None if words is None else int(words.shape[1])
    shape = shape_of_config({key: value for key, value in config.items() if value is not None})
    return replace(shape, name=path.stem, hub_id=str(path), title=path.name, kind="folder")


def _put_in_place(partial: Path, place: Path) -> None:
    try:
        partial.rename(place)
    except OSError:
        if not (place / "config.json").is_file():  # else another process was sooner, with the same content
            raise


def _check(path: Path) -> GGUFReader:
    """Open a file.

    Raises:
        UsageError: the package `gguf` is missing.
        ModelError: the file does not hold all the bytes its own tables speak of, or is a part of a model.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UsageError("reading a GGUF file needs the package gguf: pip install gguf")
    from gguf import GGUFReader

    size = path.stat().st_size
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{path} is no GGUF file: it begins with {magic!r}. Download it again")
    try:
        reader = GGUFReader(path)
        needed = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{path} is truncated or damaged: its {size:,} bytes do not hold what its header lists ({error}). "
            "Download it again, with `dsr1kit weights` for checksums"
        ) from error
    if not needed or needed > size:
        raise ModelError(f"{path} is truncated: {size:,} bytes of {needed:,}. Download it again (dsr1kit weights)")
    parts = reader.fields.get("split.count")
    if parts is not None and (count := int(parts.contents())) > 1:
        raise ModelError(
            f"{path} is one of {count} parts of a model. Serve it with llama.cpp, which reads the others beside it "
            f"(dsr1kit serve {path}), or join them first: llama-gguf-split --merge"
        )
    return reader


def _fingerprint(path: Path) -> str:
    """Of all its bytes: two merges of one model may differ in a single layer. Takes less than loading does."""
    return sha256_of(path)[:16]


def _convert(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    named: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
    try:
        tokenizer = _mended(AutoTokenizer.from_pretrained(str(path.parent), **named), path)
        came: Any = AutoModelForCausalLM.from_pretrained(
            str(path.parent), dtype=torch.float32, quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True, **named,
        )  # fmt: skip
    except Exception as error:  # its readers raise what they like where a file lacks something
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"transformers cannot read {path}: {first}. Serve it with llama.cpp instead: dsr1kit serve {path}"
        ) from error
    model, found = came
    refuse_lacking(path, found)
    model = model.to(torch.float16) if _fits_half(model) else model
    try:
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    except Exception as error:  # a full disk is a SafetensorError to one library, a bare Exception to another
        raise OSError(str(error)) from error


def _mended(tokenizer: Any, path: Path) -> Any:
    """The tokenizer with the special tokens that the file names, each whole and under its own id.

    transformers (5.23) takes a byte-level vocabulary's special tokens for spelled bytes where they hold a character
    such as R1's full-width bar: `<｜User｜>` falls to pieces, and the begin mark gets an id behind the vocabulary.
    """
    from gguf import GGUFReader
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(path).fields
    tokens, kinds = (fields.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    if tokens is None or kinds is None:
        return tokenizer
    named = list(enumerate(zip(tokens.contents(), kinds.contents(), strict=True)))
    special = {at: (token, kind == _CONTROL) for at, (token, kind) in named if kind in (_CONTROL, _USER_DEFINED)}
    wrong = {at: told for at, told in special.items() if tokenizer.convert_tokens_to_ids(told[0]) != at}
    if not wrong:
        return tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    spelled = {at: token for token, at in vocabulary.items()}
    texts = {text for text, _ in wrong.values()}
    added = [one for one in state["added_tokens"] if one["content"] not in texts and one["id"] < len(named)]
    for at, (text, control) in wrong.items():
        vocabulary.pop(spelled.get(at), None)
        vocabulary[text] = at
        bounds = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added.append({"id": at, "content": text, "special": control, **bounds})
    state["added_tokens"] = sorted(added, key=lambda one: int(one["id"]))
    marks = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "chat_template")}
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **marks)


def _fits_half(model: Any) -> bool:
    import torch

    largest = max(float(weight.detach().abs().max()) for weight in model.parameters() if weight.numel())
    return largest < float(torch.finfo(torch.float16).max)
