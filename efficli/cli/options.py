"""Options that several commands have, and the headings under which help lists them."""

from __future__ import annotations

from typing import Annotated

import typer

from efficli.console import Terminal

TYPES, CHECK, SOURCE, RUN, SHOW = "Types", "Certificate and gates", "Source", "Run", "Output on the terminal"

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Directory, hub id (org/name) or reference.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.", rich_help_panel=SHOW)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also what each task took.", rich_help_panel=SHOW)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only data and errors.", rich_help_panel=SHOW)]
NoColor = Annotated[bool, typer.Option("--no-color", help="No colours, as with NO_COLOR.", rich_help_panel=SHOW)]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", "-t", min=1, max=512, metavar="N", help="Threads; without it all cores.", rich_help_panel=RUN
    ),  # ggml takes no more
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Take a model that names code of its own; none is run.", rich_help_panel=SOURCE
    ),
]
Base = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Compare with this model, not with the origin.", rich_help_panel=CHECK),
]


NoCache = Annotated[
    bool,
    typer.Option("--no-cache", help="Neither take results of steps from the cache nor keep any.", rich_help_panel=RUN),
]


def option(*names: str, panel: str, about: str, metavar: str | None = None) -> typer.models.OptionInfo:
    """An option with the sentence that help and docs/cli.md show."""
    made: typer.models.OptionInfo = typer.Option(*names, metavar=metavar, help=about, rich_help_panel=panel)
    return made


def max_bytes_option(panel: str) -> typer.models.OptionInfo:
    """The budget as a size."""
    return option("--max-bytes", metavar="SIZE", panel=panel, about="Size of the file at most: 350MiB.")


def bpw_option(panel: str) -> typer.models.OptionInfo:
    """The budget as bits per weight."""
    return option("--bpw", metavar="X", panel=panel, about="Bits per weight at most: 3.2.")


def fit_option(panel: str) -> typer.models.OptionInfo:
    """The budget as a device's memory."""
    return option("--fit", metavar="TARGET", panel=panel, about="What this device holds.")


def max_kld_option(panel: str) -> typer.models.OptionInfo:
    """The gate on the mean KL divergence, nats."""
    about = "Exit 3 if the mean KL divergence is above."
    made: typer.models.OptionInfo = typer.Option("--max-kld", min=0, metavar="X", help=about, rich_help_panel=panel)
    return made


def min_top1_option(panel: str) -> typer.models.OptionInfo:
    """The gate on top-1 agreement, 0 to 1."""
    about = "Exit 3 if top-1 agreement is below."
    made: typer.models.OptionInfo = typer.Option(
        "--min-top1", min=0, max=1, metavar="X", help=about, rich_help_panel=panel
    )
    return made


def terminal_for(as_json: bool, verbose: bool, quiet: bool, no_color: bool) -> Terminal:
    """The terminal that these options ask for."""
    return Terminal(as_json=as_json, verbosity=-1 if quiet else int(verbose), color=not no_color)
