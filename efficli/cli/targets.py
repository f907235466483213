"""efficli targets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from efficli.cli.app import Job, app
from efficli.cli.options import RUN, AsJson, NoColor, Quiet, Verbose, option, terminal_for


class TargetsGroup(TyperGroup):
    """`efficli targets NAME` without naming a command: what is no command goes to `show`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command first: `show`, unless another is named or help is asked for."""
        word = next((arg for arg in args if not arg.startswith("-")), "")
        if word in self.commands:
            at = args.index(word)
            args = [word, *args[:at], *args[at + 1 :]]
        elif not {"-h", "--help"} & set(args):
            args = ["show", *args]
        return super().parse_args(ctx, args)


targets_app = typer.Typer(
    cls=TargetsGroup,
    subcommand_metavar="[NAME | FILE.yaml] | probe",
    help="List the devices that efficli knows, show one of them, or measure this machine.",
    epilog="""
Examples:
  efficli targets
  efficli targets pi5-8gb
  efficli targets ./my-board.yaml --json
  efficli targets probe -o my-board.yaml""",
)
app.add_typer(targets_app, name="targets")


@targets_app.command(
    "show",
    epilog="""
Examples:
  efficli targets
  efficli targets phone-mid --json""",
)
def show_targets(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A device, or a YAML file of your own.")] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> Job:
    """List the devices; with NAME every figure of one, its unit, range and source. The word show can be left out."""
    terminal = terminal_for(as_json, verbose, quiet, no_color)

    def work() -> None:
        from efficli.target import load_target, target_names
        from efficli.target import table as lines

        if name is not None:
            target = load_target(name)
            if terminal.as_json:
                terminal.data({"schema_version": 1, "command": "targets", "target": lines.to_json(target)})
                return
            terminal.table(*lines.detail(target), is_data=True)
            terminal.prose(["", *lines.facts(target), "", *lines.sources(target)])
            return
        known = [load_target(one) for one in target_names()]
        if terminal.as_json:
            values = [lines.to_json(target) for target in known]
            terminal.data({"schema_version": 1, "command": "targets", "targets": values})
            return
        for table in lines.overview(known):
            terminal.table(*table, is_data=True)
            terminal.text("\n")
        terminal.prose(lines.overview_notes(known))

    return Job(terminal, work)


@targets_app.command(
    "probe",
    epilog="""
Examples:
  efficli targets probe -o my-board.yaml
  efficli targets probe --quick""",
)
def probe_this_machine(
    output: Annotated[
        Path | None, option("--output", "-o", metavar="FILE.yaml", panel=RUN, about="Write it there, not to stdout.")
    ] = None,
    no_decode: Annotated[
        bool, option("--quick", panel=RUN, about="Memory only: the speed of llama.cpp is an estimate.")
    ] = False,
    force: Annotated[bool, option("--force", panel=RUN, about="Replace FILE.yaml.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> Job:
    """Measure this machine and write its profile: cores, instruction set, memory, its speed, and that of llama.cpp.

    Close other programs first: what they use is missing in the figures. Takes seconds; on a small board, minutes.
    """
    terminal = terminal_for(as_json, verbose, quiet, no_color)

    def work() -> None:
        from efficli.pipeline.targets import probe_target

        found = probe_target(output, quick=no_decode, force=force, progress=terminal)
        if terminal.as_json:
            terminal.data(found.to_json())
        else:
            terminal.text(f"{found.output}\n" if found.output else found.text)

    return Job(terminal, work)
