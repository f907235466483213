"""Measure artifacts: starts, rounds of speed tests, scenarios; what is known so far is always in the result."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial

from efficli.bench.engine import Repeat
from efficli.bench.figures import (
    NS_PER_MS,
    NS_PER_S,
    ArtifactResult,
    Comparison,
    Quantiles,
    Series,
    Settings,
    SpeedResult,
    SpeedTest,
    StartResult,
    StartTimes,
)
from efficli.bench.gguf_engine import GgufEngine, GgufFile, GgufStarter
from efficli.bench.rounds import Effort, Task, run_rounds
from efficli.bench.scenario import Scenario, run_scenario
from efficli.errors import UsageError
from efficli.ops.disturbance import Watch
from efficli.ops.energy import EnergyMeter
from efficli.ops.worker import Limits
from efficli.progress import Progress

MOST_STARTS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be measured of one artifact."""

    file: GgufFile
    settings: Settings
    limits: Limits
    effort: Effort
    tests: tuple[SpeedTest, ...]
    starts: bool
    scenarios: tuple[Scenario, ...]

    @property
    def starter(self) -> GgufStarter:
        """Starts it as it is measured."""
        return GgufStarter(file=self.file, settings=self.settings, limits=self.limits)


@dataclass(slots=True)
class _Record:
    """The repeats of one test so far."""

    test: SpeedTest
    began: str = ""
    repeats: list[Repeat] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)

    def take(self, engine: GgufEngine, meter: EnergyMeter | None) -> float:
        """Measure once; tokens per second."""
        self.began = self.began or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        before = meter.joules() if meter else 0.0
        repeat = engine.repeat(self.test)
        if meter:
            self.joules.append((meter.joules() - before) / self.test.tokens)
        self.repeats.append(repeat)
        return self.test.tokens * NS_PER_S / repeat.ns

    def once(self, engine: GgufEngine, meter: EnergyMeter | None) -> tuple[float]:
        """As a Task wants it."""
        return (self.take(engine, meter),)

    def result(self, within: float) -> SpeedResult:
        """As values."""
        rates = [self.test.tokens * NS_PER_S / repeat.ns for repeat in self.repeats]
        firsts = [repeat.first_token_ns / NS_PER_MS for repeat in self.repeats if repeat.first_token_ns is not None]
        tokens = [ns for repeat in self.repeats for ns in repeat.token_ns]
        return SpeedResult(
            test=self.test,
            began=self.began,
            samples_ns=tuple(repeat.ns for repeat in self.repeats),
            rate=Series.of(rates, "tokens/s", within),
            ttft=Series.of(firsts, "ms", within) if firsts else None,
            tpot=Quantiles.of(tokens) if tokens else None,
            energy=Series.of(self.joules, "J/token", within) if self.joules else None,
        )


def measure(plan: Plan, result: ArtifactResult, *, meter: EnergyMeter | None, progress: Progress) -> None:
    """Measure one artifact into `result`; an EffiError, or Ctrl-C, leaves in it what was measured before."""
    name = plan.file.path.name
    if plan.starts:
        _measure_starts(plan, result, progress)
    _run_scenarios(plan, result, None, progress)
    with GgufEngine(plan.file, plan.settings, plan.limits) as engine:
        result.model = engine.facts
        records = [_Record(test) for test in plan.tests]
        with _reported([(plan, result, engine, records)]):
            _warm_up(engine, plan.tests, name, progress)
            progress.start(f"{name}: speed", plan.effort.least * len(records), "repeats")
            tasks = [Task(partial(record.once, engine, meter)) for record in records]
            run_rounds(tasks, plan.effort, after=lambda: progress.advance(1))
            progress.finish()
            _run_scenarios(plan, result, engine, progress)


def measure_in_turns(
    plans: Sequence[Plan],
    results: Sequence[ArtifactResult],
    comparisons: list[Comparison],
    *,
    meter: EnergyMeter | None,
    progress: Progress,
) -> None:
    """Measure several artifacts in turns: each round takes a test once of each, every other round backwards.

    All are open at once. The ratio of a round is tokens/s of another artifact over those of the first, a moment apart.
    """
    effort, tests = plans[0].effort, plans[0].tests
    for plan, result in zip(plans, results, strict=True):
        if plan.starts:
            _measure_starts(plan, result, progress)
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(GgufEngine(plan.file, plan.settings, plan.limits)) for plan in plans]
        for result, engine in zip(results, engines, strict=True):
            result.model = engine.facts
        records = [[_Record(test) for test in tests] for _ in plans]
        stack.enter_context(_reported(list(zip(plans, results, engines, records, strict=True))))
        for plan, engine in zip(plans, engines, strict=True):
            _warm_up(engine, tests, plan.file.path.name, progress)
        turns = [_Turns([own[index] for own in records], engines, meter) for index in range(len(tests))]
        tasks = [Task(turn.once) for turn in turns]
        progress.start("speed in turns", effort.least * len(tests), "rounds")
        try:
            run_rounds(tasks, effort, after=lambda: progress.advance(1))
        finally:
            comparisons += _comparisons(turns, [str(plan.file.path) for plan in plans], effort.within)
            progress.finish()


