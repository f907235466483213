"""A benchmark as tables of words: how fast, how soon, how large, how good, and against what."""

from __future__ import annotations

from collections.abc import Iterator

from efficli.bench.figures import RESOLUTION, BenchResult, Series, SpeedResult
from efficli.bench.layout import Entry, Table, absent, lay_out, named, rows_of, tests_of
from efficli.bench.prediction_table import prediction_notes, prediction_tables
from efficli.bench.scenario_table import scenario_notes, scenario_tables
from efficli.bench.wording import UNSTEADY, conditions, figure, number, result_of, short_names, test_words
from efficli.ops.byte_size import binary_bytes
from efficli.ops.statistics import CONFIDENCE

PHASES = {"process": "process", "load": "+ load", "first_token": "+ first token", "total": "= in all"}
"""Of a start, in their order: fields of StartResult and their words."""

RESIDENT = 0.01
"""A start with more of the file than this in the page cache is not called cold."""


def report_tables(result: BenchResult) -> list[Table]:
    """All tables, in reading order; those with nothing in them are left out. `footnotes` explains their marks.

    Why something failed is not among them: it is on stderr, and in `ArtifactResult.failures`.
    """
    tables = [
        *_speed(result, prompt=True),
        *_speed(result, prompt=False),
        *_joules(result),
        *_starts(result),
        *_memory(result),
        *_quality(result),
        *comparison_tables(result),
        *scenario_tables(result),
        *prediction_tables(result),
    ]
    return [table for table in tables if table[2]]


def footnotes(result: BenchResult) -> list[str]:
    """What a reader must know to believe the tables, one sentence a line; the conditions come last."""
    return [
        *_cut(result),
        *doubts(result),
        *_turns(result),
        *_single_tokens(result),
        *_memory_words(result),
        *_energy(result),
        *scenario_notes(result),
        *prediction_notes(result),
        *_own_notes(result),
        conditions(result),
    ]


def doubts(result: BenchResult) -> list[str]:
    """What makes figures less sure than they look, and how sure they are: marks, neighbours, starts not cold."""
    return [
        *_interrupted(result),
        *_marks(result),
        *_disturbances(result),
        *_not_cold(result),
        *_intervals(result),
    ]


# ---- speed


def _speed(result: BenchResult, *, prompt: bool) -> Iterator[Table]:
    tests = tests_of(result, prompt=prompt)
    varied = len({test.threads for test in tests}) > 1
    columns = ["tokens/s", "first token, ms", "n"] if prompt else ["tokens/s", "p50 ms", "p95 ms", "p99 ms", "n"]
    entries = []
    for test in tests:
        for artifact, name in rows_of(result):
            one = result_of(artifact, test)
            if one is None:
                cells = [absent(result, artifact, writes=not prompt), *[""] * (len(columns) - 1)]
            else:
                cells = [figure(one.rate), *_times(one), str(one.rate.estimate.n)]
            entries.append(Entry(test_words(test, kind=False, threads=varied), name, cells))
    yield lay_out("Prefill (reading a prompt)" if prompt else "Decode (writing)", columns, entries)


def _times(one: SpeedResult) -> list[str]:
    """Until the first token of a prompt; of single tokens of generation."""
    if one.test.n_prompt:
        return [figure(one.ttft) if one.ttft else ""]
    tpot = one.tpot
    return [number(value) for value in (tpot.p50, tpot.p95, tpot.p99)] if tpot else [""] * 3


def _joules(result: BenchResult) -> Iterator[Table]:
    entries = []
    for test in (*tests_of(result, prompt=True), *tests_of(result, prompt=False)):
        for artifact, name in rows_of(result):
            one = result_of(artifact, test)
            if one and one.energy:
                cells = [figure(one.energy), str(one.energy.estimate.n)]
                entries.append(Entry(test_words(test), name, cells))
    yield lay_out("Energy", ["J/token", "n"], entries)


# ---- starts


def _starts(result: BenchResult) -> Iterator[Table]:
    """Phases below each other, cold and warm beside each other."""
    if not any(artifact.starts for artifact in result.artifacts):
        return
    entries = []
    for phase, words in PHASES.items():
        for artifact, name in rows_of(result):
            by_kind = {start.cold: getattr(start, phase) for start in artifact.starts}
            if not by_kind:
                entries.append(Entry(words, name, [absent(result, artifact), "", ""]))
                continue
            series = [by_kind.get(cold) for cold in (True, False)]
            counts = dict.fromkeys(str(one.estimate.n) for one in series if one)
            entries.append(Entry(words, name, [*(figure(one) if one else "" for one in series), " / ".join(counts)]))
    yield lay_out("Start of a fresh process, ms", ["cold, not cached", "warm, cached", "n"], entries)


# ---- memory and quality


def _memory(result: BenchResult) -> Iterator[Table]:
    rows = []
    for artifact, name in rows_of(result):
        memory, model = artifact.memory, artifact.model
        if memory:
            sizes = [model.nbytes if model else None, memory.peak_rss, memory.peak_anon, memory.peak_file]
            rows.append([name, *("" if value is None else binary_bytes(value) for value in sizes)])
        elif model:
            rows.append([name, binary_bytes(model.nbytes), absent(result, artifact), "", ""])
    yield "Size of the file, and peak memory of the process", ["", "file", "peak", "RssAnon", "RssFile"], rows


