"""A run's gates for programs that show them: Markdown for the summary of a CI step, JUnit XML for its tests."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from efficli.bench.certificate_table import table
from efficli.bench.quality import Certificate
from efficli.errors import EffiError, OutputError, UsageError
from efficli.ops.byte_size import binary_bytes
from efficli.ops.storage import replace_file, writing
from efficli.pipeline.fits import TARGET_COLUMNS
from efficli.pipeline.result import ExportResult
from efficli.progress import Progress

STEP_SUMMARY = "GITHUB_STEP_SUMMARY"
"""Names the file that all commands of a CI step append to, on GitHub, Gitea and Forgejo."""

_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold, not even escaped."""
_MARKUP = re.compile(r"[|\\`*<>\[\]&~$]|(?<![^\W_])_|_(?![^\W_])")
"""What Markdown would not show as it is; an underscore between letters it does."""


@dataclass(frozen=True, slots=True)
class Ending:
    """What ended a run that did not come to its end."""

    line: str
    kind: str
    hint: str | None = None
    error: BaseException | None = None


UNENDED = Ending("the run has not ended: it was killed, or is still under way", "Unended")


@contextmanager
def write_reports(
    summary_file: str | os.PathLike[str] | None,
    junit_file: str | os.PathLike[str] | None,
    *,
    output: Path,
    progress: Progress,
) -> Iterator[Callable[[ExportResult], None]]:
    """Write the reports when the block ends, however it ends; the block tells what it knows of the result.

    From the start on the files say that the run has not ended, so that one which is killed leaves no older report
    behind; a file that cannot be written is an OutputError before the block. What several programs write to is appended
    to: the file that GITHUB_STEP_SUMMARY names, pipes and devices. `output` is the artifact, which holds no report.
    """
    reports = [(Path(path), make) for path, make in ((summary_file, summary), (junit_file, junit)) if path is not None]
    _check_places([path for path, _ in reports], output)
    for path, make in reports:
        _begin(path, make(None, UNENDED))
    known: list[ExportResult] = []
    ending: Ending | None = None
    try:
        yield known.append
    except BaseException as error:
        ending = _ending(error)
        raise
    finally:
        for path, make in reports:
            try:
                _write(path, make(known[-1] if known else None, ending))
            except OutputError as error:
                if ending is None:
                    raise OutputError(error.message, hint=f"the run is done, and in {output}") from error
                progress.note(error.line)


def _check_places(paths: Sequence[Path], output: Path) -> None:
    for path in paths:
        with writing(path):
            is_folder, has_folder = _is(path, stat.S_ISDIR), _is(path.parent, stat.S_ISDIR)
        if is_folder:
            raise OutputError("this is a folder, expected the name of a file", where=str(path))
        if not has_folder:
            raise OutputError(f"no such folder: {path.parent}", where=str(path), hint=f"mkdir -p {path.parent}")
        if output.resolve() in path.resolve().parents:
            raise UsageError(
                "a report inside the artifact, which appears as a whole and is hashed",
                where=str(path),
                hint="write it beside the artifact",
            )
    if len(paths) == 2 and paths[0].resolve() == paths[1].resolve():
        raise UsageError("--summary and --junit are the same file", where=str(paths[0]))


