"""The commands that make one's own: check data, collect from a teacher, tune, reinforce, measure, export."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsr1kit.commands.shared import AsJson, ChannelFile, app, err, print_json, run_async
from dsr1kit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsr1kit.finetune.gain import Gain
    from dsr1kit.finetune.settings import Preset

commands = typer.Typer(
    help="Make your own: collect traces, tune an adapter, show what it gained, take it away.",
    no_args_is_help=True, add_completion=False, rich_markup_mode=None,
)  # fmt: skip
app.add_typer(commands, name="finetune")

Data = Annotated[
    list[str],
    typer.Option("--data", help="A JSONL or CSV file, set:NAME, or worked:TASK[:N]; may be given several times."),
]
Model = Annotated[str, typer.Option(help="tiny-r1, a folder, a hub id org/name, or a GGUF file.")]
Out = Annotated[Path, typer.Option(help="The run's folder; the same command again goes on where it was.")]
Task = Annotated[str, typer.Option(help="What is measured; default: the worked data's, or a part held out of it.")]
Others = Annotated[str, typer.Option(help="Tasks that were not tuned, separated by commas.")]
Items = Annotated[int, typer.Option(help="Questions of each task before and after.")]
WithoutReasoning = Annotated[
    bool,
    typer.Option("--without-reasoning", help="Keep examples without a trace: the model learns to answer at once."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]


@commands.command("check")
def check_data(
    data: Data,
    model: Model = "tiny-r1",
    task: Task = "",
    items: Items = 300,
    max_length: Annotated[int | None, typer.Option(help="Most tokens of a row.")] = None,
    loss: Annotated[str, typer.Option(help="completion, assistant or all.")] = "completion",
    without_reasoning: WithoutReasoning = False,
    template: Annotated[bool, typer.Option("--template", help="Lint training through the chat template.")] = False,
    as_json: AsJson = False,
) -> None:
    """What is wrong with training data, and one example as the model will meet it (what it reads only is dimmed)."""
    import tempfile

    from dsr1kit.finetune.lint import lint_template
    from dsr1kit.finetune.settings import settings_for
    from dsr1kit.finetune.tuning import Measure, look_at, suited, tokenizer_and_marks

    settings = settings_for(model, suited(model, max_length=max_length), max_length=max_length, loss=loss)
    with tempfile.TemporaryDirectory() as scratch:
        measure = Measure(task=task, items=items, wanted=False)
        looked = run_async(look_at(settings, data, Path(scratch), measure, needs_reasoning=not without_reasoning))
    shown = looked.lint
    if template:
        shown = lint_template(*tokenizer_and_marks(model), looked.checked.kept[0])
    if as_json:
        print_json({
            "kept": len(looked.checked.kept), "dropped": looked.checked.counts, "repeated": looked.checked.repeated,
            "lengths": asdict(looked.checked.lengths) if looked.checked.lengths else None, "sound": shown.sound,
            "findings": [asdict(finding) for finding in shown.findings],
        })  # fmt: skip
    else:
        for line in looked.checked.told():
            print(line)
        _show_lint(shown)
    if not shown.sound:
        raise SystemExit(1)


@commands.command()
def collect(
    teacher: Annotated[str, typer.Option(help="A channel, emulated:FILE or local:MODEL.")],
    task: Annotated[str, typer.Option(help="What is asked, never what will be measured: practice:KIND, file:PATH...")],
    out: Out,
    items: Annotated[int | None, typer.Option(help="Questions; 0: all.")] = None,
    samples: Annotated[int, typer.Option(help="Answers to each question.")] = 1,
    most: Annotated[int, typer.Option(help="Answers kept of each question.")] = 1,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.")] = 4,
    max_tokens: Annotated[int, typer.Option(help="Cap on reasoning and answer together.")] = 32768,
    max_cost: Annotated[float | None, typer.Option(help="Stop asking when this much is spent.")] = None,
    seed: Annotated[int, typer.Option(help="Of questions and draws.")] = 0,
    channel_file: ChannelFile = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Ask failed requests again.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Ask a teacher, keep what is right, as training data in OUT/examples.jsonl."""
    from dsr1kit.compare.settings import RunSettings
    from dsr1kit.finetune.collect import collect as ask_teacher
    from dsr1kit.progress import terminal_progress
    from dsr1kit.records import Sampling

    if task.partition(":")[0] in ("arithmetic", "questions"):
        print(f"dsr1kit: {task} is what evaluations ask; what is trained on it cannot be measured by it "
              "(practice:KIND is its other side)", file=sys.stderr)  # fmt: skip
    settings = RunSettings(
        channels=(teacher,), task=task, items=items, samples=samples, concurrency=concurrency, seed=seed,
        sampling=Sampling(max_tokens=max_tokens), max_cost=max_cost,
    )  # fmt: skip
    with terminal_progress(quiet=quiet) as tell:
        found = run_async(
            ask_teacher(
                settings, out, most=most, channel_file=channel_file, retry_failed=retry_failed, on_progress=tell
            )
        )
    if as_json:
        print_json({
            "examples": str(found.path), "kept": len(found.examples), "asked": found.asked, "dropped": found.dropped,
            "questions": found.questions, "cost": found.cost, "currency": found.currency,
            "report": str(found.run.report),
        })  # fmt: skip
    else:
        print(f"examples: {found.path}\nreport:   {found.run.report}\n")
        for line in found.told():
            print(line)


