"""A whole tuning in one call: data checked and looked at, trained on, measured before and after.

Puts the rooms together as the command line and the notebooks use them; computes nothing itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsr1kit.compare.items import Item, hashed
from dsr1kit.compare.task_files import PREFIX as FILE
from dsr1kit.errors import Dsr1kitError, ModelError, UsageError
from dsr1kit.finetune.checks import Checked, check
from dsr1kit.finetune.data import WORKED, Example, load_examples
from dsr1kit.finetune.encode import encode
from dsr1kit.finetune.gain import Gain, GainSettings, measure_gain, questions
from dsr1kit.finetune.lint import Lint, lint
from dsr1kit.finetune.settings import Preset, SftSettings, preset
from dsr1kit.finetune.sft import Trained, train_sft
from dsr1kit.local.bring import bring_now, config_of, small_files_of
from dsr1kit.local.hardware import look
from dsr1kit.local.load import quiet
from dsr1kit.local.load_failures import why_not
from dsr1kit.local.places import locate, require_vocabulary
from dsr1kit.local.release import give_back
from dsr1kit.local.shapes import find_shape, shape_of_config
from dsr1kit.records import Sampling

if TYPE_CHECKING:
    from dsr1kit.finetune.trainers import OnStep

HELD_OUT = "held_out.jsonl"
_MOST_HELD_OUT, _SHARE_HELD_OUT = 300, 5


@dataclass(frozen=True, slots=True)
class Looked:
    """Training data as it was found: what is kept, one example as it will be trained on, what will be asked."""

    checked: Checked
    lint: Lint
    task: str
    asked: dict[str, list[Item]]


@dataclass(frozen=True, slots=True)
class Tuned:
    """A finished tuning; `gain` is None where it was not to be measured."""

    looked: Looked
    trained: Trained
    gain: Gain | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """How a tuning is measured.

    Attributes:
        task: what was tuned; empty: the task of the worked data, or else examples held out of the data itself.
        others: tasks that were not tuned.
        items, samples: questions of each task, and answers to each.
        sampling: R1's by default.
        batch_size: questions answered at once.
        wanted: False: nothing is measured, only overlap with the task is looked for.
    """

    task: str = ""
    others: tuple[str, ...] = ()
    items: int = 300
    samples: int = 1
    sampling: Sampling = field(default_factory=lambda: Sampling(max_tokens=2048))
    batch_size: int = 64
    wanted: bool = True


def suited(model: str, *, max_length: int | None = None) -> Preset:
    """The preset for a model on this machine; of a hub id that is not here its configuration alone is asked for.
    Raises as `settings.preset` and `config_of`."""
    from dsr1kit.local.gguf import dequantized

    config, shape = config_of(model), None
    try:
        if config is not None:
            shape = shape_of_config(config)
        else:  # a GGUF file is trained on as the folder that it is converted to
            place, gguf = locate(model)
            shape = find_shape(str(dequantized(Path(place) / gguf))) if gguf else None
    except Dsr1kitError:  # of an architecture that the planner does not know
        pass
    return preset(model, shape, look(), max_length=max_length)


def tokenizer_and_marks(model: str) -> tuple[Any, Any]:
    """A model's tokenizer and special ids, without its weights; of a hub id that is not here the small files come.

    Raises:
        ModelError, UsageError: as `LocalModel` does.
    """
    from types import SimpleNamespace

    from transformers import AutoTokenizer, GenerationConfig

    from dsr1kit.local.gguf import dequantized
    from dsr1kit.local.rows import marks_of

    place, gguf = locate(model)
    if not Path(place).is_dir():
        place = str(small_files_of(model))
        if not (Path(place) / "config.json").is_file():  # a GGUF file's tokenizer is in it
            bring_now(model)
            place, gguf = locate(model)
        else:
            require_vocabulary(model, [file.name for file in Path(place).iterdir()])
    if gguf:
        place = str(dequantized(Path(place) / gguf))
    generation: Any = GenerationConfig
    with quiet():
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        except Exception as error:  # damaged files make the library raise what it likes
            raise ModelError(why_not(model, "none", "cpu", error, str)) from None
        try:
            config = generation.from_pretrained(place)
        except OSError:
            config = generation()
    return tokenizer, marks_of(tokenizer, SimpleNamespace(generation_config=config))


async def look_at(
    settings: SftSettings,
    data: Sequence[str],
    out: Path,
    measure: Measure,
    *,
    limit: int | None = None,
    needs_reasoning: bool = True,
) -> Looked:
    """Load and check the data, find what it will be measured on, and look at one example as the model will meet it.

    Where no task is named and the data is not the kit's own, a part of it is held out, if anything is to be measured.

    Raises:
        UsageError: nothing usable is left, or nothing can be held out to measure on.
        ModelError: the model is not there.
    """
    examples = load_examples(data, limit=limit, seed=settings.seed)
    task = measure.task or _task_of(data)
    if not task and measure.wanted:
        examples, task = hold_out(examples, out)
    asked = questions(_gain_settings(settings, measure, task, {_name(out): out})) if task else {}
    tokenizer, marks = tokenizer_and_marks(settings.model)
    checked = await check(
        examples,
        evaluation=[item for items in asked.values() for item in items],
        length=lambda one: len(encode(tokenizer, marks, one, settings.loss).input_ids),
        context=settings.max_length,
        needs_reasoning=needs_reasoning,
    )
    return Looked(checked, lint(tokenizer, marks, checked.kept[0], settings.loss), task, asked)


async def tune(
    settings: SftSettings,
    data: Sequence[str],
    out: str | Path,
    measure: Measure,
    *,
    limit: int | None = None,
    needs_reasoning: bool = True,
    on_text: Callable[[str], None] | None = None,
    on_step: OnStep | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Tuned:
    """Check, train and measure; the same call on the same folder goes on where it was killed.

    Args:
        settings: what is trained.
        data: as for `load_examples`.
        out: the folder: the run's, with `gain/` in it.
        measure: how it is measured.
        limit: examples of each source.
        needs_reasoning: whether an example without a trace is left out.
        on_text, on_step, on_progress: told how it goes.

    Raises:
        UsageError: the linter finds the text unfit to train on; and as `look_at`, `train_sft`, `measure_gain`.
    """
    folder = Path(out)
    looked = await look_at(settings, data, folder, measure, limit=limit, needs_reasoning=needs_reasoning)
    if on_text is not None:
        for line in looked.checked.told():
            on_text(line)
    if not looked.lint.sound:
        wrong = "; ".join(finding.said for finding in looked.lint.findings if not finding.holds)
        raise UsageError(f"this would be trained on a wrong text: {wrong}; dsr1kit finetune check shows it")
    trained = train_sft(settings, looked.checked.kept, folder, on_step=on_step, on_text=on_text)
    gain = None
    if measure.wanted:
        give_back()  # the trained model is loaded anew, without what training held
        asked = _gain_settings(settings, measure, looked.task, {_name(folder): trained.adapter})
        gain = await measure_gain(asked, folder / "gain", asked=looked.asked, on_progress=on_progress)
    return Tuned(looked, trained, gain)


def _name(folder: Path) -> str:
    """What the adapter of a run is called; `.` has no name of its own."""
    return folder.resolve().name


def _gain_settings(settings: SftSettings, measure: Measure, task: str, adapters: dict[str, Path]) -> GainSettings:
    return GainSettings(
        model=settings.model, adapters=adapters, task=task,
        others=tuple(other for other in measure.others if other != task), items=measure.items,
        samples=measure.samples, sampling=measure.sampling, batch_size=measure.batch_size,
        quantization="4bit" if settings.adapter.method == "qlora" else "none",
    )  # fmt: skip


def _task_of(data: Sequence[str]) -> str:
    """The task of worked data, from the side that is held out; of a person's own data nothing, whatever goes with
    it."""
    name = data[0].removeprefix(WORKED) if data and data[0].startswith(WORKED) else ""
    task, _, number = name.rpartition(":")
    return task if task and number.isdigit() else name


def hold_out(examples: Sequence[Example], out: Path) -> tuple[list[Example], str]:
    """Set a fifth of the examples that have a gold aside, 300 at most, by their questions, so that none is on both
    sides; returns the rest and the task of the others, a file in the run's folder.

    Raises:
        UsageError: too few have a gold.
    """
    own = [one for one in examples if one.gold and len(one.messages) == 1 and not one.source.startswith(WORKED)]
    known = list(dict.fromkeys(one.question.strip() for one in own))
    if len(known) < 2 * _SHARE_HELD_OUT:
        raise UsageError(
            f"{len(known)} questions have a gold and no turns before them, too few to hold some out: add a gold to the "
            "data, name what to measure on (--task), or measure nothing (--no-evaluate)"
        )
    wanted = min(_MOST_HELD_OUT, len(known) // _SHARE_HELD_OUT)
    chosen = set(sorted(known, key=hashed)[:wanted])
    rest = [one for one in examples if one.question.strip() not in chosen]
    out.mkdir(parents=True, exist_ok=True)
    path = out / HELD_OUT
    rows = {one.question.strip(): one for one in own if one.question.strip() in chosen}
    with path.open("w", encoding="utf-8") as file:
        for question, one in rows.items():
            row = {"question": question, "answer": one.gold, "scorer": one.scorer, "language": one.language}
            file.write(json.dumps(row | ({"kind": one.kind} if one.kind else {}), ensure_ascii=False) + "\n")
    return rest, f"{FILE}{path}"