def _is(path: Path, kind: Callable[[int], bool]) -> bool:
    """Whether there is something of this kind; OSError where that cannot be known."""
    try:
        return kind(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _begin(path: Path, content: bytes) -> None:
    """Write a first report, or see that one can be appended."""
    if not _is_shared(path):
        _write(path, content)
    elif not path.is_fifo():  # opening one waits for its reader
        with writing(path), path.open("ab"):
            pass


def _write(path: Path, content: bytes) -> None:
    if _is_shared(path):
        with writing(path), path.open("ab") as file:
            # what was there before may end within a line; XML is not written behind anything
            file.write(b"\n" + content if _is_of_step(path) and file.tell() else content)
    else:
        replace_file(path.resolve(), content)


def _is_shared(path: Path) -> bool:
    """Whether a file is one that others write to, too: it cannot be replaced then."""
    return _is_of_step(path) or path.absolute().parts[1] in ("dev", "proc") or (path.exists() and not path.is_file())


def _is_of_step(path: Path) -> bool:
    named = os.environ.get(STEP_SUMMARY)
    return bool(named) and Path(str(named)).resolve() == path.resolve()


def _ending(error: BaseException) -> Ending:
    if isinstance(error, EffiError):
        return Ending(error.line, type(error).__name__, error.hint, error)
    if isinstance(error, KeyboardInterrupt):
        return Ending("interrupted", "Interrupted", None, error)
    return Ending(f"a bug of efficli: {type(error).__name__}: {error}", type(error).__name__, None, error)


def summary(result: ExportResult | None, ending: Ending | None) -> bytes:
    """What ended the run if it did not come to its end, then files, targets, gates and certificates as Markdown."""
    lines = [f"## efficli: {_title(result)}", ""]
    if ending is not None:
        lines += [f"**error:** {_cell(ending.line)}", ""]
        lines += [f"hint: {_cell(ending.hint)}", ""] if ending.hint else []
    if result is not None and result.command == "rehearse":
        lines += _table(("step", "of"), [[step.kind, step.what] for step in result.steps])
    elif result is not None:
        files = [[f.name, f.type, binary_bytes(f.nbytes), f"{f.bits_per_weight:.2f}"] for f in result.files]
        lines += _table(("file", "type", "size", "bits per weight"), files)
        lines += _table(TARGET_COLUMNS, [list(target["cells"]) for target in result.targets])
        gates = [[gate.gate, gate.file, gate.words, "met" if gate.met else "not met"] for gate in result.gates]
        table_of_gates = _table(("gate", "file", "found", ""), gates)
        lines += [re.sub(r"\| not met \|$", "| **not met** |", line) for line in table_of_gates]
        for file in result.files:
            lines += _certificate(file.name, file.certificate)
    return ("\n".join(lines).rstrip("\n") + "\n").encode("utf-8", "replace")


def junit(result: ExportResult | None, ending: Ending | None) -> bytes:
    """The gates as a JUnit test suite: one case a gate and file, and one for the run itself."""
    gates = result.gates if result is not None else ()
    unmet = [gate for gate in gates if not gate.met]
    broken = ending is not None and not any(gate.error is ending.error for gate in unmet)
    seconds = f"{sum(step.seconds for step in result.steps) if result else 0:.3f}"
    suite = ElementTree.Element(
        "testsuite",
        name="efficli",
        tests=str(len(gates) + 1),
        failures=str(len(unmet)),
        errors=str(int(broken)),
        skipped="0",
        time=seconds,
        timestamp=time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()),
    )
    run = ElementTree.SubElement(
        suite, "testcase", classname=_text(_title(result, plain=True)), name="run", time=seconds
    )
    if broken and ending is not None:
        told = ElementTree.SubElement(run, "error", message=_text(ending.line), type=ending.kind)
        told.text = _text(ending.hint or "")
    for gate in gates:
        case = ElementTree.SubElement(suite, "testcase", classname=_text(gate.file), name=gate.gate, time="0.000")
        if gate.error is not None:
            failed = ElementTree.SubElement(case, "failure", message=_text(gate.words), type=type(gate.error).__name__)
            failed.text = _text(f"limit {gate.limit:g}, found {'nothing' if gate.found is None else gate.found}")
        else:
            ElementTree.SubElement(case, "system-out").text = _text(gate.words)
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def _title(result: ExportResult | None, *, plain: bool = False) -> str:
    if result is None:
        return "the recipe"
    name = result.model if plain else _cell(result.model)
    if result.command == "rehearse":
        return f"rehearsal of {name}"
    return f"{name}, not run: as predicted" if result.dry_run else name


def _certificate(name: str, found: Certificate | None) -> list[str]:
    if found is None:
        return []
    if not found.rows:
        return [f"Certificate of {_cell(name)}: {_cell(found.status)}", ""]
    head, lines = table([(row.text, row.n, row.figures) for row in found.rows])
    return [f"### Certificate of {_cell(name)} against {_cell(str(found.origin))}", "", *_table(head, lines)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table and an empty one; no lines without rows. Columns of numbers are on the right."""
    if not rows:
        return []
    right = [all(row[i][:1].isdigit() for row in rows if row[i]) for i in range(len(head))]
    rule = "|" + "|".join("--:" if number else "---" for number in right) + "|"
    return [_row(head), rule, *map(_row, rows), ""]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    """Text on one line of Markdown that is shown as it is."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(_text(text).split()))


def _text(text: str) -> str:
    return _NO_XML.sub("\ufffd", text)
