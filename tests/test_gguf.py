"""Opening models: GGUF files checked and converted once, folders and hub ids that cannot be used, what does not fit."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import hub as loopback
import pytest

from dsr1kit import LocalModel, Sampling
from dsr1kit.errors import ModelError, UsageError
from dsr1kit.local import gguf as converter
from dsr1kit.local.hardware import look
from dsr1kit.local.places import locate
from dsr1kit.local.shapes import find_shape
from dsr1kit.paths import data_dir
from dsr1kit.records import Outcome

TINY = data_dir() / "tiny-r1"
GREEDY = Sampling(temperature=0, max_tokens=120)
QUESTION = [{"role": "user", "content": "What is 4827 + 965?"}]
OPEN = """
import asyncio, json, sys
from dsr1kit import LocalModel
from dsr1kit.errors import Dsr1kitError
async def size_of(source):
    async with LocalModel(source, threads=1) as r1:
        return r1.loaded.parameters
def told(source):
    try:
        return asyncio.run(size_of(source))
    except Dsr1kitError as error:
        return str(error)
print(json.dumps([told(source) for source in sys.argv[1:]]))
"""


def ask(source, **options):
    async def inside():
        async with LocalModel(source, threads=1, **options) as model:
            return await model.ask(QUESTION, GREEDY)

    return asyncio.run(inside())


def opened(*sources, **environment):
    """Open models in another process; what each gave, its size or an error's words."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN, *sources],
        capture_output=True, text=True, timeout=120, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def write_gguf(path, *, without=(), parts=1):
    """tiny-r1 as a GGUF file in fp16; `without` some tensors, or said to be the first of several parts."""
    from gguf import GGUFWriter
    from safetensors.numpy import load_file

    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
    names |= {f"self_attn.{kind}_proj": f"attn_{kind}" for kind in "qkv"}
    names |= {f"mlp.{kind}_proj": f"ffn_{kind}" for kind in ("gate", "up", "down")}
    config, tokenizer = (json.loads((TINY / name).read_text()) for name in ("config.json", "tokenizer.json"))
    words = tokenizer["model"]["vocab"] | {one["content"]: one["id"] for one in tokenizer["added_tokens"]}
    special = {one["id"] for one in tokenizer["added_tokens"]}
    words |= {f"<unused{n}>": n for n in range(config["vocab_size"]) if n not in words.values()}
    writer = GGUFWriter(path, "qwen2")
    if parts > 1:
        writer.add_uint16("split.count", parts)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(words, key=words.__getitem__))
    writer.add_token_types([3 if n in special else 1 for n in range(config["vocab_size"])])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_chat_template((TINY / "chat_template.jinja").read_text())
    for name, weight in load_file(TINY / "model.safetensors").items():
        if name == "model.embed_tokens.weight":
            called = "token_embd.weight"
        elif name == "model.norm.weight":
            called = "output_norm.weight"
        else:
            layer, _, rest = name.removeprefix("model.layers.").partition(".")
            part, _, kind = rest.rpartition(".")
            called = f"blk.{layer}.{names[part]}.{kind}"
        if called not in without:
            writer.add_tensor(called, weight.astype("float32") if weight.ndim == 1 else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dsr1kit" / "gguf"


# --- GGUF


def test_a_gguf_file_says_what_the_same_weights_say_and_is_converted_once(tiny_gguf, cache, monkeypatch, tmp_path):
    first, own = ask(tiny_gguf), ask("tiny-r1")
    assert (first.reasoning, first.answer) == (own.reasoning, own.answer)
    assert first.outcome is Outcome.OK
    (folder,) = cache.iterdir()

    def convert(*_):
        raise AssertionError("converted again")

    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tiny_gguf, alone)
    with monkeypatch.context() as patch:
        patch.setattr(converter, "_convert", convert)
        assert ask(tiny_gguf).answer == own.answer
        assert ask(alone).answer == own.answer  # a folder with one GGUF alone, the file moved
    changed = alone / "tiny.gguf"
    changed.write_bytes(changed.read_bytes() + bytes(32))
    assert ask(alone).answer == own.answer
    assert len(list(cache.iterdir())) == 2, "another content is another model"
    assert folder.is_dir()


def test_what_a_killed_conversion_left_is_swept_a_day_later(tiny_gguf, cache):
    old, new = cache / ".partial-old", cache / ".partial-new"
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    converter.dequantized(tiny_gguf)
    assert not old.exists()
    assert new.exists()


