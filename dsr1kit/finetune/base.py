"""The model that an adapter is trained on: loaded afresh as it will be run, the adapter put on it, both made safe.

Knows PEFT and bitsandbytes' modules; nothing about data or trainers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

from dsr1kit.errors import Dsr1kitError, MissingExtra, ModelError, RunError
from dsr1kit.finetune.settings import AdapterSettings
from dsr1kit.local.bring import config_of
from dsr1kit.local.hardware import SMALL
from dsr1kit.local.load import LoadedModel, load
from dsr1kit.local.shapes import shape_of_config

#: Linear layers of the architectures that R1 and its distills have; routers and fused experts are none of them.
_LINEAR = frozenset({
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj",
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
})  # fmt: skip


def require_finetune() -> None:
    """Raise MissingExtra where TRL, PEFT or datasets is not installed."""
    for package, called in (("trl", "TRL"), ("peft", "PEFT"), ("datasets", "datasets")):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra("fine-tuning", "finetune", called)


def is_small(model: str) -> bool:
    """Whether a model is as small as tiny-r1 and what is made of it; False where its size is not known. Of a hub id
    that is not here the hub is asked: what follows from it must be the same before and after it is fetched."""
    try:
        return (config := config_of(model)) is not None and shape_of_config(config).parameters < SMALL
    except Dsr1kitError:  # not known to the planner, or not to be had
        return False


def open_base(model: str, *, method: str, dtype: str, device: str) -> LoadedModel:
    """Load the base in the calling thread, quantized for QLoRA, for training.

    Raises:
        MissingExtra: a package is not installed.
        ModelError: it cannot be loaded or does not fit; the message says what would.
    """
    require_finetune()
    import torch

    own = os.environ.get("LOCAL_RANK")  # of several processes that train together each has a GPU of its own
    if own is not None and device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{own}"
    loaded = load(model, "4bit" if method == "qlora" else "none", device, dtype, None)
    keep_for_training(loaded.model)
    return loaded


def keep_for_training(model: Any) -> None:
    """Forbid bitsandbytes to pack 4-bit weights for inference, as it does on processors with avx512_bf16 in the first
    forward pass outside training: what is packed gives wrong gradients ever after."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def put_adapter(loaded: LoadedModel, settings: AdapterSettings, seed: int) -> Any:
    """The model with a fresh adapter, in fp32 whatever the base is in; only the adapter is trainable."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.modules) or targets(loaded.model),
        use_rslora=settings.method == "rslora",
        use_dora=settings.method == "dora",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    try:
        model: Any = get_peft_model(loaded.model, config)
    except ValueError as error:
        raise ModelError(f"no adapter can be put on {config.target_modules}: {str(error)[:300]}") from None
    in_full_precision(model)
    return model


def in_full_precision(model: Any) -> None:
    """Trainable weights to fp32: half precision loses small updates, and loss scaling refuses fp16 gradients."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def targets(model: Any) -> list[str] | str:
    """The names of the layers that an adapter goes on: attention and feed-forward."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return sorted(names & _LINEAR) or "all-linear"


@contextlib.contextmanager
def shortage_told(what_to_change: Callable[[], str]) -> Iterator[None]:
    """Memory that runs out inside becomes a ModelError that says what to change, in order."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ModelError(f"{_first_line(error)}. {what_to_change()}") from None
    except RuntimeError as error:
        text = str(error).lower()
        if "out of memory" not in text and "can't allocate memory" not in text:
            raise
        raise ModelError(f"{_first_line(error)}. {what_to_change()}") from None


def _first_line(error: BaseException) -> str:
    return f"out of memory while training: {str(error).strip().partition(chr(10))[0][:200].rstrip('.')}"


def advice(
    *,
    batch_size: int = 1,
    accumulation: int = 1,
    checkpointing: bool = True,
    max_length: int = 512,
    method: str = "qlora",
    rank: int = 8,
    quantizable: bool = True,
) -> str:
    """What to change when memory ran out, what costs least first; what is done already is left out."""
    steps = []
    if batch_size > 1:
        steps.append(f"--batch-size 1 --accumulation {batch_size * accumulation} (the same step, in smaller pieces)")
    if not checkpointing:
        steps.append("--checkpointing (a third slower)")
    if max_length > 512:
        steps.append(f"--max-length {max_length // 2} (longer rows are left out)")
    return in_order(steps, method, rank, quantizable=quantizable)


def in_order(steps: list[str], method: str, rank: int, *, quantizable: bool = True) -> str:
    """The steps, behind them what helps any training."""
    steps = list(steps)
    if method != "qlora" and quantizable:
        steps.append("--method qlora (the base in 4 bits)")
    if rank > 8:
        steps.append("--rank 8")
    steps.append("a smaller model (dsr1kit fits --for qlora says which)")
    return "Change, in this order: " + "; ".join(f"{at}. {step}" for at, step in enumerate(steps, 1))


def disk_told(error: BaseException) -> RunError | None:
    """A full or failing disk as a RunError, from whatever a library made of it; None: it was something else."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        text = str(at)
        if isinstance(at, OSError) or any(
            sign in text for sign in ("No space left", "PytorchStreamWriter", "unexpected pos", "I/O error", "os error")
        ):
            said = text.strip().partition("\n")[0]
            return RunError(said[:200] or type(at).__name__)
        at = at.__cause__ or at.__context__
    return None
