"""efficli plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from efficli.cli.app import Job, app
from efficli.cli.options import RUN, SOURCE, TYPES, AsJson, Model, NoColor, Quiet, Trust, Verbose, option, terminal_for
from efficli.errors import UsageError

_DEVICE, _LINK = "Device", "Satellite link"


@app.command(
    epilog="""
Examples:
  efficli plan reference --target pi5-8gb
  efficli plan org/name --target pi4-2gb,phone-mid --ctx-size 2048,8192
  efficli plan reference --target zynq-ultrascale --uplink 256kbps --pass 8min
  efficli plan ./model --all-types --json""",
)
def plan(
    model: Model,
    target: Annotated[
        list[str] | None,
        option("--target", metavar="NAME[,NAME]", panel=_DEVICE, about="A device, as pi5-8gb, or a YAML: see targets."),
    ] = None,
    ctx_size: Annotated[
        list[str] | None,
        option("--ctx-size", "-c", metavar="N[,N]", panel=_DEVICE, about="Contexts in tokens; else 2048."),
    ] = None,
    cache_type_k: Annotated[
        str, option("--cache-type-k", "-ctk", metavar="TYPE", panel=_DEVICE, about="Type of the K cache.")
    ] = "f16",
    cache_type_v: Annotated[
        str, option("--cache-type-v", "-ctv", metavar="TYPE", panel=_DEVICE, about="Type of the V cache.")
    ] = "f16",
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            "-t",
            min=1,
            max=512,
            metavar="N",
            help="On the device; else as calibrated.",
            rich_help_panel=_DEVICE,
        ),
    ] = None,
    types: Annotated[
        list[str] | None,
        option("--type", metavar="T[,T]", panel=TYPES, about="llama.cpp's types: Q4_K_M,Q8_0; else the usual ones."),
    ] = None,
    all_types: Annotated[bool, option("--all-types", panel=TYPES, about="Every type.")] = False,
    uplink: Annotated[
        str | None,
        option("--uplink", metavar="RATE", panel=_LINK, about="Bits/s on the air, 256kbps; else the device's link."),
    ] = None,
    pass_length: Annotated[
        str | None, option("--pass", metavar="TIME", panel=_LINK, about="Length of a pass; else 8min.")
    ] = None,
    passes_per_day: Annotated[
        float | None, option("--passes-per-day", metavar="N", panel=_LINK, about="Passes to use; else 4.")
    ] = None,
    revision: Annotated[
        str | None, option("--revision", metavar="REV", panel=SOURCE, about="Branch, tag or commit of a hub id.")
    ] = None,
    pre_tokenizer: Annotated[
        str | None,
        option("--pre-tokenizer", metavar="NAME", panel=SOURCE, about="llama.cpp's name, where it is not recognised."),
    ] = None,
    trust_remote_code: Trust = False,
    chart: Annotated[
        Path | None, option("--chart", metavar="FILE.png", panel=RUN, about="Draw size against predicted speed.")
    ] = None,
    force: Annotated[bool, option("--force", panel=RUN, about="Replace the file of --chart.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> Job:
    """Say what a model will be on a device before anything is downloaded: sizes, memory, speed, and what fits."""
    terminal = terminal_for(as_json, verbose, quiet, no_color)

    def work() -> int:
        from efficli.planning import plan_table
        from efficli.planning.plan import plan as find
        from efficli.planning.uplink import parse_pass, parse_rate

        if chart is not None:
            from efficli.planning import plan_chart

            plan_chart.check(chart, force, targets=bool(target))
        result = find(
            model,
            targets=_names("--target", target),
            ctx=_numbers(ctx_size),
            types=_names("--type", types) or None,
            all_types=all_types,
            cache_type_k=cache_type_k,
            cache_type_v=cache_type_v,
            threads=threads,
            uplink=None if uplink is None else parse_rate(uplink),
            pass_s=parse_pass(pass_length),
            passes_per_day=passes_per_day,
            pre_tokenizer=pre_tokenizer,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=terminal,
        )
        if terminal.as_json:
            terminal.data(result.to_json())
        else:
            plan_table.show(terminal, result, verbose=verbose)
        if chart is not None:
            plan_chart.draw(result, chart)
            terminal.note(f"the chart is {chart}")
        if result.failure is None:
            return 0
        terminal.complaint(result.failure.line, result.failure.hint)
        return result.failure.exit_code

    return Job(terminal, work)


def _numbers(words: Sequence[str] | None) -> tuple[int, ...] | None:
    """`2048,8192`, or the option more than once; None without it."""
    if not words:
        return None
    try:
        return tuple(int(number) for word in words for number in word.split(","))
    except ValueError:
        raise UsageError(f"--ctx-size {','.join(words)!r}, expected numbers with commas between them") from None


def _names(option: str, words: Sequence[str] | None) -> tuple[str, ...]:
    """`a,b`, or the option more than once; an empty one is a variable that was not set."""
    names = tuple(name.strip() for word in words or () for name in word.split(",") if name.strip())
    if words and not names:
        raise UsageError(f"{option} {','.join(words)!r} names nothing")
    return names