def test_one_byte_anywhere_in_a_large_file_makes_another_model(tmp_path):
    one, other = tmp_path / "one.gguf", tmp_path / "other.gguf"
    held = bytearray(20 * 2**20)
    one.write_bytes(held)
    held[7 * 2**20] = 1
    other.write_bytes(held)
    assert converter._fingerprint(one) != converter._fingerprint(other)
    shutil.copy(one, tmp_path / "copy.gguf")
    assert converter._fingerprint(tmp_path / "copy.gguf") == converter._fingerprint(one)


def test_r1s_special_tokens_keep_their_ids(tiny_gguf, cache):
    """The full-width bars in them are no bytes of a byte-level vocabulary, and transformers falls for that."""
    from transformers import AutoTokenizer

    own, converted = (AutoTokenizer.from_pretrained(place) for place in (TINY, converter.dequantized(tiny_gguf)))
    given = own.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert converted.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"] == given
    assert (converted.bos_token_id, converted.eos_token_id) == (own.bos_token_id, own.eos_token_id)
    text = "12 + 30 = 42 </think>\n\n小明有3个苹果<｜end▁of▁sentence｜>"
    assert converted.decode(converted(text)["input_ids"]) == own.decode(own(text)["input_ids"])


def test_a_gguf_has_its_own_quantization(tiny_gguf, cache):
    with pytest.raises(UsageError, match="quantization='none'"):
        ask(tiny_gguf, quantization="4bit")


def test_a_gguf_cut_anywhere_is_refused_with_its_size(tiny_gguf, cache, tmp_path):
    whole = tiny_gguf.read_bytes()
    cut = tmp_path / "cut.gguf"
    points = {4, 8, 12, 23, 24, 25, 60, len(whole) - 1, *range(100, 60_000, 3001), *range(0, len(whole), 200_003)}
    for size in sorted(points - {0}):
        cut.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"truncated.*Download it again") as told:
            converter.dequantized(cut)
        assert f"{size:,} bytes" in str(told.value)
    assert not cache.exists()


@pytest.mark.parametrize("content", [b"", b"GG", b"<!DOCTYPE html>", bytes(1000), b"version https://git-lfs"])
def test_what_is_no_gguf_is_refused_with_its_first_bytes(content, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="no GGUF") as told:
        ask(path)
    assert repr(content[:4]) in str(told.value)


def test_a_damaged_header_is_an_error_that_names_the_file(tiny_gguf, cache, tmp_path):
    import random

    whole, chance = tiny_gguf.read_bytes(), random.Random(1)
    path = tmp_path / "damaged.gguf"
    refused = []
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[chance.randrange(4, 3000)] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            converter._check(path)
        except ModelError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert all(str(path) in told for told in refused)


def test_a_part_of_a_model_is_never_taken_for_the_whole(cache, tmp_path):
    lacking = write_gguf(tmp_path / "lacking.gguf", without=("blk.1.ffn_up.weight", "output_norm.weight"))
    with pytest.raises(ModelError, match=r"lacking\.gguf lacks 2 of its weights, such as model\.layers\.1\.mlp"):
        ask(lacking)
    first = write_gguf(tmp_path / "tiny-00001-of-00003.gguf", parts=3)
    with pytest.raises(ModelError, match=r"one of 3 parts .*dsr1kit serve .*llama-gguf-split"):
        ask(first)
    assert list(cache.iterdir()) == []


