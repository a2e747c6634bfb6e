"""What goes beside a tuned model: its model card, an Ollama Modelfile, the commands that serve it, and whose it is.

A card tells what a run noted and what was measured, and no figure besides. Knows the files of a run and of an adapter,
and R1's prompt form; nothing about weights.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsr1kit.errors import Dsr1kitError, ModelError, RunError
from dsr1kit.local import engine_commands as commands
from dsr1kit.local.adapters import adapter_config
from dsr1kit.local.engine_checks import check_adapter
from dsr1kit.local.engine_commands import chat_template, read_json
from dsr1kit.local.hardware import TINY
from dsr1kit.local.identity import same_model
from dsr1kit.local.places import locate

if TYPE_CHECKING:
    from dsr1kit.compare.stats import Interval, PairedDifference
    from dsr1kit.finetune.gain import Change, Gain

_CARD = "README.md"
_PORT = 8000
_PACKAGES = ("dsr1kit", "python", "torch", "transformers", "peft", "trl", "bitsandbytes", "datasets")
_BEGIN, _TURN = "<｜begin▁of▁sentence｜>", "<｜Assistant｜>"
_STOPS = ("<｜end▁of▁sentence｜>", "<｜User｜>", _TURN)
_OTHER_STOPS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
#: R1's prompt form in Go's template language. An earlier answer comes without its thinking. Ollama learns the tags from
#: what stands around `.Thinking` (a variable's field would not do), and knows where a prompt ends inside the thinking.
_OLLAMA = """\
{{ if .System }}{{ .System }}{{ end }}
{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "user" }}<｜User｜>{{ .Content }}
{{- end }}
{{- if eq .Role "assistant" }}<｜Assistant｜>
{{- if and $last .Thinking }}<think>
{{ .Thinking }}
</think>

{{ end }}{{ .Content }}
{{- if not $last }}<｜end▁of▁sentence｜>{{ end }}
{{- end }}
{{- if and $last (ne .Role "assistant") }}<｜Assistant｜>OPENED{{ end }}
{{- end }}"""


# --- whose an adapter is ---------------------------------------------------------------------------------------------


def base_of(adapter: Path, base: str | None = None) -> str:
    """The model that an adapter belongs to, as `LocalModel` takes it.

    The run's own name for it (`../run.json`) comes before the path that the adapter records, which is that of the
    machine it was trained on.

    Args:
        base: what it must be, where that is known: the same name, place or weights.

    Raises:
        ModelError: `base` is another model, or none can be found.
    """
    adapter = Path(adapter)
    recorded = str(read_adapter(adapter).get("base_model_name_or_path") or "")
    names = [name for name in (_run_model(adapter.resolve().parent), recorded) if name]
    if Path(recorded).name == TINY and not Path(recorded).exists():
        names.append(TINY)  # where it lay in another installation
    if base is not None:
        locate(base)
        if names and not any(same_model(base, name) for name in names):
            raise ModelError(
                f"the adapter in {adapter} was trained on {names[0]}, not on {base}: put into another model's weights "
                f"it would mean nothing. Name {names[0]}, or leave the base out"
            )
        return base
    for name in names:
        try:
            locate(name)
        except Dsr1kitError:
            continue
        return name
    whose = f"was trained on {names[0]}, which is not on this machine" if names else "names no base model"
    raise ModelError(f"the adapter in {adapter} {whose}: name it (--base FOLDER or a hub id)")


def read_adapter(folder: Path) -> dict[str, Any]:
    """An adapter's configuration.

    Raises:
        ModelError: none there, damaged, a pickle, or not a LoRA.
    """
    check_adapter(folder)
    config = adapter_config(folder)
    if config.get("peft_type") != "LORA":
        raise ModelError(
            f"{folder} holds {config.get('peft_type') or 'no known adapter'}, not a LoRA: PEFT merges others"
        )
    return config


def _run_model(folder: Path) -> str:
    """The model that a run's run.json names; empty where there is none."""
    identity = read_json(folder / "run.json").get("identity")
    settings = [identity.get(kind) for kind in ("sft", "grpo")] if isinstance(identity, dict) else []
    return next((str(one["model"]) for one in settings if isinstance(one, dict) and one.get("model")), "")


