"""A run's gates for programs that show them: Markdown for the summary of a CI step, JUnit XML for its tests."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

from efficli.bench.certificate_table import table
from efficli.errors import EffiError
from efficli.ops.byte_size import binary_bytes
from efficli.ops.storage import replace_file
from efficli.pipeline.result import ExportResult

_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold, not even escaped."""


@contextmanager
def write_reports(
    summary_file: str | os.PathLike[str] | None, junit_file: str | os.PathLike[str] | None
) -> Iterator[Callable[[ExportResult], None]]:
    """Write the reports when the block ends, however it ends; the block tells what it knows of the result."""
    known: list[ExportResult] = []
    failed: EffiError | None = None
    try:
        yield known.append
    except EffiError as error:
        failed = error
        raise
    finally:
        result = known[-1] if known else None
        if summary_file is not None:
            replace_file(Path(summary_file), summary(result, failed).encode("utf-8", "replace"))
        if junit_file is not None:
            replace_file(Path(junit_file), junit(result, failed))


def summary(result: ExportResult | None, error: EffiError | None) -> str:
    """Files, gates and certificates as Markdown; or what ended the run before it had any."""
    lines = [f"## efficli: {_model(result)}", ""]
    if result is not None:
        lines += ["| file | type | size | bits per weight |", "|---|---|--:|--:|"]
        lines += [
            f"| {_cell(file.name)} | {file.type} | {binary_bytes(file.nbytes)} | {file.bits_per_weight:.2f} |"
            for file in result.files
        ]
        if result.gates:
            lines += ["", "| gate | file | found | |", "|---|---|---|---|"]
            lines += [
                f"| {gate.gate} | {_cell(gate.file)} | {_cell(gate.words)} | {'met' if gate.met else '**not met**'} |"
                for gate in result.gates
            ]
        for file in result.files:
            if file.certificate is not None and file.certificate.rows:
                head, *rows = _certificate(file.certificate.rows)
                title = f"Certificate of {_cell(file.name)} against {_cell(str(file.certificate.origin))}"
                lines += ["", f"### {title}", "", _row(head), _row(["---"] * len(head)), *map(_row, rows)]
    if error is not None:
        lines += ["", f"**error:** {_cell(error.line)}"]
        lines += [f"hint: {_cell(error.hint)}"] if error.hint else []
    return "\n".join(lines) + "\n"


def junit(result: ExportResult | None, error: EffiError | None) -> bytes:
    """The gates as a JUnit test suite: one case a gate and file, and one for the run itself."""
    gates = result.gates if result is not None else ()
    unmet = [gate for gate in gates if not gate.met]
    broken = error is not None and not any(gate.error is error for gate in gates)
    suite = ElementTree.Element(
        "testsuite",
        name="efficli",
        tests=str(len(gates) + 1),
        failures=str(len(unmet)),
        errors=str(int(broken)),
        skipped="0",
        time=f"{sum(result.seconds.values()) if result else 0:.3f}",
    )
    run = ElementTree.SubElement(suite, "testcase", classname=_text(_model(result)), name="run")
    if broken and error is not None:
        told = ElementTree.SubElement(run, "error", message=_text(error.line), type=type(error).__name__)
        told.text = _text(error.hint or "")
    for gate in gates:
        case = ElementTree.SubElement(suite, "testcase", classname=_text(gate.file), name=gate.gate)
        if gate.error is not None:
            failed = ElementTree.SubElement(case, "failure", message=_text(gate.words), type=type(gate.error).__name__)
            failed.text = _text(f"limit {gate.limit:g}, found {gate.found}")
        else:
            ElementTree.SubElement(case, "system-out").text = _text(gate.words)
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def _model(result: ExportResult | None) -> str:
    return "the recipe" if result is None else result.model


def _certificate(rows: object) -> list[list[str]]:
    head, lines = table([(row.text, row.n, row.figures) for row in rows])  # type: ignore[attr-defined]
    return [list(head), *lines]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    """Text within a Markdown table: no bars, no line ends, no markup."""
    return re.sub(r"([|\\`*_<>\[\]])", r"\\\1", " ".join(_text(text).split()))


def _text(text: str) -> str:
    return _NO_XML.sub("\ufffd", text)
