"""efficli bench."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from efficli.cli.app import Job, app
from efficli.cli.options import (
    RUN,
    AsJson,
    NoColor,
    Quiet,
    Trust,
    Verbose,
    max_kld_option,
    min_top1_option,
    option,
    terminal_for,
)
from efficli.errors import UsageError

_WORK, _EFFORT, _LIMITS, _OUT = "Workload", "Repeats", "Limits and energy", "Other forms of the result"
_QUALITY = "Quality, gates and predictions"


@app.command(
    epilog="""
Examples:
  efficli bench out
  efficli bench out/model-Q4_K_M.gguf -p 512 -n 128 -d 0,1024 -t 1,2
  efficli bench --compare q4.gguf q8.gguf --no-starts
  efficli bench out --scenario chat,wake-up --target pi5-8gb
  efficli bench out --chart speed.png --markdown >>README.md""",
)
def bench(
    artifacts: Annotated[list[Path], typer.Argument(metavar="ARTIFACT", help="Artifact directories or .gguf files.")],
    n_prompt: Annotated[
        list[str] | None,
        option("--n-prompt", "-p", metavar="N[,N]", panel=_WORK, about="Prompt lengths; else 128,512."),
    ] = None,
    n_gen: Annotated[
        list[str] | None,
        option("--n-gen", "-n", metavar="N[,N]", panel=_WORK, about="Tokens to write; else 128. 0: none."),
    ] = None,
    depth: Annotated[
        list[str] | None,
        option("--depth", "-d", metavar="N[,N]", panel=_WORK, about="Tokens that come before them; else 0."),
    ] = None,
    scenario: Annotated[
        list[str] | None,
        option(
            "--scenario",
            metavar="NAME[,NAME]",
            panel=_WORK,
            about="Requests with objectives: chat, code-completion, long-log-in-short-answer, wake-up, all, or a YAML.",
        ),
    ] = None,
    compare: Annotated[
        bool, option("--compare", panel=_WORK, about="Run the artifacts in turns; ratios to the first.")
    ] = False,
    no_starts: Annotated[bool, option("--no-starts", panel=_WORK, about="No cold and warm starts.")] = False,
    threads: Annotated[
        list[str] | None,
        option("--threads", "-t", metavar="N[,N]", panel=_WORK, about="Threads; without it all cores."),
    ] = None,
    ctx_size: Annotated[
        int | None, option("--ctx-size", "-c", metavar="N", panel=_WORK, about="Context; else what the tests need.")
    ] = None,
    cache_type_k: Annotated[
        str, option("--cache-type-k", "-ctk", metavar="TYPE", panel=_WORK, about="Type of the K cache.")
    ] = "f16",
    cache_type_v: Annotated[
        str, option("--cache-type-v", "-ctv", metavar="TYPE", panel=_WORK, about="Type of the V cache.")
    ] = "f16",
    flash_attn: Annotated[
        str, option("--flash-attn", "-fa", metavar="auto|on|off", panel=_WORK, about="Flash attention.")
    ] = "auto",
    repetitions: Annotated[
        int, option("--repetitions", "-r", metavar="N", panel=_EFFORT, about="At least so many, 5 or more.")
    ] = 5,
    max_repetitions: Annotated[
        int,
        option("--max-repetitions", metavar="N", panel=_EFFORT, about="At most so many, until known to 5 %."),
    ] = 30,
    patience: Annotated[
        float, option("--patience", metavar="SECONDS", panel=_EFFORT, about="At most so long, beyond the least.")
    ] = 20,
    time_limit: Annotated[
        float, option("--time-limit", metavar="SECONDS", panel=_LIMITS, about="Stop a repeat that takes longer.")
    ] = 600,
    memory_limit: Annotated[
        str | None,
        option("--memory-limit", metavar="SIZE", panel=_LIMITS, about="Stop a model that takes more: 512MiB."),
    ] = None,
    power_command: Annotated[
        str | None,
        option("--power-command", metavar="COMMAND", panel=_LIMITS, about="What prints watts, one number a line."),
    ] = None,
    target: Annotated[
        list[str] | None,
        option("--target", metavar="NAME[,NAME]", panel=_QUALITY, about="Predict for a device, as pi5-8gb, or a YAML."),
    ] = None,
    base: Annotated[
        str | None, option("--base", metavar="MODEL", panel=_QUALITY, about="Measure quality against this model.")
    ] = None,
    text: Annotated[
        Path | None,
        option("--text", metavar="FILE", panel=_QUALITY, about="Text for --base; else the slice in efficli."),
    ] = None,
    max_kld: Annotated[float | None, max_kld_option(_QUALITY)] = None,
    min_top1: Annotated[float | None, min_top1_option(_QUALITY)] = None,
    max_bytes: Annotated[
        str | None, option("--max-bytes", metavar="SIZE", panel=_QUALITY, about="Exit 4 if a file is larger: 350MiB.")
    ] = None,
    trust_remote_code: Trust = False,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the token ids.", rich_help_panel=RUN)] = 0,
    force: Annotated[bool, option("--force", panel=RUN, about="Replace the file of --chart.")] = False,
    dry_run: Annotated[bool, option("--dry-run", panel=RUN, about="Say what would be measured.")] = False,
    chart: Annotated[
        Path | None, option("--chart", metavar="FILE.png", panel=_OUT, about="Draw bytes, speed and quality.")
    ] = None,
    csv: Annotated[bool, option("--csv", panel=_OUT, about="A line a test, as llama-bench -o csv.")] = False,
    jsonl: Annotated[bool, option("--jsonl", panel=_OUT, about="An object a test, as llama-bench -o jsonl.")] = False,
    markdown: Annotated[bool, option("--markdown", panel=_OUT, about="A table for a README.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> Job:
    """Measure what a device will feel: starts, time to the first token, speed, memory, each with its spread."""
    terminal = terminal_for(as_json, verbose, quiet, no_color)
    terminal.still = True

    def work() -> int:
        from efficli import tables
        from efficli.ops.byte_size import parse_bytes
        from efficli.pipeline import BenchResult, bench

        show = tables.BenchView(terminal=terminal, csv=csv, jsonl=jsonl, markdown=markdown, chart=chart, force=force)
        show.check()
        result = BenchResult(machine={})
        try:
            bench(
                artifacts,
                n_prompt=_numbers(n_prompt, "--n-prompt"),
                n_gen=_numbers(n_gen, "--n-gen"),
                depth=_numbers(depth, "--depth"),
                threads=_numbers(threads, "--threads"),
                ctx=ctx_size,
                cache_type_k=cache_type_k,
                cache_type_v=cache_type_v,
                flash_attn=flash_attn,
                repetitions=repetitions,
                max_repetitions=max_repetitions,
                patience=patience,
                starts=not no_starts,
                scenarios=_names(scenario),
                compare=compare,
                base=base,
                text=text,
                max_kld=max_kld,
                min_top1=min_top1,
                max_bytes=None if max_bytes is None else parse_bytes(max_bytes, "--max-bytes"),
                targets=_names(target),
                time_limit=time_limit,
                memory_limit=None if memory_limit is None else parse_bytes(memory_limit, "--memory-limit"),
                power_command=power_command,
                trust_remote_code=trust_remote_code,
                seed=seed,
                dry_run=dry_run,
                into=result,
                progress=terminal,
            )
        except KeyboardInterrupt as error:
            if show.interrupted(result):
                error.add_note("what was measured until then is shown")
            raise
        return show.finished(result, dry_run=dry_run)

    return Job(terminal, work)


def _numbers(words: Sequence[str] | None, flag: str) -> tuple[int, ...] | None:
    """`128,512`, or the option more than once; None without it."""
    if not words:
        return None
    try:
        return tuple(int(number) for word in words for number in word.split(","))
    except ValueError:
        wish = "expected numbers with commas between them"
        raise UsageError(f"{flag} {','.join(words)!r}, {wish}", hint=f"{flag} 128,512") from None


def _names(words: Sequence[str] | None) -> tuple[str, ...]:
    return tuple(name.strip() for word in words or () for name in word.split(",") if name.strip())
