"""The shapes of models: every matrix of a decoder, from its configuration, and the R1 models known by name.

Sizes in memory follow from these; nothing is loaded or downloaded. Knows data/models.toml and the fields of a
config.json; nothing about bytes, devices or engines.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from dsr1kit.config import Table, read_toml
from dsr1kit.errors import ModelError, UnknownName
from dsr1kit.local.places import is_id, locate, read_object
from dsr1kit.paths import data_dir

Role = Literal["embedding", "head", "attention", "value", "mlp", "down", "router"]
EXACT = ("llama", "mistral", "qwen2", "qwen3", "deepseek_v3")  # whose every matrix and bias is known here


@dataclass(frozen=True, slots=True)
class Matrix:
    """Weights of one kind: `count` matrices of [rows, columns], rows being outputs, `active` of them used a token.

    Attributes:
        role: what it is for; embeddings, head and router stay in 16 bits where the linear layers are quantized.
        rows, columns, count: its size, and how many there are in the model, experts included.
        active: share that one token's way through the model reads, below 1 for routed experts.
    """

    role: Role
    rows: int
    columns: int
    count: int
    active: float = 1.0

    @property
    def weights(self) -> int:
        """Number of weights in all of them."""
        return self.rows * self.columns * self.count

    @property
    def linear(self) -> bool:
        """Whether quantizers replace it and adapters sit on it."""
        return self.role in ("attention", "value", "mlp", "down")


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention of DeepSeek-V3 (arXiv 2412.19437, section 2.1): the ranks and widths."""

    query_rank: int
    cache_rank: int
    plain: int
    rotary: int
    value: int


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts: routed ones in all, used a token, shared ones, width of each, layers without any."""

    routed: int
    used: int
    shared: int
    width: int
    dense_layers: int


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder's configuration numbers, under the kit's names.

    Attributes:
        hidden, intermediate, layers, heads, kv_heads, head_dim, vocab: as in config.json.
        tied: input and output embeddings are one matrix.
        context: most tokens of prompt and completion together.
        qkv_bias, out_bias, mlp_bias: which projections have biases; query_norm: norms on queries and keys.
        latent, experts: DeepSeek-V3's attention and mixture; None where there is none.
        exact: every matrix of this architecture is known; else a usual gated decoder was assumed.
        name, hub_id, title, kind, gguf, aime_2024, native, source: what models.toml tells; empty for others.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    context: int
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    query_norm: bool = False
    latent: Latent | None = None
    experts: Experts | None = None
    exact: bool = True
    name: str = ""
    hub_id: str = ""
    title: str = ""
    kind: str = ""
    gguf: str = ""
    aime_2024: float | None = None
    native: str = "bf16"
    source: str = ""
    told_parameters: int | None = None

    @property
    def parameters(self) -> int:
        """Number of weights, norms and biases included."""
        return sum(matrix.weights for matrix in self.matrices()) + self.vectors

    @property
    def active_parameters(self) -> int:
        """Weights that one token's way through the model reads; the embedding table gives one row, so it is left out
        unless it is the output's too."""
        tables = {"embedding"} if not self.tied else set()
        read = sum(m.weights * m.active for m in self.matrices() if m.role not in tables)
        return round(read) + self.vectors

    @property
    def cached_values(self) -> int:
        """Values that the attention cache holds a token: keys and values, or, with latent attention, the compressed
        row and the rotary key, as an engine that absorbs the projections keeps them."""
        if self.latent:
            return self.layers * (self.latent.cache_rank + self.latent.rotary)
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def query_width(self) -> int:
        """Values of all query heads of a token and layer."""
        return self.heads * self.head_dim

    @property
    def vectors(self) -> int:
        """Norms, biases and the router's correction: never quantized."""
        count = self.hidden * (2 * self.layers + 1)
        if self.latent:
            count += self.layers * (self.latent.query_rank + self.latent.cache_rank)
        if self.qkv_bias:
            count += self.layers * (self.query_width + 2 * self.kv_heads * self.head_dim)
        if self.out_bias:
            count += self.layers * self.hidden
        if self.mlp_bias:
            count += self.layers * (2 * self.intermediate + self.hidden)
        if self.query_norm:
            count += self.layers * 2 * self.head_dim
        if self.experts and self.latent:
            count += (self.layers - self.experts.dense_layers) * self.experts.routed
        return count

    def matrices(self) -> tuple[Matrix, ...]:
        """All matrices of the model."""
        return tuple(self._matrices())

    def _matrices(self) -> Iterator[Matrix]:
        yield Matrix("embedding", self.vocab, self.hidden, 1)
        if not self.tied:
            yield Matrix("head", self.vocab, self.hidden, 1)
        if self.latent:
            at = self.latent
            yield Matrix("attention", at.query_rank, self.hidden, self.layers)
            yield Matrix("attention", self.heads * (at.plain + at.rotary), at.query_rank, self.layers)
            yield Matrix("attention", at.cache_rank + at.rotary, self.hidden, self.layers)
            yield Matrix("attention", self.heads * (at.plain + at.value), at.cache_rank, self.layers)
            yield Matrix("attention", self.hidden, self.heads * at.value, self.layers)
        else:
            narrow = self.kv_heads * self.head_dim
            yield Matrix("attention", self.query_width, self.hidden, self.layers)
            yield Matrix("attention", narrow, self.hidden, self.layers)
            yield Matrix("value", narrow, self.hidden, self.layers)
            yield Matrix("attention", self.hidden, self.query_width, self.layers)
        mixed = 0
        if self.experts:
            many, mixed = self.experts, self.layers - self.experts.dense_layers
            share = many.used / many.routed
            yield Matrix("router", many.routed, self.hidden, mixed)
            yield from self._mlp(many.width, mixed * many.routed, share)
            if many.shared:
                yield from self._mlp(many.width * many.shared, mixed)
        if self.layers > mixed:
            yield from self._mlp(self.intermediate, self.layers - mixed)

    def _mlp(self, width: int, count: int, active: float = 1.0) -> Iterator[Matrix]:
        yield Matrix("mlp", width, self.hidden, 2 * count, active)
        yield Matrix("down", self.hidden, width, count, active)


