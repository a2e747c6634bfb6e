"""Supervised fine-tuning of tiny-r1: it learns, a seed gives one adapter, and what stops it loses nothing."""

from __future__ import annotations

import errno
import json
import random
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="the trainer is TRL's")

from dsr1kit.errors import ModelError, RunError, UnknownName, UsageError
from dsr1kit.finetune import checkpoints
from dsr1kit.finetune.data import Example, load_examples
from dsr1kit.finetune.rows import row_order, steps_for
from dsr1kit.finetune.settings import AdapterSettings, SftSettings, preset, settings_for
from dsr1kit.finetune.sft import Trained, train_sft
from dsr1kit.local.machines import find_hardware
from dsr1kit.local.shapes import find_shape

STEPS, SAVE_EVERY = 10, 3
SETTINGS = SftSettings(
    model="tiny-r1",
    # Dropout and accumulation: what a run that goes on must draw and count as the one before would have.
    adapter=AdapterSettings(rank=8, alpha=16, dropout=0.1),
    learning_rate=5e-3,
    steps=STEPS,
    batch_size=2,
    accumulation=2,
    device="cpu",
    save_every=SAVE_EVERY,
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return load_examples(["worked:arithmetic:remainder7:30"])


@pytest.fixture(scope="module")
def undisturbed(examples: list[Example], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The run that the others are held against."""
    import torch

    torch.set_num_threads(1)
    return train_sft(SETTINGS, examples, tmp_path_factory.mktemp("undisturbed") / "run")


def weights(trained: Trained) -> bytes:
    return (trained.adapter / "adapter_model.safetensors").read_bytes()


def short(**changed: Any) -> SftSettings:
    """A run of two steps without dropout and checkpoints."""
    plain = replace(SETTINGS, adapter=replace(SETTINGS.adapter, dropout=0.0), steps=2, save_every=0)
    return replace(plain, **changed)


# --- checkpoints -------------------------------------------------------------------------------------------


def checkpoint(folder: Path, step: int, *, sealed: bool = True) -> Path:
    place = folder / f"checkpoint-{step}"
    (place / "deep").mkdir(parents=True)
    (place / "weights.bin").write_bytes(b"w" * 100)
    (place / "deep" / "state.json").write_text("{}")
    if sealed:
        checkpoints.seal(place)
    return place


def test_only_a_sealed_checkpoint_whose_files_are_as_they_were_is_whole(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path) is None
    whole, later = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert checkpoints.is_whole(whole)
    assert checkpoints.newest(tmp_path) == later, "steps are numbers, not words"
    half = checkpoint(tmp_path, 11, sealed=False)
    (half / "complete.json.part").write_text('{"weights.bin": 100}')
    assert not checkpoints.is_whole(half)
    assert checkpoints.newest(tmp_path) == later
    (later / "weights.bin").write_bytes(b"w" * 99)
    assert not checkpoints.is_whole(later)
    (lost := checkpoint(tmp_path, 12)).joinpath("deep", "state.json").unlink()
    (torn := checkpoint(tmp_path, 13)).joinpath("complete.json").write_text('{"weights.bin": 10')
    (empty := checkpoint(tmp_path, 14)).joinpath("complete.json").write_text("{}")
    (listed := checkpoint(tmp_path, 15)).joinpath("complete.json").write_text("[1]")
    assert checkpoints.newest(tmp_path) == whole
    checkpoints.clear_halves(tmp_path)
    assert not any(path.exists() for path in (half, later, lost, torn, empty, listed))
    assert (whole / "deep" / "state.json").is_file()
    assert checkpoints.step_of(whole) == 9


# --- the order of the rows ---------------------------------------------------------------------------------

_DRAWN = random.Random(3)
LENGTHS = [_DRAWN.randint(10, 200) for _ in range(60)]


@pytest.mark.parametrize("batch", [1, 4, 7, 60, 100])
def test_every_row_comes_once_a_pass_in_full_batches_always_in_the_same_order(batch: int) -> None:
    order = row_order(LENGTHS, batch, 200, 5)
    assert order == row_order(LENGTHS, batch, 200, 5)
    assert order != row_order(LENGTHS, batch, 200, 6)
    assert len(order) == 200 * batch
    for passes in (1, 2, 3):
        taken = min(passes * len(LENGTHS) // batch * batch, len(order))
        seen = Counter(order[:taken])
        # What is left of a pass, less than a batch, begins the next.
        whole = taken // len(LENGTHS)
        assert {seen[row] for row in range(len(LENGTHS))} <= {whole, whole + 1}
    if len(LENGTHS) % batch == 0:
        assert sorted(order[: len(LENGTHS)]) == list(range(len(LENGTHS)))
        assert sorted(order[len(LENGTHS) : 2 * len(LENGTHS)]) == list(range(len(LENGTHS)))


def test_no_batch_holds_a_row_twice_while_there_are_others() -> None:
    order = row_order(LENGTHS, 20, 30, 0)
    for at in range(0, len(order), 20):
        assert len(set(order[at : at + 20])) == 20


def test_within_a_step_rows_stand_by_length_so_that_its_batches_have_little_to_pad() -> None:
    order = row_order(LENGTHS, 20, 3, 0)
    steps = [[LENGTHS[row] for row in order[at : at + 20]] for at in range(0, 60, 20)]
    assert all(lengths == sorted(lengths) for lengths in steps)
    batches = [lengths[at : at + 5] for lengths in steps for at in range(0, 20, 5)]
    assert sum(5 * max(some) for some in batches) < 1.2 * sum(LENGTHS)
    means = [sum(lengths) / 20 for lengths in steps]
    assert max(means) - min(means) < 40, "each step's rows are drawn from all"


def test_an_order_needs_rows_and_steps_follow_from_epochs() -> None:
    with pytest.raises(UsageError, match="needs rows"):
        row_order([], 4, 1, 0)
    assert [steps_for(60, 8, epochs) for epochs in (1, 2, 0.01)] == [8, 15, 1]
    assert steps_for(300, 10, 0.1) == 3, "a share that floats cannot say exactly"


# --- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"learning_rate": 3.0}, "usual for LoRA are 1e-5 to 5e-4"),
        ({"learning_rate": 0.0}, "out of sense"),
        ({"learning_rate": float("nan")}, "out of sense"),
        ({"epochs": 0}, "usual are 1 to 3"),
        ({"epochs": float("nan")}, "usual are 1 to 3"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"accumulation": 0}, "accumulation must be at least 1"),
        ({"max_length": 4}, "max_length must be at least 8"),
        ({"save_every": -1}, "save_every must be at least 0"),
        ({"warmup": 1.0}, "share of the steps"),
        ({"instructed": 2.0}, "share of the questions"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"loss": "answers"}, "unknown loss"),
    ],
)
def test_a_value_out_of_sense_is_refused_with_what_is_usual(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        replace(SETTINGS, **changed)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rank": 0}, "usual are 8 to 64"),
        ({"rank": 4096}, "usual are 8 to 64"),
        ({"alpha": 0}, "usual is the rank or twice it"),
        ({"dropout": 1.0}, "usual are 0 to 0.1"),
    ],
)
def test_an_adapter_out_of_sense_is_refused_with_what_is_usual(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        AdapterSettings(**changed)
    assert said in str(caught.value)
    with pytest.raises(UnknownName, match="did you mean 'qlora'"):
        AdapterSettings(method="qlra")


@pytest.mark.parametrize(
    ("machine", "model", "named", "wanted"),
    [
        ("cpu-16gb", "tiny-r1", "cpu", {"method": "lora", "learning_rate": 3e-3, "max_length": 1024}),
        ("cpu-16gb", "DeepSeek-R1-Distill-Qwen-1.5B", "cpu", {"method": "lora", "learning_rate": 1e-3}),
        ("t4", "DeepSeek-R1-Distill-Qwen-1.5B", "t4", {"method": "lora", "dtype": "float16", "batch_size": 1}),
        ("t4", "DeepSeek-R1-Distill-Qwen-7B", "t4", {"method": "qlora", "dtype": "float16", "checkpointing": True}),
        ("l4", "DeepSeek-R1-Distill-Qwen-7B", "24gb", {"method": "lora", "dtype": "bfloat16"}),
        ("rtx4090", "DeepSeek-R1-Distill-Qwen-14B", "24gb", {"method": "qlora", "dtype": "bfloat16"}),
        ("a100-80gb", "DeepSeek-R1-Distill-Qwen-7B", "80gb", {"method": "lora", "dtype": "bfloat16", "batch_size": 4}),
        ("h100", "DeepSeek-R1-Distill-Llama-70B", "80gb", {"method": "qlora", "checkpointing": True}),
    ],
)
def test_a_preset_suits_its_machine_and_gives_a_reason_for_each_value(
    machine: str, model: str, named: str, wanted: dict[str, Any]
) -> None:
    found = preset(model, find_shape(model), find_hardware(machine))
    assert found.name == named
    assert {key: found.values[key] for key in wanted} == wanted
    assert set(found.reasons) == set(found.values)
    assert all(len(reason.split()) > 1 for reason in found.reasons.values())
    assert list(found.table()["value"]) == list(found.values.values())
    settings = settings_for(model, found, rank=4, seed=None, steps=7)
    assert (settings.adapter.rank, settings.adapter.alpha, settings.steps, settings.seed) == (4, 8, 7, 0)
    assert settings.batch_size == found.values["batch_size"]
    if named != "cpu":
        assert settings.batch_size * settings.accumulation == 16


def test_what_fits_no_card_is_refused_and_an_unknown_shape_gets_small_values() -> None:
    with pytest.raises(ModelError, match=r"QLoRA with rows of 512 tokens needs [\d.]+ GiB"):
        preset("R1", find_shape("DeepSeek-R1-Distill-Llama-70B"), find_hardware("t4"))
    unknown = preset("other", None, find_hardware("t4"))
    assert (unknown.values["method"], unknown.values["max_length"]) == ("qlora", 1024)


# --- training ----------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_tells_how_it_goes(examples: list[Example], tmp_path: Path) -> None:
    told: list[tuple[int, int, float, float]] = []
    found = train_sft(
        short(steps=8, batch_size=6, accumulation=1), examples, tmp_path / "run", on_step=lambda *at: told.append(at)
    )
    assert [(step, steps) for step, steps, _, _ in told] == [(at, 8) for at in range(1, 9)]
    assert [loss for _, _, loss, _ in told] == list(found.curve.losses)
    assert told[-1][3] == 0
    assert all(left > 0 for *_, left in told[:-1])
    first, last = found.curve.losses[:2], found.curve.losses[-2:]
    assert sum(last) < 0.8 * sum(first)
    assert found.curve.steps == tuple(range(1, 9))
    assert max(found.curve.learning_rates) == SETTINGS.learning_rate
    assert (found.steps, found.rows, found.left_out, found.resumed_at) == (8, 30, 0, 0)
    assert 0 < found.counted < found.tokens
    assert found.trained_s > 0
    figure = found.curve.figure()
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss (nats a token)", "learning rate"]
    assert figure.axes[1].get_xlabel() == "step"
    noted = json.loads((tmp_path / "run" / "run.json").read_text())
    assert noted["identity"]["sft"]["learning_rate"] == SETTINGS.learning_rate
    assert noted["result"]["curve"]["losses"] == list(found.curve.losses)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_same_seed_gives_the_same_adapter_and_another_one_another(
    undisturbed: Trained, examples: list[Example], tmp_path: Path
) -> None:
    same = train_sft(SETTINGS, examples, tmp_path / "same")
    assert weights(same) == weights(undisturbed)
    assert same.curve == undisturbed.curve
    other = train_sft(replace(SETTINGS, seed=1), examples, tmp_path / "other")
    assert weights(other) != weights(undisturbed)


def test_a_finished_run_gives_its_result_without_training(
    undisturbed: Trained, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("dsr1kit.finetune.sft.open_base", never)
    said: list[str] = []
    found = train_sft(SETTINGS, examples, undisturbed.adapter.parent, on_text=said.append)
    assert found == replace(undisturbed, trained_s=0.0)
    assert said == [f"{undisturbed.adapter.parent} is complete already"]


def test_a_folder_of_another_run_is_refused_naming_what_differs(undisturbed: Trained, examples: list[Example]) -> None:
    folder = undisturbed.adapter.parent
    with pytest.raises(UsageError, match=r"sft\.learning_rate was 0\.005 and is 0\.001.*Choose another --out"):
        train_sft(replace(SETTINGS, learning_rate=1e-3), examples, folder)
    with pytest.raises(UsageError, match=r"sft\.adapter\.rank was 8 and is 16"):
        train_sft(replace(SETTINGS, adapter=replace(SETTINGS.adapter, rank=16)), examples, folder)
    with pytest.raises(UsageError, match="another training: data was"):
        train_sft(SETTINGS, examples[:-1], folder)
    assert weights(undisturbed)


DRIVER = """
import json, sys
import torch
torch.set_num_threads(1)
from dsr1kit.finetune.data import load_examples
from dsr1kit.finetune.settings import AdapterSettings, SftSettings
from dsr1kit.finetune.sft import train_sft
told = json.loads(sys.argv[1])
settings = SftSettings(**(told | {"adapter": AdapterSettings(**told["adapter"])}))
train_sft(settings, load_examples(["worked:arithmetic:remainder7:30"]), sys.argv[2],
          on_step=lambda step, *_: print("step", step, flush=True))
"""


def test_a_run_killed_at_any_step_goes_on_and_ends_in_the_same_weights(
    undisturbed: Trained, examples: list[Example], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    at = random.Random(7).randrange(SAVE_EVERY + 1, STEPS)
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", DRIVER, json.dumps(asdict(SETTINGS)), str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        reached = next((step for step in (int(line.split()[-1]) for line in process.stdout) if step >= at), 0)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    assert reached == at
    said: list[str] = []
    found = train_sft(SETTINGS, examples, out, on_text=said.append)
    # The process may have gone on for a moment before it died.
    assert found.resumed_at in range(SAVE_EVERY, STEPS, SAVE_EVERY)
    assert found.resumed_at >= at - at % SAVE_EVERY - SAVE_EVERY
    assert said == [f"going on after step {found.resumed_at}"]
    assert weights(found) == weights(undisturbed)
    assert found.curve == undisturbed.curve, "the curve is that of all starts"
    assert found.tokens < undisturbed.tokens, "what was read in this start alone"


# --- what goes wrong ---------------------------------------------------------------------------------------


class Limit:
    """Files may not grow longer than so many bytes from a step on, as on a disk that is nearly full."""

    def __init__(self, size: int, step: int) -> None:
        self.size, self.step = size, step
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def __call__(self, step: int, *_: Any) -> None:
        if step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self._before[1]))

    def lift(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


@pytest.fixture
def limits() -> Iterator[list[Limit]]:
    made: list[Limit] = []
    yield made
    for limit in made:
        limit.lift()


# The adapter has about 330,000 bytes, the optimizer's state twice that.
@pytest.mark.parametrize("size", [100_000, 450_000], ids=["adapter", "optimizer"])
def test_a_disk_that_fills_during_a_checkpoint_leaves_the_last_good_one(
    size: int, undisturbed: Trained, examples: list[Example], tmp_path: Path, limits: list[Limit]
) -> None:
    limits.append(Limit(size, 5))
    with pytest.raises(RunError) as caught:
        train_sft(SETTINGS, examples, tmp_path / "run", on_step=limits[0])
    limits[0].lift()
    kept = tmp_path / "run" / "checkpoints" / "checkpoint-3"
    assert "the checkpoint of step 6 could not be written: " in str(caught.value)
    assert f"the last good one is {kept}. Make room" in str(caught.value)
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    found = train_sft(SETTINGS, examples, tmp_path / "run")
    assert found.resumed_at == 3
    assert weights(found) == weights(undisturbed)


def test_a_full_disk_before_the_first_checkpoint_is_told(
    examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transformers.Trainer, "_save", full)
    with pytest.raises(RunError, match=r"step 2 could not be written: .*No space left.*; there was none before"):
        train_sft(replace(SETTINGS, save_every=2), examples, tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_an_adapter_that_cannot_be_written_at_the_end_is_written_the_next_time(
    undisturbed: Trained, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft

    real = peft.PeftModel.save_pretrained

    def full(self: Any, folder: str, *args: Any, **options: Any) -> None:
        if Path(folder).name == "adapter.part":
            Path(folder).mkdir()
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, folder, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(peft.PeftModel, "save_pretrained", full)
        with pytest.raises(RunError, match="the same command goes on from the last checkpoint"):
            train_sft(SETTINGS, examples, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "run.json"]
    found = train_sft(SETTINGS, examples, tmp_path / "run")
    assert found.resumed_at == STEPS
    assert weights(found) == weights(undisturbed)
    assert found.curve == undisturbed.curve


def test_memory_that_runs_out_is_told_with_what_to_change_in_order(
    examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import trl

    def out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore lines")

    monkeypatch.setattr(trl.SFTTrainer, "training_step", out)
    large = replace(SETTINGS, adapter=AdapterSettings(rank=16), batch_size=4, accumulation=2, max_length=2048)
    with pytest.raises(ModelError) as caught:
        train_sft(large, examples, tmp_path / "large")
    message = str(caught.value)
    assert "Tried to allocate 20.00 MiB. Change, in this order: 1. --batch-size 1 --accumulation 8" in message
    order = ["--batch-size 1", "--checkpointing", "--max-length 1024", "--method qlora", "--rank 8", "a smaller model"]
    places = [message.index(f"{number}. {step}") for number, step in enumerate(order, 1)]
    assert places == sorted(places)
    assert "More lines" not in message
    least = replace(
        SETTINGS, adapter=AdapterSettings(rank=8), batch_size=1, checkpointing=True, max_length=256, accumulation=1
    )
    with pytest.raises(ModelError) as caught:
        train_sft(least, examples, tmp_path / "least")
    assert "order: 1. --method qlora (the base in 4 bits); 2. a smaller model" in str(caught.value)


def test_rows_that_do_not_fit_are_left_out_and_told_and_none_left_is_refused(
    examples: list[Example], tmp_path: Path
) -> None:
    said: list[str] = []
    found = train_sft(short(max_length=90), examples, tmp_path / "run", on_text=said.append)
    assert 0 < found.left_out < len(examples)
    assert found.rows + found.left_out == len(examples)
    assert said == [f"{found.left_out} of 30 rows are longer than 90 tokens and left out, not cut"]
    with pytest.raises(UsageError, match=r"no row of 30 fits 8 tokens \(the shortest has \d+\): raise --max-length"):
        train_sft(short(max_length=8), examples, tmp_path / "none")


# --- ways to train -----------------------------------------------------------------------------------------


def test_packed_rows_train_as_if_each_stood_alone(examples: list[Example], tmp_path: Path) -> None:
    some = examples[:12]
    alone = train_sft(short(steps=3, batch_size=12, accumulation=1), some, tmp_path / "alone")
    # All rows in two packs: the same step.
    packed = train_sft(
        short(steps=3, batch_size=2, accumulation=1, max_length=800, packing=True), some, tmp_path / "packed"
    )
    assert packed.counted == alone.counted
    assert packed.curve.losses == pytest.approx(alone.curve.losses, abs=2e-4)
    assert packed.curve.grad_norms == pytest.approx(alone.curve.grad_norms, rel=1e-3)


def test_smaller_pieces_and_activations_computed_again_make_the_same_steps(
    examples: list[Example], tmp_path: Path
) -> None:
    whole = train_sft(short(steps=3, batch_size=6, accumulation=1), examples, tmp_path / "whole")
    pieces = train_sft(short(steps=3, batch_size=2, accumulation=3), examples, tmp_path / "pieces")
    again = train_sft(short(steps=3, batch_size=6, accumulation=1, checkpointing=True), examples, tmp_path / "again")
    assert pieces.curve.losses == pytest.approx(whole.curve.losses, abs=2e-4)
    assert again.curve.losses == pytest.approx(whole.curve.losses, abs=1e-5)


@pytest.mark.parametrize("method", ["rslora", "dora", "qlora"])
def test_every_method_trains_an_adapter_in_full_precision(method: str, examples: list[Example], tmp_path: Path) -> None:
    from safetensors import safe_open

    found = train_sft(
        short(steps=6, batch_size=6, accumulation=1, adapter=AdapterSettings(method=method, rank=8, alpha=16)),
        examples, tmp_path / "run",
    )  # fmt: skip
    assert sum(found.curve.losses[-2:]) < sum(found.curve.losses[:2])
    config = json.loads((found.adapter / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["use_dora"]) == (method == "rslora", method == "dora")
    with safe_open(found.adapter / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"F32"}
        trained = [name for name in names if "lora_B" in name and file.get_tensor(name).abs().sum() > 0]
    assert len(trained) == 4 * 7, "all linear layers of four layers"
    assert any("magnitude" in name for name in names) == (method == "dora")
    if method == "qlora":
        assert found.facts["quantization"] == "4bit"
        assert found.gradients is not None
        assert found.gradients.cosine > 0.99
    else:
        assert found.gradients is None


def test_an_adapter_on_a_base_in_half_precision_is_in_full_precision(examples: list[Example], tmp_path: Path) -> None:
    from safetensors import safe_open

    found = train_sft(short(dtype="bfloat16"), examples, tmp_path / "run")
    assert found.facts["dtype"] == "bfloat16"
    with safe_open(found.adapter / "adapter_model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118 - no mapping
