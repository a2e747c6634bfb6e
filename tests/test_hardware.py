"""What this machine has: limits of control groups, affinity, accelerators; the choices and the preflight on top."""

from __future__ import annotations

import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dsr1kit.errors import ModelError, UnknownName
from dsr1kit.local import hardware as module
from dsr1kit.local.hardware import (
    DISTILL,
    TINY,
    Gpu,
    Hardware,
    choose_dtype,
    choose_quantization,
    default_model,
    look,
)
from dsr1kit.local.machines import bandwidth, find_hardware, machines
from dsr1kit.local.preflight import preflight
from dsr1kit.local.shapes import find_shape

GIB = 1 << 30
CPUINFO = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512_bf16\n"
MEMINFO = f"MemTotal:       {16 << 20} kB\nMemFree:        {2 << 20} kB\nMemAvailable:   {12 << 20} kB\n"


def machine(root: Path, files: dict[str, object] | None = None) -> Path:
    """A folder that stands for `/`: 16 GiB of memory, 12 of them free, eight processors allowed."""
    given = {
        "proc/cpuinfo": CPUINFO,
        "proc/meminfo": MEMINFO,
        "proc/self/status": "Name:\tpython\nCpus_allowed_list:\t0-3,8-11\n",
        **(files or {}),
    }
    for name, text in given.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n" if not str(text).endswith("\n") else str(text))
    return root


def test_a_machine_without_limits_is_told_as_the_kernel_tells_it(tmp_path):
    at = look(machine(tmp_path))
    assert (at.cores, at.cpu, at.gpus) == (8, "Some CPU @ 2 GHz", ())
    assert (at.memory_bytes, at.memory_free_bytes) == (16 * GIB, 12 * GIB)
    assert at.cpu_features == {"fpu", "avx2", "avx512_bf16"}


def test_the_narrowest_group_on_the_way_up_counts(tmp_path):
    base = "sys/fs/cgroup"
    at = look(
        machine(
            tmp_path,
            {
                "proc/self/cgroup": "0::/system/job",
                f"{base}/cpu.max": "max 100000",
                f"{base}/system/cpu.max": "250000 100000",
                f"{base}/system/job/cpu.max": "400000 100000",
                f"{base}/system/memory.max": 4 * GIB,
                f"{base}/system/memory.current": 3 * GIB,
                f"{base}/system/memory.stat": f"anon {1 * GIB}\ninactive_file {1 * GIB}\n",
                f"{base}/system/job/memory.max": "max",
                f"{base}/system/job/memory.current": 1 * GIB,
            },
        )
    )
    assert at.cores == 2
    assert at.memory_bytes == 4 * GIB
    assert at.memory_free_bytes == 2 * GIB  # a gibibyte of read files gives way


