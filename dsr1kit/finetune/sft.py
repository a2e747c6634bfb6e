"""Supervised fine-tuning of an adapter by TRL's SFTTrainer: resumable at any step, in an order known beforehand.

A run's folder holds run.json (settings, data, versions, the loss curve), checkpoints/ and, at the end, adapter/. The
same command on it continues a killed run and ends in the same weights. Knows trainers and files; nothing about
what the gain is.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsr1kit.errors import UsageError
from dsr1kit.finetune.base import (
    advice,
    in_full_precision,
    open_base,
    put_adapter,
    require_finetune,
    shortage_told,
)
from dsr1kit.finetune.curves import Curve
from dsr1kit.finetune.data import Example, instructed
from dsr1kit.finetune.encode import IGNORED, Encoded, encode_all, whole_conversations
from dsr1kit.finetune.rows import row_order, steps_for
from dsr1kit.finetune.runs import Run, processes
from dsr1kit.finetune.selfcheck import GradientCheck, checked_gradients
from dsr1kit.finetune.settings import SftSettings
from dsr1kit.finetune.trainers import OnStep, follow, safe, score_counted_alone
from dsr1kit.local.load import LoadedModel, quiet

__all__ = ["Trained", "train_sft"]

#: Line, row and turn behind the name of a source.
_WHERE = re.compile(r",? (?:line|row|turn) [\d,]*\d\b")


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of a training.

    Attributes:
        adapter: folder of the adapter, as PEFT writes it.
        curve: loss and learning rate by step, of all starts of the run.
        steps, rows, left_out: optimizer steps; rows trained on; rows longer than `max_length`.
        trained_s: seconds of this start's steps; 0 where the run was complete already.
        tokens: that were read in this start, padding left out; of them `counted` in the loss.
        resumed_at: the step after which this start went on; 0: from the beginning.
        gradients: of the self-check; None where the weights were not quantized.
        facts: dtype, quantization and why, device, parameters trained; `sources`: examples by where they came from.
    """

    adapter: Path
    curve: Curve
    steps: int
    rows: int
    left_out: int
    trained_s: float
    tokens: int
    counted: int
    resumed_at: int
    gradients: GradientCheck | None
    facts: dict[str, Any]

    @classmethod
    def noted(cls, noted: dict[str, Any], adapter: Path) -> Trained:
        """From what a complete run noted."""
        curve = Curve(**{key: tuple(value) for key, value in noted["curve"].items()})
        gradients = noted["gradients"] and GradientCheck(**noted["gradients"])
        return cls(**(noted | {"adapter": adapter, "curve": curve, "gradients": gradients, "trained_s": 0.0}))


