"""Results as a person reads them: which table shows what. With --json the same results as one object."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from efficli.bench.certificate_table import table as certificate_lines
from efficli.bench.chart import draw
from efficli.bench.failure import Failure
from efficli.bench.markdown import to_markdown
from efficli.bench.report_table import footnotes, report_tables
from efficli.bench.rows import to_csv, to_jsonl
from efficli.bench.wording import conditions, cut_names, test_words
from efficli.console import Terminal
from efficli.errors import EffiError, MissingExtra, OutputError, SecurityError, UsageError
from efficli.inspection import report_table as inspected
from efficli.interrupt import discard
from efficli.ops.byte_size import binary_bytes
from efficli.pipeline.fits import TARGET_COLUMNS
from efficli.pipeline.result import ExportResult

if TYPE_CHECKING:
    from efficli.bench.figures import ArtifactResult
    from efficli.bench.quality import Certificate
    from efficli.inspection import Inspection
    from efficli.pipeline import BenchResult, CompressResult, ExportedFile, Tried
    from efficli.pipeline.steps import StepRun

_NAME_WIDTH = 16
"""Columns that a file's name has in the tables below the one that gives it in full."""
_FEW_CHANGES = 3
"""More than so many, and it is another model."""

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


def show_run(terminal: Terminal, result: ExportResult) -> None:
    """As an export, and the steps as they went or would go, what targets do with the files, and the gates."""
    if terminal.as_json:
        terminal.data(result.to_json())
        return
    rehearsed = result.command == "rehearse"
    if not rehearsed:
        for title, columns, rows in export_tables(result):
            terminal.table(title, columns, rows)
    short = cut_names((file.name for file in result.files), _NAME_WIDTH)

    def named(text: str) -> str:
        return ", ".join(short.get(name, name) for name in text.split(", "))

    if result.targets:
        cells = [[named(cell) for cell in row["cells"]] for row in result.targets]
        terminal.table("Targets (predicted)", TARGET_COLUMNS, cells)
    if result.bench is not None and not rehearsed:
        for title, columns, rows in report_tables(result.bench):
            terminal.table(title, columns, rows)
    if result.gates:
        rows = [[gate.gate, named(gate.file), gate.words, "met" if gate.met else "not met"] for gate in result.gates]
        terminal.table("Gates", ("gate", "file", "found", ""), rows)
    title = "Steps (predicted)" if result.dry_run else f"Rehearsal of {result.model}" if rehearsed else "Steps"
    rows = [[step.kind, named(step.what), "from the cache" if step.cached else _seconds(step)] for step in result.steps]
    terminal.table(title, ("step", "of", "time"), rows)
    for step in result.steps:
        if 0 < len(step.changed) <= _FEW_CHANGES and "input" not in step.changed:
            terminal.note(f"{step.kind} of {step.what} anew: what is kept differs in {', '.join(step.changed)}")
    if rehearsed:
        terminal.note("every step ran on a random clone of two layers; nothing was kept")
        return
    for file in result.files:
        terminal.text(f"{result.output / file.name}\n")


def show_compressed(terminal: Terminal, result: CompressResult | ExportResult) -> None:
    """The checkpoint, the file that it stands for, and its pass; with --export the artifact as `run` shows it."""
    if isinstance(result, ExportResult):
        (show_export if result.dry_run else show_run)(terminal, result)
        return
    if terminal.as_json:
        terminal.data(result.to_json())
        return
    title = f"{'Would write' if result.dry_run else 'Wrote'} {result.output} from {result.model}"
    file = result.file
    columns = ("method", "weights", "size as GGUF", "bits/weight")
    row = [result.method, binary_bytes(result.nbytes), *(() if file is None else _file(file)[2:])]
    terminal.table(title, columns[: len(row)], [row])
    if file is not None:
        terminal.table(*_types(file))
    rows = [[step.what, "from the cache" if step.cached else _seconds(step)] for step in result.steps]
    if rows:
        terminal.table("Steps", ("pass", "time"), rows)
    terminal.text(f"{result.output}\n")


def _seconds(step: StepRun) -> str:
    seconds = step.seconds
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def export_tables(result: ExportResult) -> Iterator[Table]:
    """The files, what could not take its type, and the certificates."""
    title = f"{'Would write' if result.dry_run else 'Wrote'} {result.output} from {result.model}"
    yield title, ("file", "type", "size", "bits/weight"), [_file(file) for file in result.files]
    yield from (_types(file) for file in result.files if file.groups)
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


def _types(file: ExportedFile) -> Table:
    """The types of a file in which every tensor has its own."""
    rows = [
        [one.group, one.type, str(one.tensors), binary_bytes(one.nbytes), "" if one.loss is None else f"{one.loss:.2g}"]
        for one in file.groups
    ]
    columns = ("tensors", "type", "number", "size", "predicted loss")
    told = any(one.loss is not None for one in file.groups)
    return ("Types", columns, rows) if told else ("Types", columns[:-1], [row[:-1] for row in rows])


def _file(file: ExportedFile) -> list[str]:
    return [file.name, file.type, binary_bytes(file.nbytes), f"{file.bits_per_weight:.2f}"]


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


