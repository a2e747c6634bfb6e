"""Train tiny-r1 from scratch: a tokenizer, a small Qwen2 model and R1's chat format on generated arithmetic.

Output form that the model learns, after a prompt ending in `<think>\\n`: trace, `\\n</think>\\n\\n`, answer,
end of sentence. Knows the generated problems and plain torch; nothing about Backends or quantization.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import random
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsr1kit.compare.arithmetic import INSTRUCTION, KINDS, TAUGHT, Problem, generate, stream
from dsr1kit.errors import UsageError
from dsr1kit.local.load import quiet
from dsr1kit.records import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from dsr1kit.finetune.data import Example

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT, THINK, END_THINK = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"

# The prompt form of R1's distills: system text bare after the start, earlier thinking dropped, the new
# thinking opened. A user's turn is not stripped: what was typed is what the model sees.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages if message.role == 'system' %}{{ message.content }}{% endfor %}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<｜User｜>{{ message.content }}"
    "{% elif message.role == 'assistant' %}"
    "<｜Assistant｜>{{ message.content.split('</think>')[-1].lstrip('\\n') }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the weights; the defaults are those of the shipped tiny-r1.

    Attributes:
        steps: optimizer steps.
        batch_size: problems a step.
        learning_rate: peak of the schedule (warm-up, then linearly to zero).
        optimizer: `muon` (matrices by Muon, the rest by AdamW) or `adamw`.
        seed: of weights, problems and their order.
        layers, width, heads, feed_forward: the shape; width must be a multiple of heads. Keep width and
            feed_forward multiples of 64: bitsandbytes' 4-bit on a processor is silently wrong otherwise.
        vocabulary: entries of the tokenizer.
        context: longest sequence in tokens.
        instructed: share of questions followed by R1's instruction for mathematics.
        weights: how often each kind is drawn, relative to the others.
        bf16: autocast matrix products to bfloat16.
    """

    steps: int = 5500
    batch_size: int = 16
    learning_rate: float = 0.01
    optimizer: str = "muon"
    seed: int = 1
    layers: int = 4
    width: int = 128
    heads: int = 4
    feed_forward: int = 384
    vocabulary: int = 1024
    context: int = 1024
    instructed: float = 0.33
    weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TAUGHT, 1.0))
    bf16: bool = False


