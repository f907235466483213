"""efficli cache ls, efficli cache prune."""

from __future__ import annotations

from typing import Annotated

import typer

from efficli.cli.app import Job, app
from efficli.cli.options import RUN, AsJson, NoColor, Quiet, Verbose, option, terminal_for

_WHICH = "Which results"

cache = typer.Typer(
    help="Show or remove the results that `efficli run` keeps between runs.",
    epilog="""
Examples:
  efficli cache ls
  efficli cache prune --older-than 30d""",
)
app.add_typer(cache, name="cache")


@cache.command(
    "ls",
    epilog="""
Examples:
  efficli cache ls
  efficli cache ls --json""",
)
def list_results(
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> Job:
    """List the results that are kept: of which step, how large, how old, when last used."""
    terminal = terminal_for(as_json, verbose, quiet, no_color)

    def work() -> None:
        from efficli.pipeline.cache import list_cache

        found = list_cache()
        if as_json:
            terminal.data(found.to_json())
            return
        if found.entries:
            terminal.table(*found.table(), is_data=True)
            terminal.text("\n")
        terminal.prose(found.lines())

    return Job(terminal, work)


@cache.command(
    epilog="""
Examples:
  efficli cache prune --older-than 30d
  efficli cache prune --max-bytes 5GB --dry-run
  efficli cache prune --all""",
)
def prune(
    older_than: Annotated[
        str | None,
        option("--older-than", metavar="TIME", panel=_WHICH, about="Not used for so long: 30d, 12h."),
    ] = None,
    max_bytes: Annotated[
        str | None,
        option("--max-bytes", metavar="SIZE", panel=_WHICH, about="The least recently used, until so much stays: 5GB."),
    ] = None,
    kind: Annotated[
        list[str] | None, option("--kind", metavar="STEP", panel=_WHICH, about="Only of this step, as `ls` names it.")
    ] = None,
    everything: Annotated[bool, option("--all", panel=_WHICH, about="All of them.")] = False,
    dry_run: Annotated[bool, option("--dry-run", panel=RUN, about="Say what would be removed.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> Job:
    """Remove results; also what is damaged, or was left half written. Not while a run uses the cache."""
    terminal = terminal_for(as_json, verbose, quiet, no_color)

    def work() -> None:
        from efficli.ops.byte_size import parse_bytes
        from efficli.ops.duration import parse_duration
        from efficli.pipeline.cache import prune_cache

        result = prune_cache(
            older_than_s=None if older_than is None else parse_duration(older_than, "--older-than"),
            max_bytes=None if max_bytes is None else parse_bytes(max_bytes, "--max-bytes"),
            kinds=kind or None,
            everything=everything,
            dry_run=dry_run,
        )
        if as_json:
            terminal.data(result.to_json())
            return
        if dry_run and result.pruned.removed:
            terminal.table(*result.table(), is_data=True)
            terminal.text("\n")
        terminal.prose(result.lines())

    return Job(terminal, work)