# --- how it is run ---------------------------------------------------------------------------------------------------


def modelfile(source: Path, folder: Path, *, at: Path | None = None) -> str:
    """An Ollama Modelfile.

    A model of another prompt form than R1's gets no TEMPLATE: Ollama then takes the one that the weights carry.

    Args:
        source: what it is made of: a GGUF file, or a folder of safetensors.
        folder: the whole model's, whose prompt form and context count.
        at: the folder that the Modelfile will lie in; what is below it is named from there, so that both can move.
    """
    source = source.resolve()
    below = at is not None and source.is_relative_to(at.resolve())
    named = f"./{source.relative_to(at.resolve())}" if at is not None and below else str(source)
    template, lines = chat_template(folder), [f"FROM {named}"]
    if _TURN in template:
        # llama.cpp adds the mark itself where the tokenizer says so, and two would be one too many.
        begin = "" if read_json(folder / "tokenizer_config.json").get("add_bos_token") else _BEGIN
        opened = "<think>\n" if f"{_TURN}<think>" in template else ""
        lines.append(f'TEMPLATE """{begin}{_OLLAMA.replace("OPENED", opened)}"""')
        stops: Sequence[str] = _STOPS
    else:
        stops = [mark for mark in _OTHER_STOPS if mark in template]
    # R1's sampling, and room for its thinking, which Ollama's own default cuts.
    room = _context(folder, commands.CONTEXT_CPU)
    lines += ["PARAMETER temperature 0.6", "PARAMETER top_p 0.95", f"PARAMETER num_ctx {room}"]
    return "\n".join([*lines, *(f'PARAMETER stop "{mark}"' for mark in stops)]) + "\n"


def serve_commands(base: str, adapter: Path, *, merged: Path | None = None) -> dict[str, str]:
    """The commands that serve a base with its adapter, by engine; `transformers serve`, which takes no adapter, serves
    the merged model, and so does vLLM where it cannot serve the adapter (DoRA).

    Raises:
        ModelError, UnknownName: no such base; an adapter of a rank that vLLM does not serve.
    """
    place, gguf = locate(base)
    folder, whole = Path(place), Path(adapter).resolve()
    # Not here to be looked into: taken for R1's.
    thinks = not folder.is_dir() or "<think>" in chat_template(folder)
    context = _context(folder, commands.CONTEXT_GPU)
    given: dict[str, Any] = {"host": "127.0.0.1", "port": _PORT, "context": context, "thinks": thinks}
    found = {"dsr1kit": ["dsr1kit", "serve", base, "--adapter", str(whole), "--port", str(_PORT)]}
    if not gguf and not read_adapter(whole).get("use_dora"):
        name = commands.served_name(base, Path(place), whole)
        found["vllm"] = ["vllm", "serve", *commands.vllm_arguments(place, adapter=whole, served_as=name, **given)]
    if merged is not None:
        model = str(Path(merged).resolve())
        if "vllm" not in found:
            found["vllm"] = ["vllm", "serve", *commands.vllm_arguments(model, **given)]
        found["transformers"] = ["transformers", "serve", model, "--host", "127.0.0.1", "--port", str(_PORT)]
    return {engine: shlex.join(words) for engine, words in found.items()}


def _context(folder: Path, most: int) -> int:
    return min(most, int(read_json(folder / "config.json").get("max_position_embeddings") or most))


# --- the card --------------------------------------------------------------------------------------------------------


