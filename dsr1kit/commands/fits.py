"""The command that says which R1 runs on a machine: a table, a recommendation, the command to run it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from dsr1kit.commands.shared import AsJson, app, err, print_json, run_async
from dsr1kit.errors import UnknownName

if TYPE_CHECKING:
    from rich.text import Text

    from dsr1kit.local.fits import Fit
    from dsr1kit.local.hardware import Hardware
    from dsr1kit.local.shapes import Shape

# Signs beside the colours: a table is read in black and white, too.
_SIGNS = {"fits": ("+", "green"), "tight": ("~", "yellow"), "no": ("-", "dim")}
_NOT_SO = "x"  # before a size that a model would have in a precision that it cannot be had in


@app.command()
def fits(
    model: Annotated[str | None, typer.Argument(help="Such as 7b, a hub id or a folder; none: all of R1.")] = None,
    on: Annotated[str | None, typer.Option(help="A machine by name, as t4 or cpu-16gb; default: this one.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of prompt and completion, or of a training row.")] = 4096,
    batch: Annotated[int, typer.Option(help="Requests, or training rows, at once.")] = 1,
    for_: Annotated[str, typer.Option("--for", help="inference, qlora or lora.")] = "inference",
    as_json: AsJson = False,
) -> None:
    """Which R1 fits this machine, or a named one: GiB a precision, the one to run, and how.

    + fits, ~ fits with less than a tenth of the memory left, - does not, x cannot be had so. Computed from the models'
    shapes; of a hub id that is neither shipped nor on this machine, config.json alone is downloaded. Exit 1 when the
    MODEL named fits in no precision.
    """
    from dsr1kit.local.fits import advise, best, plan, precisions_for, recommend
    from dsr1kit.local.hardware import look
    from dsr1kit.local.machines import find_hardware, machines
    from dsr1kit.local.memory import available

    at = find_hardware(on) if on else look()
    shape = _shape(model) if model else None
    found = plan(at, context=context, batch=batch, purpose=for_, model=shape)
    pick = best(found, at, of_r1=shape is None)
    if model:
        least = found[-1].precision
        advice = "" if pick or shape is None else advise(
            shape, at, precision=least, context=context, batch=batch, purpose=for_
        )  # fmt: skip
        value, reason = (f"{pick.model} {pick.precision}", pick.note) if pick else ("", advice)
    else:
        value, reason = recommend(at, context=context, batch=batch, purpose=for_)
    lines = [] if model and pick is None else _commands(pick, at, context, batch, for_)
    title = machines()[at.name].title if at.name else ""
    if as_json:
        print_json({
            # Of a machine known by name the title stands where this one has its processor's name.
            "hardware": {**asdict(at), "title": title, "cpu": "" if title else at.cpu,
                         "cpu_features": sorted(at.cpu_features), "available_bytes": available(at)},
            "context": context, "batch": batch, "purpose": for_, "fits": [fit.as_dict() for fit in found],
            "recommended": {"value": value, "reason": reason, "commands": lines},
        })  # fmt: skip
    else:
        _show(found, at, precisions_for(at, for_), context, one=model is not None)
        if value:
            print(f"\nrun first: {value}" + (f": {reason}" if reason else ""))
        for line in lines:
            print(f"  {line}")
    if model and pick is None:
        if not as_json:
            err.print(f"dsr1kit: {reason}", markup=False)
        raise SystemExit(1)


def _shape(model: str) -> Shape:
    from dsr1kit.local.places import is_id
    from dsr1kit.local.shapes import find_shape, shape_on_hub

    try:
        return find_shape(model)
    except UnknownName:
        if not is_id(model):
            raise
    shape: Shape = run_async(shape_on_hub(model))
    return shape


def _show(found: list[Fit], at: Hardware, precisions: tuple[str, ...], context: int, *, one: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    from dsr1kit.commands.show import _out
    from dsr1kit.local.memory import GIB, available
    from dsr1kit.local.shapes import distinct

    many = f" and {len(at.gpus) - 1} more" if at.gpus[1:] else ""
    name = at.cpu if at.name or not at.gpus else f"{at.gpus[0].name}{many}"
    console = _out(110)
    console.print(Text(f"{name or 'this computer'}: {available(at) / GIB:.1f} GiB free"), soft_wrap=True)
    legend = "GiB needed; + fits, ~ tight, - does not fit"
    if one:
        rated = any(fit.tokens_per_s_bound for fit in found)
        speed = ["at most tokens/s"] if rated else []
        parts = list(dict.fromkeys(name for fit in found for name, _ in fit.need.parts()))
        table = Table("precision", *(part.replace("_", " ") for part in parts), "total GiB", "longest context",
                      *speed, box=None, header_style="bold", pad_edge=False)  # fmt: skip
        for fit in found:
            sizes = dict(fit.need.parts())
            rate = [f"{fit.tokens_per_s_bound:.0f}" if fit.tokens_per_s_bound else ""] if rated else []
            cells = [Text(f"{sizes.get(part, 0) / GIB:.2f}") for part in parts]
            table.add_row(fit.precision, *cells, _cell(fit), f"{fit.longest_context:,}", *rate)
    else:
        table = Table("model", *precisions, box=None, header_style="bold", pad_edge=False)
        by_model: dict[str, dict[str, Fit]] = {shape.name: {} for shape in distinct() if shape.kind != "check"}
        for fit in found:
            by_model[fit.model][fit.precision] = fit
        for name, row in by_model.items():
            table.add_row(name, *(_cell(row[kind]) for kind in precisions))
    if not all(fit.possible for fit in found):
        legend += f", {_NOT_SO} cannot be had so"
    console.print(table)
    console.print(Text(legend), style="dim")
    if not one:
        told = [fit for fit in found if fit.context < context and fit.shape.kind != "embedded"]
        for tokens in sorted({fit.context for fit in told}):
            names = ", ".join(dict.fromkeys(fit.model for fit in told if fit.context == tokens))
            console.print(Text(f"counted at their own {tokens:,} tokens, the most they take: {names}"), style="dim",
                          soft_wrap=True)  # fmt: skip
    for fit in found if one else ():
        if fit.note:
            console.print(Text(f"{fit.precision}: {fit.note}"), style="dim", soft_wrap=True)


def _cell(fit: Fit) -> Text:
    from rich.text import Text

    from dsr1kit.local.memory import GIB

    sign, style = _SIGNS[fit.state] if fit.possible else (_NOT_SO, "dim")
    return Text(f"{sign} {fit.need.total / GIB:.1f}", style=style)


def _commands(fit: Fit | None, at: Hardware, context: int, batch: int, purpose: str) -> list[str]:
    """What to type to run it; for fine-tuning only the download, whose trainer has its own page."""
    from dsr1kit.local.fits import ROOM

    if fit is None:
        return ['dsr1kit ask --local tiny-r1 "What is 12 + 30?"']
    shape = fit.shape
    source = shape.hub_id
    if shape.kind in ("embedded", "folder"):
        fetch: list[str] = []
    elif fit.precision == "q4_k_m" and not shape.gguf:
        return [f"# a GGUF repository of it, often called {shape.name}-GGUF: dsr1kit weights ... --file '*Q4_K_M*'"]
    elif fit.precision == "q4_k_m":
        fetch, source = [f"dsr1kit weights {shape.gguf} --file '*Q4_K_M*'"], shape.gguf
    else:
        fetch = [f"dsr1kit weights {source}"]
    if purpose != "inference":
        return fetch
    # The room that the recommendation counts on, or what was asked for; without --batch an engine takes more rows.
    tokens = max(min(fit.longest_context, ROOM), min(context, shape.context))
    sizes = f"--context {tokens} --batch {batch}"
    if fit.precision == "q4_k_m" and shape.kind == "folder" and not source.endswith(".gguf"):
        return ["# made into a GGUF file by llama.cpp's convert_hf_to_gguf.py, then quantized by its llama-quantize"]
    if fit.precision == "q4_k_m":
        return [*fetch, f"dsr1kit serve {source} --engine llama.cpp {sizes}"]
    if shape.latent or len(at.gpus) > 1:
        packed = " --quantization 4bit" if fit.precision == "nf4" else ""
        return [*fetch, f"dsr1kit serve {source} --engine vllm {sizes}{packed}"]
    bits = {"nf4": " --quantization 4bit", "8bit": " --quantization 8bit"}.get(fit.precision, "")
    bits = "" if shape.native == "fp8" else bits  # it is in 8 bits as it is
    return [*fetch, f'dsr1kit ask --local {source}{bits} "How many primes are below 60?"']
