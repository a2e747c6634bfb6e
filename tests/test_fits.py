"""Shapes against transformers' own models, bytes against published figures, and what is recommended from them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from dsr1kit.config import read_toml
from dsr1kit.errors import ModelError, UnknownName, UsageError
from dsr1kit.local.fits import ROOM, advise, best, plan, recommend
from dsr1kit.local.machines import find_hardware, machines
from dsr1kit.local.memory import GIB, PRECISIONS, available, need, weight_bytes
from dsr1kit.local.shapes import distinct, find_shape, shape_of_config, shapes
from dsr1kit.paths import data_dir

NAMES = [shape.name for shape in distinct()]


# --- shapes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_computed_number_of_weights_is_the_published_one(name):
    shape = find_shape(name)
    assert shape.told_parameters is not None
    assert shape.parameters == shape.told_parameters
    assert shape.exact


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("671b", "tiny-r1")])
def test_the_shape_is_transformers_own_model_weight_for_weight(name):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**read_toml(data_dir() / "models.toml")["model"][name]["config"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = shape_of_config(config.to_dict())
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    linear = sum(
        m.weight.numel() for key, m in model.named_modules() if isinstance(m, torch.nn.Linear) and key != "lm_head"
    )
    assert sum(m.weights for m in shape.matrices() if m.linear) == linear


def test_the_mixture_of_experts_is_transformers_own_model_too():
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(read_toml(data_dir() / "models.toml")["model"]["671b"]["config"])
    small = {"num_hidden_layers": 5, "n_routed_experts": 16, "n_group": 4}
    config = AutoConfig.for_model(**{**values, **small})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    correction = sum(b.numel() for key, b in model.named_buffers() if key.endswith("e_score_correction_bias"))
    whole = sum(p.numel() for p in model.parameters()) + correction
    assert shape_of_config({**values, **small}).parameters == whole


def test_r1_uses_37_of_its_671_billion_weights_for_a_token():
    assert find_shape("671b").active_parameters / 1e9 == pytest.approx(37, abs=0.5)


@pytest.mark.parametrize(("name", "kib"), [("1.5b", 28), ("7b", 56), ("8b", 128), ("14b", 192), ("671b", 68.625)])
def test_the_cache_a_token_is_the_known_one(name, kib):
    assert find_shape(name).cached_values * 2 / 1024 == kib


def test_the_embedded_model_is_read_from_its_own_files():
    from safetensors import safe_open

    with safe_open(data_dir() / "tiny-r1" / "model.safetensors", "np") as file:
        stored = sum(file.get_tensor(key).size for key in file.keys())  # noqa: SIM118 - safetensors' own method
    assert find_shape("tiny-r1").parameters == stored
    assert find_shape(str(data_dir() / "tiny-r1")).parameters == stored


def test_models_are_found_by_short_name_hub_id_and_its_last_part():
    seven = shapes()["7b"]
    for name in ("7b", "7B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "DeepSeek-R1-Distill-Qwen-7B"):
        assert find_shape(name) is seven
    assert find_shape("deepseek-ai/DeepSeek-R1") is find_shape("deepseek-ai/DeepSeek-R1-0528")
    with pytest.raises(UnknownName, match="did you mean '0528-8b'"):
        find_shape("0528-8")


def test_a_configuration_that_is_no_decoders_is_refused_with_the_field(tmp_path):
    with pytest.raises(ModelError, match="num_attention_heads"):
        shape_of_config({"hidden_size": 8})
    with pytest.raises(ModelError, match="hidden_size"):
        shape_of_config({"hidden_size": "wide"})
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match="no JSON object"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        find_shape(str(tmp_path))


def test_an_unknown_architecture_is_estimated_and_says_so():
    base = json.loads((data_dir() / "tiny-r1" / "config.json").read_text())
    shape = shape_of_config({"model_type": "new", "text_config": {**base, "model_type": "newer"}})
    assert not shape.exact
    told = find_shape("tiny-r1").parameters
    assert shape.parameters == pytest.approx(told, rel=0.01)


# --- bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),  # bytes of Q4_K_M files as Ollama's registry lists them; they hold a vocabulary besides
    [("7b", 4_683_075_271), ("14b", 8_988_112_040)],
)
def test_a_q4_k_m_file_has_the_computed_size(name, size):
    assert weight_bytes(find_shape(name), "q4_k_m") == pytest.approx(size, rel=0.002)


def test_q4_k_m_of_r1_is_some_404_gigabytes():
    assert weight_bytes(find_shape("671b"), "q4_k_m") == pytest.approx(404e9, rel=0.01)


@pytest.mark.parametrize(("double", "bits"), [(False, 4.5), (True, 4.127)])
def test_nf4_takes_the_known_bits_and_leaves_embeddings_in_16(double, bits):
    shape = find_shape("7b")
    linear = sum(m.weights for m in shape.matrices() if m.linear)
    left = 2 * (shape.parameters - linear)
    assert 8 * (weight_bytes(shape, "nf4", double_quant=double) - left) / linear == pytest.approx(bits, abs=0.001)


def test_nf4_is_what_bitsandbytes_really_stores():
    import bitsandbytes
    import torch

    weight = torch.randn(256, 512)
    for double in (False, True):
        packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
        scales = state.absmax.nbytes + (state.state2.absmax.nbytes if double else 0)
        shape = replace(find_shape("tiny-r1"), hidden=256, intermediate=512)
        base = [m for m in shape.matrices() if m.linear]
        linear = sum(m.weights for m in base)
        rest = 2 * (shape.parameters - linear)
        computed = (weight_bytes(shape, "nf4", double_quant=double) - rest) / linear * weight.numel()
        assert packed.nbytes + scales == pytest.approx(computed, rel=0.001)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_more_context_and_more_rows_never_need_less(precision):
    shape = find_shape("8b")

    def total(context: int, batch: int = 1) -> int:
        return need(shape, precision=precision, context=context, batch=batch).total

    assert total(1024) < total(2048) < total(16384) < total(16384, 4)


def test_the_cache_allows_for_the_engines_growth():
    held = 4096 * 2 * 56 * 1024

    def told(precision: str, device: str, context: int = 4096) -> int:
        return need(find_shape("7b"), precision=precision, context=context, batch=2, device=device).kv_cache

    assert told("fp16", "cuda") == told("8bit", "cuda") == told("bf16", "cpu") == 1.25 * held
    assert told("q4_k_m", "cuda") == held  # llama.cpp's is as long as it was told
    assert told("fp16", "cuda", 131_072) == 32 * held  # no longer than the model's own context


def test_the_parts_sum_to_the_total_and_training_has_its_own():
    tuning = need(find_shape("8b"), precision="nf4", context=2048, purpose="qlora")
    assert sum(size for _, size in tuning.parts()) == tuning.total
    assert tuning.optimizer == 2 * tuning.gradients == 2 * tuning.adapter
    assert tuning.kv_cache == 0
    answering = need(find_shape("8b"), precision="nf4", context=2048)
    assert {name for name, _ in answering.parts()} == {"weights", "kv_cache", "activations", "overhead"}


def test_an_adapter_has_the_size_that_peft_makes():
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    peft = pytest.importorskip("peft", reason="peft comes with the finetune extra")
    config = AutoConfig.from_pretrained(data_dir() / "tiny-r1")
    adapted = peft.LoraConfig(r=16, target_modules="all-linear")
    model = peft.get_peft_model(AutoModelForCausalLM.from_config(config, dtype=torch.float32), adapted)
    made = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert need(find_shape("tiny-r1"), precision="nf4", context=64, purpose="qlora").adapter == made


@pytest.mark.parametrize(
    ("name", "gigabytes"),  # peaks that Unsloth tells for a T4 at 2,048 tokens and two rows
    [("8b", 7.9), ("14b", 14.5)],
)
def test_qlora_peaks_told_by_others_are_met_within_a_quarter(name, gigabytes):
    told = need(find_shape(name), precision="nf4", context=2048, batch=2, purpose="qlora", whole_logits=False).total
    assert told / 1e9 == pytest.approx(gigabytes, rel=0.25)


def test_what_cannot_be_meant_is_refused():
    shape = find_shape("7b")
    with pytest.raises(UnknownName, match="nf4"):
        need(shape, precision="nf5", context=1)
    with pytest.raises(UsageError, match="at least 1"):
        need(shape, precision="nf4", context=0)
    with pytest.raises(UsageError, match="qlora takes nf4"):
        need(shape, precision="fp16", context=64, purpose="qlora")
    with pytest.raises(UsageError, match="lora does not train on nf4"):
        need(shape, precision="nf4", context=64, purpose="lora")


# --- plan, recommendation, advice ----------------------------------------------------------------------------------


def state(machine: str, model: str, precision: str, **options) -> str:
    (fit,) = [fit for fit in plan(machine, model=model, **options) if fit.precision == precision]
    return fit.state


def test_a_t4_holds_what_it_is_known_to_hold():
    assert state("t4", "1.5b", "fp16") == "fits"
    assert state("t4", "7b", "fp16") == "no"
    assert state("t4", "7b", "nf4") == "fits"
    assert state("t4", "8b", "nf4") == "fits"
    assert state("t4", "14b", "nf4") == "fits"
    assert state("t4", "14b", "nf4", context=32_768) == "no"
    assert state("t4", "32b", "nf4") == "no"


def test_r1_itself_takes_eight_h200s_in_its_own_fp8_and_does_not_fit_eight_h100s_comfortably():
    assert state("8xh200", "671b", "8bit") == "fits"
    assert state("8xh100", "671b", "8bit") != "fits"
    assert state("8xh200", "671b", "bf16") == "no"
    assert {fit.precision for fit in plan("8xh200", model="671b") if fit.possible} == {"bf16", "8bit", "q4_k_m"}


def test_a_precision_that_r1_cannot_be_had_in_has_its_size_and_is_never_said_to_fit():
    (packed,) = [fit for fit in plan("8xh200", model="671b") if not fit.possible]
    assert packed.precision == "nf4"
    assert packed.need.total < packed.available_bytes
    assert (packed.state, packed.longest_context) == ("no", 0)
    assert packed.note.startswith("cannot be had so: bitsandbytes packs linear layers")
    assert all(fit.possible for fit in plan("8xh200") if fit.model != "671b")


def test_a_model_whose_own_context_is_shorter_is_counted_at_that_and_said_so():
    counted = {fit.model: fit.context for fit in plan("8xh200", context=140_000)}
    assert (counted["671b"], counted["32b"]) == (140_000, 131_072)
    assert recommend("8xh200", context=140_000)[0] == "671b 8bit", "the one that reaches so far"
    value, reason = recommend("h200", context=140_000)
    assert value == "32b bf16"
    assert reason.endswith("no R1 that fits reaches further than 131,072 tokens")
    assert "reaches further" not in recommend("h200", context=131_072)[1]
    told = fits("--on", "h200", "--context", "140000").stdout
    assert "counted at their own 131,072 tokens, the most they take: 70b, 32b, 14b, 0528-8b, 8b, 7b, 1.5b" in told
    assert "counted at" not in fits("--on", "h200").stdout


@pytest.mark.parametrize("machine", sorted(machines()))
def test_the_longest_context_is_the_longest_that_fits(machine):
    for fit in plan(machine):
        if fit.state == "no" or fit.longest_context == fit.shape.context:
            continue
        at = find_hardware(machine)

        def holds(tokens: int, fit=fit, at=at) -> bool:
            def total(gpus: int) -> int:
                device = "cuda" if at.gpus else "cpu"
                return need(fit.shape, precision=fit.precision, context=tokens, device=device, gpus=gpus).total

            one = at.gpus[0].free_bytes if at.gpus else at.memory_free_bytes
            return total(1) <= one or (len(at.gpus) > 1 and total(len(at.gpus)) <= available(at))

        assert holds(fit.longest_context)
        assert not holds(fit.longest_context + 1)


def test_the_longest_context_over_many_gpus_does_not_depend_on_the_one_asked_for():
    def row(context: int):
        (fit,) = [fit for fit in plan("8xh100", model="70b", context=context) if fit.precision == "8bit"]
        return fit

    alone, split = row(4096), row(30_000)
    assert alone.longest_context == split.longest_context == 131_072
    assert alone.available_bytes < split.available_bytes
    assert "tokens take all 8 GPUs" in alone.note
    assert "over 8 GPUs" in split.note


@pytest.mark.parametrize("machine", sorted(machines()))
def test_what_is_recommended_fits_and_says_why(machine):
    value, reason = recommend(machine)
    name, precision = value.split()
    assert state(machine, name, precision) == "fits"
    assert len(reason) > 40


def test_a_t4_is_told_the_strongest_in_4bit_and_the_fast_one_in_fp16():
    value, reason = recommend("t4")
    assert value == "0528-8b nf4"
    assert "1.5b fp16" in reason
    assert best(plan("t4"), find_hardware("t4")).longest_context >= ROOM


def test_4bit_is_not_recommended_where_16_bits_hold_a_model_as_strong():
    assert recommend("rtx4090")[0] == "0528-8b bf16"
    assert recommend("h100")[0] == "32b bf16"
    assert recommend("8xh200")[0] == "671b 8bit"


def test_a_computer_without_a_gpu_is_sent_to_llama_cpp():
    value, reason = recommend("cpu-16gb")
    assert value == "0528-8b q4_k_m"
    assert "llama.cpp" in reason


def test_where_nothing_fits_the_embedded_model_is_told_and_that_it_is_no_r1():
    small = replace(find_hardware("cpu-16gb"), memory_free_bytes=GIB)
    value, reason = recommend(small)
    assert value == "tiny-r1 fp32"
    assert "no R1" in reason


def test_fine_tuning_is_planned_in_the_precisions_that_can_be_tuned():
    assert {fit.precision for fit in plan("t4", purpose="qlora")} == {"nf4"}
    assert {fit.precision for fit in plan("t4", purpose="lora")} == {"fp16", "8bit"}
    value, reason = recommend("t4", context=2048, purpose="qlora")
    assert value == "0528-8b nf4"
    assert "trains" in reason


def test_tuning_names_what_trains_only_tightly_and_says_nothing_of_answering():
    value, reason = recommend("t4", purpose="qlora")
    assert value == "1.5b nf4"
    assert "with room to spare" in reason
    assert reason.split("tightly: ")[1] == "8b nf4, 7b nf4"
    assert "tightly" not in recommend("h100", purpose="qlora")[1]
    for purpose in ("qlora", "lora"):
        assert not any("tokens/s" in fit.note or "serve" in fit.note for fit in plan("t4", purpose=purpose))


def test_r1_itself_cannot_be_tuned_in_4bit_and_the_advice_says_why_and_what_can():
    told = advise("671b", "8xh200", precision="nf4", context=4096, batch=2, purpose="qlora")
    assert "experts" in told
    assert "short" not in told
    assert "What would fit: DeepSeek-R1-Distill-Llama-70B in nf4" in told


def test_llama_cpp_over_many_gpus_is_noted_as_such_and_no_faster_than_one():
    fits = {(fit.model, fit.precision): fit for fit in plan("8xh100")}
    packed, whole = fits["671b", "q4_k_m"], fits["671b", "8bit"]
    assert "llama.cpp" in packed.note
    assert "vLLM" not in packed.note
    assert "vLLM" in whole.note
    assert packed.tokens_per_s_bound < whole.tokens_per_s_bound


@pytest.mark.parametrize("machine", sorted(machines()))
def test_only_a_model_with_a_higher_bound_is_called_faster(machine):
    value, reason = recommend(machine)
    if "faster by the bounds" not in reason:
        return
    bounds = {f"{fit.model} {fit.precision}": fit.tokens_per_s_bound for fit in plan(machine)}
    assert bounds[reason.rsplit(": ", 1)[1]] > bounds[value]


def test_speeds_are_bounds_that_known_measurements_stay_under():
    def bound(model: str, precision: str) -> float:
        (fit,) = [fit for fit in plan("t4", model=model, context=512) if fit.precision == precision]
        return fit.tokens_per_s_bound

    assert bound("8b", "nf4") > 17  # vLLM with bitsandbytes: 16-17
    assert bound("14b", "nf4") > 10  # and 10
    assert bound("1.5b", "fp16") < 300e9 / (2 * find_shape("1.5b").active_parameters) + 1


def test_a_fit_as_a_dict_is_flat_json():
    rows = json.loads(json.dumps([fit.as_dict() for fit in plan("t4")]))
    assert {"model", "precision", "state", "need_bytes", "longest_context"} <= set(rows[0])
    assert all(not isinstance(value, dict | list) for row in rows for value in row.values())
    row = next(row for row in rows if (row["model"], row["precision"]) == ("7b", "nf4"))
    parts = ("weights_bytes", "kv_cache_bytes", "activations_bytes", "overhead_bytes")
    assert sum(row[part] for part in parts) == row["need_bytes"]
    assert row["available_bytes"] - row["need_bytes"] == row["free_after_bytes"]


def test_advice_names_the_shortage_and_what_fits_from_least_harm():
    told = advise("14b", "t4", precision="nf4", context=32_768, batch=2)
    assert "GiB short" in told
    ways = told.split("What would fit")[1]
    assert ways.index("context of at most") < ways.index("DeepSeek")
    told = advise("8b", "t4", precision="fp16", context=4096)
    assert "the same model in 8bit or nf4" in told
    assert told.index("the same model") < told.index("Qwen-7B")


def test_every_way_out_that_is_advised_does_fit():
    told = advise("7b", "t4", precision="nf4", context=16_384, batch=16)
    rows = int(told.split("batch ")[2].split(";")[0].rstrip("."))
    assert state("t4", "7b", "nf4", context=16_384, batch=rows) != "no"
    assert state("t4", "7b", "nf4", context=16_384, batch=rows + 1) == "no"
    tokens = int(told.split("context of at most ")[1].split(" tokens")[0].replace(",", ""))
    assert state("t4", "7b", "nf4", context=tokens, batch=16) != "no"


def test_advice_for_a_model_that_should_fit_says_so():
    told = advise("7b", "t4", precision="nf4", context=2048)
    assert "should fit" in told
    assert "Lighter: the same model in q4_k_m" in told


# --- the command ---------------------------------------------------------------------------------------------------


def fits(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dsr1kit", "fits", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_table_names_every_model_marks_without_colour_and_gives_the_command():
    done = fits("--on", "t4")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    for name in ("671b", "70b", "32b", "14b", "0528-8b", "8b", "7b", "1.5b", "tiny-r1"):
        assert name in lines
    assert "- 15." in lines["7b"]
    assert "+ 6." in lines["7b"]
    assert "dsr1kit ask --local deepseek-ai/DeepSeek-R1-0528-Qwen3-8B --quantization 4bit" in done.stdout


def test_a_model_that_fits_nowhere_ends_with_1_and_the_way_out():
    done = fits("70b", "--on", "t4")
    assert done.returncode == 1
    assert "What would fit" in done.stderr
    assert "ask --local" not in done.stdout


def test_one_model_is_broken_down():
    done = fits("7b", "--on", "t4", "--context", "8192")
    assert done.returncode == 0, done.stderr
    for word in ("weights", "kv cache", "activations", "overhead", "nf4", "q4_k_m"):
        assert word in done.stdout


def test_a_model_that_cannot_be_had_so_ends_with_1_and_says_why():
    done = fits("671b", "--for", "qlora", "--on", "8xh200")
    assert done.returncode == 1
    assert "x 440." in done.stdout
    assert "run first" not in done.stdout
    assert "experts" in done.stderr
    done = fits("671b", "--for", "qlora", "--on", "8xh200", "--json")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert [fit["possible"] for fit in told["fits"]] == [False]
    assert told["recommended"]["commands"] == []
    assert "experts" in told["recommended"]["reason"]


def test_the_tuning_tables_keep_r1_itself_and_have_no_speeds():
    done = fits("--on", "t4", "--for", "qlora")
    assert done.returncode == 0, done.stderr
    assert ["671b", "x", "436.3"] in [line.split() for line in done.stdout.splitlines()]
    assert "x cannot be had so" in done.stdout
    done = fits("8b", "--on", "t4", "--for", "qlora")
    assert done.returncode == 0, done.stderr
    assert "optimizer" in done.stdout
    assert "tokens/s" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        (("--on", "cpu-16gb"), "--context 16384 --batch 1"),
        (("--on", "cpu-16gb", "--batch", "2"), "--context 16384 --batch 2"),
        (("--on", "8xh200", "--context", "20000"), "--engine vllm --context 20000 --batch 1"),
        (("1.5b", "--on", "8xh200", "--context", "200000"), "--context 131072 --batch 1"),
    ],
)
def test_the_printed_serve_command_takes_the_planned_sizes(arguments, sizes):
    done = fits(*arguments)
    assert done.returncode == 0, done.stderr
    assert sizes in next(line for line in done.stdout.splitlines() if "dsr1kit serve" in line)


def test_a_named_machines_title_has_its_own_key_in_json():
    told = json.loads(fits("--on", "t4", "--json").stdout)["hardware"]
    assert told["title"] == "NVIDIA T4 16 GB, as in Colab"
    assert told["cpu"] == ""
    here = json.loads(fits("--json").stdout)["hardware"]
    assert here["title"] == ""


def test_json_is_one_object_for_this_machine():
    done = fits("--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["recommended"]["value"]
    assert told["hardware"]["cores"] >= 1
    assert len(told["fits"]) > 20


@pytest.mark.parametrize(
    "arguments", [("--on", "t5"), ("9b",), ("--for", "training"), ("--context", "0"), ("7b", "--batch", "-1")]
)
def test_what_cannot_be_meant_ends_with_2(arguments):
    done = fits(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("dsr1kit: ")


def test_a_folder_is_planned_by_its_own_configuration():
    done = fits(str(data_dir() / "tiny-r1"), "--on", "cpu-16gb", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fits"][0]["parameters"] == find_shape("tiny-r1").parameters
