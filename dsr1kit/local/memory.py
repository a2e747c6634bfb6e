"""How much memory a model needs, computed from its shape: nothing is loaded, nothing measured.

The formulae stand in `need`; benchmarks/fit_truth.py holds them against measured peaks. Knows shapes and byte sizes;
nothing about which model to prefer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, cast, get_args

from dsr1kit.errors import UnknownName, UsageError

if TYPE_CHECKING:
    from dsr1kit.local.hardware import Hardware
    from dsr1kit.local.shapes import Matrix, Shape

Purpose = Literal["inference", "qlora", "lora"]
PRECISIONS = ("fp32", "fp16", "bf16", "8bit", "nf4", "q4_k_m")
MIB, GIB = 1 << 20, 1 << 30
CHUNK = 512  # tokens of a prompt that are computed at once, by the kit's engine and by llama.cpp alike
TOGETHER = 8  # prompts that the kit's engine reads in at once
#: A dtype of torch or a quantization of the kit, as the planner calls the precision.
PRECISION_OF = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "8bit": "8bit", "4bit": "nf4"}
GROWTH = 1.25  # by this factor its attention cache grows when it is full
RANK = 16  # of an adapter on all linear layers
# Measured resident sizes after imports and a small forward pass (Linux x86-64, torch 2.13, transformers 5.23); for
# bitsandbytes with its own code and what its packing leaves behind in the allocator.
_PROCESS, _BITSANDBYTES, _LLAMA_CPP = 400 * MIB, 100 * MIB, 100 * MIB
_CUDA = 600 * MIB  # context, libraries' kernels, cuBLAS workspaces and rounding of blocks
# Bits a weight of llama.cpp's block formats: 256 weights with their scales in 144, 176, 210 bytes; 32 in 22 and 34.
_Q4_K, _Q5_K, _Q6_K, _Q5_0, _Q8_0 = 4.5, 5.5, 6.5625, 5.5, 8.5


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that a model needs, by what they are for; the last three when fine-tuning."""

    weights: int
    kv_cache: int
    activations: int
    overhead: int
    adapter: int = 0
    gradients: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        """Sum of all parts, bytes."""
        return sum(size for _, size in self.parts())

    def parts(self) -> Iterator[tuple[str, int]]:
        """Each part that is not zero: (name, bytes)."""
        for field in fields(self):
            if size := getattr(self, field.name):
                yield field.name, size


def purpose_named(name: str) -> Purpose:
    """The purpose of that name. Raises UnknownName."""
    if name not in get_args(Purpose):
        raise UnknownName("purpose", name, get_args(Purpose))
    return cast(Purpose, name)


def half_precision(hardware: Hardware) -> str:
    """The 16-bit format that a machine multiplies, or `fp32` for a processor that has none."""
    if hardware.gpus:
        return "bf16" if hardware.gpus[0].bf16 else "fp16"
    return "bf16" if "avx512_bf16" in hardware.cpu_features else "fp32"


def available(hardware: Hardware) -> int:
    """Bytes free for one model: of all GPUs together, or of the host's memory where there is none."""
    return sum(gpu.free_bytes for gpu in hardware.gpus) if hardware.gpus else hardware.memory_free_bytes