def test_an_architecture_that_cannot_be_read_is_sent_to_llama_cpp(cache, tmp_path):
    import numpy as np
    from gguf import GGUFWriter

    path = tmp_path / "odd.gguf"
    writer = GGUFWriter(path, "nothing-known")
    writer.add_tensor("w", np.zeros((4, 4), dtype="float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"cannot read .*dsr1kit serve"):
        ask(path)
    assert list(cache.iterdir()) == []


def test_a_gguf_that_does_not_fit_into_memory_is_not_even_begun(tiny_gguf, cache, monkeypatch):
    size = tiny_gguf.stat().st_size
    for free, said in ((size + 100_000, "dsr1kit serve"), (size // 2, r"The file alone has .* short")):
        monkeypatch.setattr(converter, "look", lambda free=free: replace(look(), gpus=(), memory_free_bytes=free))
        with pytest.raises(ModelError, match=rf"GiB.*{said}"):
            ask(tiny_gguf)
    assert not cache.exists()


def test_a_gguf_is_planned_by_its_header(tiny_gguf, tmp_path):
    found, own = find_shape(str(tiny_gguf)), find_shape("tiny-r1")
    apart = {"name", "hub_id", "title", "kind", "gguf", "source", "told_parameters", "aime_2024"}
    assert {k: v for k, v in asdict(found).items() if k not in apart} == {
        k: v for k, v in asdict(own).items() if k not in apart
    }
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_gguf.read_bytes()[:100_000])
    with pytest.raises(ModelError, match="truncated"):
        find_shape(str(cut))


@pytest.mark.skipif(sys.platform != "linux", reason="the size limit of files stands for a full disk")
@pytest.mark.parametrize("room", [20_000, 1_000_000])
def test_a_full_disk_is_told_and_leaves_nothing_that_is_taken_for_a_model(tiny_gguf, cache, room):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(ModelError, match="could not be converted") as told:
            ask(tiny_gguf)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "XDG_CACHE_HOME" in str(told.value)
    assert list(cache.iterdir()) == []
    assert ask(tiny_gguf).outcome is Outcome.OK


def test_two_processes_convert_at_once_and_both_are_served(tiny_gguf, cache):
    both = [
        subprocess.Popen([sys.executable, "-c", OPEN, str(tiny_gguf)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    ends = [process.communicate(timeout=120) for process in both]
    sizes = [json.loads(said) for said, _ in ends]
    assert sizes[0] == sizes[1]
    assert isinstance(sizes[0][0], int), sizes  # else an error's words
    (folder,) = cache.iterdir()
    assert folder.name.startswith("tiny-")


# --- folders


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def test_a_folder_without_tokenizer_says_what_is_missing(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        ask(folder)


def test_a_folder_without_chat_template_cannot_answer(folder):
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        ask(folder)


@pytest.mark.parametrize("size", [0, 4, 5000, 1_900_000])
def test_weights_that_are_cut_short_are_told_and_not_thrown(folder, size):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(ModelError, match="could not load"):
        ask(folder)


@pytest.mark.parametrize("quantization", ["none", "8bit"])
def test_weights_that_are_missing_are_not_made_up(folder, quantization):
    from safetensors.torch import load_file, save_file

    held = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in held.items() if ".layers.2." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    lacking = f"lacks {len(held) - len(kept)} of its weights, such as model.layers.2"
    with pytest.raises(ModelError, match=lacking):
        ask(folder, quantization=quantization)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("", "cannot be read as JSON"), ("[]", "holds no JSON object"), ("{}", "names no architecture"),
        ('{"model_type": "nothing-known"}', "the architecture 'nothing-known', which transformers does not know here"),
    ],
)  # fmt: skip
def test_a_config_that_means_nothing_is_told_and_not_thrown(folder, config, words):
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match=words):
        ask(folder)


def test_a_download_that_was_not_finished_is_not_opened(folder):
    (folder / ".incoming").mkdir()
    with pytest.raises(ModelError, match="not downloaded to the end"):
        ask(folder)
    (folder / "model.safetensors").unlink()  # as before the first file was whole
    with pytest.raises(ModelError, match="not downloaded to the end"):
        ask(folder)


def test_a_split_file_is_named_by_its_first_part_also_in_a_folder_of_its_own(tmp_path):
    parts = tmp_path / "Q4_K_M"
    parts.mkdir()
    for number in (2, 1):
        (parts / f"R1-Q4_K_M-{number:05}-of-00002.gguf").write_bytes(b"GGUF")
    assert locate(str(tmp_path)) == (str(tmp_path), "Q4_K_M/R1-Q4_K_M-00001-of-00002.gguf")
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"holds 2 GGUF models: name the one to open \(/.*/Q4_K_M/R1.*/other.gguf\)"):
        locate(str(tmp_path))


def test_a_folder_with_several_gguf_files_asks_which(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"/a\.gguf, /.*/b\.gguf"):
        ask(tmp_path)


def test_a_model_that_does_not_fit_is_not_loaded_and_told_what_would(monkeypatch):
    monkeypatch.setattr("dsr1kit.local.room.look", lambda: replace(look(), gpus=(), memory_free_bytes=3_000_000))
    with pytest.raises(ModelError, match=r"tiny-r1 does not fit: .* GiB short"):
        ask("tiny-r1")


# --- hub


def test_a_damaged_folder_is_no_hubs_business_though_its_path_looks_like_an_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, file in (("config", "config.json"), ("words", "tokenizer.json")):
        shutil.copytree(TINY, tmp_path / "bad" / name)
        (tmp_path / "bad" / name / file).write_text((TINY / file).read_text()[:200])
    for told in opened("bad/config", "bad/words", HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="1"):
        assert "not on this machine" not in told
        assert "dsr1kit weights" not in told
        assert "copy or fetch it again, whole" in told
    with loopback.running() as hub:
        hub.push("bad/config", {"config.json": b"{}", "pytorch_model.bin": b"x"})
        (told,) = opened("bad/config", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="0")
    assert "pickle" not in told
