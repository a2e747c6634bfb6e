"""How fast does the kit train beside TRL's SFTTrainer, in how much memory, and by which of its settings?

    python benchmarks/finetune_throughput.py [MODEL] [--rows 512] [--rounds 3] [--data worked:arithmetic ...]
    python benchmarks/finetune_throughput.py --gpu-shapes      # 7B and 14B shapes in NF4 under a T4's memory

MODEL is tiny-r1, a folder, a hub id or a GGUF file. The same model, rows and adapter (rank 16 on all linear layers) go
through SFTTrainer with its defaults, then with one setting after the other taken over from the kit's preset, then
through `train_sft`. Each pass over the rows is a process of its own; the variants take turns over several rounds and
are compared within a round. Told are tokens per second without padding (from the beginning of the first step to the
end of the last), the peak of memory while training (resident on a processor, torch's on a GPU), and what each setting
brings; by processor time as well, which suffers less from what else the machine does. The loss counts the completion
alone in all of them. `--query-value` adds SFTTrainer's defaults with PEFT's default layers, query and value alone.

`--gpu-shapes` (CUDA) trains random weights of the true shapes by QLoRA on rows that fill 2,048 tokens (7B) and 1,024
(14B), with bfloat16 forbidden and memory capped at a T4's 14.7 GB.

Exit 1 when a mark is missed: 1.3 times SFTTrainer's defaults, and not behind it at equal batch, precision,
checkpointing and packing; or a shape that does not fit under the cap.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import fit_truth

from dsr1kit.finetune.base import open_base, targets
from dsr1kit.finetune.data import Example, example, instructed, load_examples
from dsr1kit.finetune.encode import completion_text, encode_all
from dsr1kit.finetune.rows import row_order
from dsr1kit.finetune.settings import AdapterSettings, SftSettings, settings_for
from dsr1kit.finetune.sft import precision_of, train_sft
from dsr1kit.finetune.tuning import suited, tokenizer_and_marks
from dsr1kit.local.load import quiet
from dsr1kit.local.memory import GIB, MIB
from dsr1kit.local.prompts import prompt_text

DEFAULTS, EQUAL, KIT, NARROW = "SFTTrainer, defaults", "batch", "dsr1kit", "SFTTrainer, query and value"
#: From SFTTrainer's defaults to the kit, one setting at a time, each on top of those before.
STEPS = (DEFAULTS, "checkpointing", "precision", EQUAL, "rows of like length", KIT)
MARKS = ((DEFAULTS, 1.3), (EQUAL, 1.0))
TINY_DATA = ("worked:arithmetic", "worked:arithmetic:sum4")
DATA = ("worked:reasoning-gym:chain_sum:max_terms=3,max_digits=2",)
SHAPES = (("7b", 2048), ("14b", 1024))


def clocked() -> Any:
    """A callback that transformers gives to every trainer: when steps began and ended, in seconds."""
    from transformers import TrainerCallback, trainer

    class Clock(TrainerCallback):
        wall = spent = began = began_cpu = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            forget_peak()
            Clock.began, Clock.began_cpu = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            import torch

            if torch.cuda.is_available():
                torch.cuda.synchronize()
            Clock.wall = time.perf_counter() - Clock.began
            Clock.spent = time.process_time() - Clock.began_cpu

    trainer.DEFAULT_CALLBACKS.append(Clock)
    return Clock


def forget_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        fit_truth.forget_peak()


def peak() -> int:
    """Bytes since the mark was cleared."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        return 1024 * int(found[1]) if found else 0
    return 0


def settings_of(model: str) -> SftSettings:
    """The kit's preset for this machine."""
    return settings_for(model, suited(model), rank=16)