@commands.command()
def sft(
    data: Data,
    out: Out,
    model: Model = "tiny-r1",
    task: Task = "",
    others: Others = "",
    items: Items = 300,
    method: Annotated[str | None, typer.Option(help="lora, rslora, dora or qlora; default: by hardware.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of the adapter; usual are 8 to 64.", show_default="16")] = None,
    alpha: Annotated[int | None, typer.Option(help="Its scale.", show_default="twice the rank")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: by hardware and model.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.", show_default="1")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps, in place of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows at once on one device.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Batches that make one step.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Most tokens of a row; longer ones are left out.")] = None,
    loss: Annotated[str | None, typer.Option(help="completion, assistant or all.")] = None,
    packing: Annotated[bool | None, typer.Option(help="Several rows in one.")] = None,
    checkpointing: Annotated[bool | None, typer.Option(help="Compute activations again, to save memory.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the base: auto, float32, bfloat16, float16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of adapter, order and worked problems.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints; 0: none.")] = None,
    instructed: Annotated[float | None, typer.Option(help="Share of questions with R1's instruction.")] = None,
    limit: Annotated[int | None, typer.Option(help="Examples of each source.")] = None,
    without_reasoning: WithoutReasoning = False,
    max_tokens: Annotated[int, typer.Option(help="Cap of an answer when measuring.")] = 2048,
    evaluate: Annotated[bool, typer.Option(help="Measure before and after.")] = True,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Tune an adapter on examples, and measure before and after, on the task and on others.

    Under `accelerate launch -m dsr1kit finetune sft ... --no-evaluate` several processes train together.
    """
    from dsr1kit.finetune.base import require_finetune
    from dsr1kit.finetune.runs import is_first, processes
    from dsr1kit.finetune.settings import settings_for
    from dsr1kit.finetune.tuning import Measure, suited, tune
    from dsr1kit.progress import terminal_progress
    from dsr1kit.records import Sampling

    require_finetune()
    if processes() > 1 and evaluate:
        raise UsageError("of several processes none measures: --no-evaluate, then dsr1kit finetune evaluate")
    quiet = quiet or not is_first()
    chosen = suited(model, max_length=max_length)
    settings = settings_for(
        model, chosen, method=method, rank=rank, alpha=alpha, learning_rate=learning_rate, epochs=epochs, steps=steps,
        batch_size=batch_size, accumulation=accumulation, max_length=max_length, loss=loss, packing=packing,
        checkpointing=checkpointing, dtype=dtype, device=device, seed=seed, save_every=save_every,
        instructed=instructed,
    )  # fmt: skip
    if not quiet and not as_json:
        _show_preset(chosen, method=method, dtype=dtype, checkpointing=checkpointing, batch_size=batch_size,
                     accumulation=accumulation, learning_rate=learning_rate, max_length=max_length)  # fmt: skip
    measure = Measure(
        task=task, others=_listed(others) or _usual_others(model), items=items,
        sampling=Sampling(max_tokens=max_tokens), wanted=evaluate,
    )  # fmt: skip
    say = None if quiet else _say
    with terminal_progress(quiet=quiet) as tell:
        done = run_async(
            tune(settings, data, out, measure, limit=limit, needs_reasoning=not without_reasoning, on_text=say,
                 on_step=_stepping(tell, "train"), on_progress=tell)
        )  # fmt: skip
    trained = done.trained
    if not is_first():
        return
    _result(
        out, done.gain, as_json,
        {"adapter": str(trained.adapter), "steps": trained.steps, "rows": trained.rows, "left_out": trained.left_out,
         "trained_s": trained.trained_s, "tokens": trained.tokens, "resumed_at": trained.resumed_at,
         "loss": trained.curve.losses[-1] if trained.curve.losses else None, "facts": trained.facts},
    )  # fmt: skip


@commands.command()
def grpo(
    task: Annotated[str, typer.Option(help="What is asked, never what is measured: practice:KIND, file:PATH, ...")],
    out: Out,
    model: Model = "tiny-r1",
    measured: Annotated[str, typer.Option(help="What is measured; default: the other side of practice:KIND.")] = "",
    others: Others = "",
    items: Items = 300,
    questions: Annotated[int, typer.Option(help="Different questions to learn from.")] = 1000,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    prompts: Annotated[int, typer.Option(help="Questions a step.")] = 8,
    generations: Annotated[int, typer.Option(help="Completions of each.")] = 8,
    batch_size: Annotated[int, typer.Option(help="Completions trained on at once; 0: all of a step.")] = 0,
    rank: Annotated[int, typer.Option(help="Of the adapter; reinforcement works at 1 to 32.")] = 16,
    method: Annotated[str, typer.Option(help="lora, rslora, dora or qlora.")] = "lora",
    learning_rate: Annotated[float | None, typer.Option(help="Default: by the size of the model.")] = None,
    temperature: Annotated[float, typer.Option(help="Of the completions.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Of a completion; what is cut earns nothing.")] = 512,
    form_reward: Annotated[float, typer.Option(help="Weight of the reply's form.")] = 0.1,
    length_reward: Annotated[float, typer.Option(help="Weight of brevity.")] = 0.0,
    beta: Annotated[float, typer.Option(help="Of the KL term; 0: none.")] = 0.0,
    vllm: Annotated[bool, typer.Option("--vllm", help="Let vLLM write the completions (GPU).")] = False,
    dtype: Annotated[str, typer.Option(help="Of the base.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of questions, draws and adapter.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0: none.")] = 50,
    evaluate: Annotated[bool, typer.Option(help="Measure before and after.")] = True,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Reinforce an adapter with rewards that can be verified (GRPO), and measure before and after."""
    from dsr1kit.compare.tasks import load_task
    from dsr1kit.finetune.checks import apart_from
    from dsr1kit.finetune.gain import GainSettings, measure_gain
    from dsr1kit.finetune.gain import questions as gain_questions
    from dsr1kit.finetune.grpo import GrpoSettings, train_grpo, usual_learning_rate
    from dsr1kit.finetune.rewards import Rewards
    from dsr1kit.finetune.settings import AdapterSettings
    from dsr1kit.progress import terminal_progress
    from dsr1kit.records import Sampling

    asked = measured or (task.replace("practice", "arithmetic", 1) if task.partition(":")[0] == "practice" else "")
    if evaluate and (not asked or asked == task):
        raise UsageError(f"name what is measured (--measured TASK), another one than {task}, or --no-evaluate")
    settings = GrpoSettings(
        model=model, task=task, items=questions, adapter=AdapterSettings(method=method, rank=rank, alpha=2 * rank),
        learning_rate=usual_learning_rate(model) if learning_rate is None else learning_rate, steps=steps,
        prompts=prompts, generations=generations, batch_size=batch_size, temperature=temperature, max_tokens=max_tokens,
        rewards=Rewards(form=form_reward, length=length_reward), beta=beta, vllm=vllm, dtype=dtype, device=device,
        seed=seed, save_every=save_every,
    )  # fmt: skip
    wanted = None
    if evaluate:  # what cannot be measured is told before anything is trained
        wanted = GainSettings(
            model=model, adapters={out.resolve().name: out / "adapter"}, task=asked,
            others=tuple(other for other in (_listed(others) or _usual_others(model)) if other != asked),
            items=items, sampling=Sampling(max_tokens=2048), quantization="4bit" if method == "qlora" else "none",
        )  # fmt: skip
    learnt = load_task(task, questions, seed)
    by_task = None if wanted is None else gain_questions(wanted)
    if by_task is not None:
        found = apart_from(learnt, [item for items in by_task.values() for item in items])
        if not found:
            raise UsageError(f"all questions of {task} are asked by {asked} too: measure another task (--measured)")
        if len(found) < len(learnt) and not quiet:
            _say(f"{len(learnt) - len(found):,} of {len(learnt):,} questions are asked to measure, and left out")
        learnt = found
    with terminal_progress(quiet=quiet) as tell:
        done = train_grpo(
            settings, out, items=learnt, on_step=_stepping(tell, "reinforce"), on_text=None if quiet else _say
        )
        gain = None
        if wanted is not None:
            gain = run_async(measure_gain(wanted, out / "gain", asked=by_task, on_progress=tell))
    _result(
        out, gain, as_json,
        {"adapter": str(done.adapter), "steps": done.steps, "trained_s": done.trained_s,
         "alarms": [asdict(alarm) for alarm in done.alarms], "facts": done.facts},
    )  # fmt: skip


