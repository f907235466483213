"""efficli export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from efficli.cli.app import Job, app
from efficli.cli.options import (
    CHECK,
    RUN,
    SOURCE,
    TYPES,
    AsJson,
    Base,
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
    max_kld_option,
    min_top1_option,
    option,
    terminal_for,
)
from efficli.errors import UsageError


@app.command(
    epilog="""
Examples:
  efficli export reference -o out --type Q4_K_M
  efficli export ./SmolLM2-135M -o out --type Q8_0,Q4_K_M --imatrix auto
  efficli export ./SmolLM2-135M -o out --max-bytes 75MiB
  efficli export org/name --revision v1.0 -o out --type Q4_0 --tensor-type 'attn_v=Q6_K'
  efficli export reference -o out --type Q3_K_M --min-top1 0.9 && echo close enough
  efficli export reference -o out --dry-run --json""",
)
def export(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Directory of the artifact.")],
    format: Annotated[str, typer.Option(metavar="gguf", help="File format.", rich_help_panel=TYPES)] = "gguf",
    type: Annotated[
        str | None,
        option(
            "--type",
            metavar="TYPE[,TYPE]",
            panel=TYPES,
            about="Q4_K_M, Q8_0 ... or MIXED (types that quantize allocated); by default MIXED or Q4_K_M.",
        ),
    ] = None,
    max_bytes: Annotated[str | None, max_bytes_option(TYPES)] = None,
    bpw: Annotated[float | None, bpw_option(TYPES)] = None,
    fit: Annotated[str | None, fit_option(TYPES)] = None,
    fit_ctx: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens that --fit must hold.", rich_help_panel=TYPES)
    ] = None,
    imatrix: Annotated[
        str | None,
        typer.Option(metavar="FILE|auto", help="Importance matrix: a file, or computed now.", rich_help_panel=TYPES),
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        option("--tensor-type", metavar="REGEX=TYPE", panel=TYPES, about="Type of the tensors that match; repeatable."),
    ] = None,
    output_tensor_type: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Type of output.weight.", rich_help_panel=TYPES)
    ] = None,
    token_embedding_type: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Type of token_embd.weight.", rich_help_panel=TYPES)
    ] = None,
    pure: Annotated[bool, option("--pure", panel=TYPES, about="One type for all tensors, no mixture.")] = False,
    allow_non_ternary: Annotated[
        bool, option("--allow-non-ternary", panel=TYPES, about="Ternary type from weights that are not ternary.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a hub id.", rich_help_panel=SOURCE)
    ] = None,
    pre_tokenizer: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="llama.cpp's name, if not recognised.", rich_help_panel=SOURCE),
    ] = None,
    trust_remote_code: Trust = False,
    base: Base = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text to measure on; else the slice in efficli.", rich_help_panel=CHECK),
    ] = None,
    ctx_size: Annotated[
        int, typer.Option("--ctx-size", "-c", min=2, metavar="N", help="Tokens of a window.", rich_help_panel=CHECK)
    ] = 512,
    max_kld: Annotated[float | None, max_kld_option(CHECK)] = None,
    min_top1: Annotated[float | None, min_top1_option(CHECK)] = None,
    no_certificate: Annotated[
        bool, option("--no-certificate", panel=CHECK, about="Load the file, but measure nothing.")
    ] = False,
    strict: Annotated[
        bool, option("--strict", panel=CHECK, about="Fallbacks and an absent origin are errors.")
    ] = False,
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
    """Write a checkpoint as GGUF, load the file, and measure how far it is from its origin."""
    terminal = terminal_for(as_json, verbose, quiet, no_color)

    def work() -> None:
        from efficli import pipeline, tables

        result = pipeline.export(
            model,
            output,
            format=format,
            types=None if type is None else tuple(part.strip() for part in type.split(",") if part.strip()),
            max_bytes=max_bytes,
            bpw=bpw,
            fit=fit,
            fit_ctx=fit_ctx,
            imatrix=imatrix,
            tensor_types=tuple(_override(word) for word in tensor_type or ()),
            output_tensor_type=output_tensor_type,
            token_embedding_type=token_embedding_type,
            pure=pure,
            pre_tokenizer=pre_tokenizer,
            allow_non_ternary=allow_non_ternary,
            revision=revision,
            trust_remote_code=trust_remote_code,
            base=base,
            text=text,
            ctx=ctx_size,
            max_kld=max_kld,
            min_top1=min_top1,
            certificate=not no_certificate,
            strict=strict,
            threads=threads,
            seed=seed,
            force=force,
            dry_run=dry_run,
            cache=not no_cache,
            progress=terminal,
        )
        tables.show_export(terminal, result)

    return Job(terminal, work)


def _override(word: str) -> tuple[str, str]:
    """`REGEX=TYPE`, cut at the last `=`."""
    pattern, equals, type = word.rpartition("=")
    if not (pattern and equals and type):
        raise UsageError(f"--tensor-type {word!r}, expected REGEX=TYPE", hint="--tensor-type 'attn_v=Q6_K'")
    return pattern, type
