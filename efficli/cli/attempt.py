"""efficli try."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from efficli.cli.app import Job, app
from efficli.cli.options import AsJson, NoColor, Quiet, Threads, Trust, Verbose, terminal_for


@app.command(
    "try",
    epilog="""
Examples:
  efficli try out -p "def read_lines(path):"
  efficli try out --base reference -p "import os" -n 32""",
)
def try_(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="What export wrote, or one .gguf file.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="What to continue.")],
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="Show what this model writes beside it.")] = None,
    tokens: Annotated[int, typer.Option("--n-gen", "-n", min=1, metavar="N", help="Tokens to write.")] = 64,
    trust_remote_code: Trust = False,
    threads: Threads = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> Job:
    """Continue a text with an artifact, and with its base side by side."""
    terminal = terminal_for(as_json, verbose, quiet, no_color)

    def work() -> None:
        from efficli import pipeline, tables

        names = [str(artifact)] if base is None else [str(artifact), base]
        with tables.side_by_side(terminal, prompt, names) as write:
            tried = pipeline.try_artifact(
                artifact,
                prompt,
                base=base,
                max_tokens=tokens,
                threads=threads,
                trust_remote_code=trust_remote_code,
                on_piece=write,
                progress=terminal,
            )
        tables.show_try(terminal, tried)

    return Job(terminal, work)