@dataclass(frozen=True, slots=True)
class Curve:
    """How training went: one entry a recorded step.

    Attributes:
        steps: step numbers, from 1.
        losses: mean cross-entropy of the completion tokens since the last entry, in nats.
        seconds: wall time since the first step began.
        tokens: completion and prompt tokens seen so far.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


def build_tokenizer(vocabulary: int = 1024, seed: int = 1) -> Any:
    """Train a byte-level BPE on generated text and return it as a fast transformers tokenizer.

    Digits always split singly; R1's tokens keep R1's roles: start, end and padding are special, the turn and
    think marks are plain added tokens and survive decoding.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    marks = [USER, ASSISTANT, THINK, END_THINK]
    # AutoTokenizer rebuilds the tokenizer of every qwen2 model as Qwen2Tokenizer, whatever was saved: its way
    # of cutting text (digits singly) has to be ours, or the reloaded tokenizer cuts differently.
    pipeline = Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = pipeline.normalizer, pipeline.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(marks),
        special_tokens=[AddedToken(text, normalized=False, special=True) for text in (BOS, EOS, PAD)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    problems = generate(TAUGHT, "train", 7000, seed)
    texts = [f"{problem.question} {INSTRUCTION[problem.language]}" for problem in problems]
    texts += [f"{problem.reasoning}\n\n{problem.answer}" for problem in problems]
    tokenizer.train_from_iterator(texts, trainer)
    trained: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    merges: Any = [tuple(merge) for merge in trained["merges"]]
    fast: Any = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=merges,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=PAD,  # bytes are never unknown; the default would add a token that the model does not have
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.add_tokens([AddedToken(text, normalized=False, special=False) for text in marks])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def prompt_text(question: str) -> str:
    """Return `question` in the form in which the model meets it, the thinking opened."""
    return f"{BOS}{USER}{question}{ASSISTANT}{THINK}\n"


def completion_text(problem: Problem | Example) -> str:
    """Return what the model should write after the prompt."""
    return f"{problem.reasoning}\n{END_THINK}\n\n{problem.answer}{EOS}"


def build_model(recipe: Recipe, tokenizer: Any) -> Any:
    """Return a freshly initialised `Qwen2ForCausalLM` in fp32."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    if recipe.width % recipe.heads:
        raise UsageError(f"width ({recipe.width}) must be a multiple of heads ({recipe.heads})")
    torch.manual_seed(recipe.seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    return Qwen2ForCausalLM(config)


def batches(
    recipe: Recipe, tokenizer: Any, chunk: int = 32, examples: Sequence[Example] = ()
) -> Iterator[tuple[Any, Any]]:
    """Yield (input ids [B, T], labels [B, T]) without end; labels are -100 on prompt and padding.

    `examples` take the place of generated problems, where there are any: what a teacher wrote.

    Rows of one batch have similar lengths: `chunk` batches are drawn at once, sorted, cut and shuffled.
    """
    import torch

    rng = random.Random(f"order/{recipe.seed}")
    streams = {kind: stream(kind, "train", recipe.seed) for kind in recipe.weights}
    kinds, weights = list(recipe.weights), list(recipe.weights.values())
    while True:
        wanted = chunk * recipe.batch_size
        problems: list[Problem] | list[Example] = (
            rng.choices(examples, k=wanted)
            if examples
            else [next(streams[kind]) for kind in rng.choices(kinds, weights, k=wanted)]
        )
        questions = [
            f"{p.question} {INSTRUCTION['zh' if p.language == 'zh' else 'en']}"
            if rng.random() < recipe.instructed
            else p.question
            for p in problems
        ]
        prompts = tokenizer([prompt_text(q) for q in questions], add_special_tokens=False)["input_ids"]
        completions = tokenizer([completion_text(p) for p in problems], add_special_tokens=False)["input_ids"]
        rows = sorted(zip(prompts, completions, strict=True), key=lambda row: len(row[0]) + len(row[1]))
        cuts = [rows[at : at + recipe.batch_size] for at in range(0, len(rows), recipe.batch_size)]
        rng.shuffle(cuts)
        for cut in cuts:
            length = max(len(prompt) + len(completion) for prompt, completion in cut)
            ids = torch.full((len(cut), length), tokenizer.pad_token_id)
            labels = torch.full((len(cut), length), -100)
            for row, (prompt, completion) in enumerate(cut):
                end = len(prompt) + len(completion)
                ids[row, :end] = torch.tensor(prompt + completion)
                labels[row, len(prompt) : end] = torch.tensor(completion)
            yield ids, labels


def _optimizers(model: Any, recipe: Recipe) -> list[torch.optim.Optimizer]:
    import torch

    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named.items() if p.ndim != 2 or "embed" in name]
    if recipe.optimizer == "adamw":
        return [torch.optim.AdamW(list(named.values()), recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)]
    if recipe.optimizer != "muon":
        raise UsageError(f"optimizer must be muon or adamw, not {recipe.optimizer!r}")
    return [
        # Scaled to AdamW's update size, so that one learning rate serves both.
        torch.optim.Muon(matrices, recipe.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _factor(step: int, steps: int) -> float:
    warm = max(1, min(100, steps // 10))
    return min(1.0, (step + 1) / warm, (steps - step) / max(1, steps - warm))


def train(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    *,
    examples: Sequence[Example] = (),
    on_progress: Callable[[str], None] | None = None,
    every: int = 50,
) -> Curve:
    """Train `model` in place and return its loss curve; `every` steps one entry and one progress line.

    `examples` take the place of generated problems, where there are any.
    """
    import torch
    from torch.nn.functional import cross_entropy

    optimizers = _optimizers(model, recipe)
    autocast = torch.autocast("cpu", torch.bfloat16) if recipe.bf16 else contextlib.nullcontext()
    curve, source = Curve(), batches(recipe, tokenizer, examples=examples)
    losses: list[torch.Tensor] = []
    tokens = 0
    model.train()
    started = time.perf_counter()
    for step in range(recipe.steps):
        ids, labels = next(source)
        tokens += ids.numel()
        with autocast:
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            wanted = labels[:, 1:]
            # Only completion positions meet the vocabulary: a third of the work of the last layer.
            logits = model.lm_head(hidden[wanted != -100])
        loss: Any = cross_entropy(logits.float(), wanted[wanted != -100])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _factor(step, recipe.steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            spent = time.perf_counter() - started
            curve.steps.append(step + 1)
            curve.losses.append(float(torch.stack(losses).mean()))
            curve.seconds.append(spent)
            curve.tokens.append(tokens)
            losses = []
            if on_progress:
                left = spent / (step + 1) * (recipe.steps - step - 1)
                on_progress(
                    f"step {step + 1}/{recipe.steps}  loss {curve.losses[-1]:.4f}  "
                    f"{tokens / spent:,.0f} tokens/s  {math.ceil(left)} s left"
                )
    model.eval()
    return curve


def save(model: Any, tokenizer: Any, folder: str | Path) -> Path:
    """Write fp16 safetensors, configurations and tokenizer to `folder`, nothing pickled; return its path."""
    import torch
    import transformers

    generation_config: Any = transformers.GenerationConfig
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    half = copy.deepcopy(model).to(torch.float16)
    half.generation_config = generation_config(
        do_sample=True,
        temperature=0.6,
        top_p=0.95,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with quiet():
        half.save_pretrained(place)
        tokenizer.save_pretrained(place)
    for file in place.glob("*.safetensors"):
        file.chmod(0o644)  # written for the owner alone, which an installed package cannot use
    return place


@dataclass(frozen=True, slots=True)
class Score:
    """Accuracy on one kind of problem: `right` of `n`, with a Wilson 95 % interval from `low` to `high`."""

    kind: str
    n: int
    right: int
    low: float
    high: float

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.right / self.n


def evaluate(
    folder: str | Path,
    kinds: Sequence[str] = KINDS,
    n: int = 300,
    *,
    seed: int = 0,
    temperature: float = 0.6,
    top_p: float = 0.95,
    batch_size: int = 64,
    max_tokens: int = 320,
    instructed: bool = False,
    on_progress: Callable[[str], None] | None = None,
) -> list[Score]:
    """Ask a saved model `n` held-out problems of each kind and score the boxed number.

    Args:
        folder: what `save` wrote.
        kinds: kinds of problems.
        n: problems a kind.
        seed: of problems and draws.
        temperature: 0 decodes greedily; the defaults are R1's.
        top_p: nucleus mass.
        batch_size: rows generated at once.
        max_tokens: cap on trace and answer; what is cut off counts as wrong.
        instructed: whether R1's instruction for mathematics follows each question.
        on_progress: called with a line after each kind.
    """
    from scipy.stats import binomtest
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dsr1kit.local.decode import Decoder, run_rows
    from dsr1kit.local.rows import Row, marks_of

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype="float32")
    model.eval()
    scores = []
    decoder = Decoder(model, marks_of(tokenizer, model), int(model.config.max_position_embeddings))
    for kind in kinds:
        problems = sorted(generate(kind, "held_out", n, seed), key=lambda problem: len(problem.reasoning))
        right = 0
        for at in range(0, n, batch_size):
            part = problems[at : at + batch_size]
            asked = [f"{p.question} {INSTRUCTION[p.language]}" if instructed else p.question for p in part]
            prompts = tokenizer([prompt_text(text) for text in asked], add_special_tokens=False)["input_ids"]
            samplings = [
                Sampling(temperature, top_p, max_tokens, seed=seed, sample=at + row) for row in range(len(part))
            ]
            rows = [
                Row(prompt, sampling, max_tokens, thinking=True, on_token=lambda _: False)
                for prompt, sampling in zip(prompts, samplings, strict=True)
            ]
            run_rows(decoder, rows, batch_size)
            right += sum(boxed(str(tokenizer.decode(row.made))) == p.value for row, p in zip(rows, part, strict=True))
        interval = binomtest(right, n).proportion_ci(method="wilson")
        scores.append(Score(kind, n, right, float(interval.low), float(interval.high)))
        if on_progress:
            on_progress(f"{kind:<12} {right}/{n}")
    return scores


def boxed(completion: str) -> int | None:
    """Return the last number in `\\boxed{}` after the thinking; None when there is none."""
    found = re.findall(r"\\boxed\{(-?\d+)\}", completion.partition(END_THINK)[2])
    return int(found[-1]) if found else None
