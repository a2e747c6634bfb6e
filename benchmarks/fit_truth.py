"""Does a model take the memory that `dsr1kit fits` tells? Predicted against measured peaks, a process each.

A model of the true shape with random weights (memory and speed do not depend on their values) is opened by LocalModel
and answers behind a prompt that fills its context but for 32 tokens. On a processor the peak is that of the resident
set from when the model is open, less pages of the weights file that were only read to convert them, which the kernel
takes back when it needs them; on a GPU what torch reserved, and what the driver holds besides.

    python benchmarks/fit_truth.py [--only smollm2-135m,7b] [--model FOLDER] [--t4]

`--t4` (with CUDA) forbids bfloat16 and caps the memory at a T4's. Exit 1 when a ratio is outside 0.85 to 1.15.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dsr1kit.local.memory import GIB, MIB, need
from dsr1kit.local.shapes import find_shape
from dsr1kit.paths import data_dir

LOW, HIGH, NEW = 0.85, 1.15, 32
T4_BYTES = int(14.7 * GIB)
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Case:
    model: str
    precision: str
    context: int
    device: str


def cases(cuda: bool, only: list[str]) -> list[Case]:
    found = [
        Case("smollm2-135m", precision, context, "cpu")
        for precision in ("fp32", "bf16", "nf4")
        for context in (2048, 8192)
    ]
    if cuda:
        found += [
            Case(model, precision, context, "cuda:0")
            for model in ("1.5b", "7b", "14b")
            for precision in ("fp16", "nf4")
            for context in (2048, 16384)
        ]
    return [case for case in found if not only or case.model in only]


def write_model(name: str, folder: Path) -> None:
    """A folder of the model's true shape with random bfloat16 weights and tiny-r1's tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from dsr1kit.config import read_toml

    values = read_toml(data_dir() / "models.toml")["model"][name]["config"]
    config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    number = total = 0

    def flush() -> None:
        nonlocal shard, number
        number += 1
        save_file(shard, folder / f"model-{number:05}.safetensors", metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, f"model-{number:05}.safetensors"))
        shard = {}

    for key, tensor in model.named_parameters():  # of tied ones, the first
        random = torch.empty(tensor.shape, dtype=torch.bfloat16, device=device)
        random.fill_(1.0) if key.endswith("norm.weight") else random.normal_(0, tensor.shape[-1] ** -0.5)
        shard[key] = random.cpu()
        total += random.nbytes
        if sum(part.nbytes for part in shard.values()) > 4 * GIB:
            flush()
    if shard:
        flush()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    config.architectures = [type(model).__name__]
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, 2
    config.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(data_dir() / "tiny-r1" / file, folder)


def measure(case: Case, folder: str, t4: bool) -> int:
    """Peak bytes of opening the model, filling its context and answering, in this process."""
    import torch

    from dsr1kit import LocalModel, Sampling
    from dsr1kit.records import Outcome

    cuda = case.device.startswith("cuda")
    if cuda and t4:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((T4_BYTES - 600 * MIB) / total)
        torch.cuda.is_bf16_supported = lambda **_: False
    quantization = "4bit" if case.precision == "nf4" else "none"
    dtype = DTYPES.get(case.precision, "float16" if cuda else "bfloat16")

    peak = [0]

    async def work() -> None:
        async with LocalModel(folder, dtype=dtype, quantization=quantization, device=case.device) as r1:
            forget_peak()  # what loading mapped is given back
            ids = r1.loaded.tokenizer("7" * 64, add_special_tokens=False)["input_ids"]
            room = min(case.context, r1.loaded.context) - NEW - 16
            content = "7" * (64 * room // len(ids))
            reply = await r1.ask([{"role": "user", "content": content}], Sampling(temperature=0, max_tokens=NEW))
            assert reply.outcome in (Outcome.OK, Outcome.TRUNCATED, Outcome.EMPTY), (reply.outcome, reply.detail)
            used = (reply.usage.prompt_tokens or 0) + NEW
            assert 0.97 * case.context <= used <= case.context, used
            peak[0] = peak_resident(Path(folder), kept_bytes(case))

    asyncio.run(work())
    if cuda:
        free, total = torch.cuda.mem_get_info()
        beside = total - free - torch.cuda.memory_reserved()  # the context; of others, too, where the card is shared
        return torch.cuda.max_memory_reserved() + beside
    return peak[0]


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_resident(folder: Path, kept: int) -> int:
    """Highest resident bytes since the mark was cleared, less pages of the weights file that nothing uses any more."""
    highest = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    mapped, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counts = line.endswith(".safetensors") and str(folder) in line
        elif counts and line.startswith("Rss:"):
            mapped += 1024 * int(line.split()[1])
    assert highest
    return 1024 * int(highest[1]) - max(0, mapped - kept)


def kept_bytes(case: Case) -> int:
    """Bytes of the mapped weights file that the open model still uses: all, what is not quantized, or none."""
    shape = find_shape(case.model)
    if case.precision == "nf4":
        return 2 * (shape.parameters - sum(m.weights for m in shape.matrices() if m.linear))
    return 0 if case.precision == "fp32" else 2 * shape.parameters


def compare(case: Case, folder: str, t4: bool) -> bool:
    """Print one line; whether the prediction is near enough."""
    start = f"{case.model:<14}{case.precision:<9}{case.context:>9}  {case.device:<7}"
    device = case.device.partition(":")[0]
    predicted = need(find_shape(case.model), precision=case.precision, context=case.context, device=device).total
    if t4 and device == "cuda" and predicted > T4_BYTES:
        print(f"{start}{predicted / GIB:>11.2f}  told not to fit a T4: left out", flush=True)
        return True
    command = [sys.executable, __file__, "--one", json.dumps([[*vars(case).values()], folder])]
    done = subprocess.run(command + ["--t4"] * t4, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        print(f"{start}{predicted / GIB:>11.2f}  failed: {done.stderr.strip()[-400:]}", flush=True)
        return False
    measured = int(done.stdout.splitlines()[-1])
    ratio = predicted / measured
    print(f"{start}{predicted / GIB:>11.2f}{measured / GIB:>11.2f}{ratio:>7.2f}", flush=True)
    return LOW <= ratio <= HIGH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models, separated by commas")
    parser.add_argument("--model", default="", help="a folder with real weights of the model in --only")
    parser.add_argument("--t4", action="store_true", help="imitate a T4 on a larger card")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        case, folder = json.loads(options.one)
        print(measure(Case(*case), folder, options.t4))
        return
    import torch

    only = [name for name in options.only.split(",") if name]
    todo = cases(torch.cuda.is_available(), only)
    print("model         precision  context  device   predicted   measured  ratio   (GiB)")
    near = []
    for name in dict.fromkeys(case.model for case in todo):
        with tempfile.TemporaryDirectory() as temporary:
            if not options.model:
                write_model(name, Path(temporary))
            folder = options.model or temporary
            near += [compare(case, folder, options.t4) for case in todo if case.model == name]
    raise SystemExit(0 if all(near) else 1)


if __name__ == "__main__":
    main()
