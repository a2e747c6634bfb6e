"""What all commands share: the application, common options, ways to print and to fail."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from dsr1kit.keys import redact, redact_texts

if TYPE_CHECKING:
    from dsr1kit.access.channels import Channel

app = typer.Typer(
    name="dsr1kit",
    help="Which way to DeepSeek R1 works for you: reach it, run it, compare hosted against local.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
err = Console(stderr=True, highlight=False, soft_wrap=True)

ChannelFile = Annotated[
    Path | None, typer.Option("--channel-file", help="Your own channels (TOML); default: $DSR1KIT_CHANNELS.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def fail(message: str, code: int) -> NoReturn:
    """Say why, without any key, and end."""
    print(f"dsr1kit: {redact(message)}", file=sys.stderr)
    raise SystemExit(code)


def run_async(work: Coroutine[Any, Any, Any]) -> Any:
    """What the coroutine returns."""
    return asyncio.run(work)


def print_json(value: object) -> None:
    """One JSON object on stdout, without any key."""
    plain = json.loads(json.dumps(value, default=str))
    text = json.dumps(redact_texts(plain), ensure_ascii=False)
    print(text.encode("utf-8", "replace").decode())  # half an emoji from a far side cannot be printed


def warn_of_retirement(names: Sequence[str], catalogue: Mapping[str, Channel]) -> None:
    """A line on stderr for each channel that is retired within 30 days."""
    for name in names:
        if name in catalogue and (warning := catalogue[name].retirement_warning()):
            print(f"dsr1kit: {warning}", file=sys.stderr)


def said(message: str) -> int:
    """Say it on stderr; returns the exit code of a bad answer."""
    print(f"dsr1kit: {redact(message)}", file=sys.stderr)
    return 1


def print_paths(paths: dict[str, str], verdict: Sequence[str]) -> None:
    """Where things were written, and the verdict."""
    for name, path in paths.items():
        print(f"{name + ':':<10}{path}")
    print()
    for line in verdict:
        print(line)
