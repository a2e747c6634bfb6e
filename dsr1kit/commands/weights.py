"""The command that downloads models to run here, and keeps them up to date."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsr1kit.commands.shared import AsJson, app, fail, print_json, run_async, said
from dsr1kit.errors import Dsr1kitError, UsageError

if TYPE_CHECKING:
    from dsr1kit.local.weights import Weights


@app.command()
def weights(
    models: Annotated[list[str], typer.Argument(help="Hub ids, org/name.", metavar="MODEL...")],
    source: Annotated[
        str, typer.Option(help="hub (Hugging Face, or its mirror in HF_ENDPOINT) or modelscope.")
    ] = "hub",
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit; default: the main branch.")] = None,
    file: Annotated[
        list[str] | None, typer.Option("--file", help="Weights to take, such as '*Q4_K_M*'; may be repeated.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="The folder; default: ~/.cache/dsr1kit/models/SOURCE/ORG/NAME.")
    ] = None,
    sync: Annotated[bool, typer.Option("--sync", help="Ask the hub again, and fetch what changed there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be fetched.")] = False,
    as_json: AsJson = False,
) -> None:
    """Download a model's weights: resumed after every break, checked against the hub's checksums, whole or not there.

    Only safetensors and GGUF, never pickles or code. The folder that is printed is what LocalModel and local:FOLDER
    take. The same command goes on with what was begun. Tokens for gated and private models are read from HF_TOKEN and
    MODELSCOPE_API_TOKEN.

    Every night, by cron, what changed; the old state is used until the new one is complete:

    0 3 * * *  dsr1kit weights ORG/NAME ORG/OTHER --sync --json >> weights.log 2>&1
    """
    from dsr1kit.local.weights import fetch_weights
    from dsr1kit.progress import fetch_progress

    names = list(dict.fromkeys(models))
    if to is not None and len(names) > 1:
        raise UsageError("--to is the folder of one model: name one, or leave --to out")
    told: list[dict[str, Any]] = []
    codes: list[int] = []
    for name in names:
        try:
            with fetch_progress(name, quiet=as_json) as (tell, note):
                done = run_async(
                    fetch_weights(
                        name, source=source, revision=revision, files=file or (), to=to, sync=sync, dry_run=dry_run,
                        on_progress=tell, on_note=note,
                    )
                )  # fmt: skip
        except KeyboardInterrupt:
            fail("stopped; what came is kept, and the same command goes on from there", 130)
        except Dsr1kitError as error:
            if len(names) == 1 and not as_json:
                raise
            said(str(error))
            codes.append(2 if isinstance(error, UsageError) else 1)
            told.append({"model": name, "source": source, "error": str(error)})
            continue
        told.append(asdict(done))
        if not as_json:
            _show(done, dry_run=dry_run)
    if as_json:
        print_json({"dry_run": dry_run, "models": told})
    if codes:
        raise SystemExit(min(codes))


def _show(done: Weights, *, dry_run: bool) -> None:
    from dsr1kit.local.choice import size_text

    print(f"{done.model} at {done.commit[:12]}, licence: {done.licence or 'not stated, see its page'}")
    new = [one for one in done.files if one.fetched]
    verb = "would be fetched" if dry_run else "fetched"
    for one in new:
        print(f"  {size_text(one.size):>9}  {one.path}")
    for path in done.removed:
        print(f"  {'':>9}  {path} (gone from the source{', would be removed' if dry_run else ', removed'})")
    if done.changed:
        print(f"{len(new)} of {len(done.files)} files {verb}, {size_text(done.downloaded_bytes)} over the network, "
              f"{size_text(done.reused_bytes)} of {size_text(done.total_bytes)} were there")  # fmt: skip
    else:
        print(f"all {len(done.files)} files are there, {size_text(done.total_bytes)}")
    print(done.folder)
