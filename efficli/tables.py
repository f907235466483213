"""Results as a person reads them: which table shows what. Reads the same JSON that --json prints."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from efficli.console import Terminal, size

Values = Mapping[str, Any]


class Result(Protocol):
    """What a public function returns."""

    def to_json(self) -> dict[str, Any]:
        """Everything that it found out, in JSON's own types."""


def show_export(terminal: Terminal, result: Result) -> None:
    """Sizes, quality and what differs from what was asked on stderr; the paths of the files on stdout."""
    values = result.to_json()
    if terminal.as_json:
        terminal.data(values)
        return
    files = values["files"]
    title = "Would write" if values["dry_run"] else "Wrote"
    terminal.table(f"{title} {values['artifact']}", ("file", "type", "size", "bits/weight"), [_file(f) for f in files])
    certified = [f for f in files if f.get("certificate")]
    for name, columns, rows in certificate_tables(certified):
        terminal.table(name, columns, rows)
    fallbacks = Counter((f["type"], b["wanted"], b["got"]) for f in files for b in f["fallbacks"])
    if fallbacks:
        rows = [(type, wanted, got, str(count)) for (type, wanted, got), count in sorted(fallbacks.items())]
        terminal.table("Tensors that could not take their type", ("file", "asked", "has", "tensors"), rows)
    for file in files:
        terminal.text(f"{file['path']}\n")


def _file(file: Values) -> tuple[str, str, str, str]:
    name = str(file["path"]).rpartition("/")[2]
    return name, file["type"], size(file["bytes"]), f"{file['bits_per_weight']:.2f}"


def certificate_tables(files: list[Values]) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Title, columns and rows of the certificates: one table, a row a file."""
    return iter(())


@contextlib.contextmanager
def side_by_side(terminal: Terminal, num_columns: int) -> Iterator[Callable[[int, str], None]]:
    """A `write(column, piece)` that shows text as it comes: one column as plain text, two beside each other.

    With two columns, where stdout is no terminal, nothing is shown before `show_try`.
    """
    if terminal.as_json:
        yield lambda column, piece: None
    elif num_columns == 1:
        yield lambda column, piece: terminal.text(piece)
    else:
        with terminal.columns(("artifact", "base")) as write:
            yield write


def show_try(terminal: Terminal, result: Result) -> None:
    """What is left to say after the text itself: the speed, and with --json everything."""
    values = result.to_json()
    if terminal.as_json:
        terminal.data(values)
        return
    columns = values["columns"]
    if len(columns) == 1:
        terminal.text("\n")
    elif not terminal.draws_columns:
        for column in columns:
            terminal.text(f"--- {column['name']}\n{column['text']}\n")
    for column in columns:
        terminal.remark(f"{column['name']}: {column['tokens']} tokens, {column['tokens_per_s']:.1f} tokens/s")