def show_inspection(terminal: Terminal, found: Inspection) -> None:
    """Each model: its tensors, what differs, what was checked; findings last, on stderr too where they are refusals."""
    if terminal.as_json:
        terminal.data(found.to_json())
        return
    for model in found.models:
        title, columns, rows = inspected.group_table(model)
        terminal.table(title, columns, rows, is_data=True)
        terminal.text("\n")
        terminal.prose([inspected.facts_line(model)])
        terminal.text("\n")
        if table := inspected.fallback_table(model):
            terminal.table(*table, is_data=True)
            terminal.text("\n")
        terminal.prose(inspected.check_lines(model.checks), indent=26)
        terminal.text("\n")
    if found.checks:
        terminal.prose(inspected.check_lines(found.checks), indent=26)
        terminal.text("\n")
    terminal.prose([inspected.verdict(found)])
    terminal.prose(inspected.finding_lines(found.all_findings), indent=4)
    for finding in found.all_findings:
        if finding.code == SecurityError.exit_code:
            terminal.complaint(finding.line, finding.hint)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchView:
    """How the result of `bench` is shown: tables on stdout, or one of the forms that programs read."""

    terminal: Terminal
    csv: bool
    jsonl: bool
    markdown: bool
    chart: Path | None
    force: bool

    def check(self) -> None:
        """Before anything runs: one form only, and a place for the chart."""
        forms = {"--json": self.terminal.as_json, "--csv": self.csv, "--jsonl": self.jsonl, "--markdown": self.markdown}
        chosen = [name for name, is_on in forms.items() if is_on]
        if len(chosen) > 1:
            raise UsageError(f"{' and '.join(chosen)} both write to stdout, expected one of them")
        if self.chart is not None:
            self._check_chart(self.chart)

    def _check_chart(self, path: Path) -> None:
        if path.suffix.lower() != ".png":
            raise UsageError(f"--chart {path}, expected a name that ends in .png")
        if not path.parent.is_dir():
            raise OutputError("no such directory", where=str(path.parent))
        if path.exists() and not self.force:
            raise OutputError("exists", where=str(path), hint="--force replaces it")
        if find_spec("matplotlib") is None:
            raise MissingExtra("matplotlib", "plot")

    def interrupted(self, result: BenchResult) -> bool:
        """Show what there is, and what had failed; whether anything was measured."""
        self.terminal.finish()
        measured = any(artifact.is_measured for artifact in result.artifacts)
        if measured:
            self._show(result)
            if self.chart is not None:
                self.terminal.note(f"{self.chart} was not drawn: a chart is of a whole run")
        self._complain(failure for artifact in result.artifacts for failure in artifact.failures)
        return measured

    def finished(self, result: BenchResult, *, dry_run: bool) -> int:
        """Show the result, and each failure on stderr; the exit code is that of the first failure."""
        failures = [failure for artifact in result.artifacts for failure in artifact.failures]
        if dry_run:
            self._show_plan(result)
        else:
            try:
                self._show(result)
            except BrokenPipeError:  # nobody reads on, but what failed still has its line and its exit code
                discard(1)
            if self.chart is not None and not (failures and not any(artifact.tests for artifact in result.artifacts)):
                failures += self._draw(result, self.chart)
            if left_out := self._left_out(result):
                self.terminal.note(left_out)
        self._complain(failures)
        return failures[0].code if failures else 0

    def _complain(self, failures: Iterable[Failure]) -> None:
        for failure in dict.fromkeys(failures):
            self.terminal.complaint(failure.line, failure.hint, log=failure.log)

    def _left_out(self, result: BenchResult) -> str | None:
        """What was measured and has no place in lines of speed tests."""
        form = "--csv" if self.csv else "--jsonl" if self.jsonl else None
        there = {
            "starts": any(artifact.starts and not artifact.tests for artifact in result.artifacts),
            "scenarios": any(artifact.scenarios for artifact in result.artifacts),
            "ratios": bool(result.comparisons),
            "predictions": any(artifact.predictions for artifact in result.artifacts),
        }
        names = ", ".join(name for name, is_there in there.items() if is_there)
        return f"{form} has the speed tests, and not: {names}; --json has all" if form and names else None

    def _draw(self, result: BenchResult, path: Path) -> list[Failure]:
        """The chart; one that cannot be drawn is one more failure, and what was measured is on stdout by then."""
        try:
            draw(result, path)
        except EffiError as error:
            return [Failure.of(error)]
        self.terminal.note(f"the chart is {path}")
        return []

    def _show(self, result: BenchResult) -> None:
        terminal = self.terminal
        if terminal.as_json:
            terminal.data(result.to_json())
        elif not any(artifact.is_measured for artifact in result.artifacts):
            pass  # why not is on stderr
        elif self.csv:
            terminal.text(to_csv(result))
        elif self.jsonl:
            terminal.text(to_jsonl(result))
        elif self.markdown:
            terminal.text(to_markdown(result))
        else:
            for title, columns, rows in report_tables(result):
                terminal.table(title, columns, rows, is_data=True)
                terminal.text("\n")
            terminal.prose(footnotes(result))

    def _show_plan(self, result: BenchResult) -> None:
        planned = [artifact for artifact in result.artifacts if artifact.settings]
        if self.terminal.as_json:
            self.terminal.data(result.to_json())
        elif planned:
            self.terminal.prose(
                f"would measure {artifact.path}: {', '.join(_planned(artifact))}" for artifact in planned
            )
            self.terminal.prose([conditions(result)])


def _planned(artifact: ArtifactResult) -> Iterator[str]:
    if artifact.planned_starts:
        yield "cold and warm starts"
    varied = len({test.threads for test in artifact.planned}) > 1
    yield from (test_words(test, threads=varied) for test in artifact.planned)
    yield from (f"scenario {name}" for name in artifact.planned_scenarios)
