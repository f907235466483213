"""Results as a person reads them: which table shows what. With --json the same results as one object."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from efficli.bench.certificate_table import table as certificate_lines
from efficli.console import Terminal, size

if TYPE_CHECKING:
    from efficli.bench.quality import Certificate
    from efficli.pipeline import ExportedFile, ExportResult, Tried

Table = tuple[str, Sequence[str], list[list[str]]]
"""Title, headings, rows."""


def show_export(terminal: Terminal, result: ExportResult) -> None:
    """Sizes, quality and what differs from what was asked on stderr; the paths of the files on stdout."""
    if terminal.as_json:
        terminal.data(result.to_json())
        return
    for title, columns, rows in export_tables(result):
        terminal.table(title, columns, rows)
    for file in result.files:
        terminal.text(f"{result.output / file.name}\n")


def export_tables(result: ExportResult) -> Iterator[Table]:
    """The files, what could not take its type, and the certificates."""
    title = f"{'Would write' if result.dry_run else 'Wrote'} {result.output} from {result.model}"
    yield title, ("file", "type", "size", "bits/weight"), [_file(file) for file in result.files]
    fallbacks = Counter((file.type, f.wanted, f.columns, f.got) for file in result.files for f in file.fallbacks)
    if fallbacks:
        rows = [[type, wanted, got, str(cols), str(n)] for (type, wanted, cols, got), n in sorted(fallbacks.items())]
        title = "Tensors whose rows do not fill the blocks of their type"
        yield title, ("type", "should be", "is", "row length", "tensors"), rows
    measured = [file for file in result.files if file.certificate is not None]
    if len(measured) == 1:
        certificate = _certificate(measured[0])
        yield _title(certificate), *certificate.table()
    elif measured:
        totals = [(file.type, _certificate(file).total) for file in measured if _certificate(file).rows]
        if totals:
            yield _title(_certificate(measured[0])), *certificate_lines([(t, r.n, r.figures) for t, r in totals])


def _file(file: ExportedFile) -> list[str]:
    return [file.name, file.type, size(file.nbytes), f"{file.bits_per_weight:.2f}"]


def _certificate(file: ExportedFile) -> Certificate:
    if file.certificate is None:
        raise ValueError(f"{file.name} was not measured")
    return file.certificate


def _title(certificate: Certificate) -> str:
    if certificate.status != "measured":
        return f"Certificate: {certificate.status}"
    return f"Certificate against {certificate.origin} ({certificate.base_runtime})"


@contextlib.contextmanager
def side_by_side(terminal: Terminal, prompt: str, names: Sequence[str]) -> Iterator[Callable[[str, str], None]]:
    """A `write(side, piece)` that shows text as it comes: one side as plain text, two beside each other."""
    if terminal.as_json:
        yield lambda side, piece: None
    elif len(names) == 1:
        ahead = [prompt]  # shown with the first piece: a model that cannot be run shows nothing but its error

        def write_one(side: str, piece: str) -> None:
            terminal.text((ahead.pop() if ahead else "") + piece)

        yield write_one
        write_one(names[0], "\n")
    else:
        with terminal.columns(names) as write:
            heads = dict.fromkeys(("artifact", "base"), prompt)

            def write_two(side: str, piece: str) -> None:
                write(int(side == "base"), heads.pop(side, "") + piece)

            yield write_two


def show_try(terminal: Terminal, tried: Tried) -> None:
    """With --json, all of it; otherwise only why a side stopped early: the text has been shown."""
    if terminal.as_json:
        terminal.data(tried.to_json())
        return
    for side, completion in tried.completions.items():
        if completion.stopped != "length":
            terminal.note(f"{tried.names[side]} stopped at its {completion.stopped}")
