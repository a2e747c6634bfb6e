"""Reinforcement: rewards are the scorers', prompts are what the model is asked with, dead signals end, runs go on."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import typer.main

from dsr1kit.commands.finetune import commands
from dsr1kit.compare.items import Item
from dsr1kit.compare.tasks import load_task
from dsr1kit.errors import RunError, UnknownName, UsageError
from dsr1kit.finetune import checkpoints
from dsr1kit.finetune.checks import apart_from
from dsr1kit.finetune.grpo import (
    GrpoSettings,
    Reinforced,
    RewardCurve,
    _advice,
    train_grpo,
    usual_learning_rate,
)
from dsr1kit.finetune.rewards import Rewards
from dsr1kit.finetune.settings import AdapterSettings
from dsr1kit.finetune.tuning import tokenizer_and_marks
from dsr1kit.local.prompts import prompt_of

pytest.importorskip("trl", reason="reinforcement is TRL's")

STEPS = 3


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Sums in another order would differ in their last bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def asked(**changed: Any) -> GrpoSettings:
    usual: dict[str, Any] = {
        "model": "tiny-r1", "task": "practice:sum2", "items": 20, "steps": STEPS, "prompts": 4, "generations": 4,
        "max_tokens": 64, "save_every": 1, "learning_rate": 2e-3, "temperature": 1.5,
        "adapter": AdapterSettings(rank=4, alpha=8),
    }  # fmt: skip
    return GrpoSettings(**(usual | changed))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Reinforced, Path, list[Any]]:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    told: list[Any] = []
    return train_grpo(asked(), out, on_step=lambda *step: told.append(step)), out, told


def weights(adapter: Path) -> bytes:
    return (adapter / "adapter_model.safetensors").read_bytes()


def sure(prompts: Sequence[str], gold: str, **more: Any) -> list[Item]:
    """Questions with a gold of one's own."""
    return [Item(f"q{at}", prompt, gold, "", "en", **more) for at, prompt in enumerate(prompts)]


def strict(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return found


# --- what is asked for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"learning_rate": 1.0}, "a learning rate of 1 is out of sense; usual for GRPO with LoRA are 1e-6 to 5e-5"),
        ({"learning_rate": 0.0}, "a learning rate of 0 is out of sense; usual"),
        ({"learning_rate": float("nan")}, "a learning rate of nan is out of sense"),
        ({"generations": 1}, "generations must be at least 2, not 1"),
        ({"prompts": 0}, "prompts must be at least 1, not 0"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"items": 0}, "items must be at least 1, not 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"save_every": -1}, "save_every must be at least 0, not -1"),
        ({"patience": 0}, "patience must be at least 1, not 0"),
        ({"temperature": 0.0}, "temperature must be above 0: equal completions teach nothing"),
        ({"temperature": float("nan")}, "temperature must be above 0"),
        ({"batch_size": 5}, "batch_size must divide the 16 completions of a step, not be 5"),
        ({"batch_size": 32}, "batch_size must divide the 16 completions of a step, not be 32"),
    ],
)
def test_settings_out_of_sense_are_refused_with_what_is_usual(values: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        asked(**values)


def test_an_unknown_schedule_is_told_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'cosine'"):
        asked(schedule="cosin")


def test_small_models_bear_larger_steps_and_unknown_ones_get_small_ones() -> None:
    assert usual_learning_rate("tiny-r1") == 1e-3
    assert usual_learning_rate("nobody/knows-it") == 1e-5


def test_fewer_questions_than_a_step_asks_are_refused_rather_than_nothing_trained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a step asks 4 different questions, and there are 3: lower --prompts"):
        train_grpo(asked(), tmp_path / "run", items=load_task("practice:sum2", 3))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("words", "mend"), [(900, "lower --max-tokens"), (1100, "ask shorter questions")])