@commands.command("evaluate")
def evaluate_adapters(
    adapters: Annotated[list[str], typer.Option("--adapter", help="A folder, or NAME=FOLDER; several may be given.")],
    task: Annotated[str, typer.Option(help="What was tuned.")],
    out: Out,
    model: Annotated[str, typer.Option(help="Default: what the first adapter was trained on.")] = "",
    others: Others = "",
    items: Items = 300,
    samples: Annotated[int, typer.Option(help="Answers to each question.")] = 1,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.6,
    max_tokens: Annotated[int, typer.Option(help="Cap of an answer.")] = 2048,
    quantization: Annotated[str, typer.Option(help="none, 8bit or 4bit.")] = "none",
    seed: Annotated[int, typer.Option(help="Of questions and draws.")] = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """The same questions to a model without and with adapters: what was gained, what was forgotten."""
    from dsr1kit.finetune.gain import GainSettings, measure_gain
    from dsr1kit.finetune.modelcard import base_of
    from dsr1kit.progress import terminal_progress
    from dsr1kit.records import Sampling

    named = {}
    for text in adapters:
        name, sign, folder = text.partition("=")
        path = Path(folder if sign else text)
        called = name if sign else path.resolve().name
        if called in named:
            raise UsageError(f"two adapters are called {called!r}: name them, as --adapter NAME={path}")
        named[called] = path
    settings = GainSettings(
        model=model or base_of(next(iter(named.values()))), adapters=named, task=task, others=_listed(others),
        items=items, samples=samples, sampling=Sampling(temperature, max_tokens=max_tokens), seed=seed,
        quantization=quantization,
    )  # fmt: skip
    with terminal_progress(quiet=quiet) as tell:
        gain = run_async(measure_gain(settings, out, on_progress=tell))
    _result(out, gain, as_json, {})


@commands.command("export")
def export_run(
    run: Annotated[Path, typer.Argument(help="The folder of a finished sft or grpo run.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    what: Annotated[
        str, typer.Option(help="merged, gguf, modelfile, card, commands; separated by commas.")
    ] = "merged,card",
    base: Annotated[str | None, typer.Option(help="The model that it was tuned from.", show_default="as noted")] = None,
    outtype: Annotated[str, typer.Option(help="Of a GGUF's weights: f16, bf16, f32, q8_0.")] = "f16",
    as_json: AsJson = False,
) -> None:
    """Take the result away: merged weights, GGUF, an Ollama Modelfile, a model card, the commands that serve it."""
    from dsr1kit.finetune.export import export

    done = export(run, out, what=_listed(what), base=base, outtype=outtype)
    if as_json:
        print_json(done.as_data())
    else:
        for line in done.told():
            print(line)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _usual_others(model: str) -> tuple[str, ...]:
    """What shows what was forgotten: what tiny-r1 and its descendants were taught, or the kit's own questions."""
    from dsr1kit.finetune.base import is_small

    return ("arithmetic",) if is_small(model) else ("questions",)


def _say(line: str) -> None:
    err.print(line, markup=False)


def _stepping(
    tell: Callable[[str, int, int], None] | None, stage: str
) -> Callable[[int, int, float, float], None] | None:
    """A trainer's steps as a bar."""
    if tell is None:
        return None
    return lambda step, steps, *_: tell(stage, step, steps)


def _show_preset(chosen: Preset, **given: Any) -> None:
    err.print(f"settings for {chosen.name}:", markup=False)
    for name, value in chosen.values.items():
        if given.get(name) is not None:
            value, why = given[name], "as asked"
        else:
            why = chosen.reasons[name]
        err.print(f"  {name} {value}: {why}", markup=False)


def _show_lint(shown: Any) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    console.print()
    text = Text()
    for piece in shown.pieces:
        text.append(piece.text, style="" if piece.counted else "dim")
    console.print(text)
    print(f"\n{shown.counted:,} of {shown.tokens:,} tokens count in the loss")
    for finding in shown.findings:
        print(f"{'ok' if finding.holds else 'NO'}: {finding.said}")


def _result(out: Path, gain: Gain | None, as_json: bool, facts: dict[str, Any]) -> None:
    if as_json:
        told = (
            None if gain is None else {"changes": gain.as_data(), "verdict": gain.verdict(), "report": str(gain.report)}
        )
        print_json({"out": str(out), **facts, "gain": told})
        return
    if "adapter" in facts:
        print(f"adapter:  {facts['adapter']}")
    if gain is not None:
        print(f"report:   {gain.report}\n")
        for line in gain.verdict():
            print(line)
