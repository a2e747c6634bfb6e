"""Taking an adapter away: merged it answers as unmerged, from 16-bit weights; GGUF, Modelfile, card and commands."""

from __future__ import annotations

import asyncio
import errno
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsr1kit import LocalModel, Sampling
from dsr1kit.compare.stats import Interval, PairedDifference
from dsr1kit.compare.tasks import load_task
from dsr1kit.errors import ModelError, RunError, UnknownName, UsageError
from dsr1kit.finetune import export as exporting
from dsr1kit.finetune.data import load_examples
from dsr1kit.finetune.export import MERGED, base_of, export, merge, modelfile, noted_gain, serve_commands, to_gguf
from dsr1kit.finetune.gain import Change, Gain
from dsr1kit.finetune.settings import AdapterSettings, SftSettings
from dsr1kit.paths import data_dir

pytest.importorskip("trl", reason="adapters are trained with TRL")

GREEDY = Sampling(temperature=0, max_tokens=120)
TINY = data_dir() / "tiny-r1"


def trained(folder: Path, method: str = "lora") -> Path:
    """A real, small training's folder."""
    from dsr1kit.finetune.sft import train_sft

    settings = SftSettings(
        model="tiny-r1", adapter=AdapterSettings(method=method, rank=8, alpha=16), steps=8, batch_size=8,
        learning_rate=3e-3, save_every=0,
    )  # fmt: skip
    train_sft(settings, load_examples(["worked:arithmetic:sum4:64"]), folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("run") / "sum4")


@pytest.fixture(scope="module")
def merged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merge(run / "adapter", tmp_path_factory.mktemp("merged") / "model")


