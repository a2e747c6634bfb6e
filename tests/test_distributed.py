"""Training on several processes: the same rows, the same curve and the same adapter as on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsr1kit.finetune.base import open_base
from dsr1kit.paths import data_dir

pytest.importorskip("trl", reason="fine-tuning is TRL's")

DDP, FSDP = (data_dir() / "accelerate" / f"{name}.yaml" for name in ("ddp", "fsdp"))

_DRIVER = """
import json, sys
import torch
from dsr1kit.finetune.data import load_examples
from dsr1kit.finetune.settings import AdapterSettings, SftSettings
from dsr1kit.finetune.sft import train_sft

torch.set_num_threads(1)
settings = SftSettings(
    model="tiny-r1", adapter=AdapterSettings(rank=4, alpha=8), learning_rate=5e-3, steps=6, save_every=4, device="cpu",
    batch_size=int(sys.argv[2]),
)
found = train_sft(settings, load_examples(["worked:arithmetic:remainder7:40"]), sys.argv[1],
                  on_step=lambda step, *_: print("step", step, flush=True))
print("losses", json.dumps(found.curve.losses), flush=True)
"""


def trained(root: Path, name: str, batch: int, *launcher: str) -> tuple[list[list[float]], list[int], Path]:
    """Run the driver; the losses that each process tells, the steps that were told, and the run's folder."""
    driver, out = root / "train.py", root / name
    driver.write_text(_DRIVER)
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, *launcher, str(driver), str(out), str(batch)],
        capture_output=True, text=True, timeout=240, check=False, env=kept | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.partition(" ") for line in done.stdout.splitlines()]
    losses = [json.loads(rest) for word, _, rest in lines if word == "losses"]
    return losses, [int(rest) for word, _, rest in lines if word == "step"], out


def test_two_processes_with_half_the_batch_train_as_one_does(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    (alone,), _, one = trained(tmp_path, "one", 8)
    launch = ("-m", "accelerate.commands.launch", "--config_file", str(DDP), "--num_processes", "2",
              "--main_process_port", "0")  # fmt: skip
    together, told, two = trained(tmp_path, "two", 4, *launch)
    assert len(together) == 2
    assert told == list(range(1, 7))  # by the first process alone
    for losses in together:
        assert losses == pytest.approx(alone, rel=1e-4)
    ours, theirs = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (one, two))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.linalg.norm(theirs[name] - weight) < 0.02 * torch.linalg.norm(weight), name
    assert sorted(path.name for path in two.iterdir()) == ["adapter", "run.json"]


@pytest.mark.parametrize(
    ("path", "kind", "sharded"), [(DDP, "MULTI_GPU", False), (FSDP, "FSDP", True)], ids=["ddp", "fsdp"]
)
def test_a_configuration_is_understood_by_accelerate(path: Path, kind: str, sharded: bool) -> None:
    """Sharding itself needs GPUs: on a processor accelerate falls back to whole copies."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    loaded: Any = load_config_from_file(str(path))
    assert loaded.distributed_type == kind
    assert loaded.num_processes == 2
    arguments = ["--config_file", str(path), "--num_processes", "4", "train.py"]
    wanted, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    assert (wanted.num_processes, wanted.use_fsdp, wanted.multi_gpu) == (4, sharded, not sharded)
    assert wanted.mixed_precision == "no"  # the kit's settings say it
    if sharded:
        assert wanted.fsdp_version == 2
        assert wanted.fsdp_state_dict_type == "FULL_STATE_DICT"


def test_each_process_loads_the_base_on_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    class Loaded(Exception):
        pass

    def load(_: str, __: str, device: str, *___: object) -> None:
        raise Loaded(device)

    monkeypatch.setattr("dsr1kit.finetune.base.load", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for rank, asked, expected in (("3", "auto", "cuda:3"), ("1", "cuda", "cuda:1"), ("1", "cpu", "cpu"), ("", "auto",
                                  "auto")):  # fmt: skip
        monkeypatch.setenv("LOCAL_RANK", rank)
        if not rank:
            monkeypatch.delenv("LOCAL_RANK")
        with pytest.raises(Loaded, match=f"^{expected}$"):
            open_base("tiny-r1", method="lora", dtype="auto", device=asked)