def test_a_prompt_that_leaves_no_room_is_refused_with_what_mends_it(words: int, mend: str, tmp_path: Path) -> None:
    long = " ".join("7" * (words // 2))
    with pytest.raises(
        UsageError, match=rf"a prompt of \d+ tokens and 200 of completion pass .* context of 1024: {mend}"
    ):
        train_grpo(asked(prompts=1, max_tokens=200), tmp_path, items=sure([long], "7"))


# --- training ------------------------------------------------------------------------------------------------------


def test_a_few_steps_change_the_adapter_and_all_is_told(undisturbed: tuple[Reinforced, Path, list[Any]]) -> None:
    from safetensors.torch import load_file

    found, out, told = undisturbed
    curve = found.curve
    assert curve.steps == (1, 2, 3)
    assert all(len(column) == STEPS for column in asdict(curve).values())
    assert all(0 <= share <= 1 for column in (curve.right, curve.spread, curve.clipped) for share in column)
    assert max(curve.right) > 0.5, "sums of two are what tiny-r1 was taught"
    assert max(curve.spread) > 0
    assert max(curve.clipped) > 0
    assert all(0 < tokens <= 64 for tokens in curve.tokens)
    assert all(entropy > 0 for entropy in curve.entropy)
    assert all(r <= reward <= r + 0.1 + 1e-6 for r, reward in zip(curve.right, curve.reward, strict=True))
    learned = {
        name: one for name, one in load_file(found.adapter / "adapter_model.safetensors").items() if "lora_B" in name
    }
    assert learned
    assert all(one.abs().max() > 0 for one in learned.values()), "they begin at zero"
    assert [(step, steps) for step, steps, _, _ in told] == [(at, STEPS) for at in (1, 2, 3)]
    assert tuple(share for _, _, share, _ in told) == curve.right
    assert told[-1][3] == 0
    assert (found.steps, found.resumed_at, found.alarms) == (STEPS, 0, ())
    assert found.trained_s > 0
    assert found.facts["trained_parameters"] < found.facts["parameters"] / 2
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "run.json"]
    assert sorted(path.name for path in found.adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    noted = strict(out / "run.json")
    assert noted["identity"]["grpo"]["learning_rate"] == 2e-3
    assert noted["versions"]["dsr1kit"]
    drawing = curve.figure()
    assert [axes.get_ylabel() for axes in drawing.axes] == ["right completions (%)", "share (%)"]


def test_the_adapter_is_one_that_the_local_model_answers_with(undisturbed: tuple[Reinforced, Path, list[Any]]) -> None:
    import asyncio

    from dsr1kit.local.model import LocalModel
    from dsr1kit.records import Sampling

    async def answers() -> list[str]:
        async with LocalModel("tiny-r1", adapters={"mine": undisturbed[0].adapter}) as model:
            await model.use_adapter("mine")
            items = load_task("arithmetic:sum2", 4)
            replies = await model.generate_many([one.messages() for one in items], [Sampling(0.0, max_tokens=200)] * 4)
            return [reply.outcome.value for reply in replies]

    assert asyncio.run(answers()) == ["ok"] * 4


def test_a_complete_run_gives_its_result_without_training(
    undisturbed: tuple[Reinforced, Path, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, out, _ = undisturbed
    said: list[str] = []
    monkeypatch.setattr("dsr1kit.finetune.grpo.open_base", lambda *_, **__: pytest.fail("the model was loaded"))
    again = train_grpo(asked(), out, on_text=said.append)
    assert (again.curve, again.adapter, again.alarms, again.facts) == (
        found.curve, found.adapter, found.alarms, found.facts,
    )  # fmt: skip
    assert again.trained_s == 0
    assert said == [f"{out} is complete already"]
    with pytest.raises(UsageError, match=r"holds another training: grpo\.beta was 0\.0 and is 0\.1"):
        train_grpo(asked(beta=0.1), out)
    with pytest.raises(UsageError, match=r"data was '\w{16}' and is '\w{16}'"):
        train_grpo(asked(), out, items=load_task("practice:sum2", 20, seed=1))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    undisturbed: tuple[Reinforced, Path, list[Any]], tmp_path: Path
) -> None:
    items = load_task("practice:sum2", 20)
    again = train_grpo(asked(save_every=0), tmp_path / "again", items=items)
    other = train_grpo(asked(save_every=0, seed=1), tmp_path / "other", items=items)
    assert again.curve == undisturbed[0].curve
    assert weights(again.adapter) == weights(undisturbed[0].adapter)
    assert (other.curve.right, other.curve.tokens) != (again.curve.right, again.curve.tokens)


def test_completions_trained_on_in_pieces_are_the_same_training(
    undisturbed: tuple[Reinforced, Path, list[Any]], tmp_path: Path
) -> None:
    pieces = train_grpo(asked(batch_size=8), tmp_path)
    whole = undisturbed[0].curve
    assert pieces.curve.right == whole.right
    assert pieces.curve.spread == whole.spread
    assert pieces.curve.reward == pytest.approx(whole.reward, rel=1e-5)
    assert pieces.curve.tokens == pytest.approx(whole.tokens)


# --- what is asked and what it earns -------------------------------------------------------------------------------


def test_prompts_are_token_for_token_what_the_model_is_asked_with_and_what_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trl

    from dsr1kit.local.decode import Decoder

    written: list[Any] = []
    trained: list[tuple[list[int], list[int]]] = []
    admit: Any = Decoder.admit
    scored: Any = trl.GRPOTrainer._generate_and_score_completions

    def admitting(self: Any, rows: Any) -> Any:
        written.extend(rows)
        return admit(self, rows)

    def scoring(self: Any, inputs: Any) -> Any:
        batch = scored(self, inputs)
        for name in ("prompt", "completion"):
            batch[f"{name}s"] = [
                ids[mask.bool()].tolist() for ids, mask in zip(batch[f"{name}_ids"], batch[f"{name}_mask"], strict=True)
            ]
        trained.extend(zip(batch.pop("prompts"), batch.pop("completions"), strict=True))
        return batch

    monkeypatch.setattr(Decoder, "admit", admitting)
    monkeypatch.setattr(trl.GRPOTrainer, "_generate_and_score_completions", scoring)
    items = load_task("practice:words_zh", 2) + load_task("practice:sum2", 2)
    train_grpo(asked(steps=1, max_tokens=200, temperature=3.0), tmp_path, items=items)
    tokenizer, marks = tokenizer_and_marks("tiny-r1")
    wanted = [prompt_of(tokenizer, marks, one.messages()).ids for one in items]
    assert sorted(row.prompt for row in written) == sorted(wanted * 4)
    assert sorted(trained) == sorted((row.prompt, row.made) for row in written)
    ended = [row.made for row in written if len(row.made) < 200]
    assert ended
    assert all(made[-1] in marks.ends for made in ended), "the end is trained as well"
    assert len({tuple(row.made) for row in written}) > 4, "completions of one question are draws of their own"


def test_rewards_are_the_scorers_and_a_gold_that_cannot_be_read_is_worth_nothing_either_way(tmp_path: Path) -> None:
    right = Item("right", "51 + 122 = ?", "173", "", "en")
    wrong = Item("wrong", "51 + 121 = ?", "173", "", "en")
    algebra = Item("algebra", "52 + 122 = ?", "\\frac{348}{2}", "", "en", "math")
    unreadable = Item("unreadable", "53 + 122 = ?", "who knows", "", "en")
    reference = Item("reference", "54 + 122 = ?", "for the reader only", "", "en", reference="176")
    items = [right, wrong, algebra, unreadable, reference]
    calm = {"temperature": 0.05, "max_tokens": 200, "prompts": len(items), "generations": 2, "steps": 1}
    found = train_grpo(asked(**calm), tmp_path / "run", items=items)
    assert found.curve.right == (0.75,), "three of the four that can be judged"
    assert found.curve.reward == pytest.approx((3 / 5 + 0.1,), rel=1e-5)
    assert found.curve.spread == (0.0,)
    assert found.curve.clipped == (0.0,)
    brief = train_grpo(asked(**calm, rewards=Rewards(form=0.0, length=0.5)), tmp_path / "brief", items=items)
    assert 3 / 5 - 0.5 * 3 / 5 < brief.curve.reward[0] < 3 / 5, "right answers alone pay for their length"


def test_what_the_limit_cuts_earns_nothing_though_its_box_is_closed(tmp_path: Path) -> None:
    items = [Item("right", "51 + 122 = ?", "173", "", "en")]
    calm = {"temperature": 0.05, "prompts": 1, "generations": 2, "steps": 1}
    whole = train_grpo(asked(**calm, max_tokens=200), tmp_path / "whole", items=items)
    length = round(whole.curve.tokens[0])
    found = train_grpo(asked(**calm, max_tokens=length - 1), tmp_path / "cut", items=items)
    assert (whole.curve.right, found.curve.right) == ((1.0,), (0.0,))
    assert found.curve.reward == (0.0,)
    assert found.curve.clipped == (1.0,)


def test_questions_that_are_asked_to_measure_are_left_out_whatever_stands_behind_them() -> None:
    items = [Item(f"q{at}", f"{at} + 1 = ?\nPlease reason step by step, and put your final answer within \\boxed{{}}.",
                  str(at + 1), "", "en") for at in range(6)]  # fmt: skip
    evaluation = [Item("other", "3 + 1 = ?", "4", "", "en"), Item("minus", "4 - 1 = ?", "3", "", "en")]
    assert [item.id for item in apart_from(items, evaluation)] == ["q0", "q1", "q2", "q4", "q5"]


def test_advice_where_memory_ran_out_names_options_of_the_command() -> None:
    options = {name for p in typer.main.get_command(commands).commands["grpo"].params for name in p.opts}  # type: ignore[attr-defined]  # a group
    said = _advice(asked(prompts=8, generations=8, max_tokens=1024))
    assert said.startswith("Change, in this order: 1. --batch-size 8")
    assert set(re.findall(r"--[a-z-]+", said)) - {"--for"} <= options
    assert len(re.findall(r"--[a-z-]+", said)) >= 5


def test_golds_that_nobody_can_read_give_no_reward_and_no_crash(tmp_path: Path) -> None:
    items = sure([f"{at} + 122 = ?" for at in range(51, 55)], "who knows")
    said: list[str] = []
    wanted = asked(steps=2, generations=2, rewards=Rewards(form=0.0), patience=3)
    steps: list[tuple[int, float]] = []
    found = train_grpo(
        wanted,
        tmp_path,
        items=items,
        on_text=said.append,
        on_step=lambda step, _, right, __: steps.append((step, right)),
    )
    assert [step for step, _ in steps] == [1, 2]
    assert all(math.isnan(right) for _, right in steps)
    assert found.curve.reward == (0.0, 0.0)
    assert found.curve.spread == (0.0, 0.0)
    assert strict(tmp_path / "run.json")["result"]["steps"] == 2
    with pytest.raises(RunError, match="no gold can be read"):
        train_grpo(asked(steps=2, generations=2, rewards=Rewards(form=0.0), patience=2), tmp_path / "b", items=items)


@pytest.mark.parametrize("patience", [2, 3])
def test_a_dead_signal_ends_the_run_with_why_and_what_mends_it_and_again_when_it_is_called_again(
    patience: int, tmp_path: Path
) -> None:
    items = sure([f"{at} + 122 = ?" for at in range(51, 55)], "-7")
    wanted = asked(steps=patience + 1, generations=2, rewards=Rewards(form=0.0), patience=patience)
    said: list[str] = []
    steps: list[int] = []
    told = (
        rf"ended after step {patience}: for {patience} steps every group of completions earned the same, so nothing "
        r"was learned\. in 100% of the groups all completions earn the same \(all wrong\).*take easier questions, or "
        r"tune on examples first \(finetune sft\)"
    )
    with pytest.raises(RunError, match=told):
        train_grpo(wanted, tmp_path, items=items, on_text=said.append, on_step=lambda step, *_: steps.append(step))
    assert steps == list(range(1, patience + 1))
    assert any(line.startswith(f"step {patience}, no spread: ") for line in said)
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(RunError, match="so nothing was learned"):
        train_grpo(wanted, tmp_path, items=items)
    assert not (tmp_path / "adapter").exists()


def test_a_signal_that_dies_with_the_last_step_is_dead_when_called_again_as_well(tmp_path: Path) -> None:
    items = sure([f"{at} + 122 = ?" for at in range(51, 55)], "-7")
    wanted = asked(steps=2, generations=2, rewards=Rewards(form=0.0), patience=2)
    for _ in range(2):
        with pytest.raises(RunError, match="so nothing was learned"):
            train_grpo(wanted, tmp_path, items=items)


@pytest.mark.parametrize("changed", [{"beta": 0.1}, {"adapter": AdapterSettings(method="dora", rank=4, alpha=8)}],
                         ids=["a KL term", "dora"])  # fmt: skip
def test_other_forms_train_as_well(changed: dict[str, Any], tmp_path: Path) -> None:
    found = train_grpo(asked(steps=1, save_every=0, **changed), tmp_path)
    assert len(found.curve.right) == 1
    assert (found.adapter / "adapter_config.json").is_file()


def test_adapters_on_quantized_weights_stay_in_full_precision(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    pytest.importorskip("bitsandbytes", reason="4-bit weights are bitsandbytes'")
    quantized = asked(steps=1, save_every=0, adapter=AdapterSettings(method="qlora", rank=4, alpha=8))
    found = train_grpo(quantized, tmp_path)
    assert {one.dtype for one in load_file(found.adapter / "adapter_model.safetensors").values()} == {torch.float32}
    assert found.facts["quantization"] == "4bit"


# --- killed --------------------------------------------------------------------------------------------------------

_DRIVER = """
import json, sys
import torch
from dsr1kit.finetune.grpo import GrpoSettings, train_grpo
from dsr1kit.finetune.rewards import Rewards
from dsr1kit.finetune.settings import AdapterSettings
torch.set_num_threads(1)
wanted = json.loads(sys.argv[2])
wanted["adapter"] = AdapterSettings(**(wanted["adapter"] | {"modules": ()}))
wanted["rewards"] = Rewards(**wanted["rewards"])
train_grpo(GrpoSettings(**wanted), sys.argv[1], on_step=lambda step, *_: print(step, flush=True))
"""


def test_a_run_killed_at_a_step_ends_as_an_undisturbed_one(
    undisturbed: tuple[Reinforced, Path, list[Any]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-c", _DRIVER, str(out), json.dumps(asdict(asked()))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 2:  # the first checkpoint is whole, the second perhaps
                process.kill()
                break
        _, complaint = process.communicate()
    assert process.returncode == -9, complaint
    assert not (out / "adapter").exists()
    last = checkpoints.newest(out / "checkpoints")
    assert last is not None
    said: list[str] = []
    steps: list[int] = []
    found = train_grpo(asked(), out, on_text=said.append, on_step=lambda step, *_: steps.append(step))
    assert found.resumed_at == checkpoints.step_of(last)
    assert said[0] == f"going on after step {found.resumed_at}"
    assert steps == list(range(found.resumed_at + 1, STEPS + 1))
    assert found.curve == undisturbed[0].curve
    assert weights(found.adapter) == weights(undisturbed[0].adapter)
    assert not (out / "checkpoints").exists()


# --- the curve -----------------------------------------------------------------------------------------------------


def test_a_curve_holds_the_steps_of_a_log_alone() -> None:
    step = {
        "step": 1, "frac_reward_zero_std": 0.25, "rewards/right/mean": 0.5, "reward": 0.6,
        "completions/clipped_ratio": 0.1, "completions/mean_length": 40.0, "entropy": None,
    }  # fmt: skip
    curve = RewardCurve.of([step, {"step": 1, "train_runtime": 5.0}, step | {"step": 2, "frac_reward_zero_std": 1.0}])
    assert curve == RewardCurve((1, 2), (0.5, 0.5), (0.6, 0.6), (0.75, 0.0), (0.1, 0.1), (40.0, 40.0), (0.0, 0.0))
