"""efficli recipe-schema."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from efficli.cli.app import Job, app
from efficli.cli.options import RUN, AsJson, NoColor, Quiet, Verbose, option, terminal_for


@app.command(
    epilog="""
Examples:
  efficli recipe-schema
  efficli recipe-schema -o recipe.schema.json

An editor with a YAML language server checks and completes a recipe that begins with
  # yaml-language-server: $schema=recipe.schema.json""",
)
def recipe_schema(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it there, not to stdout.")
    ] = None,
    force: Annotated[bool, option("--force", panel=RUN, about="Replace FILE.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> Job:
    """Print the JSON schema of recipes, for editors and for checks in CI."""
    terminal = terminal_for(as_json, verbose, quiet, no_color)

    def work() -> None:
        from efficli.recipe.json_schema import recipe_schema as schema
        from efficli.recipe.json_schema import write_schema

        if output is None:
            terminal.data(schema())
            return
        write_schema(output, force=force)
        if terminal.as_json:
            terminal.data({"schema": str(output)})
        else:
            terminal.note(f"wrote {output}")

    return Job(terminal, work)