def write_card(folder: Path, facts: Mapping[str, Any], *, base: str, gain: Gain | None = None) -> Path:
    """Write a model card into the folder of an adapter or a merged model; returns its path. One that is there is
    replaced.

    Args:
        facts: what the run noted (its run.json).
        base: the model that was tuned, as `base_of` names it.
        gain: what was measured; None: nothing was.

    Raises:
        RunError: the card cannot be written.
    """
    merged = not (folder / "adapter_config.json").is_file()
    kind = "grpo" if "grpo" in facts["identity"] else "sft"
    settings = facts["identity"].get(kind) or {}
    text = "\n\n".join([
        _front(base, merged),
        _opening(base, kind, merged),
        _before_and_after(gain),
        _training(kind, settings, facts),
        _settings(settings, facts.get("versions") or {}),
        _license(base),
    ])  # fmt: skip
    return write(folder / _CARD, text + "\n")


def write(path: Path, text: str) -> Path:
    """Write a text and return its path. Raises RunError."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}; make room, or name another --out") from None
    return path


def _front(base: str, merged: bool) -> str:
    library, relation = ("transformers", "finetune") if merged else ("peft", "adapter")
    licensed = f"license: {told}\n" if (told := _base_license(base)) else ""
    return (
        f"---\nlibrary_name: {library}\nbase_model: {_public(base)}\nbase_model_relation: {relation}\n{licensed}"
        "pipeline_tag: text-generation\ntags: [dsr1kit, lora, reasoning]\n---"
    )


def _opening(base: str, kind: str, merged: bool) -> str:
    what = "A whole model: a LoRA adapter merged into the unquantized weights of" if merged else "A LoRA adapter for"
    how = {"sft": "supervised fine-tuning on worked answers", "grpo": "reinforcement by GRPO"}[kind]
    toy = " The base is a toy that knows small arithmetic; neither is DeepSeek R1." if base == TINY else ""
    use = "dsr1kit serve FOLDER" if merged else f"dsr1kit serve {_public(base)} --adapter FOLDER"
    title = f"{_public(base).rpartition('/')[2]}, tuned"
    return f"# {title}\n\n{what} {_public(base)}, made by {how} with dsr1kit.{toy}\n\n```\n{use}\n```"


def _public(base: str) -> str:
    """A model's name without the folders of the machine that it lay on."""
    path = Path(base).expanduser()
    return path.name if path.exists() or base.startswith(("/", ".", "~")) else base


def _base_license(base: str) -> str:
    """The license that the base's own card names, where that is on this machine."""
    try:
        text = (Path(locate(base)[0]) / _CARD).read_text(encoding="utf-8")
    except (Dsr1kitError, OSError, ValueError):  # not here, or not to be read: then it is not known
        return ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    named = re.search(r"^license:\s*([\w.-]+)\s*$", front[1], re.MULTILINE) if front else None
    return named[1] if named else ""


def _license(base: str) -> str:
    told = f"the base's card names `{named}`" if (named := _base_license(base)) else "see the base's page"
    terms = "The data may add terms of its own."
    return f"## License\n\nWhat is made of a model stands under that model's license: {told}. {terms}"


def _before_and_after(gain: Gain | None) -> str:
    head = "## Before and after\n\n"
    if gain is None or not gain.changes:
        return f"{head}Not measured.\n"
    several = len({one.adapter for one in gain.changes}) > 1
    rows = [
        f"| {one.task}{' (tuned)' if one.tuned else ''}{f', {one.adapter}' if several else ''} "
        f"| {one.difference.items} | {_spread(one.before)} | {_spread(one.after)} "
        f"| {_spread(one.difference, '+.1f')}{'' if one.differs else ', not shown to differ'} "
        f"| {'' if one.whole is None else _spread(one.whole, '+.1f')} | {one.cut_before} / {one.cut_after} |"
        for one in gain.changes
    ]
    return (
        f"{head}Percent right on held-out questions, and the paired difference over the same questions in points, with "
        f"95 % intervals{_asked(gain.folder)}.\n\n"
        "| task | questions | before | after | difference | without cut answers | cut by the token limit |\n"
        "|---|---|---|---|---|---|---|\n" + "\n".join(rows) + f"\n\n{_forgotten(gain.changes)}"
    )


