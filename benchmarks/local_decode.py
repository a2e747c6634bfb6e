"""How fast is the kit's decoding beside plain `model.generate`, with the same weights, in one run?

    python benchmarks/local_decode.py MODEL [--tokens 64] [--prompts 64] [--repeat 5] [--dtype float32]
    python benchmarks/local_decode.py --random 1.5b        # a distill's true shape with random weights, for a GPU

MODEL is a folder, a hub id or a GGUF file. Three loads: one prompt, streamed (batch 1); a batch of equal prompts
(batch 8); and a mixed set, prompts and answers of many lengths, which `model.generate` takes in padded batches in
the order given. The contenders take turns; printed are tokens per second (median of the repeats) and the ratio.
llama.cpp (`--llama URL` of a running llama-server with the same weights) and, on a GPU, vLLM (where it is installed)
come beside. Checked as well: every token that the kit decodes greedily in fp32 is `model.generate`'s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import fit_truth

from dsr1kit.local.decode import Decoder, run_rows
from dsr1kit.local.load import load, quiet
from dsr1kit.local.rows import Row
from dsr1kit.records import Sampling

GREEDY = Sampling(temperature=0.0)


class Plain:
    """`model.generate`, padded on the left."""

    def __init__(self, loaded) -> None:
        self._model, self._pad = loaded.model, min(loaded.marks.ends)

    def many(self, prompts: list[list[int]], limits: list[int], at_once: int) -> list[list[int]]:
        out: list[list[int]] = []
        for at in range(0, len(prompts), at_once):
            part, most = prompts[at : at + at_once], limits[at : at + at_once]
            width = max(map(len, part))
            ids = torch.tensor([[self._pad] * (width - len(p)) + p for p in part], device=self._model.device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=self._model.device)
            made = self._model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=max(most),
                min_new_tokens=max(most), pad_token_id=self._pad, eos_token_id=-1,
            )  # fmt: skip
            out += [row[:limit] for row, limit in zip(made[:, width:].tolist(), most, strict=True)]
        return out


class Ours:
    """The kit's decoder, rows that end replaced by rows that wait."""

    def __init__(self, loaded, compiled: bool) -> None:
        from dataclasses import replace

        # Lengths are given: no token ends a row.
        marks = replace(loaded.marks, ends=frozenset({-1}))
        self._decoder = Decoder(loaded.model, marks, loaded.context, compiled=compiled)

    def many(self, prompts: list[list[int]], limits: list[int], at_once: int) -> list[list[int]]:
        rows = [
            Row(p, GREEDY, n, thinking=False, on_token=lambda _: False) for p, n in zip(prompts, limits, strict=True)
        ]
        run_rows(self._decoder, rows, at_once)
        return [row.made for row in rows]