def shape_of_config(config: Mapping[str, Any]) -> Shape:
    """The shape that a config.json (or `config.to_dict()`) describes.

    Exact for llama, mistral, qwen2, qwen3 and deepseek_v3; for others a gated decoder with these sizes, `exact` False.

    Raises:
        ModelError: it lacks the sizes of a decoder.
    """
    text = config.get("text_config")
    at: Mapping[str, Any] = text if isinstance(text, Mapping) else config

    def number(key: str, default: int | None = None) -> int:
        value = at.get(key)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(
                f"the model's configuration has no usable {key} ({at.get(key)!r}), so its memory cannot be planned; "
                "is this the config.json of a text decoder (hidden_size, num_hidden_layers, vocab_size ...)?"
            )
        return value

    def count(key: str) -> int:
        return number(key) if at.get(key) else 0

    family = str(at.get("model_type", ""))
    hidden, heads = number("hidden_size"), number("num_attention_heads")
    attention_bias = bool(at.get("attention_bias", False))
    latent = experts = None
    if at.get("kv_lora_rank"):
        latent = Latent(
            number("q_lora_rank"), number("kv_lora_rank"), number("qk_nope_head_dim"), number("qk_rope_head_dim"),
            number("v_head_dim"),
        )  # fmt: skip
    if routed := count("n_routed_experts") or count("num_experts") or count("num_local_experts"):
        inner = number("moe_intermediate_size", at.get("intermediate_size"))
        experts = Experts(
            routed, number("num_experts_per_tok"), count("n_shared_experts"), inner, count("first_k_dense_replace"),
        )  # fmt: skip
    return Shape(
        hidden=hidden,
        intermediate=number("intermediate_size", 4 * hidden),
        layers=number("num_hidden_layers"),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", latent.plain + latent.rotary if latent else max(hidden // heads, 1)),
        vocab=number("vocab_size"),
        # What PretrainedConfig assumes where a file does not say; files of most models do.
        tied=bool(config.get("tie_word_embeddings", at.get("tie_word_embeddings", family not in EXACT))),
        context=number("max_position_embeddings", 4096),
        qkv_bias=family == "qwen2" or (attention_bias and family in ("llama", "qwen3")),
        out_bias=attention_bias and family in ("llama", "qwen3"),
        mlp_bias=bool(at.get("mlp_bias", False)) and family == "llama",
        query_norm=family == "qwen3",
        latent=latent,
        experts=experts,
        exact=family in EXACT and (experts is None or family == "deepseek_v3"),
    )


