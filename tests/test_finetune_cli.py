"""The finetune commands from outside: exit codes, one JSON object on stdout, what is said, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="fine-tuning is TRL's")

SMALL = ("--steps", "4", "--rank", "4", "--batch-size", "8", "--items", "7", "--max-tokens", "48", "--quiet")


def finetune(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "dsr1kit", "finetune", *map(str, arguments)],
        capture_output=True, text=True, timeout=240, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == code, (done.returncode, done.stdout[-500:], done.stderr[-1500:])
    assert "Traceback" not in done.stderr + done.stdout
    return done


def one_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    assert isinstance(value, dict)
    return value


def refused(*arguments: str | Path) -> str:
    """The message of a command that cannot be meant: exit 2, nothing on stdout."""
    done = finetune(*arguments, code=2)
    assert done.stdout == ""
    return done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("cli") / "mine"
    done = finetune("sft", "--data", "worked:arithmetic:sum4:64", "--out", out, "--json", *SMALL)
    return out, one_object(done.stdout)


def test_sft_trains_measures_and_gives_one_object(run: tuple[Path, dict[str, Any]]) -> None:
    out, told = run
    assert Path(told["adapter"]) == out / "adapter"
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert (told["steps"], told["resumed_at"], told["left_out"]) == (4, 0, 0)
    assert told["tokens"] > 0
    assert told["facts"]["sources"] == {"worked:arithmetic:sum4": 64}
    assert {change["task"] for change in told["gain"]["changes"]} == {"arithmetic:sum4", "arithmetic"}
    assert Path(told["gain"]["report"]).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_the_same_command_again_trains_nothing_and_says_the_same(run: tuple[Path, dict[str, Any]]) -> None:
    out, told = run
    again = finetune("sft", "--data", "worked:arithmetic:sum4:64", "--out", out, "--json", *SMALL)
    assert one_object(again.stdout)["gain"] == told["gain"]


def test_a_learning_rate_that_differs_is_another_run(run: tuple[Path, dict[str, Any]]) -> None:
    out, _ = run
    said = refused("sft", "--data", "worked:arithmetic:sum4:64", "--out", out, *SMALL, "--learning-rate", "0.001")
    assert "learning_rate" in said


def test_adapters_are_measured_by_name(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = run
    asked = ("--task", "arithmetic:sum4", "--items", "5", "--max-tokens", "48", "--temperature", "0", "--quiet")
    done = finetune("evaluate", "--adapter", f"four steps={out / 'adapter'}", *asked, "--out", tmp_path / "gain")
    assert "four steps: arithmetic:sum4" in done.stdout
    assert (tmp_path / "gain" / "report.html").is_file()
    said = refused(
        "evaluate", "--adapter", out / "adapter", "--adapter", out / "adapter", *asked, "--out", tmp_path / "b"
    )
    assert "two adapters are called 'adapter'" in said


def test_a_run_is_exported(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = run
    done = finetune("export", out, "--out", tmp_path / "away", "--what", "merged,card,commands", "--json")
    told = one_object(done.stdout)
    assert told
    assert list((tmp_path / "away").rglob("model.safetensors"))
    card = next((tmp_path / "away").rglob("README.md")).read_text(encoding="utf-8")
    assert "Data: 64 of worked:arithmetic:sum4." in card
    assert "unknown" in refused("export", out, "--out", tmp_path / "c", "--what", "onnx")


def test_data_is_checked_and_shown_as_it_will_be_read() -> None:
    done = finetune("check", "--data", "worked:arithmetic:20", "--items", "5", "--json")
    told = one_object(done.stdout)
    assert (told["kept"], told["sound"]) == (20, True)
    shown = finetune("check", "--data", "worked:arithmetic:20", "--items", "5").stdout
    assert "20 of 20 examples kept" in shown
    assert "ok: the end mark is trained" in shown


def test_training_through_the_chat_template_is_found_unfit() -> None:
    done = finetune("check", "--data", "worked:arithmetic:20", "--items", "5", "--template", code=1)
    assert "NO: the reasoning is gone" in done.stdout


def test_a_teacher_is_asked_and_what_is_right_is_kept(tmp_path: Path) -> None:
    weather = tmp_path / "weather.toml"
    weather.write_text('[model]\nname = "tiny-r1"\n[latency]\nfirst_token_s = 0.01\ninter_token_s = 0.0\n')
    out = tmp_path / "traces"
    done = finetune("collect", "--teacher", f"emulated:{weather}", "--task", "practice:sum2", "--items", "6",
                    "--max-tokens", "96", "--out", out, "--json", "--quiet")  # fmt: skip
    told = one_object(done.stdout)
    assert told["asked"] == 6
    assert 1 <= told["kept"] <= 6
    lines = Path(told["examples"]).read_text(encoding="utf-8").splitlines()
    assert len(lines) == told["kept"]
    assert all(json.loads(line)["reasoning"] for line in lines)


def test_grpo_takes_steps_and_tells_its_alarms(tmp_path: Path) -> None:
    done = finetune("grpo", "--task", "practice:sum2", "--steps", "2", "--prompts", "2", "--generations", "4",
                    "--max-tokens", "48", "--out", tmp_path / "r", "--no-evaluate", "--json", "--quiet")  # fmt: skip
    told = one_object(done.stdout)
    assert (told["steps"], told["gain"]) == (2, None)
    assert isinstance(told["alarms"], list)
    assert (tmp_path / "r" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("export", "absent", "--out", "r"), "absent is no folder of a run"),
        (("evaluate", "--adapter", "absent", "--task", "arithmetic", "--out", "r"), "there is no adapter absent"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_what_is_not_there_is_told(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = finetune(*arguments[:-1], tmp_path / "r", code=1)
    assert said in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sft", "--data", "absent.jsonl", "--out", "r"), "absent.jsonl"),
        (("sft", "--data", "worked:algebra", "--out", "r"), "algebra"),
        (("sft", "--data", "set:OpenR2", "--out", "r"), "openr1-math"),
        (("sft", "--data", "worked:arithmetic:8", "--out", "r", "--rank", "5000"), "usual are 8 to 64"),
        (("sft", "--data", "worked:arithmetic:8", "--out", "r", "--learning-rate", "3"), "usual for LoRA"),
        (("sft", "--data", "worked:arithmetic:8", "--out", "r", "--method", "prefix"), "lora"),
        (("grpo", "--task", "gsm8k", "--out", "r"), "--measured"),
        (("grpo", "--task", "gsm8k", "--measured", "gsm8k", "--out", "r"), "another one than gsm8k"),
        (("grpo", "--task", "practice:sum9", "--out", "r"), "sum9"),
        (("collect", "--teacher", "absent", "--task", "practice", "--out", "r"), "absent"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_meant_is_refused_with_a_way_out(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(*arguments)
    assert not (tmp_path / "r").exists() or not list((tmp_path / "r").rglob("*.safetensors"))
