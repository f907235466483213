"""efficli bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from efficli.cli.app import Job, app
from efficli.cli.options import CHECK, RUN, AsJson, NoColor, Quiet, Trust, Verbose, option, terminal_for
from efficli.errors import UsageError

_WORK, _EFFORT, _LIMITS, _OUT = "Workload", "Repeats", "Limits and energy", "Other forms of the result"


@app.command(
    epilog="""
Examples:
  efficli bench out
  efficli bench out/model-Q4_K_M.gguf -p 512 -n 128 -d 0,1024 -t 1,2
  efficli bench --compare q4.gguf q8.gguf --no-starts
  efficli bench out --scenario chat,wake-up --target pi5-8g
  efficli bench q4.gguf q8.gguf --base reference --chart speed.png --markdown >>README.md""",
)
def bench(
    artifacts: Annotated[
        list[Path], typer.Argument(metavar="ARTIFACT", help="Artifact directories or .gguf files.")
    ],
    n_prompt: Annotated[
        str, option("--n-prompt", "-p", metavar="N[,N]", panel=_WORK, about="Prompts to read, in tokens: 128,512.")
    ] = "",
    n_gen: Annotated[
        str, option("--n-gen", "-n", metavar="N[,N]", panel=_WORK, about="Tokens to write: 128; 0 for none.")
    ] = "",
    depth: Annotated[
        str, option("--depth", "-d", metavar="N[,N]", panel=_WORK, about="Tokens already in the cache: 0.")
    ] = "",
    scenario: Annotated[
        str, option("--scenario", metavar="NAME[,NAME]", panel=_WORK, about="Requests with objectives: all, or a YAML.")
    ] = "",
    compare: Annotated[
        bool, option("--compare", panel=_WORK, about="Run the artifacts in turns; ratios to the first.")
    ] = False,
    no_starts: Annotated[bool, option("--no-starts", panel=_WORK, about="No cold and warm starts.")] = False,
    threads: Annotated[
        str, option("--threads", "-t", metavar="N[,N]", panel=_WORK, about="Threads; without it all cores.")
    ] = "",
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
        int, option("--repetitions", "-r", metavar="N", panel=_EFFORT, about="Repeats at least, 5 or more.")
    ] = 5,
    max_repetitions: Annotated[
        int, option("--max-repetitions", metavar="N", panel=_EFFORT, about="Repeats at most, until within 5 %.")
    ] = 30,
    patience: Annotated[
        float, option("--patience", metavar="SECONDS", panel=_EFFORT, about="Time for repeats beyond the least.")
    ] = 20.0,
    time_limit: Annotated[
        float, option("--time-limit", metavar="SECONDS", panel=_LIMITS, about="Of one repeat; then it is stopped.")
    ] = 600.0,
    memory_limit: Annotated[
        str | None, option("--memory-limit", metavar="SIZE", panel=_LIMITS, about="Of the process: 512MiB.")
    ] = None,
    power_command: Annotated[
        str | None,
        option("--power-command", metavar="COMMAND", panel=_LIMITS, about="Prints watts, one number a line."),
    ] = None,
    target: Annotated[
        list[str] | None, option("--target", metavar="NAME", panel=CHECK, about="Predict for a device; repeatable.")
    ] = None,
    base: Annotated[
        str | None, option("--base", metavar="MODEL", panel=CHECK, about="Measure quality against this model.")
    ] = None,
    text: Annotated[
        Path | None, option("--text", metavar="FILE", panel=CHECK, about="Text for --base; else the slice in efficli.")
    ] = None,
    max_kld: Annotated[
        float | None,
        typer.Option(min=0, metavar="X", help="Exit 3 if the mean KL divergence is above.", rich_help_panel=CHECK),
    ] = None,
    min_top1: Annotated[
        float | None,
        typer.Option(
            "--min-top1", min=0, max=1, metavar="X", help="Exit 3 if top-1 agreement is below.", rich_help_panel=CHECK
        ),
    ] = None,
    max_bytes: Annotated[
        str | None, option("--max-bytes", metavar="SIZE", panel=CHECK, about="Exit 4 if a file is larger: 350MiB.")
    ] = None,
    trust_remote_code: Trust = False,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the token ids.", rich_help_panel=RUN)] = 0,
    force: Annotated[bool, option("--force", panel=RUN, about="Replace the file of --chart.")] = False,
    dry_run: Annotated[bool, option("--dry-run", panel=RUN, about="Say what would be measured.")] = False,
    chart: Annotated[
        Path | None, option("--chart", metavar="FILE.png", panel=_OUT, about="Draw bytes, speed and quality.")
    ] = None,
    csv: Annotated[bool, option("--csv", panel=_OUT, about="A line a test, as llama-bench -o csv, on stdout.")] = False,
    jsonl: Annotated[
        bool, option("--jsonl", panel=_OUT, about="An object a test, as llama-bench -o jsonl, on stdout.")
    ] = False,
    markdown: Annotated[bool, option("--markdown", panel=_OUT, about="A table for a README on stdout.")] = False,
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
                scenarios=_words(scenario),
                compare=compare,
                base=base,
                text=text,
                max_kld=max_kld,
                min_top1=min_top1,
                max_bytes=None if max_bytes is None else parse_bytes(max_bytes),
                targets=target or (),
                time_limit=time_limit,
                memory_limit=None if memory_limit is None else parse_bytes(memory_limit),
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


def _numbers(text: str, flag: str) -> tuple[int, ...] | None:
    """`128,512`; None for nothing."""
    if not text:
        return None
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        wish = "expected numbers with commas between them"
        raise UsageError(f"{flag} {text!r}, {wish}", hint=f"{flag} 128,512") from None


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
