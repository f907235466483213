"""The application: what every command line goes through, and the one place where failures become lines."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from efficli import __version__
from efficli.console import Terminal
from efficli.errors import EffiError
from efficli.interrupt import fill_closed_streams, guard, writing_stdout

app = typer.Typer(
    name="efficli",
    help="Turns Hugging Face checkpoints into small files that stock runtimes load, and says what that cost.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@dataclass(frozen=True, slots=True)
class Job:
    """What a command line asks for. Runs after Typer has returned: inside, Typer hides interrupts and closed pipes."""

    terminal: Terminal
    work: Callable[[], int | None]
    """Returns the exit code if it is not 0."""


@app.callback(
    invoke_without_command=True,
    epilog="""
Examples:
  efficli plan reference --target pi5-8gb
  efficli export reference -o out --type Q4_K_M
  efficli inspect out
  efficli bench out --scenario chat
  efficli try out --base reference -p "def read_lines(path):"

Exit codes:
  0 done  1 you can fix it  2 usage  3 a gate was not met  4 does not fit
  5 unsupported, or an extra is missing  6 refused: integrity or security
  70 a bug of efficli  130 interrupted""",
)
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"efficli {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; every failure is turned into its line here, and only here."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    fill_closed_streams()
    terminal = Terminal(as_json="--json" in argv)

    def body() -> int:
        nonlocal terminal
        with writing_stdout():
            parsed = app(argv, prog_name="efficli", standalone_mode=False)
        if not isinstance(parsed, Job):
            return int(parsed or 0)  # help, version, completion
        terminal = parsed.terminal
        return parsed.work() or 0

    try:
        return guard(body, lambda line: terminal.interrupted(line))
    except typer.TyperException as error:
        return _usage(error, terminal)
    except EffiError as error:
        terminal.failure(error)
        return error.exit_code
    except Exception:  # noqa: BLE001 - the one place where a bug is told from a user's mistake
        if sys.stderr:
            traceback.print_exc()
        terminal.error(
            "this is a bug of efficli", code=70, hint="report it with the lines above and `efficli --version`"
        )
        return 70


def _usage(error: typer.TyperException, terminal: Terminal) -> int:
    """A command line that Typer could not parse, in the form of every other error."""
    message, near, names = " ".join(error.format_message().split()).partition(" Did you mean ")
    message = message[:1].lower() + message[1:].removesuffix(".")
    command = getattr(getattr(error, "ctx", None), "command_path", "efficli")
    terminal.error(message, code=error.exit_code, hint=f"did you mean {names}" if near else f"{command} --help")
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
