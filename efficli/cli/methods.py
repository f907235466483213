"""efficli methods."""

from __future__ import annotations

from typing import Annotated

import typer

from efficli.cli.app import Job, app
from efficli.cli.options import AsJson, NoColor, Quiet, Verbose, terminal_for


@app.command(
    epilog="""
Examples:
  efficli methods
  efficli methods lowrank.svd""",
)
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this method's keys.")] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> Job:
    """List the methods that a recipe's passes can name, or show what one does and which keys it has."""
    terminal = terminal_for(as_json, verbose, quiet, no_color)

    def work() -> None:
        from efficli.pipeline import methods as pages

        if terminal.as_json:
            terminal.data(
                pages.describe_method(name).to_json() if name is not None else {"methods": pages.list_methods()}
            )
        else:
            blocks = pages.method_lines(pages.describe_method(name)) if name is not None else [pages.list_lines()]
            for indent, lines in blocks:
                terminal.prose(lines, indent)

    return Job(terminal, work)
