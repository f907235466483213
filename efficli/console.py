"""What a person sees: progress, notes, tables and errors on stderr; data on stdout. The only importer of rich."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TextIO

from efficli.errors import EffiError
from efficli.interrupt import discard, writing_stdout

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TaskID
    from rich.table import Table

_LEAST_NAME = 12
"""Columns that a folded name has at least."""


class Terminal:
    """Where a command writes; it is also the `efficli.progress.Progress` that long work reports to.

    `as_json`: one JSON object on stdout and no tables. `verbosity`: below 0 neither progress nor notes, above 0 also
    what each task took. A bar is drawn only where stderr is a terminal. `NO_COLOR` is honoured, and so is `color`.
    """

    def __init__(self, *, as_json: bool = False, verbosity: int = 0, color: bool = True) -> None:
        self.as_json = as_json
        self.verbosity = verbosity
        self.color = color and not os.environ.get("NO_COLOR")
        self.still = False
        """Draw a bar anew only when it moves: one that draws itself would disturb what is being measured."""
        self._console: Console | None = None
        self._bar: Bar | None = None
        self._id: TaskID | None = None
        self._task = ""
        self._begin = 0.0

    @property
    def console(self) -> Console:
        """rich's view of stderr, made when first needed: importing rich costs more than printing a line."""
        if self._console is None:
            self._console = self._console_of(sys.stderr)
        return self._console

    def _console_of(self, stream: TextIO | None) -> Console:
        from rich.console import Console

        plain = not stream or not stream.isatty()
        width = 400 if plain else None  # a file has no right margin: nothing is cut or folded
        return Console(file=stream, no_color=not self.color, width=width, highlight=False, soft_wrap=plain)

    @property
    def width(self) -> int:
        """Columns that a table on stdout may have: those of the terminal, or 80 where it is none."""
        return self._console_of(sys.stdout).width if sys.stdout and sys.stdout.isatty() else 80

    def start(self, task: str, total: float, unit: str = "") -> None:
        """Begin a task of `total` units; drawn as a bar with the time left, or, without a unit, the time gone by."""
        self.finish()
        self._task, self._begin = task, time.monotonic()
        if self.verbosity < 0 or not sys.stderr or not sys.stderr.isatty():
            return
        self._bar = _bar(total, unit, self.color, self.still)
        self._id = self._bar.add_task(task, total=total or None, unit=unit)
        self._bar.start()

    def advance(self, amount: float) -> None:
        """`amount` more units are done."""
        if self._bar is not None and self._id is not None:
            self._bar.advance(self._id, amount)
            if self.still:
                self._bar.refresh()

    def finish(self) -> None:
        """Take the bar away; with -v, say what the task took."""
        if self._bar is not None:
            self._bar.stop()
        if self._task and self.verbosity > 0:
            self._line(f"{self._task}: {time.monotonic() - self._begin:.1f} s")
        self._bar, self._id, self._task = None, None, ""

    def note(self, message: str) -> None:
        """A line that a user should read: a fallback, a warning, a decision."""
        if self.verbosity >= 0:
            self._line(f"note: {message}")

    def error(self, message: str, *, code: int, where: str | None = None, hint: str | None = None) -> None:
        """The one line of a failure on stderr, and with --json an object on stdout."""
        self.complaint(f"{where}: {message}" if where else message, hint)
        self._told({"code": code, "where": where, "message": message, "hint": hint})

    def _told(self, failure: Mapping[str, Any]) -> None:
        """A failure as an object on stdout, with --json."""
        if self.as_json:
            try:
                self.data({"error": failure})
            except BrokenPipeError:  # stderr has the line, and the exit code is the error's
                discard(1)

    def complaint(self, line: str, hint: str | None, *, log: str | None = None) -> None:
        """A failure on stderr and nowhere else: what was asked for is on stdout nonetheless."""
        self.finish()
        if log:
            self._line(log)
        self._line(f"error: {line}")
        if hint:
            self._line(f"hint: {hint}")

    def failure(self, error: EffiError) -> None:
        """An error that a user can act on; several are a line each, with their hints."""
        if not error.others:
            self.error(error.message, code=error.exit_code, where=error.where, hint=error.hint)
            return
        for one in (error, *error.others):
            self.complaint(f"{one.line}; {one.hint}" if one.hint else one.line, None)
        first, *others = [
            {"where": one.where, "message": one.message, "hint": one.hint} for one in (error, *error.others)
        ]
        self._told({"code": error.exit_code, **first, "others": others})

    def interrupted(self, line: str) -> None:
        """What became of the work when a signal stopped it."""
        self.finish()
        self._line(line)

    def data(self, values: Mapping[str, Any]) -> None:
        """One JSON object on stdout."""
        self.text(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def text(self, text: str) -> None:
        """Text on stdout as it is, at once; what its encoding lacks is escaped. A closed stdout is not an error."""
        if not sys.stdout:
            return
        encoding = sys.stdout.encoding or "utf-8"
        with writing_stdout():
            sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
            sys.stdout.flush()

    def prose(self, paragraphs: Iterable[str], indent: int = 2) -> None:
        """Sentences on stdout below a table: folded between words on a terminal, elsewhere a line each.

        Further lines of one begin `indent` columns to the right.
        """
        width = shutil.get_terminal_size().columns if sys.stdout and sys.stdout.isatty() else 0
        for words in paragraphs:
            lines = (
                textwrap.wrap(words, width, subsequent_indent=" " * indent, break_on_hyphens=False)
                if width > 20
                else [words]
            )
            self.text("\n".join(lines) + "\n")

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, is_data: bool = False
    ) -> None:
        """A table on stderr: the first column to the left, the others to the right; none with --json or -q.

        One that `is_data`, what the command is for, goes to stdout, with -q too.
        """
        if self.as_json or (self.verbosity < 0 and not is_data) or not (sys.stdout if is_data else sys.stderr):
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        console = self._console_of(sys.stdout) if is_data else self.console
        wide = [max(Text(text).cell_len for text in column) for column in zip(columns, *rows, strict=True)]
        # only names are folded, in the first column, if that is enough: "0.0012 ± 0.0001" stays in one piece
        figures_fit = sum(wide[1:]) + 3 * len(wide[1:]) + min(wide[0], _LEAST_NAME) <= console.width
        for index, column in enumerate(columns):
            justify: Literal["left", "right"] = "left" if index == 0 else "right"
            table.add_column(Text(column), justify=justify, overflow="fold", no_wrap=index > 0 and figures_fit)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))  # not markup: [b] may be part of a name
        # rich would end the process where the reader has gone; and it writes nothing, which a full device refuses too
        with writing_stdout(), console.capture() as drawn:
            console.print(Text(title if is_data else f"\n{title}", style="bold"))
            console.print(table)
        (self.text if is_data else self._write)(drawn.get())

    @contextlib.contextmanager
    def columns(self, titles: Sequence[str]) -> Iterator[Callable[[int, str], None]]:
        """A `write(column, piece)` for texts side by side on stdout; one below the other where it is no terminal."""
        texts = ["" for _ in titles]

        def keep(column: int, piece: str) -> None:
            texts[column] += piece

        if not sys.stdout or not sys.stdout.isatty():
            yield keep
            for title, text in zip(titles, texts, strict=True):
                self.text(f"--- {title}\n{text}\n")
            return
        from rich.console import Console
        from rich.live import Live

        console = Console(no_color=not self.color, highlight=False)
        with Live(_beside(titles, texts), console=console, auto_refresh=False, vertical_overflow="visible") as live:

            def show(column: int, piece: str) -> None:
                keep(column, piece)
                live.update(_beside(titles, texts), refresh=True)

            yield show

    def _line(self, line: str) -> None:
        if self._bar is not None:  # above the bar, which rich draws again
            self._bar.console.print(line, markup=False, soft_wrap=True)
        else:
            self._write(line + "\n")

    def _write(self, text: str) -> None:
        """Text on stderr; a reader of it that has gone is no reason to stop the work."""
        if not sys.stderr:
            return
        encoding = sys.stderr.encoding or "utf-8"
        try:
            sys.stderr.write(text.encode(encoding, "backslashreplace").decode(encoding))
            sys.stderr.flush()
        except BrokenPipeError:
            discard(2)