@cache
def shapes() -> Mapping[str, Shape]:
    """The models known by name, largest first: `671b`, `70b`, `32b`, `14b`, `0528-8b`, `8b`, `7b`, `1.5b`, ...

    Each also under its hub id. Raises ConfigError where data/models.toml is wrong.
    """
    found: dict[str, Shape] = {}
    path = data_dir() / "models.toml"
    for name, values in Table(path, "", read_toml(path)).raw_all().get("model", {}).items():
        table = Table(path, f"model.{name}", values)
        if folder := table.text("folder"):
            config = json.loads((data_dir() / folder / "config.json").read_text(encoding="utf-8"))
        else:
            config = table.raw("config")
        shape = replace(
            shape_of_config(config),
            name=name,
            hub_id=table.text("hub_id", required=True),
            title=table.text("title", required=True),
            kind=table.text("kind", choices=("r1", "distill", "embedded", "check"), required=True),
            gguf=table.text("gguf"),
            aime_2024=table.number("aime_2024", high=100),
            native=table.text("native", "bf16", choices=("bf16", "fp8")),
            source=table.text("source", required=True),
            told_parameters=table.whole("parameters"),
        )
        others = table.texts("also")
        table.date("as_of")
        table.finish()
        for key in (name, shape.hub_id, *others):
            found[key] = shape
    return MappingProxyType(found)


def distinct() -> list[Shape]:
    """The models known by name, each once, largest first."""
    return sorted(dict.fromkeys(shapes().values()), key=lambda shape: -shape.parameters)


def find_shape(model: str) -> Shape:
    """The shape of a known name, a hub id (its organisation may be left out), a folder with a config.json, or a GGUF.

    Of hub ids those are known that are shipped or on this machine; `shape_on_hub` asks for others.

    Raises:
        UnknownName: none of these.
        ModelError: the folder's config.json is no decoder's, or the GGUF file is damaged or of another architecture.
    """
    wanted = model.strip().rstrip("/").casefold()
    for key, shape in shapes().items():
        if wanted in (key.casefold(), key.rpartition("/")[2].casefold()):
            return shape
    place, gguf = locate(model) if is_id(model) else (model, None)
    path = Path(place).expanduser() / (gguf or "")
    if path.suffix == ".gguf" and path.is_file():
        from dsr1kit.local.gguf import shape_of_gguf

        return shape_of_gguf(path)
    file = path / "config.json"
    if file.is_file():
        return replace(
            _stored(read_object(file), model), name=Path(model).name, hub_id=model, title=model, kind="folder"
        )
    names = [shape.name for shape in distinct()]
    raise UnknownName("model", model, names, hint="(or its hub id, a folder with a config.json, or a GGUF file)")


async def shape_on_hub(model: str) -> Shape:
    """The shape of a hub's model, by its config.json, which alone is fetched.

    Raises:
        ModelError: the hub cannot be reached, or the model has no decoder's config.json. UsageError: no such model.
    """
    from dsr1kit.local.weights import config_on_hub

    if (config := await config_on_hub(model)) is None:
        raise ModelError(
            f"{model} has no config.json, by which its memory is planned: name the model that its files were made of, "
            "or a GGUF file that is here"
        )
    return replace(_stored(config, model), name=model.partition("/")[2], hub_id=model, title=model, kind="hub")


def _stored(config: Mapping[str, Any], model: str) -> Shape:
    """The shape of a model as it is stored. Raises ModelError where that is quantized in a way that is not planned."""
    shape, packed = shape_of_config(config), config.get("quantization_config")
    if not packed:
        return shape
    method = packed.get("quant_method") if isinstance(packed, Mapping) else packed
    if method == "fp8":
        return replace(shape, native="fp8")
    raise ModelError(
        f"{model} is stored quantized ({method}), in a format whose memory is not planned: it needs little more than "
        "its files have; for what else fits, name the model that it was made of"
    )


def least_blocks(shape: Shape, block: int) -> bool:
    """Whether the rows of all linear layers are whole blocks of so many weights."""
    return math.gcd(*(m.columns for m in shape.matrices() if m.linear)) % block == 0