def _quality(result: BenchResult) -> Iterator[Table]:
    """Of models that write, and of embedding models."""
    writing, embedding, origins = [], [], set()
    for artifact, name in rows_of(result):
        quality = artifact.quality
        if quality is None or quality.kld_mean is quality.cosine_mean is None:
            continue
        origins.add(quality.origin or "an origin that is not named")
        if quality.kld_mean is not None:
            top1 = quality.top1_agreement
            writing.append([name, number(quality.kld_mean), "" if top1 is None else f"{100 * top1:.2f} %"])
        if quality.cosine_mean is not None:
            embedding.append([name, f"{quality.cosine_mean:.6f}"])
    title = f"Quality against {', '.join(sorted(origins))}"
    yield title, ["", "mean KL divergence", "top-1 agreement"], writing
    yield title, ["", "mean cosine of embeddings"], embedding


# ---- comparison


def comparison_tables(result: BenchResult) -> Iterator[Table]:
    """Ratios to the first artifact, one table for each of the others."""
    names = short_names([path for one in result.comparisons for path in (one.first, one.other)])
    for pair in dict.fromkeys((one.first, one.other) for one in result.comparisons):
        own = [one for one in result.comparisons if (one.first, one.other) == pair]
        varied = len({one.test.threads for one in own}) > 1
        rows = [
            [test_words(one.test, threads=varied), figure(one.ratios), one.verdict, str(one.ratios.estimate.n)]
            for one in own
        ]
        title = f"{names[pair[1]]} over {names[pair[0]]}: ratio of tokens/s, in turns"
        yield title, ["", "ratio", "verdict", "pairs"], rows


# ---- footnotes


def _interrupted(result: BenchResult) -> Iterator[str]:
    if result.interrupted:
        yield "interrupted: the tables hold what was measured until then"


def _marks(result: BenchResult) -> Iterator[str]:
    doubtful = [series for series in _all_series(result) if not series.steady]
    if any(series.estimate.n > 1 for series in doubtful):
        yield f"{UNSTEADY} did not settle: the true median lies somewhere in this range, which is wider than asked for"
    if any(series.estimate.n == 1 for series in doubtful):
        yield f"{UNSTEADY} after one number: one repeat only, so nothing says how far it can be off"


def _disturbances(result: BenchResult) -> Iterator[str]:
    affected = dict[str, list[str]]()
    for artifact, name in named(result):
        for line in artifact.disturbance.lines if artifact.disturbance is not None else ():
            affected.setdefault(line, []).append(name)
    for line, names in affected.items():
        yield f"while {', '.join(names)} ran: {line}"


def _intervals(result: BenchResult) -> Iterator[str]:
    sure = {series.estimate.n: series.estimate.confidence for series in _all_series(result) if series.estimate.n > 1}
    few = [f"{100 * level:.3g} % ({n} repeats)" for n, level in sorted(sure.items()) if level < CONFIDENCE]
    many = [f"{100 * CONFIDENCE:.0f} %{' (more)' if few else ''}"] if len(few) < len(sure) else []
    if sure:
        yield f"median (low - high): the true median lies in between with a confidence of {', '.join([*few, *many])}"


def _not_cold(result: BenchResult) -> Iterator[str]:
    for artifact, name in named(result):
        for start in artifact.starts:
            if start.cold and start.resident is None:
                yield f"{name} may not have started cold: this system does not tell what is in its page cache"
            elif start.cold and start.resident and start.resident > RESIDENT:
                yield f"{name} did not start really cold: {start.resident:.0%} of the file stayed in the page cache"


def _memory_words(result: BenchResult) -> Iterator[str]:
    before = [artifact.memory.before_anon for artifact in result.artifacts if artifact.memory]
    if before:
        yield (
            "RssAnon is what the process must have; RssFile is files in memory, which the kernel may drop and read "
            f"again; {binary_bytes(max(before))} of RssAnon were there before the model was opened"
        )


def _energy(result: BenchResult) -> Iterator[str]:
    for source in dict.fromkeys(artifact.energy_source for artifact in result.artifacts if artifact.energy_source):
        none, _, why = source.partition(": ")
        told = f"J/token: from {source}; idle power and what else runs included"
        yield f"no joules: {why}" if none == "none" else told


def _cut(result: BenchResult) -> Iterator[str]:
    for (_, full), (_, shown) in zip(named(result), rows_of(result), strict=True):
        if shown != full:
            yield f"{shown}: {full}"


def _turns(result: BenchResult) -> Iterator[str]:
    if result.comparisons:
        yield (
            f"a difference is one beyond {RESOLUTION:.0%}: two processes of the same file can differ by that for as "
            "long as they live"
        )


def _single_tokens(result: BenchResult) -> Iterator[str]:
    if any(one.tpot for artifact in result.artifacts for one in artifact.tests):
        yield "p50, p95, p99: what so many per cent of single tokens took at most (time per output token, TPOT)"


def _own_notes(result: BenchResult) -> Iterator[str]:
    for artifact, name in named(result):
        yield from (f"{name}: {note}" for note in artifact.notes)


# ---- what all tables need


def _all_series(result: BenchResult) -> Iterator[Series]:
    """Every figure with an interval that the tables show."""
    for artifact in result.artifacts:
        for one in artifact.tests:
            yield from (series for series in (one.rate, one.ttft, one.energy) if series)
        for start in artifact.starts:
            yield from (start.process, start.load, start.first_token, start.total)
        for scenario in artifact.scenarios:
            found = (scenario.series(one) for one in dict.fromkeys([scenario.headline, *scenario.objectives]))
            yield from (series for series in found if series)
    yield from (one.ratios for one in result.comparisons)