def _bar(total: float, unit: str, color: bool, still: bool) -> Bar:
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True, no_color=not color, highlight=False)
    console.width = max(console.width - len("^C "), 20)  # what the terminal echoes must not begin a line of its own
    columns: list[progress.ProgressColumn] = [progress.TextColumn("{task.description}", markup=False)]
    columns.append(progress.BarColumn())
    if not unit:
        columns.append(progress.TimeElapsedColumn())
    elif unit in ("B", "bytes"):
        columns += [progress.DownloadColumn(binary_units=True), progress.TransferSpeedColumn()]
    elif total < 100_000:
        columns += [progress.MofNCompleteColumn(), progress.TextColumn("{task.fields[unit]}")]
    else:  # two numbers of nine digits say less
        columns += [progress.TaskProgressColumn(), progress.TextColumn("of {task.total:,.0f} {task.fields[unit]}")]
    if unit:
        columns.append(progress.TimeRemainingColumn())
    # stdout is left alone: rich would send data to stderr, where the bar is
    return progress.Progress(*columns, console=console, transient=True, auto_refresh=not still, redirect_stdout=False)


def _beside(titles: Sequence[str], texts: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
    for title in titles:
        table.add_column(title, ratio=1, overflow="fold")
    table.add_row(*(Text(text) for text in texts))
    return table