def test_a_container_whose_group_is_mounted_at_the_root_is_found_under_a_path_of_the_host(tmp_path):
    files = {"proc/self/cgroup": "0::/docker/0123abcd", "sys/fs/cgroup/memory.max": 2 * GIB,
             "sys/fs/cgroup/memory.current": GIB // 2, "sys/fs/cgroup/cpu.max": "50000 100000"}  # fmt: skip
    at = look(machine(tmp_path, files))
    assert (at.memory_bytes, at.memory_free_bytes, at.cores) == (2 * GIB, 3 * GIB // 2, 1)


def test_the_groups_of_version_one_count_too(tmp_path):
    files = {
        "proc/self/cgroup": "4:memory:/a/b\n2:cpu,cpuacct:/a\n",
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": 3 * GIB,
        "sys/fs/cgroup/memory/a/memory.usage_in_bytes": 2 * GIB,
        "sys/fs/cgroup/memory/a/memory.stat": f"total_inactive_file {GIB // 2}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": 300000,
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": 100000,
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": -1,
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": 100000,
    }
    at = look(machine(tmp_path, files))
    assert (at.cores, at.memory_bytes, at.memory_free_bytes) == (3, 3 * GIB, 3 * GIB // 2)


def test_a_limit_above_the_memory_there_is_changes_nothing(tmp_path):
    files = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": 64 * GIB,
             "sys/fs/cgroup/memory.current": 60 * GIB}  # fmt: skip
    assert look(machine(tmp_path, files)).memory_free_bytes == 12 * GIB


def test_a_machine_that_tells_nothing_still_has_a_core(tmp_path):
    at = look(tmp_path)
    assert at.cores >= 1
    assert (at.cpu, at.memory_bytes) == ("", 0)


def test_affinity_is_honoured_in_a_process_that_is_bound_to_one_core():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from dsr1kit.local.hardware import look; print(look().cores)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


@pytest.mark.skipif(any(Path("/", d).exists() for d in module._DEVICES), reason="torch is asked where a GPU may be")
def test_looking_imports_no_torch_where_there_is_no_accelerator():
    code = "import sys; from dsr1kit.local.hardware import look; look(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


SMI = """#!/bin/sh
cat <<'END'
0, GPU-aaaa-1, Tesla T4, 15360, 15095, 7.5
1, GPU-bbbb-2, NVIDIA H100 80GB HBM3, 81559, 80994, 9.0
2, GPU-cccc-3, Odd Card, [N/A], [N/A], [N/A]
END
"""


@pytest.fixture
def smi(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_nvidia_smi_tells_of_the_cards_without_torch(smi):
    first, second = module._told_gpus()
    assert first == Gpu("Tesla T4", 15360 << 20, 15095 << 20, (7, 5), bf16=False)
    assert (second.name, second.capability, second.bf16) == ("NVIDIA H100 80GB HBM3", (9, 0), True)


@pytest.mark.parametrize(
    ("visible", "names"),
    [("1", ["NVIDIA H100 80GB HBM3"]), ("GPU-aaaa", ["Tesla T4"]), ("1,0", ["NVIDIA H100 80GB HBM3", "Tesla T4"]),
     ("", []), ("-1", []), ("0,9,1", ["Tesla T4"])],
)  # fmt: skip
def test_hidden_cards_are_not_told(smi, monkeypatch, visible, names):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.name for gpu in module._told_gpus()] == names


def test_a_broken_nvidia_smi_is_no_card(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML' ; exit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert module._told_gpus() == ()


# --- choices -------------------------------------------------------------------------------------------------------


def test_a_named_model_is_taken_as_asked():
    assert default_model("some/model") == ("some/model", "as asked")


def test_a_t4_runs_the_smallest_distill_in_float16():
    value, reason = default_model(hardware=find_hardware("t4"))
    assert value == DISTILL
    assert "float16" in reason
    assert "bfloat16" in default_model(hardware=find_hardware("h100")).reason


def test_without_a_gpu_or_with_a_full_one_the_embedded_model_runs():
    assert default_model(hardware=find_hardware("cpu-16gb"))[0] == TINY
    t4 = find_hardware("t4")
    full = replace(t4, gpus=(replace(t4.gpus[0], free_bytes=2 * GIB),))
    value, reason = default_model(hardware=full)
    assert value == TINY
    assert "2.0 GiB free" in reason


def test_small_models_run_in_float32_on_a_processor():
    assert choose_dtype(1_400_000, "cpu").value == "float32"
    wide = choose_dtype(1_500_000_000, "cpu")
    assert wide.value == ("bfloat16" if "avx512_bf16" in look().cpu_features else "float32")


@pytest.mark.parametrize(
    ("model", "machine_name", "purpose", "value"),
    [
        ("1.5b", "t4", "inference", "none"),  # fits in fp16, where 4-bit would be slower
        ("7b", "t4", "inference", "4bit"),
        ("14b", "t4", "inference", "4bit"),
        ("7b", "a100-40gb", "inference", "none"),
        ("1.5b", "t4", "qlora", "4bit"),
        ("1.5b", "t4", "lora", "none"),
        ("8b", "t4", "lora", "8bit"),
        ("7b", "cpu-16gb", "inference", "4bit"),
    ],
)
def test_quantization_is_chosen_only_where_it_must_be(model, machine_name, purpose, value):
    choice = choose_quantization(find_shape(model), find_hardware(machine_name), 2048, purpose)
    assert choice.value == value
    assert "GiB" in choice.reason or "4-bit" in choice.reason


def test_4bit_is_not_chosen_on_a_processor_for_widths_that_it_gets_wrong():
    odd = replace(find_shape("7b"), hidden=3600)
    assert choose_quantization(odd, find_hardware("cpu-16gb"), 2048).value == "8bit"


def test_a_model_too_large_in_any_precision_is_refused_with_what_would_fit():
    with pytest.raises(ModelError, match=r"GiB short. What would fit: .*Qwen-14B in nf4"):
        choose_quantization(find_shape("70b"), find_hardware("t4"), 4096)
    with pytest.raises(UnknownName, match="inference"):
        choose_quantization(find_shape("7b"), find_hardware("t4"), 4096, "inferrence")


def test_a_card_that_is_here_gets_its_makers_bandwidth_by_its_name():
    def of(name: str, total: int) -> float | None:
        return bandwidth(Hardware((Gpu(name, total, total, (8, 0), True),), 1, "", frozenset(), GIB, GIB, False))

    assert of("Tesla T4", 15 * GIB) == 300e9
    assert of("NVIDIA A100-SXM4-40GB", 40 * GIB) == 1555e9
    assert of("NVIDIA A100-SXM4-80GB", 80 * GIB) == 2039e9
    assert of("NVIDIA GeForce RTX 4090", 24 * GIB) == 1008e9
    assert of("NVIDIA GeForce RTX 4090 Laptop GPU", 16 * GIB) is None
    assert of("Something new", 16 * GIB) is None


def test_every_named_machine_can_be_found_and_a_misspelt_one_names_the_nearest():
    assert {"t4", "cpu-16gb", "8xh200"} <= set(machines())
    assert len(find_hardware("8xh100").gpus) == 8
    with pytest.raises(UnknownName, match="did you mean 'rtx3090'"):
        find_hardware("rtx-3090")


# --- preflight -----------------------------------------------------------------------------------------------------

GOOD = {"torch": "2.13.0", "transformers": "5.23.0", "accelerate": "1.15.0", "gguf": "0.19", "safetensors": "0.8",
        "tokenizers": "0.23", "bitsandbytes": "0.50.2", "peft": "0.21"}  # fmt: skip


def findings(versions: dict[str, str | None], at: Hardware | None = None) -> dict[str, object]:
    have = {**GOOD, **versions}
    at = at or find_hardware("cpu-16gb")
    return {finding.name: finding for finding in preflight(hardware=at, installed=have.get)}


def test_a_sound_environment_has_nothing_to_mend_and_4bit_products_are_really_checked():
    found = {finding.name: finding for finding in preflight()}
    assert found["bitsandbytes"].ok, found["bitsandbytes"]
    assert "agrees with its weights" in found["bitsandbytes"].detail
    assert found["torch"].ok
    assert all(finding.ok or finding.fix for finding in found.values())


def test_colabs_old_torchao_is_found_where_peft_would_refuse_it():
    found = findings({"torchao": "0.10.0", "torch": None})
    assert not found["torchao"].ok
    assert "pip uninstall -y torchao" in found["torchao"].fix
    assert "torchao" not in findings({"torchao": "0.16.0", "torch": None})
    assert "torchao" not in findings({"torchao": "0.10.0", "peft": None, "torch": None})


def test_a_torch_that_was_replaced_after_it_was_loaded_asks_for_a_restart():
    import torch  # noqa: F401 - it must be loaded

    found = findings({"torch": "1.0.0"}, replace(find_hardware("t4"), colab=True))
    assert not found["torch"].ok
    assert "Restart" in found["torch"].fix


def test_packages_below_the_kits_bounds_are_told_with_the_bound():
    found = findings({"transformers": "4.57.1", "accelerate": None, "torch": None})
    assert found["transformers"].fix.startswith("pip install -U 'transformers>=5")
    assert "not installed" in found["accelerate"].detail


def test_in_colab_no_fix_touches_what_colab_has_loaded():
    at = replace(find_hardware("t4"), colab=True)
    old = {"transformers": "4.40", "bitsandbytes": "0.40", "torch": "1.0", "torchao": "0.10", "peft": "0.1"}
    for finding in findings(old, at).values():
        if "pip install" in finding.fix and finding.name != "torchao":
            assert "--no-deps" in finding.fix
        for name in ("torch>=", "'torch'", "numpy", "pandas", "ipython"):
            assert name not in finding.fix


def test_a_gpu_that_this_torch_cannot_use_is_told():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this torch can use the GPU that is here")
    finding = findings({}, find_hardware("t4"))["GPU"]
    assert not finding.ok
    assert "CUDA" in finding.detail
    assert finding.fix


def test_more_threads_than_cores_and_the_offline_switch_are_told(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = findings({"torch": None})
    assert found["threads"].fix.startswith("export OMP_NUM_THREADS=8")
    assert found["offline"].ok
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert not {"threads", "offline"} & set(findings({"torch": None}))


def test_a_processor_without_avx2_is_sent_elsewhere():
    old = replace(find_hardware("cpu-16gb"), cpu_features=frozenset({"sse2"}))
    assert not findings({"torch": None}, old)["processor"].ok
    assert findings({"torch": None})["processor"].ok
