"""efficli run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from efficli.cli.app import Job, app
from efficli.cli.options import RUN, AsJson, NoCache, NoColor, Quiet, Threads, Verbose, option, terminal_for

RECIPE, CI = "Recipe", "For CI"


@app.command(
    epilog="""
Examples:
  efficli run recipes/reference-demo.yaml -o out
  efficli run recipes/pi5-chat.yaml --set model=org/name --dry-run
  efficli run recipes/ci-gate.yaml -o out --summary out.md --junit out.xml
  efficli run recipes/pi5-chat.yaml --rehearse""",
)
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Directory of the artifact; else the recipe's name."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        option("--set", metavar="KEY=VALUE", panel=RECIPE, about="A value instead of the file's: gates.max_kld=0.1."),
    ] = None,
    dry_run: Annotated[
        bool, option("--dry-run", panel=RECIPE, about="Say what would be written, how large, how long it takes.")
    ] = False,
    rehearse: Annotated[
        bool, option("--rehearse", panel=RECIPE, about="Every step on a two-layer random clone; keeps nothing.")
    ] = False,
    summary: Annotated[
        Path | None, option("--summary", metavar="FILE.md", panel=CI, about="Gates and certificates as Markdown.")
    ] = None,
    junit: Annotated[
        Path | None, option("--junit", metavar="FILE.xml", panel=CI, about="Gates as JUnit test cases.")
    ] = None,
    threads: Threads = None,
    no_cache: NoCache = False,
    force: Annotated[bool, option("--force", panel=RUN, about="Replace what is in DIR.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> Job:
    """Do what a recipe says: passes, files, certificate, bench, gates."""
    terminal = terminal_for(as_json, verbose, quiet, no_color)

    def work() -> None:
        from efficli import pipeline, tables

        result = pipeline.run(
            recipe,
            output,
            settings=tuple(settings or ()),
            cache=not no_cache,
            rehearsal=rehearse,
            dry_run=dry_run,
            threads=threads,
            force=force,
            summary=summary,
            junit=junit,
            progress=terminal,
        )
        tables.show_run(terminal, result)

    return Job(terminal, work)
