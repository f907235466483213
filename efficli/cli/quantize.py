"""efficli quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from efficli.cli.app import Job, app
from efficli.cli.options import (
    RUN,
    SOURCE,
    AsJson,
    Model,
    NoCache,
    NoColor,
    Quiet,
    Threads,
    Trust,
    Verbose,
    bpw_option,
    fit_option,
    max_bytes_option,
    option,
    terminal_for,
)

BUDGET, CHOICE = "Budget (one of them)", "How it is chosen"


@app.command(
    epilog="""
Examples:
  efficli quantize reference -o small --max-bytes 1MiB
  efficli quantize ./SmolLM2-135M -o small --bpw 3.2 --types Q3_K,Q4_K,Q6_K,Q8_0
  efficli quantize ./SmolLM2-135M -o small --fit pi4-2gb --ctx-size 4096 --harmonize qkv,gate-up
  efficli quantize reference -o out --max-bytes 1MiB --export""",
)
def quantize(
    model: Model,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder of the checkpoint, or of the artifact."),
    ],
    method: Annotated[str, typer.Option(metavar="NAME", help="As `efficli methods` lists them.")] = "mixed",
    export: Annotated[bool, typer.Option("--export", help="Go on to the GGUF file; no checkpoint is kept.")] = False,
    max_bytes: Annotated[str | None, max_bytes_option(BUDGET)] = None,
    bpw: Annotated[float | None, bpw_option(BUDGET)] = None,
    fit: Annotated[str | None, fit_option(BUDGET)] = None,
    ctx_size: Annotated[
        int | None,
        typer.Option("--ctx-size", "-c", min=1, metavar="N", help="Tokens for --fit.", rich_help_panel=BUDGET),
    ] = None,
    types: Annotated[
        str | None, option("--types", metavar="T,T", panel=CHOICE, about="Types to choose from; else all that fit.")
    ] = None,
    target: Annotated[
        str | None, option("--target", metavar="TARGET", panel=CHOICE, about="Only types that run fast on this device.")
    ] = None,
    loss: Annotated[
        str | None, option("--loss", metavar="auto|mse|hess|higgs|kld", panel=CHOICE, about="What errors are told by.")
    ] = None,
    rounding: Annotated[
        str | None,
        option("--rounding", metavar="nearest|error-feedback", panel=CHOICE, about="How codes are rounded."),
    ] = None,
    harmonize: Annotated[
        str | None, option("--harmonize", metavar="qkv,gate-up", panel=CHOICE, about="One type for these together.")
    ] = None,
    imatrix: Annotated[
        str | None, option("--imatrix", metavar="FILE", panel=CHOICE, about="Importance matrix; else computed.")
    ] = None,
    swaps: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Measurements of the search at most.", rich_help_panel=CHOICE),
    ] = None,
    calibration: Annotated[
        Path | None, option("--calibration", metavar="FILE", panel=CHOICE, about="Text; else the slices in efficli.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a hub id.", rich_help_panel=SOURCE)
    ] = None,
    trust_remote_code: Trust = False,
    threads: Threads = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of what is drawn.", rich_help_panel=RUN)] = 0,
    no_cache: NoCache = False,
    force: Annotated[bool, option("--force", panel=RUN, about="Replace what is in DIR.")] = False,
    dry_run: Annotated[bool, option("--dry-run", panel=RUN, about="Say what would be written, how large.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> Job:
    """Choose fewer bits for a checkpoint's weights, each tensor its own, under a budget of bytes."""
    terminal = terminal_for(as_json, verbose, quiet, no_color)
    given: dict[str, Any] = {
        "max_bytes": max_bytes,
        "bpw": bpw,
        "fit": fit,
        "ctx_size": ctx_size,
        "types": None if types is None else _words(types),
        "target": target,
        "loss": loss,
        "rounding": rounding,
        "harmonize": None if harmonize is None else _words(harmonize),
        "imatrix": imatrix,
        "swaps": swaps,
    }

    def work() -> None:
        from efficli import pipeline, tables

        result = pipeline.compress(
            model,
            output,
            method=f"quantize.{method}",
            options={key: value for key, value in given.items() if value is not None},
            calibration=calibration,
            revision=revision,
            trust_remote_code=trust_remote_code,
            export=export,
            seed=seed,
            threads=threads,
            force=force,
            dry_run=dry_run,
            cache=not no_cache,
            progress=terminal,
        )
        tables.show_compressed(terminal, result)

    return Job(terminal, work)


def _words(text: str) -> list[str]:
    """Words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]