def train_sft(
    settings: SftSettings,
    examples: Sequence[Example],
    out: str | Path,
    *,
    on_step: OnStep | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Trained:
    """Train an adapter on examples, or go on with a training that was killed.

    Args:
        settings: what to train and how.
        examples: checked (`checks.check`).
        out: the run's folder. One of another run is refused.
        on_step: called after each step with (step, steps, loss, seconds left).
        on_text: called with a line where there is something to say.

    Raises:
        UsageError: a folder of another run, or no row that fits `max_length`.
        ModelError: the model cannot be loaded, memory ran out (says what to change, in order), or the gradients
            of quantized weights are wrong.
        RunError: a checkpoint could not be written; the last good one is kept and named.
        MissingExtra: a package is not installed.
    """
    require_finetune()
    tell = on_text or (lambda _: None)
    told = whole_conversations(examples) if settings.loss == "assistant" else examples
    data = instructed(told, settings.instructed)
    run = Run(Path(out), {"sft": asdict(settings), "data": digest(data), "processes": processes()})
    if (noted := run.result()) is not None:
        tell(f"{out} is complete already")
        return Trained.noted(noted, run.adapter)
    with quiet():
        with run.unused_if_refused():
            loaded = open_base(
                settings.model, method=settings.adapter.method, dtype=settings.dtype, device=settings.device
            )
        rows, left_out = _rows(loaded, settings, data, tell)
        model = put_adapter(loaded, settings.adapter, settings.seed)
        facts = facts_of(loaded, model) | {"sources": sources_of(examples)}
        with shortage_told(lambda: _advice(settings)):
            gradients = checked_gradients(loaded, model, lambda: rows[0], tell)
            trainer, following, steps = _trainer(settings, loaded, model, rows, run.checkpoints, on_step)
            resumed_at = run.train(trainer, tell)
    used = [trainer.train_dataset[at] for at in range(resumed_at * trainer.global_batch, len(trainer.train_dataset))]
    found = Trained(
        adapter=run.adapter,
        curve=Curve.of(trainer.state.log_history),
        steps=steps,
        rows=len(rows),
        left_out=left_out,
        trained_s=following.spent_s,
        tokens=sum(len(unit["input_ids"]) for unit in used),
        counted=sum(label != IGNORED for unit in used for label in unit["labels"]),
        resumed_at=resumed_at,
        gradients=gradients,
        facts=facts,
    )
    # Sharded weights are gathered by all processes together.
    weights = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if trainer.is_world_process_zero():
        run.finish(model, asdict(found), weights)
    return found


def _rows(
    loaded: LoadedModel, settings: SftSettings, data: Sequence[Example], tell: Callable[[str], None]
) -> tuple[list[Encoded], int]:
    length = min(settings.max_length, loaded.context)
    every = encode_all(loaded.tokenizer, loaded.marks, data, settings.loss)
    rows = [row for row in every if len(row.input_ids) <= length]
    if not rows:
        shortest = min((len(row.input_ids) for row in every), default=0)
        raise UsageError(
            f"no row of {len(every):,} fits {length:,} tokens (the shortest has {shortest:,}): raise --max-length"
            + (f"; the model's context is {loaded.context:,}" if shortest > loaded.context else "")
        )
    if left_out := len(every) - len(rows):
        tell(f"{left_out:,} of {len(every):,} rows are longer than {length:,} tokens and left out, not cut")
    return rows, left_out


def _trainer(
    settings: SftSettings,
    loaded: LoadedModel,
    model: Any,
    rows: Sequence[Encoded],
    folder: Path,
    on_step: OnStep | None,
) -> tuple[Any, Any, int]:
    import datasets

    trl: Any = importlib.import_module("trl")
    units = _packed(rows, min(settings.max_length, loaded.context)) if settings.packing else _single(rows)
    batch = settings.batch_size * settings.accumulation * processes()
    steps = settings.steps or steps_for(len(units), batch, settings.epochs)
    order = row_order([len(unit["input_ids"]) for unit in units], batch, steps, settings.seed)
    dataset = datasets.Dataset.from_list([units[at] for at in order])
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        max_length=settings.max_length,
        packing=settings.packing,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_steps=steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=round(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=settings.checkpointing,
        **precision_of(loaded),
        seed=settings.seed,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 1,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=loaded.device != "cpu",
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to="none",
    )
    following = follow(on_step)
    trainer: Any = safe(trl.SFTTrainer)(
        model=model,
        args=arguments,
        train_dataset=dataset,
        processing_class=loaded.tokenizer,
        callbacks=[following],
    )
    in_full_precision(trainer.model)  # TRL casts adapters on quantized weights to bfloat16, which a T4 has not
    if loaded.device == "cpu" and not trainer.is_fsdp_enabled:
        score_counted_alone(trainer.model)
    trainer.in_order, trainer.global_batch = True, batch
    return trainer, following, steps


def _single(rows: Sequence[Encoded]) -> list[dict[str, list[int]]]:
    return [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]


def _packed(rows: Sequence[Encoded], length: int) -> list[dict[str, list[int]]]:
    """Rows put together up to `length` tokens, best fit first, with the lengths by which attention keeps them apart."""
    import datasets

    trl: Any = importlib.import_module("trl")
    dataset = datasets.Dataset.from_list(_single(rows))
    bars = datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return list(trl.pack_dataset(dataset, length, "bfd"))
    finally:
        if not bars:
            datasets.enable_progress_bars()


def precision_of(loaded: LoadedModel) -> dict[str, bool]:
    """Mixed precision as the device has it: none on a processor, where the base's own dtype decides."""
    if loaded.device == "cpu":
        return {"use_cpu": True, "bf16": False, "fp16": False}
    return {"bf16": loaded.dtype == "bfloat16", "fp16": loaded.dtype == "float16"}


def _advice(settings: SftSettings) -> str:
    return advice(
        batch_size=settings.batch_size,
        accumulation=settings.accumulation,
        checkpointing=settings.checkpointing,
        max_length=settings.max_length,
        method=settings.adapter.method,
        rank=settings.adapter.rank,
    )


def facts_of(loaded: LoadedModel, model: Any) -> dict[str, Any]:
    """What a run notes about its model."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "device": loaded.device,
        "dtype": loaded.dtype,
        "dtype_reason": loaded.dtype_reason,
        "quantization": loaded.quantization,
        "parameters": loaded.parameters,
        "trained_parameters": trained,
    }


def sources_of(examples: Sequence[Example]) -> dict[str, int]:
    """How many examples came from each file, set, generator or teacher; their lines and rows left out."""
    return dict(Counter(_WHERE.sub("", one.source) or "unknown" for one in examples))


def digest(examples: Sequence[Example]) -> str:
    """16 hex digits over all that is trained on, in order."""
    told = [[one.messages, one.reasoning, one.answer] for one in examples]
    return hashlib.sha256(json.dumps(told, ensure_ascii=True).encode()).hexdigest()[:16]
