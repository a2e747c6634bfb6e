"""What the kit adds to TRL's trainers: whole checkpoints, an order of its own, less work in the head, and progress.

Knows transformers' Trainer; nothing about data or models.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dsr1kit.errors import RunError
from dsr1kit.finetune import checkpoints
from dsr1kit.finetune.base import disk_told
from dsr1kit.finetune.encode import IGNORED

if TYPE_CHECKING:
    pass

#: (step, steps, the loss or another value, seconds left)
OnStep = Callable[[int, int, float, float], None]
#: Positions whose scores over the whole vocabulary are held at once.
_SCORED_AT_ONCE = 256


def safe(trainer: type) -> type:
    """The same trainer with checkpoints that are whole or not there, and rows in their own order."""
    import torch

    class Safe(trainer):  # type: ignore[misc]  # a class known at run time
        in_order = False  # whether the dataset holds the rows in the order of the steps
        global_batch = 1

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            try:
                super()._save_checkpoint(model, trial)
                if self.is_world_process_zero():
                    checkpoints.seal(folder)
            except Exception as error:
                full = disk_told(error)
                if full is None:
                    raise
                shutil.rmtree(folder, ignore_errors=True)
                last = checkpoints.newest(folder.parent)
                kept = f"the last good one is {last}" if last else "there was none before"
                raise RunError(
                    f"the checkpoint of step {self.state.global_step} could not be written: {full}; {kept}. Make room, "
                    "then the same command goes on from it"
                ) from None

        def create_model_card(self, *_: Any, **__: Any) -> None:
            """The kit writes its own, with what was measured."""

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            if self.in_order:
                return torch.utils.data.SequentialSampler(self.train_dataset if dataset is None else dataset)
            return super()._get_train_sampler(dataset)

    return Safe


def score_counted_alone(model: Any) -> bool:
    """Send none but the positions that the loss counts through the head of a model that TRL's SFTTrainer has; returns
    whether that could be done.

    On a GPU TRL does so itself. On a processor it sends prompts and padding too, in fp32 and twice over, which is half
    of all the work for a small model with a large vocabulary. Here a position's gradient is taken where its score is;
    TRL's entropy and token accuracy are not computed (NaN).

    Args:
        model: with or without an adapter; its head must not be trained.
    """
    import torch
    from torch.nn.functional import linear
    from trl.trainer import utils

    output: Any = getattr(utils, "FusedCausalLMOutput", None)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head, text = base.get_output_embeddings(), base.config.get_text_config()
    special = ("final_logit_softcapping", "logit_scale", "output_router_logits")
    if (
        output is None
        or type(head) is not torch.nn.Linear
        or any(p.requires_grad for p in head.parameters())
        or any(getattr(text, name, None) for name in special)
    ):
        return False

    class LogProbs(torch.autograd.Function):
        """(positions, width), (positions,) -> (positions,): log-probabilities of the targets in fp32."""

        @staticmethod
        def forward(ctx: Any, hidden: Any, targets: Any, weight: Any, bias: Any) -> Any:
            found = hidden.new_empty(len(hidden), dtype=torch.float32)
            slopes = torch.empty_like(hidden)
            for at in range(0, len(hidden), _SCORED_AT_ONCE):
                part = slice(at, at + _SCORED_AT_ONCE)
                wanted = targets[part, None]
                scores = linear(hidden[part], weight, bias).float().log_softmax(-1)
                found[part] = scores.gather(1, wanted)[:, 0]
                push = scores.exp_().neg_()
                push.scatter_add_(1, wanted, push.new_ones(wanted.shape))
                slopes[part] = push.to(weight.dtype) @ weight
            ctx.save_for_backward(slopes)
            return found

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            (slopes,) = ctx.saved_tensors
            return (slopes * grads[0][:, None]).to(slopes.dtype), None, None, None

    theirs, log_probs_of = base.forward, cast(Any, LogProbs).apply

    def forward(*args: Any, fused_lm_head: bool = False, **inputs: Any) -> Any:
        if not fused_lm_head or inputs.get("labels") is None or inputs.get("shift_labels") is not None:
            return theirs(*args, fused_lm_head=fused_lm_head, **inputs)
        targets = inputs.pop("labels")[:, 1:]
        hidden = base.get_decoder()(*args, **inputs).last_hidden_state[:, :-1]
        counted = targets != IGNORED
        scored: Any = log_probs_of(hidden[counted], targets[counted], head.weight, head.bias)
        # Connected to the model even where nothing counts.
        log_probs = scored.new_zeros(counted.shape).masked_scatter(counted, scored)
        unknown = torch.full((), float("nan"))
        return output(log_probs=log_probs, entropy=unknown, is_top1=unknown, label_mask=counted)

    base.forward = forward
    return True


def follow(on_step: OnStep | None, value: str = "loss") -> Any:
    """A callback that tells how a training goes, with the time left by the pace of this start; its `spent_s` is how
    long the steps of this start took.

    Args:
        on_step: what is called; value: the metric that it is given.
    """
    from transformers import TrainerCallback

    base: Any = TrainerCallback

    class Follow(base):  # type: ignore[misc]  # transformers is untyped here
        began, first, spent_s = 0.0, 0, 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began, self.first = time.perf_counter(), state.global_step

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if not logs or value not in logs:
                return
            self.spent_s = time.perf_counter() - self.began
            left = self.spent_s / max(1, state.global_step - self.first) * (state.max_steps - state.global_step)
            if on_step is not None and state.is_world_process_zero:
                told = logs[value]  # None: TRL's for a mean over nothing
                on_step(state.global_step, state.max_steps, math.nan if told is None else float(told), left)

    return Follow()