def need(
    shape: Shape,
    *,
    precision: str,
    context: int,
    batch: int = 1,
    purpose: str = "inference",
    device: str = "cuda",
    gpus: int = 1,
    double_quant: bool = True,
    whole_logits: bool = True,
    rank: int = RANK,
) -> Need:
    """Bytes needed to answer or to fine-tune with `context` tokens in each of `batch` rows.

    With L layers, hidden width d, feed-forward width f, q and k values of queries and keys a token, vocabulary V, b
    bytes a value (2, in fp32 4), and T = min(batch, 8) * min(context, 512) tokens computed at once:

    - weights. fp32 4, fp16 and bf16 2 bytes. Quantizers take the linear layers alone; embeddings, output matrix,
      norms and biases stay in 16 bits. `8bit`, LLM.int8: 1 byte, and 4 a row (arXiv 2208.07339); for a model native
      in fp8 that: 1 byte, and 4 a block of 128x128 (arXiv 2412.19437). `nf4`: half a byte, and a scale for 64
      weights: in fp32 4.5 bits a weight, or, doubly quantized, in 8 bits with an fp32 for 256 of them, 4.127 (QLoRA,
      arXiv 2305.14314). `q4_k_m`: llama.cpp's rule: 4.5 bits; 6.5625 for the output matrix and for half of the
      value and down projections; 32-bit vectors; rows that are no multiple of 256 take 5.5 and 8.5 (Llama-70B's
      values 5.5, since eight query heads share one).
    - kv_cache: batch * context * 2 L k values of b bytes, k being those of all key heads; the kit's engine grows it in
      steps and may hold 1.25 times that; llama.cpp reserves exactly the context, in 16 bits. DeepSeek-V3: 576
      values a token and layer, in an engine that absorbs the projections (vLLM, SGLang); transformers expands them to
      40,960 and is no way to run it.
    - activations: T (max(3 f, 3 q + 3 k) b + 3 d b + 8 d); one layer's cache repeated to the query heads; a mask of
      T * context; logits of the last position with what sampling in fp64 holds (44 V batch); for quantized weights
      the largest matrix once in 16 bits. llama.cpp: 512 (V + 2 d) values in fp32.
    - overhead: a process with torch and transformers (400 MiB, 100 more with bitsandbytes) or, on a GPU, the context
      (600 MiB on each); host memory of a GPU's process is not counted,
      nor are pages of the weights file that a processor maps while it converts them: the kernel takes those back.
    - fine-tuning: adapter matrices r (rows + columns) of all linear layers in fp32, as much of gradients, twice that
      for Adam; gradient checkpointing: batch * context (2 d L + one layer's (2 (4 q + 4 k + 6 d) + 8 f)), and
      logits with their gradients, 10 bytes * V a token, or 512 tokens of them where the loss is computed in pieces
      (`whole_logits` False: Liger, Unsloth). Peaks told by others are met within about 25 %: batches, kernels and
      allocators differ.

    Args:
        shape: the model's.
        precision: one of `PRECISIONS`, of the base's weights.
        context: tokens of prompt and completion, or of a training row.
        batch: rows at once.
        purpose: `inference`, `lora` or `qlora` (which is `nf4`).
        device: `cuda` or `cpu`.
        gpus: devices that share the model.
        double_quant: of nf4's scales, as the kit loads them.
        whole_logits: the loss is computed over all tokens at once, as transformers does.
        rank: of the adapter.

    Raises:
        UnknownName: no such precision or purpose.
        UsageError: a size below 1, or a precision that the purpose cannot have.
    """
    if precision not in PRECISIONS:
        raise UnknownName("precision", precision, PRECISIONS)
    what = purpose_named(purpose)
    if context < 1 or batch < 1:
        raise UsageError(f"context and batch must be at least 1, not {context} and {batch}")
    if (what == "qlora" and precision != "nf4") or (what == "lora" and precision in ("nf4", "q4_k_m")):
        raise UsageError(f"{what} does not train on {precision} weights: qlora takes nf4, lora 16 bits, fp32 or 8bit")
    weights, overhead = weight_bytes(shape, precision, double_quant=double_quant), _overhead(precision, device, gpus)
    if what != "inference":
        return _tuning(shape, precision, weights, overhead, context, batch, rank, whole_logits)
    size = 4 if precision == "fp32" else 2
    held = batch * context * shape.cached_values * size
    if precision == "q4_k_m":
        return Need(weights, held, 4 * CHUNK * (shape.vocab + 2 * shape.hidden), overhead)
    if not shape.latent:
        places = min(round(GROWTH * context), max(context, shape.context))
        held = batch * places * shape.cached_values * size
    return Need(weights, held, _activations(shape, precision, size, context, batch, device), overhead)


