"""Fine-tuning of weights that nobody here trained: SmolLM2-135M learns sums in minutes on two cores."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from dsr1kit import Sampling
from dsr1kit.compare.tasks import load_task
from dsr1kit.finetune.checks import check
from dsr1kit.finetune.data import load_examples
from dsr1kit.finetune.gain import GainSettings, measure_gain
from dsr1kit.finetune.settings import settings_for
from dsr1kit.finetune.sft import train_sft
from dsr1kit.finetune.tuning import suited

pytest.importorskip("trl", reason="fine-tuning is TRL's")
pytest.importorskip("reasoning_gym", reason="the questions are reasoning-gym's")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

#: Two or three numbers of one or two digits, plus and minus, no result below zero.
TASK = "reasoning-gym:chain_sum:max_terms=3,max_digits=2,min_answer=0"
STEPS = 40


def test_chain_sum_rises_from_below_35_to_above_55_percent(smollm2: Path, tmp_path: Path) -> None:
    settings = settings_for(str(smollm2), suited(str(smollm2)), steps=STEPS, instructed=1.0, save_every=0)
    held_out = load_task(TASK, 200)
    examples = load_examples([f"worked:{TASK}:{2 * STEPS * settings.batch_size}"])
    checked = asyncio.run(check(examples, evaluation=held_out))
    trained = train_sft(settings, checked.kept[: STEPS * settings.batch_size], tmp_path / "run")
    asked = GainSettings(
        model=str(smollm2),
        adapters={"tuned": trained.adapter},
        task=TASK,
        items=200,
        sampling=Sampling(0.0, max_tokens=200),
        batch_size=32,
    )
    gain = asyncio.run(measure_gain(asked, tmp_path / "gain", asked={TASK: held_out}))
    print(f"{trained.tokens:,} tokens in {trained.trained_s:.0f} s", *gain.verdict(), sep="\n")
    (change,) = gain.changes
    assert change.before.high < 0.35
    assert change.after.low >= 0.55
