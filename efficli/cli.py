"""The command line: signatures and help only. Each command calls one public function and prints what it says."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from efficli import __version__
from efficli.console import Terminal
from efficli.errors import EffiError, UsageError
from efficli.interrupt import fill_closed_streams, guard

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
    work: Callable[[], None]


_TYPES, _CHECK, _SOURCE, _RUN, _SHOW = "Types", "Certificate and gates", "Source", "Run", "Output on the terminal"

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Directory, hub id (org/name) or reference.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.", rich_help_panel=_SHOW)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also what each task took.", rich_help_panel=_SHOW)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only data and errors.", rich_help_panel=_SHOW)]
NoColor = Annotated[bool, typer.Option("--no-color", help="No colours, as with NO_COLOR.", rich_help_panel=_SHOW)]
Threads = Annotated[
    int | None,
    typer.Option("--threads", "-t", min=1, metavar="N", help="Threads; without it all cores.", rich_help_panel=_RUN),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Take a model that names code of its own; none is run.", rich_help_panel=_SOURCE
    ),
]
Base = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Compare with this model, not with the origin.", rich_help_panel=_CHECK),
]


def _option(*names: str, panel: str, about: str, metavar: str | None = None) -> typer.models.OptionInfo:
    """An option with the sentence that help and docs/cli.md show."""
    option: typer.models.OptionInfo = typer.Option(*names, metavar=metavar, help=about, rich_help_panel=panel)
    return option


@app.callback(
    invoke_without_command=True,
    epilog="""
Examples:
  efficli export reference -o out --type Q4_K_M
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


@app.command(
    epilog="""
Examples:
  efficli export reference -o out --type Q4_K_M
  efficli export ./SmolLM2-135M -o out --type Q8_0,Q4_K_M --imatrix auto
  efficli export org/name --revision v1.0 -o out --type Q4_0 --tensor-type 'attn_v=Q6_K'
  efficli export reference -o out --type Q3_K_M --min-top1 0.9 && echo close enough
  efficli export reference -o out --dry-run --json""",
)
def export(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Directory of the artifact.")],
    format: Annotated[str, typer.Option(metavar="gguf", help="File format.", rich_help_panel=_TYPES)] = "gguf",
    type: Annotated[
        str,
        _option(
            "--type", metavar="TYPE[,TYPE]", panel=_TYPES, about="Q4_K_M, Q8_0, IQ4_NL, F16 ...; several in one read."
        ),
    ] = "Q4_K_M",
    imatrix: Annotated[
        str | None,
        typer.Option(metavar="FILE|auto", help="Importance matrix: a file, or computed now.", rich_help_panel=_TYPES),
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        _option(
            "--tensor-type", metavar="REGEX=TYPE", panel=_TYPES, about="Type of the tensors that match; repeatable."
        ),
    ] = None,
    output_tensor_type: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Type of output.weight.", rich_help_panel=_TYPES)
    ] = None,
    token_embedding_type: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Type of token_embd.weight.", rich_help_panel=_TYPES)
    ] = None,
    pure: Annotated[bool, _option("--pure", panel=_TYPES, about="One type for all tensors, no mixture.")] = False,
    allow_non_ternary: Annotated[
        bool, _option("--allow-non-ternary", panel=_TYPES, about="Ternary type from weights that are not ternary.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a hub id.", rich_help_panel=_SOURCE)
    ] = None,
    pre_tokenizer: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="llama.cpp's name, if not recognised.", rich_help_panel=_SOURCE),
    ] = None,
    trust_remote_code: Trust = False,
    base: Base = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text to measure on; else the slice in efficli.", rich_help_panel=_CHECK),
    ] = None,
    ctx_size: Annotated[
        int, typer.Option("--ctx-size", "-c", min=2, metavar="N", help="Tokens of a window.", rich_help_panel=_CHECK)
    ] = 512,
    max_kld: Annotated[
        float | None,
        typer.Option(min=0, metavar="X", help="Exit 3 if the mean KL divergence is above.", rich_help_panel=_CHECK),
    ] = None,
    min_top1: Annotated[
        float | None,
        typer.Option(
            "--min-top1", min=0, max=1, metavar="X", help="Exit 3 if top-1 agreement is below.", rich_help_panel=_CHECK
        ),
    ] = None,
    no_certificate: Annotated[
        bool, _option("--no-certificate", panel=_CHECK, about="Load the file, but measure nothing.")
    ] = False,
    strict: Annotated[
        bool, _option("--strict", panel=_CHECK, about="Fallbacks and an absent origin are errors.")
    ] = False,
    threads: Threads = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of what is drawn.", rich_help_panel=_RUN)] = 0,
    force: Annotated[bool, _option("--force", panel=_RUN, about="Replace what is in DIR.")] = False,
    dry_run: Annotated[bool, _option("--dry-run", panel=_RUN, about="Say what would be written, how large.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> Job:
    """Write a checkpoint as GGUF, load the file, and measure how far it is from its origin."""
    terminal = _terminal(as_json, verbose, quiet, no_color)

    def work() -> None:
        from efficli import pipeline, tables

        result = pipeline.export(
            model,
            output,
            format=format,
            types=tuple(part.strip() for part in type.split(",") if part.strip()),
            imatrix=imatrix,
            tensor_types=tuple(_override(word) for word in tensor_type or ()),
            output_tensor_type=output_tensor_type,
            token_embedding_type=token_embedding_type,
            pure=pure,
            pre_tokenizer=pre_tokenizer,
            allow_non_ternary=allow_non_ternary,
            revision=revision,
            trust_remote_code=trust_remote_code,
            base=base,
            text=text,
            ctx=ctx_size,
            max_kld=max_kld,
            min_top1=min_top1,
            certificate=not no_certificate,
            strict=strict,
            threads=threads,
            seed=seed,
            force=force,
            dry_run=dry_run,
            progress=terminal,
        )
        tables.show_export(terminal, result)

    return Job(terminal, work)


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
    terminal = _terminal(as_json, verbose, quiet, no_color)

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


def _terminal(as_json: bool, verbose: bool, quiet: bool, no_color: bool) -> Terminal:
    return Terminal(as_json=as_json, verbosity=-1 if quiet else int(verbose), color=not no_color)


def _override(word: str) -> tuple[str, str]:
    """`REGEX=TYPE`, cut at the last `=`."""
    pattern, equals, type = word.rpartition("=")
    if not (pattern and equals and type):
        raise UsageError(f"--tensor-type {word!r}, expected REGEX=TYPE", hint="--tensor-type 'attn_v=Q6_K'")
    return pattern, type


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; every failure is turned into its line here, and only here."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    fill_closed_streams()
    terminal = Terminal(as_json="--json" in argv)

    def body() -> int:
        nonlocal terminal
        parsed = app(argv, prog_name="efficli", standalone_mode=False)
        if not isinstance(parsed, Job):
            return int(parsed or 0)  # help, version, completion
        terminal = parsed.terminal
        parsed.work()
        return 0

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
