"""Reinforcement with rewards that can be verified: GRPO (arXiv 2402.03300, as R1 was trained) by TRL's GRPOTrainer.

The rewards are the comparison's own scorers; completions come from the kit's engine, or from vLLM on a GPU. A run's
folder is that of a supervised one. Knows trainers; nothing about what the gain is.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsr1kit.compare.items import Item, digest
from dsr1kit.compare.judge import Judge
from dsr1kit.compare.tasks import load_task
from dsr1kit.errors import RunError, UnknownName, UsageError
from dsr1kit.finetune.alarms import Alarm, Watch, too_long
from dsr1kit.finetune.base import (
    in_full_precision,
    in_order,
    is_small,
    open_base,
    put_adapter,
    require_finetune,
    shortage_told,
)
from dsr1kit.finetune.curves import RewardCurve
from dsr1kit.finetune.data import example
from dsr1kit.finetune.encode import Encoded, encode
from dsr1kit.finetune.rewards import Rewards, answer_of, cut_off, form_of, length_of
from dsr1kit.finetune.runs import Run, processes
from dsr1kit.finetune.selfcheck import GradientCheck, checked_gradients
from dsr1kit.finetune.settings import SCHEDULES, AdapterSettings
from dsr1kit.finetune.sft import facts_of, precision_of
from dsr1kit.finetune.trainers import OnStep, follow, safe
from dsr1kit.local.hardware import look
from dsr1kit.local.load import LoadedModel, quiet
from dsr1kit.local.prompts import prompt_of
from dsr1kit.records import Outcome, Reply, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoSettings:
    """Reinforcement of an adapter.

    Attributes:
        model: `tiny-r1`, a folder or a hub id.
        task: what is asked, never what will be measured on: `practice:KIND`, `file:PATH`, ...
        items: so many different questions.
        adapter, learning_rate, schedule, warmup, dtype, device, seed, save_every: as in `SftSettings`.
        steps: optimizer steps.
        prompts: questions a step; `generations` completions of each.
        batch_size: completions that are trained on at once; 0: all of a step.
        temperature, top_p: of the completions; R1's paper explores at 1.
        max_tokens: of a completion; what is cut earns nothing.
        rewards: what they weigh.
        beta: of the KL term against the model as it was; 0: none, and no copy of it is kept.
        vllm: let vLLM write the completions (GPU; `colocate`).
        patience: steps in a row without any gradient after which the run is ended.
    """

    model: str
    task: str
    items: int = 1000
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    learning_rate: float = 1e-5
    schedule: str = "constant"
    warmup: float = 0.05
    steps: int = 100
    prompts: int = 8
    generations: int = 8
    batch_size: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 512
    rewards: Rewards = field(default_factory=Rewards)
    beta: float = 0.0
    vllm: bool = False
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    save_every: int = 50
    patience: int = 20
    max_grad_norm: float = 0.2

    def __post_init__(self) -> None:
        if not 1e-8 <= self.learning_rate <= 0.05:
            raise UsageError(
                f"a learning rate of {self.learning_rate:g} is out of sense; usual for GRPO with LoRA are 1e-6 to "
                "5e-5, and up to 5e-3 for models of a few million weights"
            )
        if self.schedule not in SCHEDULES:
            raise UnknownName("schedule", self.schedule, SCHEDULES)
        for name, least in (("items", 1), ("steps", 1), ("prompts", 1), ("generations", 2), ("batch_size", 0),
                            ("max_tokens", 1), ("save_every", 0), ("patience", 1)):  # fmt: skip
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not self.temperature > 0:
            raise UsageError("temperature must be above 0: equal completions teach nothing")
        size = self.prompts * self.generations
        if self.batch_size and size % self.batch_size:
            raise UsageError(f"batch_size must divide the {size} completions of a step, not be {self.batch_size}")


def usual_learning_rate(model: str) -> float:
    """What small and large models bear."""
    return 1e-3 if is_small(model) else 1e-5


@dataclass(frozen=True, slots=True)
class Reinforced:
    """What came of a reinforcement; `trained_s` is of this start, 0 where the run was complete already; `gradients` of
    the self-check, None where the weights were not quantized."""

    adapter: Path
    curve: RewardCurve
    alarms: tuple[Alarm, ...]
    steps: int
    trained_s: float
    resumed_at: int
    facts: dict[str, Any]
    gradients: GradientCheck | None = None

    @classmethod
    def noted(cls, noted: dict[str, Any], adapter: Path) -> Reinforced:
        """From what a complete run noted."""
        curve = RewardCurve(**{key: tuple(value) for key, value in noted["curve"].items()})
        alarms = tuple(Alarm(**alarm) for alarm in noted["alarms"])
        gradients = noted["gradients"] and GradientCheck(**noted["gradients"])
        told = {"adapter": adapter, "curve": curve, "alarms": alarms, "gradients": gradients, "trained_s": 0.0}
        return cls(**(noted | told))


def train_grpo(
    settings: GrpoSettings,
    out: str | Path,
    *,
    items: Sequence[Item] | None = None,
    on_step: OnStep | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Reinforced:
    """Reinforce an adapter, or go on with a run that was killed.

    Args:
        settings: what to train and how.
        out: the run's folder. One of another run is refused.
        items: the questions; None: `settings.items` of the task.
        on_step: called after each step with (step, steps, share of right completions, seconds left).
        on_text: called with a line where there is something to say, alarms among them.

    Raises:
        UsageError: a folder of another run, fewer questions than a step asks, or a prompt that leaves no room.
        ModelError: the model cannot be loaded, or memory ran out.
        RunError: a checkpoint could not be written, or no group taught anything for `patience` steps.
        MissingExtra: a package is not installed.
    """
    require_finetune()
    tell = on_text or (lambda _: None)
    asked = list(items) if items is not None else load_task(settings.task, settings.items, settings.seed)
    if len(asked) < settings.prompts:  # the trainer would end at once, and well, having trained nothing
        raise UsageError(
            f"a step asks {settings.prompts} different questions, and there are {len(asked)}: lower --prompts, or ask "
            "more of them (--questions)"
        )
    run = Run(Path(out), {"grpo": asdict(settings), "data": digest(asked), "processes": processes()})
    if (noted := run.result()) is not None:
        tell(f"{out} is complete already")
        return Reinforced.noted(noted, run.adapter)
    watch = Watch(settings.max_tokens, settings.patience)
    with quiet():
        with run.unused_if_refused():
            loaded = open_base(
                settings.model, method=settings.adapter.method, dtype=settings.dtype, device=settings.device
            )
        model = put_adapter(loaded, settings.adapter, settings.seed)
        facts = facts_of(loaded, model)
        with shortage_told(lambda: _advice(settings)):
            gradients = checked_gradients(loaded, model, lambda: _worked_row(loaded, asked[0]), tell)
            following = follow(on_step, value="rewards/right/mean")
            trainer = _trainer(
                settings, loaded, model, asked, run.checkpoints, [following, _watching(watch, settings, tell)]
            )
            in_full_precision(trainer.model)  # TRL casts adapters on quantized weights to bfloat16, which a T4 has not
            resumed_at = run.train(trainer, tell)
    if watch.dead:
        raise RunError(
            f"ended after step {trainer.state.global_step}: for {settings.patience} steps every group of completions "
            f"earned the same, so nothing was learned. {watch.raised[-1].said if watch.raised else ''}".rstrip()
        )
    found = Reinforced(
        run.adapter, RewardCurve.of(trainer.state.log_history), tuple(watch.raised), settings.steps,
        following.spent_s, resumed_at, facts, gradients,
    )  # fmt: skip
    if trainer.is_world_process_zero():
        run.finish(model, asdict(found))
    return found


def _worked_row(loaded: LoadedModel, item: Item) -> Encoded:
    """A question with its answer, as a row for the self-check of gradients."""
    return encode(loaded.tokenizer, loaded.marks, example(item.prompt, item.gold, f"\\boxed{{{item.gold}}}"))


def _advice(settings: GrpoSettings) -> str:
    """What to change when memory ran out, what costs least first; what is done already is left out."""
    size, steps = settings.prompts * settings.generations, []
    if (settings.batch_size or size) > settings.generations:
        steps.append(f"--batch-size {settings.generations} (the same step, in smaller pieces)")
    if settings.max_tokens > 256:
        steps.append(f"--max-tokens {settings.max_tokens // 2} (what is longer is cut and earns nothing)")
    if settings.prompts > 1:
        steps.append(f"--prompts {settings.prompts // 2} (fewer completions are written at once)")
    if settings.generations > 4:
        steps.append("--generations 4")
    return in_order(steps, settings.adapter.method, settings.adapter.rank)


def _trainer(
    settings: GrpoSettings,
    loaded: LoadedModel,
    model: Any,
    items: Sequence[Item],
    folder: Path,
    callbacks: list[Any],
) -> Any:
    import datasets

    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is told to be experimental at every start
    trl: Any = importlib.import_module("trl")
    size = settings.prompts * settings.generations
    batch = settings.batch_size or size
    arguments = trl.GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=size // batch,
        num_generations=settings.generations,
        max_completion_length=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        beta=settings.beta,
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=round(settings.warmup * settings.steps),
        max_grad_norm=settings.max_grad_norm,
        reward_weights=[settings.rewards.right, settings.rewards.form, settings.rewards.length],
        gradient_checkpointing=loaded.device != "cpu",
        use_vllm=settings.vllm,
        **precision_of(loaded),
        seed=settings.seed,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 1,
        save_total_limit=2,
        logging_steps=1,
        dataloader_pin_memory=loaded.device != "cpu",
        disable_tqdm=True,
        report_to="none",
    )
    rows = [
        {"prompt": item.messages(), "scorer": item.scorer, "gold": item.reference or item.gold, "name": item.id}
        for item in items
    ]
    return safe(trl.GRPOTrainer)(
        model=model,
        reward_funcs=_reward_functions(loaded, settings),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=loaded.tokenizer,
        callbacks=callbacks,
        **({} if settings.vllm else {"rollout_func": _rollouts(loaded, settings)}),
    )


def _rollouts(loaded: LoadedModel, settings: GrpoSettings) -> Callable[[list[Any], Any], dict[str, Any]]:
    """Completions by the kit's engine: many at once, each prompt token for token as the model is asked."""

    def rollouts(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        from dsr1kit.local.decode import Decoder, run_rows
        from dsr1kit.local.rows import Row

        model = trainer.accelerator.unwrap_model(trainer.model)
        was_training = model.training
        model.eval()
        asked = [prompt_of(loaded.tokenizer, loaded.marks, prompt) for prompt in prompts]
        longest = max(len(one.ids) for one in asked)
        if longest + settings.max_tokens > loaded.context:
            raise UsageError(
                f"a prompt of {longest} tokens and {settings.max_tokens} of completion pass the model's context of "
                f"{loaded.context}: {'lower --max-tokens' if longest < loaded.context else 'ask shorter questions'}"
            )
        step = trainer.state.global_step
        rows = [
            Row(
                one.ids,
                Sampling(settings.temperature, settings.top_p, settings.max_tokens,
                         seed=settings.seed * 1_000_003 + step, sample=at),
                settings.max_tokens, one.opened, on_token=lambda _: False,
            )
            for at, one in enumerate(asked)
        ]  # fmt: skip
        try:
            run_rows(Decoder(model.get_base_model(), loaded.marks, loaded.context), rows, len(rows))
        finally:
            model.train(was_training)
        return {
            "prompt_ids": [one.ids for one in asked],
            "completion_ids": [row.made for row in rows],
            "logprobs": None,
        }

    return rollouts


def _reward_functions(loaded: LoadedModel, settings: GrpoSettings) -> list[Any]:
    thinks = loaded.marks.end_think is not None

    def cut(ids: list[int]) -> bool:
        return cut_off(ids, settings.max_tokens, loaded.marks.ends)

    async def right(completions: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        found: list[float | None] = []
        async with Judge() as judge:
            for completion, ids, gold, scorer, name in zip(
                completions, completion_ids, columns["gold"], columns["scorer"], columns["name"], strict=True
            ):
                if cut(ids):
                    found.append(0.0)
                    continue
                item = Item(name, "", gold, "", "en", scorer)
                reply = Reply(Outcome.OK, answer=answer_of(_text(completion), thinks))
                verdict = await judge.verdict(reply, item)
                found.append(None if verdict == "unscored" else float(verdict == "right"))
        return found

    def form(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [
            0.0 if cut(ids) else form_of(_text(completion), thinks)
            for completion, ids in zip(completions, completion_ids, strict=True)
        ]

    async def length(completions: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        if settings.rewards.length == 0:
            return [0.0] * len(completions)
        known = await right(completions, completion_ids, **columns)
        return [
            length_of(len(ids), settings.max_tokens, value) for ids, value in zip(completion_ids, known, strict=True)
        ]

    return [right, form, length]


def _text(completion: Any) -> str:
    return str(completion if isinstance(completion, str) else completion[-1].get("content") or "")


def _watching(watch: Watch, settings: GrpoSettings, tell: Callable[[str], None]) -> Any:
    """A callback that raises the alarms, tells once how long it will take, and ends a run that is dead."""
    from transformers import TrainerCallback

    base: Any = TrainerCallback
    colab = look().colab

    class Watching(base):  # type: ignore[misc]  # transformers is untyped here
        told_time = False
        began: float | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            for row in state.log_history:  # what was seen before a kill counts on
                watch.look(int(row["step"]), row)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            import time

            for alarm in watch.look(state.global_step, logs or {}):
                tell(f"step {alarm.step}, {alarm.name}: {alarm.said}")
            if watch.dead:
                control.should_training_stop = True
            now = time.perf_counter()
            if self.began is None:
                self.began, self.first = now, state.global_step
            elif not self.told_time and state.global_step - self.first >= 3:
                self.told_time = True
                left = (now - self.began) / (state.global_step - self.first) * (state.max_steps - state.global_step)
                tell(too_long(left / 3600, colab=colab, save_every=settings.save_every)
                     or f"about {left / 60:.0f} minutes to go")  # fmt: skip

    return Watching()