class Llama:
    """A running llama-server: its native completion endpoint takes token ids."""

    def __init__(self, url: str) -> None:
        self._url = url.removesuffix("/v1").rstrip("/")

    def many(self, prompts: list[list[int]], limits: list[int], at_once: int) -> list[list[int]]:
        async def one(prompt: list[int], limit: int, gate: asyncio.Semaphore) -> list[int]:
            body = {"prompt": prompt, "n_predict": limit, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
            data = json.dumps(body | {"return_tokens": True}).encode()
            request = urllib.request.Request(self._url + "/completion", data, {"Content-Type": "application/json"})  # noqa: S310 - loopback
            async with gate:
                with await asyncio.to_thread(urllib.request.urlopen, request) as answer:
                    return list(json.load(answer)["tokens"])

        async def all_of_them() -> list[list[int]]:
            gate = asyncio.Semaphore(at_once)
            return await asyncio.gather(*(one(p, n, gate) for p, n in zip(prompts, limits, strict=True)))

        return asyncio.run(all_of_them())


class Vllm:
    """vLLM in this process, on a GPU."""

    def __init__(self, folder: str, dtype: str) -> None:
        from vllm import LLM

        self._engine = LLM(folder, dtype=dtype, gpu_memory_utilization=0.4, enable_prefix_caching=False)

    def many(self, prompts: list[list[int]], limits: list[int], at_once: int) -> list[list[int]]:
        from vllm import SamplingParams

        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in limits]
        outputs = self._engine.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny-r1")
    parser.add_argument("--random", metavar="SHAPE", help="random weights in the shape of 1.5b, 7b, ...")
    parser.add_argument(
        "--tokens", type=int, default=64, help="new tokens a prompt; in the mixed set a quarter to twice"
    )
    parser.add_argument("--prompts", type=int, default=64, help="prompts of the mixed set")
    parser.add_argument("--at-once", type=int, default=16, help="rows at once in the mixed set, for all contenders")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--llama", metavar="URL", help="a running llama-server with the same weights")
    parser.add_argument("--vllm", action="store_true", help="beside vLLM, where it is installed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.random:
            fit_truth.write_model(args.random, Path(folder))
        source = folder if args.random else args.model
        loaded = load(source, args.quantization, "auto", args.dtype, None)
        print(
            f"{args.random or Path(args.model).name}: {loaded.parameters:,} parameters, {loaded.device}, "
            f"{loaded.dtype}, {loaded.quantization}, {torch.get_num_threads()} threads",
            flush=True,
        )
        contenders = {
            "model.generate": Plain(loaded),
            "dsr1kit": Ours(loaded, loaded.device.startswith("cuda") and loaded.quantization != "8bit"),
        }
        if args.llama:
            contenders["llama.cpp"] = Llama(args.llama)
        if args.vllm:
            contenders["vLLM"] = Vllm(source, loaded.dtype)
        dice = random.Random(1)
        vocabulary = int(loaded.model.config.vocab_size)

        def prompt(length: int) -> list[int]:
            return [dice.randrange(min(300, vocabulary - 1), vocabulary) for _ in range(length)]

        n = args.prompts
        # An exponential spread, as answers have: a few are many times longer than most.
        lengths = [max(8, min(160, int(dice.expovariate(1 / 48)))) for _ in range(n)]
        limits = [max(4, min(4 * args.tokens, int(dice.expovariate(1 / args.tokens)))) for _ in range(n)]
        loads = {
            "batch 1": ([prompt(48)], [2 * args.tokens], 1),
            "batch 8": ([prompt(48) for _ in range(8)], [args.tokens] * 8, 8),
            f"mixed {n}": ([prompt(length) for length in lengths], limits, args.at_once),
        }
        with quiet(python_warnings=False), torch.inference_mode():
            for name, (prompts, most, at_once) in loads.items():
                compare(name, contenders, prompts, most, at_once, args.repeat, exact=loaded.dtype == "float32")


def compare(name, contenders, prompts, limits, at_once, repeat, *, exact) -> None:
    seconds: dict[str, list[float]] = {who: [] for who in contenders}
    made: dict[str, list[list[int]]] = {}
    for turn in range(repeat + 1):  # the first warms up
        for who in list(contenders)[:: 1 if turn % 2 else -1]:
            began = time.perf_counter()
            made[who] = contenders[who].many(prompts, limits, at_once)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[who].append(time.perf_counter() - began)
    tokens = sum(limits)
    plain = seconds["model.generate"]
    print(f"\n{name}: {len(prompts)} prompts, {tokens:,} new tokens")
    for who, spent in seconds.items():
        # Rounds are compared with themselves: what else the machine does meets both.
        ratio = statistics.median(b / a for a, b in zip(spent, plain, strict=True))
        print(
            f"  {who:<15} {tokens / statistics.median(spent):9.1f} tokens/s   {ratio:5.2f}x of model.generate",
            flush=True,
        )
    if exact:
        same = sum(a == b for a, b in zip(made["dsr1kit"], made["model.generate"], strict=True))
        print(f"  the same tokens in {same} of {len(prompts)} rows")


if __name__ == "__main__":
    main()
