"""A benchmark as Markdown for a README: one row an artifact, what else was asked for, what the figures hold under."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from efficli.bench.figures import ArtifactResult, BenchResult, SpeedResult, StartResult
from efficli.bench.prediction_table import prediction_notes, prediction_tables
from efficli.bench.report_table import comparison_tables, doubts
from efficli.bench.scenario_table import scenario_notes, scenario_tables
from efficli.bench.wording import conditions, figure, main_test, number, result_of, short_names, test_words
from efficli.ops.byte_size import binary_bytes

Column = tuple[str, Callable[[ArtifactResult], str]]


def to_markdown(result: BenchResult) -> str:
    """The table and its conditions; a column that no artifact can fill is left out, a failure has its row.

    Ratios, scenarios and predictions, where there are any, are tables of their own below it.
    """
    names = short_names([artifact.path for artifact in result.artifacts])
    columns = [(head, cell) for head, cell in _columns(result) if any(cell(artifact) for artifact in result.artifacts)]
    rows = [
        [_code(names[artifact.path]), *(_escaped(cell(artifact)) for _, cell in columns)]
        for artifact in result.artifacts
    ]
    lines = _table(["artifact", *(head for head, _ in columns)], rows)
    failed = [
        f"{_code(names[artifact.path])} failed: {_escaped(artifact.failure.message)}"
        for artifact in result.artifacts
        if artifact.failure
    ]
    more = [*comparison_tables(result), *scenario_tables(result), *prediction_tables(result)]
    for title, heads, found in (table for table in more if table[2]):
        escaped = ([_escaped(cell) for cell in row] for row in found)
        lines += ["", _escaped(title), "", *_table([_escaped(head) for head in heads], escaped)]
    notes = [*doubts(result), *scenario_notes(result), *prediction_notes(result), conditions(result)]
    remarks = [*failed, *(_escaped(line) for line in notes)]
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {remark}" for remark in remarks) + "\n"


def _columns(result: BenchResult) -> list[Column]:
    decode, prefill = main_test(result.artifacts, prompt=False), main_test(result.artifacts, prompt=True)

    def speed(one: SpeedResult | None) -> str:
        return figure(one.rate) if one else ""

    columns: list[Column] = [("size", lambda artifact: binary_bytes(artifact.model.nbytes) if artifact.model else "")]
    if decode:
        head = f"{test_words(decode)}, tokens/s"
        columns.append((head, lambda artifact: speed(result_of(artifact, decode)) or _absent(artifact)))
    if prefill:
        head = f"{test_words(prefill)}, tokens/s"
        columns.append((head, lambda artifact: speed(result_of(artifact, prefill)) or _absent(artifact)))
        columns.append(("first token, ms", lambda artifact: _first_token(result_of(artifact, prefill))))
    return [
        *columns,
        ("load cold / warm, ms", lambda artifact: _starts(artifact.starts)),
        ("peak memory", lambda artifact: binary_bytes(artifact.memory.peak_rss) if artifact.memory else ""),
        ("mean KL divergence", _divergence),
    ]


def _absent(artifact: ArtifactResult) -> str:
    return "failed" if artifact.failure else ""


def _first_token(one: SpeedResult | None) -> str:
    return figure(one.ttft, interval=False) if one and one.ttft else ""


def _starts(starts: Sequence[StartResult]) -> str:
    by_kind = {start.cold: figure(start.load, interval=False) for start in starts}
    return " / ".join(by_kind.get(cold, "?") for cold in (True, False)) if by_kind else ""


def _divergence(artifact: ArtifactResult) -> str:
    quality = artifact.quality
    return number(quality.kld_mean) if quality and quality.kld_mean is not None else ""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_line(heads), "|---|" + "--:|" * (len(heads) - 1), *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _code(name: str) -> str:
    """As code: a bar ends a cell there too, and a backtick is fenced by two."""
    fence, pad = ("``", " ") if "`" in name else ("`", "")
    return f"{fence}{pad}{name.replace('|', chr(92) + '|')}{pad}{fence}"


def _escaped(text: str) -> str:
    """On one line; a bar ends a cell, a star begins a list or emphasis, `<` begins HTML."""
    text = " ".join(text.split())
    for sign in "|*<":
        text = text.replace(sign, f"\\{sign}")
    return text