@dataclass(slots=True)
class _Turns:
    """One test of several artifacts, a round at a time."""

    records: list[_Record]
    engines: list[GgufEngine]
    meter: EnergyMeter | None
    ratios: list[list[float]] = field(default_factory=list)
    """Of each whole round: the others over the first."""

    def once(self) -> list[float]:
        """A round: the others' ratios to the first."""
        order = list(range(len(self.records)))
        if len(self.ratios) % 2:
            order.reverse()
        rates = dict.fromkeys(order, 0.0)
        for index in order:
            rates[index] = self.records[index].take(self.engines[index], self.meter)
        self.ratios.append([rates[index] / rates[0] for index in range(1, len(order))])
        return self.ratios[-1]


def _comparisons(turns: Iterable[_Turns], paths: Sequence[str], within: float) -> Iterator[Comparison]:
    for turn in turns:
        for index, other in enumerate(paths[1:]):
            if turn.ratios:
                ratios = Series.of([row[index] for row in turn.ratios], "ratio", within)
                yield Comparison(test=turn.records[0].test, first=paths[0], other=other, ratios=ratios)


@contextlib.contextmanager
def _reported(
    measured: Sequence[tuple[Plan, ArtifactResult, GgufEngine, Sequence[_Record]]],
) -> Iterator[None]:
    """Watch for others who use the processor, and however the block ends, put what was measured into the results."""
    watch = Watch(lambda: [engine.pid for _, _, engine, _ in measured])
    watch.start()
    try:
        yield
    finally:
        disturbance = watch.stop()
        for plan, result, engine, records in measured:
            result.tests = [record.result(plan.effort.within) for record in records if record.repeats]
            result.memory = engine.memory()
            result.disturbance = disturbance


def _warm_up(engine: GgufEngine, tests: Sequence[SpeedTest], name: str, progress: Progress) -> None:
    """Each test once, of generation one token, as llama-bench does: pages, caches and clocks are then up."""
    progress.start(f"{name}: warm-up", len(tests), "tests")
    for test in tests:
        short = SpeedTest(n_gen=1, n_depth=test.n_depth, threads=test.threads) if test.n_gen else test
        engine.repeat(short)
        progress.advance(1)
    progress.finish()


def _run_scenarios(plan: Plan, result: ArtifactResult, engine: GgufEngine | None, progress: Progress) -> None:
    """Those that need the engine, or without one those that must not have it open; one that cannot run stops no other.

    Why it cannot is then in its own result.
    """
    for scenario in plan.scenarios:
        if (scenario.kind == "start") is not (engine is None):
            continue
        progress.start(f"{plan.file.path.name}: {scenario.name}", scenario.requests, "requests")
        try:
            run_scenario(
                scenario,
                engine,
                plan.starter,
                ctx=plan.settings.ctx,
                progress=progress,
                within=plan.effort.within,
                begin=result.scenarios.append,
            )
        except UsageError:
            continue
        finally:
            progress.finish()


def _measure_starts(plan: Plan, result: ArtifactResult, progress: Progress) -> None:
    """Cold and warm starts in turns."""
    times: dict[bool, list[StartTimes]] = {True: [], False: []}
    starter = plan.starter
    # a start takes long beside what it measures, and the spread of process starts does not shrink for ever
    effort = replace(plan.effort, most=max(plan.effort.least, min(MOST_STARTS, plan.effort.most)))
    progress.start(f"{plan.file.path.name}: starts, cold and warm", 2 * effort.least, "starts")

    def take(cold: bool) -> tuple[float]:
        found = starter.start(cold=cold)
        times[cold].append(found)
        return (float(found.total_ns),)

    try:
        tasks = [Task(partial(take, True)), Task(partial(take, False))]
        run_rounds(tasks, effort, after=lambda: progress.advance(1))
    finally:
        result.starts = [_starts(found, effort.within) for found in times.values() if found]
        progress.finish()


def _starts(times: Sequence[StartTimes], within: float) -> StartResult:
    def series(ns: Iterable[int]) -> Series:
        return Series.of([value / NS_PER_MS for value in ns], "ms", within)

    shares = [found.resident for found in times if found.resident is not None]
    return StartResult(
        cold=times[0].cold,
        resident=max(shares) if len(shares) == len(times) else None,
        process=series(found.process_ns for found in times),
        load=series(found.load_ns for found in times),
        first_token=series(found.first_token_ns for found in times),
        total=series(found.total_ns for found in times),
    )