@pytest.fixture
def mine(run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def answers(source: str | Path, adapter: Path | None = None) -> list[tuple[str, str]]:
    items = [*load_task("arithmetic", 25), *load_task("arithmetic:sum4", 25)]

    async def ask() -> list[tuple[str, str]]:
        adapters = None if adapter is None else {"it": adapter}
        async with LocalModel(source, dtype="float32", device="cpu", adapters=adapters) as model:
            replies = await model.generate_many([i.messages() for i in items], [GREEDY] * len(items))
        return [(reply.reasoning, reply.answer) for reply in replies]

    return asyncio.run(ask())


def dtypes(folder: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return {str(file.get_tensor(key).dtype) for key in file.keys()}  # noqa: SIM118 - no mapping


def config_of(adapter: Path, **changed: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


# --- merging ---------------------------------------------------------------------------------------------------------


def test_merged_and_unmerged_answer_greedily_alike_on_fifty_prompts_and_not_as_the_base(
    run: Path, merged: Path
) -> None:
    unmerged = answers("tiny-r1", run / "adapter")
    assert len(unmerged) == 50
    assert answers(merged) == unmerged
    assert answers("tiny-r1") != unmerged


def test_a_merged_folder_is_a_whole_model_that_says_what_it_is(run: Path, merged: Path) -> None:
    names = {path.name for path in merged.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    } <= names
    assert not any(name.endswith((".bin", ".part")) for name in names)
    assert dtypes(merged) == {"torch.float32"}
    noted = json.loads((merged / MERGED).read_text())
    assert (noted["base"], noted["dtype"]) == ("tiny-r1", "float32")
    assert "50 million" in noted["dtype_reason"]
    assert noted["versions"]["peft"]
    assert not merged.with_name("model.part").exists()


def test_the_dtype_can_be_chosen_and_an_earlier_merge_is_replaced_but_no_other_folder(
    run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    merge(run / "adapter", out, dtype="float16")
    assert dtypes(out) == {"torch.float16"}
    merge(run / "adapter", out, dtype="bfloat16")
    assert dtypes(out) == {"torch.bfloat16"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(UnknownName, match="did you mean 'float16'"):
        merge(run / "adapter", out, dtype="float61")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="is no earlier merge"):
        merge(run / "adapter", other)
    assert (other / "thesis.txt").read_text() == "mine"


def test_an_adapter_trained_on_four_bits_is_merged_into_the_sixteen_bit_weights(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    import torch
    from safetensors.torch import load_file

    run = trained(tmp_path / "run", "qlora")
    noted = json.loads((run / "run.json").read_text())
    assert noted["result"]["facts"]["quantization"] == "4bit"
    out = merge(run / "adapter", tmp_path / "model")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    whole, base, lora = (
        load_file(path) for path in (out / "model.safetensors", TINY / "model.safetensors",
                                     run / "adapter" / "adapter_model.safetensors")
    )  # fmt: skip
    name = "model.layers.1.mlp.down_proj"
    a, b = (lora[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
    expected = base[f"{name}.weight"].float() + 2 * (b @ a)
    assert torch.allclose(whole[f"{name}.weight"], expected, atol=1e-6)
    assert torch.equal(whole["model.embed_tokens.weight"], base["model.embed_tokens.weight"].float())
    assert answers(out) == answers("tiny-r1", run / "adapter")


@pytest.mark.parametrize("method", ["rslora", "dora"])
def test_rslora_and_dora_are_merged_by_their_own_rules(method: str, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = trained(tmp_path / "run", method)
    out = merge(run / "adapter", tmp_path / "model")
    base, whole = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (TINY, out))
    ids = torch.randint(3, 800, (4, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = base(ids).logits.clone(), whole(ids).logits
        tuned = PeftModel.from_pretrained(base, run / "adapter").eval()(ids).logits
    assert torch.allclose(after, tuned, atol=1e-3)
    assert not torch.allclose(after, before, atol=0.1)


def test_a_base_that_is_not_the_adapters_is_refused(run: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    other = tmp_path / "other"
    shutil.copytree(TINY, other)
    model = AutoModelForCausalLM.from_pretrained(TINY)
    model.model.embed_tokens.weight.data.add_(0.5)
    model.save_pretrained(other)
    with pytest.raises(ModelError, match=r"was trained on tiny-r1, not on .*other"):
        merge(run / "adapter", tmp_path / "model", base=str(other))
    assert not (tmp_path / "model").exists()
    same = tmp_path / "same"
    shutil.copytree(TINY, same)
    assert base_of(run / "adapter", str(same)) == str(same)


def test_an_adapter_of_other_shapes_is_refused_whatever_name_it_bears(mine: Path, tmp_path: Path) -> None:
    config_of(mine / "adapter", r=4)
    with pytest.raises(ModelError, match=r"does not go with tiny-r1: .*--base"):
        merge(mine / "adapter", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_tiny_r1_is_found_by_name_where_the_recorded_path_is_of_another_machine(mine: Path, tmp_path: Path) -> None:
    config_of(mine / "adapter", base_model_name_or_path="/elsewhere/site-packages/dsr1kit/_data/tiny-r1")
    assert base_of(mine / "adapter") == "tiny-r1"
    (mine / "run.json").unlink()
    assert base_of(mine / "adapter") == "tiny-r1"
    assert base_of(mine / "adapter", "tiny-r1") == "tiny-r1"
    config_of(mine / "adapter", base_model_name_or_path="/elsewhere/another")
    with pytest.raises(ModelError, match=r"which is not on this machine: name it \(--base"):
        base_of(mine / "adapter")
    with pytest.raises(ModelError, match="was trained on /elsewhere/another, not on tiny-r1"):
        base_of(mine / "adapter", "tiny-r1")
    config_of(mine / "adapter", base_model_name_or_path=None)
    with pytest.raises(ModelError, match="names no base model"):
        base_of(mine / "adapter")


def test_no_adapter_a_pickle_and_what_is_no_lora_are_refused(mine: Path, tmp_path: Path) -> None:
    adapter, out = mine / "adapter", tmp_path / "model"
    with pytest.raises(ModelError, match="there is no adapter"):
        merge(tmp_path / "nothing", out)
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        merge(mine, out)
    weights = adapter / "adapter_model.safetensors"
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="is a pickle and never loaded"):
        merge(adapter, out)
    (adapter / "adapter_model.bin").rename(weights)
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="not copied to its end or is damaged"):
        merge(adapter, out)
    weights.write_bytes(whole)
    config_of(adapter, peft_type="PREFIX_TUNING")
    with pytest.raises(ModelError, match="PREFIX_TUNING, not a LoRA"):
        merge(adapter, out)
    assert not out.exists()


def test_a_base_that_is_stored_quantized_is_refused(mine: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    shutil.copytree(TINY, packed)
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(ModelError, match="tune and merge on its 16-bit original"):
        merge(mine / "adapter", tmp_path / "model", base=str(packed))


@pytest.mark.parametrize("earlier", [False, True])
def test_a_full_disk_puts_nothing_in_place_and_leaves_what_was_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    from transformers import PreTrainedModel

    out = tmp_path / "model"
    before = merge(run / "adapter", out).joinpath("model.safetensors").read_bytes() if earlier else b""
    saved = PreTrainedModel.save_pretrained

    def full(self: Any, folder: str, **kwargs: Any) -> None:
        saved(self, folder, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(RunError, match=r"No space left on device.*Nothing was put in place; make room"):
        merge(run / "adapter", out)
    assert not (tmp_path / "model.part").exists()
    assert out.exists() is earlier
    if earlier:
        assert (out / "model.safetensors").read_bytes() == before


# --- GGUF ------------------------------------------------------------------------------------------------------------

CONVERTER = """
import json, pathlib, sys
folder, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1])
assert (folder / "config.json").is_file() and (folder / "model.safetensors").is_file(), folder
assert sys.argv[sys.argv.index("--outtype") + 1] in ("f16", "q8_0"), sys.argv
out.write_bytes(b"GGUF" + json.dumps(sys.argv[1:]).encode())
"""


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    script = folder / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER)
    monkeypatch.setenv("DSR1KIT_LLAMA_CPP", str(folder))
    return script


def test_gguf_is_made_by_llama_cpps_converter(merged: Path, converter: Path, tmp_path: Path) -> None:
    out = to_gguf(merged, tmp_path / "new" / "model.gguf", "q8_0")
    assert out.read_bytes().startswith(b"GGUF")
    given = json.loads(out.read_bytes()[4:])
    assert given[0] == str(merged)
    assert given[given.index("--outtype") + 1] == "q8_0"
    assert [path.name for path in out.parent.iterdir()] == ["model.gguf"]
    with pytest.raises(UnknownName, match="unknown GGUF type 'q4'"):
        to_gguf(merged, out, "q4")
    with pytest.raises(ModelError):
        to_gguf(tmp_path / "nothing", out)


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("raise NotImplementedError('BPE pre-tokenizer was not recognized')", "BPE pre-tokenizer was not recognized"),
        ("import sys; open(sys.argv[3], 'wb').write(b'half'); sys.exit(3)", "it ended with code 3"),
        ("import sys; open(sys.argv[3], 'wb').write(b'half')", "is no GGUF file"),
        ("", "could not be written"),
    ],
)
def test_a_converter_that_fails_is_told_and_leaves_nothing(
    merged: Path, converter: Path, tmp_path: Path, script: str, told: str
) -> None:
    converter.write_text(script)
    out = tmp_path / "out" / "model.gguf"
    with pytest.raises(RunError, match=told):
        to_gguf(merged, out)
    assert list(out.parent.iterdir()) == []


def test_the_converter_is_found_on_path_and_its_absence_says_how_to_get_it(
    merged: Path, converter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("DSR1KIT_LLAMA_CPP", str(tmp_path))
    with pytest.raises(UsageError, match=r"holds no convert_hf_to_gguf.py: name the folder of a llama.cpp checkout"):
        to_gguf(merged, tmp_path / "model.gguf")
    monkeypatch.delenv("DSR1KIT_LLAMA_CPP")
    with pytest.raises(UsageError, match=r"git clone .*llama.cpp, then export DSR1KIT_LLAMA_CPP=llama.cpp"):
        to_gguf(merged, tmp_path / "model.gguf")
    on_path = tmp_path / "convert_hf_to_gguf.py"
    on_path.write_text(f"#!{exporting.sys.executable}\n{CONVERTER}")
    on_path.chmod(0o755)
    assert to_gguf(merged, tmp_path / "model.gguf").is_file()


# --- Modelfile and commands ------------------------------------------------------------------------------------------


def test_a_modelfile_names_the_weights_and_has_r1s_prompt_form_and_sampling(merged: Path, tmp_path: Path) -> None:
    text = modelfile(merged.parent / "model.gguf", merged, at=merged.parent)
    assert text.startswith("FROM ./model.gguf\n")
    assert "PARAMETER temperature 0.6\nPARAMETER top_p 0.95\nPARAMETER num_ctx 1024\n" in text
    (template,) = re.findall(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    assert template.startswith("<｜begin▁of▁sentence｜>{{ if .System }}")
    assert "<｜User｜>{{ .Content }}" in template
    assert "<think>\n{{ .Thinking }}\n</think>\n" in template
    assert "<｜Assistant｜><think>\n{{ end }}" in template
    assert template.count("{{ end }}") + template.count("{{- end }}") == len(re.findall(r"{{-? (?:if|range)", template))
    for mark in ("<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"):
        assert f'PARAMETER stop "{mark}"' in text
    assert modelfile(merged, merged, at=tmp_path).startswith(f"FROM {merged.resolve()}\n")


def test_the_begin_mark_is_left_to_llama_cpp_where_the_tokenizer_says_that_it_adds_it(
    merged: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(merged, tmp_path / "model"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": True}))
    assert 'TEMPLATE """{{ if .System }}' in modelfile(folder, folder)


def test_a_model_of_another_prompt_form_keeps_its_own(merged: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(merged, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>{% endfor %}")
    text = modelfile(folder, folder)
    assert "TEMPLATE" not in text
    assert 'PARAMETER stop "<|im_end|>"' in text


def test_the_commands_serve_base_and_adapter(run: Path, mine: Path, merged: Path) -> None:
    import shlex

    adapter = run / "adapter"
    found = serve_commands("tiny-r1", adapter)
    assert found["dsr1kit"] == f"dsr1kit serve tiny-r1 --adapter {adapter.resolve()} --port 8000"
    words = shlex.split(found["vllm"])
    assert words[:2] == ["vllm", "serve"]
    assert "--enable-lora" in words
    assert words[words.index("--lora-modules") + 1].endswith(f"={adapter.resolve()}")
    assert words[words.index("--max-lora-rank") + 1] == "8"
    assert words[words.index("--reasoning-parser") + 1] == "deepseek_r1"
    assert words[words.index("--max-model-len") + 1] == "1024"
    assert "transformers" not in found
    assert serve_commands("tiny-r1", adapter, merged=merged)["transformers"].startswith("transformers serve ")
    config_of(mine / "adapter", use_dora=True)
    assert "vllm" not in serve_commands("tiny-r1", mine / "adapter")
    assert "--enable-lora" not in serve_commands("tiny-r1", mine / "adapter", merged=merged)["vllm"]


# --- the card and the whole ------------------------------------------------------------------------------------------


def change(task: str, tuned: bool, gained: float, differs: bool = True) -> Change:
    difference = PairedDifference(gained, gained - 0.04, gained + 0.04, 300, None, 0.001)
    return Change(
        "sum4", task, tuned, Interval(0.5, 0.44, 0.56), Interval(0.5 + gained, 0.44, 0.9), difference, difference, 1, 2,
        differs,
    )  # fmt: skip


def test_a_card_says_what_was_trained_on_what_and_what_was_measured(mine: Path, tmp_path: Path) -> None:
    gain = Gain((change("arithmetic:sum4", True, 0.3), change("arithmetic", False, -0.1)), tmp_path / "gain")
    done = export(mine, tmp_path / "out", what=("merged", "card"), gain=gain)
    assert done.cards == (mine / "adapter" / "README.md", tmp_path / "out" / "merged" / "README.md")
    text = done.cards[0].read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["library_name"], front["license"]) == ("peft", "apache-2.0")
    noted = json.loads((mine / "run.json").read_text())
    assert noted["identity"]["data"] in text
    for said in ("| learning_rate | 0.003 |", "| seed | 0 |", "| rank | 8 |", "| method | lora |", "64 rows",
                 f"torch {noted['versions']['torch']}", f"{noted['result']['curve']['losses'][-1]:.4f}",
                 "| arithmetic:sum4 (tuned) | 300 | 50.0 (44.0 to 56.0) | 80.0 (44.0 to 90.0) |",
                 "| +30.0 (+26.0 to +34.0) |",
                 "Forgotten: on arithmetic it answers worse than before."):  # fmt: skip
        assert said in text
    assert str(tmp_path) not in text
    assert str(data_dir()) not in text
    whole = done.cards[1].read_text()
    assert yaml.safe_load(whole.split("---\n")[1])["library_name"] == "transformers"
    assert "adapter merged into" in whole


def test_a_card_holds_no_figure_that_was_not_measured(mine: Path, tmp_path: Path) -> None:
    (card,) = export(mine, tmp_path / "out", what=("card",)).cards
    assert "## Before and after\n\nNot measured.\n" in card.read_text()
    only = replace(change("arithmetic:sum4", True, 0.3))
    (card,) = export(mine, tmp_path / "out", what=("card",), gain=Gain((only,), tmp_path)).cards
    assert "were not asked: what was forgotten is not known" in card.read_text()
    same = change("arithmetic", False, -0.01, differs=False)
    (card,) = export(mine, tmp_path / "out", what=("card",), gain=Gain((only, same), tmp_path)).cards
    assert "no loss is shown" in card.read_text()
    assert "-1.0 (-5.0 to +3.0), not shown to differ" in card.read_text()


def test_what_the_run_measured_itself_is_on_the_card(mine: Path, tmp_path: Path) -> None:
    gain = Gain((change("arithmetic:sum4", True, 0.3),), mine / "gain")
    gain.folder.mkdir()
    (gain.folder / "gain.json").write_text(json.dumps(gain.as_data()))
    sampling = {"temperature": 0.6, "max_tokens": 2048}
    (gain.folder / "run.json").write_text(json.dumps({"identity": {"sampling": sampling, "seed": 3}}))
    assert noted_gain(mine) == gain
    (card,) = export(mine, tmp_path / "out", what=("card",)).cards
    assert "temperature 0.6, at most 2,048 tokens an answer, seed 3" in card.read_text()
    (gain.folder / "gain.json").write_text("[{}]")
    with pytest.raises(RunError, match="measure again"):
        export(mine, tmp_path / "out", what=("card",))


def test_a_reinforcements_card_says_what_was_asked_and_rewarded(mine: Path, tmp_path: Path) -> None:
    path = mine / "run.json"
    noted = json.loads(path.read_text())
    settings = noted["identity"].pop("sft") | {"task": "practice:sum3", "items": 500, "rewards": {"form": 0.1}}
    noted["identity"]["grpo"] = settings
    result = noted["result"]
    result["curve"] = {"steps": [1, 2], "right": [0.25, 0.75]}
    result["alarms"] = [{"step": 2, "name": "clipped", "said": "half of the completions were cut"}]
    for name in ("rows", "left_out"):
        del result[name]
    path.write_text(json.dumps(noted))
    assert base_of(mine / "adapter") == "tiny-r1"
    text = export(mine, tmp_path / "out", what=("card",)).cards[0].read_text()
    for said in ("made by reinforcement by GRPO", "Questions of `practice:sum3`, at most 500", "0.2500", "0.7500",
                 "| rewards | form 0.1 |", "Alarm: half of the completions were cut."):  # fmt: skip
        assert said in text


def test_all_is_made_in_one_call_and_again_over_it(mine: Path, converter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        done = export(mine, out, what=("merged", "gguf", "modelfile", "card", "commands"))
    assert {path.name for path in out.iterdir()} == {"merged", "model-f16.gguf", "Modelfile", "commands.txt"}
    assert (out / "Modelfile").read_text().startswith("FROM ./model-f16.gguf\n")
    assert done.commands["vllm"] in (out / "commands.txt").read_text()
    told = done.as_data()
    assert (told["merged"], told["gguf"]) == (str(out / "merged"), str(out / "model-f16.gguf"))
    assert any("ollama create" in line for line in done.told())
    json.dumps(told)


def test_what_cannot_be_exported_is_told_before_anything_is_made(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DSR1KIT_LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    out = tmp_path / "out"
    with pytest.raises(UnknownName, match="did you mean 'merged'"):
        export(mine, out, what=("merge",))
    with pytest.raises(UsageError, match="name what to export: merged, gguf"):
        export(mine, out, what=())
    with pytest.raises(UsageError, match=r"llama\.cpp"):
        export(mine, out, what=("merged", "gguf"))
    with pytest.raises(ModelError, match="is no folder of a run"):
        export(tmp_path / "nothing", out)
    shutil.rmtree(mine / "adapter")
    with pytest.raises(ModelError, match="the same training command again ends it"):
        export(mine, out)
    assert not out.exists()