def weight_bytes(shape: Shape, precision: str, *, double_quant: bool = True) -> int:
    """Bytes of the weights alone, in memory or in a file of that format; the formulae are in `need`."""
    if precision in ("fp32", "fp16", "bf16"):
        return shape.parameters * (4 if precision == "fp32" else 2)
    if precision == "q4_k_m":
        # Norms and biases, and the router, stay in fp32.
        routers = sum(m.weights for m in shape.matrices() if m.role == "router")
        return round(sum(_k_quant_bits(shape, m) * m.weights for m in shape.matrices()) / 8) + 4 * (
            shape.vectors + routers
        )
    total = 2 * shape.vectors
    for matrix in shape.matrices():
        n = matrix.weights
        if not matrix.linear:
            total += 2 * n
        elif precision == "8bit":
            total += n + (n // 128**2 * 4 if shape.native == "fp8" else 4 * matrix.rows * matrix.count)
        else:
            total += n // 2 + (n // 64 + n // (64 * 256) * 4 if double_quant else n // 64 * 4)
    return total


def read_bytes(shape: Shape, precision: str, context: int) -> float:
    """Bytes read to decode one token behind `context` others: the active weights and the cache."""
    share = shape.active_parameters / shape.parameters
    cache = context * shape.cached_values * (4 if precision == "fp32" else 2)
    return weight_bytes(shape, precision) * share + cache


def _k_quant_bits(shape: Shape, matrix: Matrix) -> float:
    """Bits a weight of llama.cpp's Q4_K_M, from its rule for each tensor (src/llama-quant.cpp)."""
    if matrix.role == "router":
        return 0.0
    whole = matrix.columns % 256 == 0
    low, high = (_Q4_K, _Q6_K) if whole else (_Q5_0, _Q8_0)
    if matrix.role == "head" or (matrix.role == "embedding" and shape.tied):
        # An output matrix with rows that are no whole blocks is Q8_0 at once.
        return high
    if matrix.role not in ("value", "down"):
        return low
    n = shape.layers
    more = sum(1 for i in range(n) if i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2) / n
    if matrix.role == "value" and n == 80 and shape.heads == 8 * shape.kv_heads:
        low = _Q5_K
    return more * high + (1 - more) * low


def _activations(shape: Shape, precision: str, size: int, context: int, batch: int, device: str) -> int:
    rows = min(batch, TOGETHER) * min(context, CHUNK)
    narrow = shape.kv_heads * shape.head_dim
    inner = shape.intermediate
    if shape.experts:
        inner = max(inner, shape.experts.used * shape.experts.width)
    wide = max(3 * inner, 3 * shape.query_width + 3 * narrow)
    flowing = rows * (wide * size + 3 * shape.hidden * size + 8 * shape.hidden)
    repeated = 0 if shape.latent else 2 * min(batch, TOGETHER) * context * shape.query_width * size
    mask = rows * context * (size if device == "cpu" else 1)
    drawn = 44 * batch * shape.vocab
    unpacked = 0
    if precision in ("nf4", "8bit") and shape.native != "fp8":
        unpacked = 2 * max(m.rows * m.columns for m in shape.matrices() if m.linear)
    return max(flowing + mask, repeated + mask, drawn) + unpacked


def _overhead(precision: str, device: str, gpus: int) -> int:
    if device.startswith("cuda"):
        return _CUDA * gpus
    if precision == "q4_k_m":
        return _LLAMA_CPP
    return _PROCESS + (_BITSANDBYTES if precision in ("nf4", "8bit") else 0)


def _tuning(
    shape: Shape, precision: str, weights: int, overhead: int, context: int, batch: int, rank: int, whole_logits: bool
) -> Need:
    adapter = 4 * rank * sum((m.rows + m.columns) * m.count for m in shape.matrices() if m.linear)
    size = 4 if precision == "fp32" else 2
    tokens = batch * context
    narrow = shape.kv_heads * shape.head_dim
    layer = size * (4 * shape.query_width + 4 * narrow + 6 * shape.hidden + 4 * shape.intermediate)
    kept = tokens * (size * shape.hidden * shape.layers + layer)
    logits = 10 * shape.vocab * (tokens if whole_logits else min(tokens, CHUNK))
    unpacked = 0 if size == 4 or precision in ("bf16", "fp16") else 2 * max(
        m.rows * m.columns for m in shape.matrices() if m.linear
    )  # fmt: skip
    return Need(weights, 0, kept + logits + unpacked, overhead, adapter, adapter, 2 * adapter)