def _forgotten(changes: Sequence[Change]) -> str:
    others = [one for one in changes if not one.tuned]
    lost = list(dict.fromkeys(one.task for one in others if one.differs and one.difference.value < 0))
    if not others:
        return "Tasks that were not tuned were not asked: what was forgotten is not known."
    if lost:
        return f"Forgotten: on {', '.join(lost)} it answers worse than before."
    return f"On what was not tuned ({', '.join(dict.fromkeys(one.task for one in others))}) no loss is shown."


def _asked(folder: Path) -> str:
    """How the questions were asked, where the measurement noted it."""
    identity = read_json(folder / "run.json").get("identity")
    sampling = identity.get("sampling") if isinstance(identity, dict) else None
    if not isinstance(identity, dict) or not isinstance(sampling, dict):
        return ""
    said = [f"temperature {sampling['temperature']:g}", f"at most {sampling['max_tokens']:,} tokens an answer"]
    if identity.get("samples", 1) != 1:
        said.append(f"{identity['samples']} answers a question")
    if identity.get("quantization", "none") != "none":
        said.append(f"base in {identity['quantization']}")
    said.append(f"seed {identity.get('seed', 0)}")
    return f"; {', '.join(said)}"


def _spread(one: Interval | PairedDifference, form: str = ".1f") -> str:
    value, low, high = (format(100 * share, form) for share in (one.value, one.low, one.high))
    return f"{value} ({low} to {high})"


def _training(kind: str, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Sentences about what the run noted."""
    result, said = facts.get("result") or {}, []
    if kind == "grpo":
        said.append(f"Questions of `{_plain(settings.get('task', ''))}`, at most {settings.get('items', 0):,}.")
    if result.get("steps"):
        over = f" over {result['rows']:,} rows" if result.get("rows") else ""
        left = f" ({result['left_out']:,} longer ones left out)" if result.get("left_out") else ""
        said.append(f"{result['steps']:,} steps{over}{left}.")
    if sources := (result.get("facts") or {}).get("sources"):
        said.append(f"Data: {', '.join(f'{number:,} of {_plain(name)}' for name, number in sources.items())}.")
    said.append(f"Digest of the data: `{facts['identity'].get('data', '')}`.")
    curve = result.get("curve") or {}
    for key, caption in (("losses", "Loss in nats a token"), ("right", "Share of right completions")):
        if values := curve.get(key):
            said.append(f"{caption}: {values[0]:.4f} at the first step, {values[-1]:.4f} at the last.")
    if model := result.get("facts"):
        bits = "" if model.get("quantization", "none") == "none" else f", the base in {model['quantization']}"
        said.append(
            f"{model['trained_parameters']:,} parameters trained beside the base's {model['parameters']:,}, on "
            f"{model['device']} in {model['dtype']}{bits}."
        )
    if gradients := result.get("gradients"):
        said.append(f"Gradients against the dequantized weights': cosine {gradients['cosine']:.4f}.")
    said += [f"Alarm: {alarm['said'].rstrip('.')}." for alarm in result.get("alarms") or ()]
    if gpus := (facts.get("hardware") or {}).get("gpus"):
        said.append(f"Trained on {', '.join(gpus)}.")
    return "## Training\n\n" + " ".join(said)


def _settings(settings: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    adapter = settings.get("adapter") or {}
    told = {**adapter, **{key: value for key, value in settings.items() if key not in ("adapter", "model")}}
    rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in told.items() if value not in (None, [], ""))
    named = ", ".join(f"{package} {versions[package]}" for package in _PACKAGES if package in versions)
    return f"| setting | value |\n|---|---|\n{rows}\n\nMade with {named}."


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    return f"{value:g}" if isinstance(value, float) else _plain(str(value))


def _plain(text: str) -> str:
    """A text that a table's cell holds, without the folders of a machine."""
    return re.sub(r"(?:~|(?<![\w.-]))/(?:[^/\s|]+/)*", "", text).replace("|", "\\|")
