"""What a fine-tuning is: model, adapter, data and schedule, as plain values, checked; and presets by hardware.

Each preset value comes with its reason. Knows the planner; nothing about trainers or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dsr1kit.errors import ModelError, UnknownName, UsageError
from dsr1kit.finetune.encode import LOSSES, Loss
from dsr1kit.local.memory import GIB, available, half_precision, need

if TYPE_CHECKING:
    from dsr1kit.local.hardware import Hardware
    from dsr1kit.local.shapes import Shape

METHODS = ("lora", "rslora", "dora", "qlora")
SCHEDULES = ("linear", "cosine", "constant")
#: Share of free memory that a plan may fill: allocators and kernels differ.
_MARGIN = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSettings:
    """A LoRA adapter (Hu et al., arXiv 2106.09685) on all linear layers.

    Attributes:
        method: `lora`; `rslora` (scale alpha / sqrt(rank), arXiv 2312.03732); `dora` (magnitudes of their own, arXiv
            2402.09353); `qlora` (LoRA on NF4 weights, arXiv 2305.14314).
        rank, alpha: width of the adapter; its products are scaled by alpha / rank.
        dropout: share of the adapter's inputs that is dropped while training.
        modules: names of the linear layers; empty: all of attention and feed-forward.
    """

    method: str = "lora"
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UnknownName("method", self.method, METHODS)
        if not 1 <= self.rank <= 1024:
            raise UsageError(f"rank must be from 1 to 1024, not {self.rank}; usual are 8 to 64")
        if not 0 < self.alpha <= 8 * 1024:
            raise UsageError(f"alpha must be above 0, not {self.alpha}; usual is the rank or twice it")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout must be from 0 to below 1, not {self.dropout}; usual are 0 to 0.1")


@dataclass(frozen=True, slots=True, kw_only=True)
class SftSettings:
    """Supervised fine-tuning of an adapter.

    Attributes:
        model: `tiny-r1`, a folder, a hub id or a GGUF file.
        adapter: what is trained.
        learning_rate: its peak; warms up over `warmup` of the steps, then goes as `schedule` says.
        epochs: passes over the data; `steps`, where given, counts instead.
        batch_size: rows a step on one device; `accumulation` such batches make one step.
        max_length: most tokens of a row; longer ones are left out, never cut.
        loss: which tokens it counts (`encode.encode`).
        packing: several rows in one, their attention kept apart.
        checkpointing: compute activations again in the backward pass instead of keeping them.
        dtype: of the base's weights: `auto`, `float32`, `bfloat16` or `float16`.
        device: `auto`, `cpu` or `cuda`.
        seed: of the adapter's first weights and of the order of the rows.
        save_every: steps between checkpoints; 0: none.
        instructed: share of questions that get R1's instruction on the form of the answer.
    """

    model: str
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.05
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 8
    accumulation: int = 1
    max_length: int = 2048
    loss: Loss = "completion"
    packing: bool = False
    checkpointing: bool = False
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    save_every: int = 50
    instructed: float = 0.5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if not 1e-7 <= self.learning_rate <= 0.1:
            raise UsageError(
                f"a learning rate of {self.learning_rate:g} is out of sense; usual for LoRA are 1e-5 to 5e-4, ten "
                "times that of full tuning, and up to 1e-2 for models of a few million weights"
            )
        if self.schedule not in SCHEDULES:
            raise UnknownName("schedule", self.schedule, SCHEDULES)
        if self.loss not in LOSSES:
            raise UnknownName("loss", self.loss, LOSSES)
        for name, least in (("batch_size", 1), ("accumulation", 1), ("max_length", 8), ("save_every", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"steps must be at least 1, not {self.steps}")
        if not self.epochs > 0:
            raise UsageError(f"epochs must be above 0, not {self.epochs}; usual are 1 to 3")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"warmup is a share of the steps, from 0 to below 1, not {self.warmup}")
        if not 0 <= self.instructed <= 1:
            raise UsageError(f"instructed is a share of the questions, from 0 to 1, not {self.instructed}")


@dataclass(frozen=True, slots=True)
class Preset:
    """Settings for a machine, and why each is as it is."""

    name: str
    values: Mapping[str, Any]
    reasons: Mapping[str, str]

    def table(self) -> Any:
        """Name, value and reason, as a frame."""
        import pandas as pd

        rows = [(key, value, self.reasons.get(key, "")) for key, value in self.values.items()]
        return pd.DataFrame(rows, columns=["setting", "value", "why"]).set_index("setting")


def preset(model: str, shape: Shape | None, hardware: Hardware, *, max_length: int | None = None) -> Preset:
    """What suits a model on a machine.

    Args:
        model: its name, for messages.
        shape: its shape; None: unknown to the planner, and small values are taken.
        hardware: the machine; its first GPU, or its processor, trains.
        max_length: of a row, in tokens; None: 2048, or the model's context where that is less.

    Raises:
        ModelError: not even QLoRA with rows of 512 tokens fits; says what would.
    """
    context = shape.context if shape is not None else 2048
    length = min(max_length or 2048, context)
    gpu = hardware.gpus[0] if hardware.gpus else None
    values: dict[str, Any] = {}
    why: dict[str, str] = {}

    def take(name: str, value: Any, reason: str) -> None:
        values[name], why[name] = value, reason

    if gpu is None:
        tiny = shape is not None and shape.parameters < 50_000_000
        take("method", "lora", "4-bit weights are no faster on a processor, and host memory is plenty")
        take("dtype", "auto", "fp32 below 50 million weights; above, bfloat16 where the processor multiplies it")
        take("checkpointing", False, "it would save memory that is not short, for a third more time")
        take("batch_size", 8 if tiny else 4, "rows of like length share a batch, and so many keep the cores busy")
        take("accumulation", 4 if tiny else 2, "32 rows a step" if tiny else "8 rows a step: many steps in few minutes")
        take("rank", 32 if tiny else 16, "a small model needs a large share of its width" if tiny else "as usual")
        small = shape is not None and shape.parameters < 500_000_000
        take("learning_rate", 3e-3 if tiny else 2e-3 if small else 1e-3,
             "small models bear large steps; three times larger unlearns the rest" if tiny else
             "few steps in few minutes: above the usual 2e-4")  # fmt: skip
        take("max_length", length, "rows of such data are short; longer ones are left out and told")
        return Preset("cpu", values, why)
    method, row, checkpointed, batch = _fits(model, shape, hardware, length)
    half = "bfloat16" if gpu.bf16 else "float16"
    named = "t4" if gpu.total_bytes < 18 * GIB else "24gb" if gpu.total_bytes < 30 * GIB else "80gb"
    take("method", method, "16-bit weights fit, and 4-bit would be slower" if method == "lora" else
         "the weights fit in 4 bits only, beside adapter and activations")  # fmt: skip
    take("dtype", half, "the GPU multiplies bfloat16" if gpu.bf16 else
         "the GPU has no bfloat16: fp16 with loss scaling, the adapter in fp32")  # fmt: skip
    take("checkpointing", checkpointed, "activations would not fit" if checkpointed else "activations fit")
    take("batch_size", batch, "so many of the longest rows fit beside the weights" if batch > 1 else
         "the longest rows fit one by one")  # fmt: skip
    take("accumulation", max(1, 16 // batch), "16 rows a step: LoRA loses with much larger batches")
    take("learning_rate", 2e-4, "ten times that of full tuning, as usual for LoRA")
    take("max_length", row, "the longest rows that fit" if row < length else "as asked, or R1-like traces of one page")
    return Preset(named, values, why)


def _fits(model: str, shape: Shape | None, hardware: Hardware, length: int) -> tuple[str, int, bool, int]:
    """Method, row length, whether to compute activations again, and rows at once, for one GPU: the longest rows first,
    then 16 bits, then no second computing, then many at once."""
    if shape is None:
        return "qlora", min(length, 1024), True, 1
    one = replace(hardware, gpus=hardware.gpus[:1])
    room = available(one) * _MARGIN
    whole = half_precision(one)
    for method, precision in (("lora", whole), ("qlora", "nf4")):
        for row in dict.fromkeys((length, min(length, 1024), min(length, 512))):
            if _taken(shape, precision, method, row) <= room:
                kept = _taken(shape, precision, method, row, kept=True) <= room
                batch = 16
                while batch > 1 and _taken(shape, precision, method, row, batch, kept=kept) > room:
                    batch //= 2
                return method, row, not kept, batch
    least = need(shape, precision="nf4", context=512, purpose="qlora", whole_logits=False).total
    raise ModelError(
        f"{model} cannot be tuned here: QLoRA with rows of 512 tokens needs {least / GIB:.1f} GiB, free are "
        f"{room / GIB:.1f}; a smaller distill would fit: dsr1kit fits --for qlora"
    )


def _taken(shape: Shape, precision: str, method: str, row: int, batch: int = 1, *, kept: bool = False) -> int:
    """Bytes of a training; activations that are `kept` take in every layer what is computed again for one at a time."""
    wanted = need(shape, precision=precision, context=row, batch=batch, purpose=method, whole_logits=False)
    layer = 2 * (4 * shape.query_width + 6 * shape.hidden + 4 * shape.intermediate)
    return wanted.total + kept * (shape.layers - 1) * batch * row * layer


def settings_for(model: str, chosen: Preset, **given: Any) -> SftSettings:
    """Settings from a preset, what is `given` (and not None) counting before it.

    Raises:
        UsageError: a value that cannot be meant.
    """
    wanted = {**chosen.values, **{key: value for key, value in given.items() if value is not None}}
    names = ("method", "rank", "alpha", "dropout", "modules")
    own = {key: wanted.pop(key) for key in names if key in wanted}
    if "rank" in own and "alpha" not in own:
        own["alpha"] = 2 * own["rank"]
    return SftSettings(model=model, adapter=AdapterSettings(**own), **wanted)
