"""Writes docs/cli.md from the help texts; `--check` fails where the page and the program differ."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
HEAD = """# Commands

Generated from the help texts by `make docs`; `make lint` fails where the two differ.
"""


def page() -> str:
    """The text of docs/cli.md."""
    # for the length of this call: a test that runs it must not leave its own terminal to the next one
    with mock.patch.dict(os.environ, COLUMNS="100", TERM="dumb", NO_COLOR="1", TERMINAL_WIDTH="100"):
        return _page()


def _page() -> str:
    import typer.main

    from efficli.cli import app

    return "\n".join([HEAD, *_sections(typer.main.get_command(app), "efficli")])


def _sections(command: object, name: str) -> Iterator[str]:
    """The help of a command, and of those inside it."""
    yield _section(command, name)
    for word, inner in sorted(getattr(command, "commands", {}).items()):
        yield from _sections(inner, f"{name} {word}")


def _section(command: object, name: str) -> str:
    import contextlib
    import io

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        command.main(["--help"], prog_name=name, standalone_mode=False)  # type: ignore[attr-defined]
    lines = [line.rstrip() for line in shown.getvalue().strip("\n").splitlines()]
    return f"## `{name}`\n\n```text\n" + "\n".join(lines).strip("\n") + "\n```\n"


if __name__ == "__main__":
    text = page()
    if "--check" not in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit(f"{PAGE.name} is not what the help texts say: make docs")
