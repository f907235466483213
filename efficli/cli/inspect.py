"""efficli inspect."""

from __future__ import annotations

from typing import Annotated

import typer

from efficli.cli.app import Job, app
from efficli.cli.options import AsJson, NoColor, Quiet, Verbose, option, terminal_for


@app.command(
    epilog="""
Examples:
  efficli inspect reference
  efficli inspect out
  efficli inspect out/model-Q4_K_M.gguf --json
  efficli inspect model.onnx --no-scan

Exit codes:
  0 nothing to act on  1 findings  6 a hash differs, or something is hostile""",
)
def inspect(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="Checkpoint, artifact, .gguf or .onnx file, hub id or reference."),
    ],
    no_scan: Annotated[
        bool, option("--no-scan", panel="Options", about="Read no weights: neither values nor hashes are judged.")
    ] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> Job:
    """Say what a model is and what is wrong with it: types, values, chat template, hashes and more."""
    terminal = terminal_for(as_json, verbose, quiet, no_color)

    def work() -> int:
        from efficli import tables
        from efficli.pipeline.inspect import inspect

        found = inspect(path, scan=not no_scan, progress=terminal)
        tables.show_inspection(terminal, found)
        return found.exit_code

    return Job(terminal, work)