def rows_of(model: str, data: list[str], rows: int) -> list[Example]:
    each = -(-rows // len(data))
    return load_examples([f"{name}:{each}" for name in data or default_data(model)])[:rows]


def default_data(model: str) -> list[str]:
    return list(TINY_DATA if model == "tiny-r1" else DATA)


def by_kit(settings: SftSettings, examples: list[Example], out: str) -> int:
    """Train with the kit; returns the tokens read."""
    steps = len(examples) // (settings.batch_size * settings.accumulation)
    return train_sft(replace(settings, steps=steps), examples, out).tokens


def by_trl(variant: str, settings: SftSettings, examples: list[Example], out: str) -> int:
    """Train with SFTTrainer, with the kit's settings up to `variant`; returns the tokens read."""
    import datasets
    import peft
    import trl

    reached = STEPS.index(DEFAULTS if variant == NARROW else variant)

    def taken(step: str) -> bool:
        return reached >= STEPS.index(step)

    dtype = settings.dtype if taken("precision") else "float32"
    loaded = open_base(settings.model, method=settings.adapter.method, dtype=dtype, device=settings.device)
    loaded.model.train()
    end = str(loaded.tokenizer.eos_token or "")
    texts = []
    for one in instructed(examples, settings.instructed):
        prompt, opened = prompt_text(loaded.tokenizer, loaded.marks, one.messages)
        texts.append({"prompt": prompt, "completion": completion_text(one, opened, end)})
    own: dict[str, Any] = {}
    if taken("checkpointing"):
        own["gradient_checkpointing"] = settings.checkpointing
    if taken("precision"):
        own |= precision_of(loaded)
    if taken(EQUAL):
        own |= {"per_device_train_batch_size": settings.batch_size}
        own |= {"gradient_accumulation_steps": settings.accumulation}
    if taken("rows of like length"):
        lengths = [len(row.input_ids) for row in encode_all(loaded.tokenizer, loaded.marks, examples, settings.loss)]
        batch = settings.batch_size * settings.accumulation
        texts = [texts[at] for at in row_order(lengths, batch, len(texts) // batch, settings.seed)]
        own["train_sampling_strategy"] = "sequential"
    if loaded.device == "cpu":
        own["use_cpu"] = True
    trainer = trl.SFTTrainer(
        model=loaded.model,
        args=trl.SFTConfig(out, num_train_epochs=1, report_to="none", disable_tqdm=True, **own),
        train_dataset=datasets.Dataset.from_list(texts),
        processing_class=loaded.tokenizer,
        peft_config=peft.LoraConfig(
            r=settings.adapter.rank,
            lora_alpha=settings.adapter.alpha,
            target_modules=None if variant == NARROW else targets(loaded.model),
            task_type="CAUSAL_LM",
        ),
    )
    trainer.train()
    return sum(map(len, trainer.train_dataset["input_ids"]))


def one_pass(variant: str, model: str, data: list[str], rows: int) -> dict[str, float]:
    """One pass over the rows, in this process."""
    import torch

    clock = clocked()
    settings = settings_of(model)
    examples = rows_of(model, data, rows)
    with tempfile.TemporaryDirectory() as out, quiet(python_warnings=False):
        tokens = by_kit(settings, examples, out) if variant == KIT else by_trl(variant, settings, examples, out)
        found = {"tokens": tokens, "wall_s": clock.wall, "cpu_s": clock.spent, "peak": peak()}
    if torch.cuda.is_available():
        found["cpu_s"] = clock.wall  # the processor only waits
    return found


def in_process(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed: {done.stderr.strip()[-1500:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(model: str, data: list[str], rows: int, rounds: int, narrow: bool) -> bool:
    """Print what was measured; whether all marks are met."""
    settings = settings_of(model)
    variants = (*STEPS, NARROW) if narrow else STEPS
    batch = settings.batch_size * settings.accumulation
    rows = max(batch, rows // batch * batch)
    print(
        f"{Path(model).name}: {rows} rows of {', '.join(data or default_data(model))}; preset: "
        f"{settings.adapter.method}, dtype {settings.dtype}, batch {settings.batch_size} x "
        f"{settings.accumulation}, checkpointing {settings.checkpointing}, packing {settings.packing}; "
        f"load at the start {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    measured: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
    for turn in range(rounds):
        for variant in variants[:: -1 if turn % 2 else 1]:
            asked = json.dumps([variant, model, data or default_data(model), rows])
            measured[variant].append(in_process("--one", asked))
            spent = measured[variant][-1]
            print(
                f"  round {turn + 1}: {variant:<28}{spent['tokens'] / spent['wall_s']:>9.1f} tokens/s"
                f"{spent['tokens'] / spent['cpu_s']:>9.1f} a processor-second",
                flush=True,
            )
    print(f"\n{'':<30}{'tokens/s':>9}{'peak GiB':>10}   factor (range)          by processor time")
    for before, variant in zip((None, *variants), variants, strict=False):
        rates = [one["tokens"] / one["wall_s"] for one in measured[variant]]
        memory = statistics.median(one["peak"] for one in measured[variant]) / GIB
        line = f"{variant:<30}{statistics.median(rates):>9.1f}{memory:>10.2f}"
        if before is not None:
            before = DEFAULTS if variant == NARROW else before
            line += f"   {told(ratios(measured, variant, before, 'wall_s')):<24}"
            line += told(ratios(measured, variant, before, "cpu_s"))
        print(line)
    print("a factor is over the line before; each setting is as the kit's from its line on\n")
    met = []
    for over, wanted in MARKS:
        found = ratios(measured, KIT, over, "wall_s")
        good = statistics.median(found) >= wanted
        by_cpu = told(ratios(measured, KIT, over, "cpu_s"))
        what = "SFTTrainer at equal batch, precision, checkpointing and packing" if over == EQUAL else over
        print(f"{'met' if good else 'MISSED'}: {told(found)} of {what}, wanted {wanted}; by processor time {by_cpu}")
        met.append(good)
    print(f"load at the end {os.getloadavg()[0]:.1f}", flush=True)
    return all(met)


def ratios(measured: dict[str, list[dict[str, Any]]], variant: str, over: str, by: str) -> list[float]:
    """Tokens per second of one variant over another's, within each round."""
    pairs = zip(measured[variant], measured[over], strict=True)
    return [(a["tokens"] / a[by]) / (b["tokens"] / b[by]) for a, b in pairs]


def told(found: list[float]) -> str:
    return f"{statistics.median(found):.2f}x ({min(found):.2f} to {max(found):.2f})"


def filled(model: str, length: int, rows: int) -> list[Example]:
    """Rows of nearly `length` tokens: worked sums, one behind the other."""
    tokenizer, marks = tokenizer_and_marks(model)
    pool = load_examples(["worked:arithmetic:1000"])
    found, at = [], 0
    for number in range(rows):
        parts: list[str] = []
        row = None
        while True:
            for _ in range(4):
                parts.append(pool[at % len(pool)].reasoning)
                at += 1
            longer = example(f"Row {number}: work all of it out.", "\n".join(parts), "Done.")
            if len(encode_all(tokenizer, marks, [longer])[0].input_ids) > length:
                break
            row = longer
        assert row is not None
        found.append(row)
    return found


def train_shape(folder: str, length: int) -> dict[str, float]:
    """Tokens per second and peak of QLoRA as on a T4, in this process."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    # What the driver keeps for a process is not torch's.
    torch.cuda.set_per_process_memory_fraction((fit_truth.T4_BYTES - 600 * MIB) / total)
    torch.cuda.is_bf16_supported = lambda **_: False
    clock = clocked()
    settings = SftSettings(
        model=folder,
        adapter=AdapterSettings(method="qlora", rank=16, alpha=32),
        batch_size=1,
        accumulation=4,
        steps=5,
        max_length=length,
        checkpointing=True,
        dtype="float16",
        device="cuda",
        instructed=0.0,
        save_every=0,
    )
    examples = filled(folder, length, settings.accumulation * 5)
    with tempfile.TemporaryDirectory() as out, quiet(python_warnings=False):
        trained = train_sft(settings, examples, out)
    assert trained.left_out == 0
    return {
        "tokens": trained.tokens,
        "wall_s": clock.wall,
        "peak": peak(),
        "reserved": torch.cuda.max_memory_reserved(),
        "loss": trained.curve.losses[-1],
    }


def gpu_shapes() -> bool:
    """Print tokens per second and peak of each shape; whether all fit."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("--gpu-shapes needs an NVIDIA GPU; here is none")
    print(f"{torch.cuda.get_device_name(0)}, memory capped at {fit_truth.T4_BYTES / GIB:.1f} GiB, no bfloat16, NF4")
    met = []
    for shape, length in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            fit_truth.write_model(shape, Path(folder))
            torch.cuda.empty_cache()
            try:
                found = in_process("--shape", json.dumps([folder, length]))
            except SystemExit as failed:
                print(f"  {shape:<5}{length:>6} tokens a row: MISSED: {failed}", flush=True)
                met.append(False)
                continue
        met.append(found["reserved"] <= fit_truth.T4_BYTES)
        print(
            f"  {shape:<5}{length:>6} tokens a row: {found['tokens'] / found['wall_s']:8.1f} tokens/s, peak "
            f"{found['peak'] / GIB:.2f} GiB allocated, {found['reserved'] / GIB:.2f} reserved",
            flush=True,
        )
    return all(met)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny-r1")
    parser.add_argument("--data", nargs="+", default=[], help="as for dsr1kit finetune; worked examples by default")
    parser.add_argument("--rows", type=int, default=512, help="rows of a pass, in whole batches")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--query-value", action="store_true", help="PEFT's default layers beside")
    parser.add_argument("--gpu-shapes", action="store_true", help="7B and 14B shapes in NF4 under a T4's memory")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    parser.add_argument("--shape", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one_pass(*json.loads(args.one))))
        return
    if args.shape:
        print(json.dumps(train_shape(*json.loads(args.shape))))
        return
    if args.gpu_shapes:
        raise SystemExit(0 if gpu_shapes() else 1)
    raise SystemExit(0 if compare(args.model, args.data, args.rows, args.rounds, args.query_value) else 1)


if __name__ == "__main__":
    main()
