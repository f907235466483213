"""Measure artifacts: starts, rounds of speed tests, scenarios; what is known so far is always in the result."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial

from efficli.bench.engine import Engine, ModelFile, Repeat, Starter
from efficli.bench.figures import (
    NS_PER_MS,
    NS_PER_S,
    ArtifactResult,
    Comparison,
    Series,
    Settings,
    SpeedResult,
    SpeedTest,
    StartResult,
    StartTimes,
)
from efficli.bench.rounds import Effort, Task, run_rounds
from efficli.bench.scenario import Scenario, run_scenario
from efficli.errors import CheckpointError, EffiError, SecurityError, UsageError
from efficli.ops.child import ChildError
from efficli.ops.disturbance import Watch
from efficli.ops.energy import EnergyMeter
from efficli.ops.process import confine, ran_on, thread_times, wait_for_rest
from efficli.ops.processors import allowed
from efficli.ops.statistics import Quantiles
from efficli.ops.worker import Limits
from efficli.progress import Progress

MOST_STARTS = 10


@dataclass(slots=True)
class Energy:
    """The meter of a run, if there is one; a meter that breaks on the way costs its figures and no others."""

    meter: EnergyMeter | None
    trouble: str | None = None
    """Why there are no more joules."""

    def joules(self) -> float | None:
        """Since the meter was opened; None without one."""
        if self.meter is None:
            return None
        try:
            return self.meter.joules()
        except EffiError as error:
            self.meter, self.trouble = None, error.line
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be measured of one artifact."""

    file: ModelFile
    settings: Settings
    limits: Limits
    effort: Effort
    tests: tuple[SpeedTest, ...]
    starts: bool
    scenarios: tuple[Scenario, ...]

    @property
    def starter(self) -> Starter:
        """Starts it as it is measured."""
        return self.file.starter(self.settings, self.limits)

    def open(self) -> Engine:
        """The file as it is measured."""
        return self.file.open(self.settings, self.limits)


@dataclass(slots=True)
class _Record:
    """The repeats of one test so far."""

    test: SpeedTest
    began: str = ""
    repeats: list[Repeat] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)

    def take(self, engine: Engine, energy: Energy) -> float:
        """Measure once; tokens per second."""
        self.began = self.began or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        before, began = energy.joules(), time.monotonic_ns()
        repeat = engine.repeat(self.test)
        after = energy.joules()
        if before is not None and after is not None:
            # before the tokens that count, a depth may have been read
            share = repeat.ns / (time.monotonic_ns() - began)
            self.joules.append((after - before) * share / self.test.tokens)
        self.repeats.append(repeat)
        return self.test.tokens * NS_PER_S / repeat.ns

    def once(self, engine: Engine, energy: Energy) -> tuple[float]:
        """As a Task wants it."""
        return (self.take(engine, energy),)

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


def measure(plan: Plan, result: ArtifactResult, *, energy: Energy, progress: Progress) -> None:
    """Measure one artifact into `result`; an EffiError, or Ctrl-C, leaves in it what was measured before."""
    with _watched([result]) as watch:
        watch.start()
        if plan.starts:
            _measure_starts(plan, result, progress)
        _run_scenarios(plan, result, None, progress)
        watch.pause()
        _measure_open(plan, result, watch, energy, progress)


def _measure_open(plan: Plan, result: ArtifactResult, watch: _OwnWatch, energy: Energy, progress: Progress) -> None:
    """What is measured with the file open."""
    name = plan.file.path.name
    with plan.open() as engine:
        result.model = engine.facts
        records = [_Record(test) for test in plan.tests]
        with _reported(plan, result, engine, records):
            _warm_up(engine, plan.tests, name, progress)
            watch.own.append(engine.pid)
            watch.start()
            bar = _Bar(progress, f"{name}: speed", plan.effort.least * len(records), "repeats")
            run_rounds([Task(partial(record.once, engine, energy)) for record in records], plan.effort, bar.advance)
            progress.finish()
            _run_scenarios(plan, result, engine, progress)
            watch.pause()


def measure_in_turns(
    plans: Sequence[Plan],
    results: Sequence[ArtifactResult],
    comparisons: list[Comparison],
    *,
    energy: Energy,
    progress: Progress,
) -> None:
    """Measure several artifacts in turns: each round takes a test once of each, every other round backwards.

    All are open at once. The ratio of a round is tokens/s of another artifact over those of the first, a moment apart.
    All plans have the same tests. An EffiError of one is that one's failure: the others take their turns anew without
    it, and one that is left alone is measured by itself.
    """
    pairs = list(zip(plans, results, strict=True))
    with _watched(results) as watch:
        watch.start()
        for plan, result in pairs:
            with contextlib.suppress(_Stopped), _blamed(result):
                if plan.starts:
                    _measure_starts(plan, result, progress)
        watch.pause()
        while len(able := [pair for pair in pairs if pair[1].failure is None]) > 1:
            if _take_turns(able, comparisons, watch, energy, progress):
                return
        for plan, result in able:
            with contextlib.suppress(_Stopped), _blamed(result):
                _measure_open(plan, result, watch, energy, progress)


def _take_turns(
    pairs: Sequence[tuple[Plan, ArtifactResult]],
    comparisons: list[Comparison],
    watch: _OwnWatch,
    energy: Energy,
    progress: Progress,
) -> bool:
    """Measure all of them in turns; False if one failed, of which then no comparison but its own is kept."""
    effort, tests = pairs[0][0].effort, pairs[0][0].tests
    engines: list[Engine] = []
    records = [[_Record(test) for test in tests] for _ in pairs]
    results = [result for _, result in pairs]
    known = len(comparisons)
    try:
        with contextlib.ExitStack() as stack:
            for (plan, result), own in zip(pairs, records, strict=True):
                with _blamed(result):
                    engine = stack.enter_context(plan.open())
                    stack.enter_context(_reported(plan, result, engine, own))
                    result.model = engine.facts
                    engines.append(engine)
                    _warm_up(engine, tests, plan.file.path.name, progress)
                    wait_for_rest(engine.pid)
            watch.own += [engine.pid for engine in engines]
            turns = [_Turns([own[index] for own in records], engines, results, energy) for index in range(len(tests))]
            watch.start()
            bar = _Bar(progress, "speed in turns", effort.least * len(tests), "rounds")
            try:
                run_rounds([Task(turn.once) for turn in turns], effort, bar.advance)
            finally:
                comparisons += _comparisons(turns, [result.path for result in results], effort.within)
                progress.finish()
                watch.pause()
    except _Stopped:
        failed = {result.path for result in results if result.failure}
        comparisons[known:] = [one for one in comparisons[known:] if failed & {one.first, one.other}]
        return False
    return True


class _Stopped(Exception):
    """A failure was noted where it belongs."""


@contextlib.contextmanager
def _blamed(result: ArtifactResult) -> Iterator[None]:
    """An EffiError of the block is this artifact's failure; _Stopped is raised instead of it."""
    try:
        yield
    except (EffiError, ChildError) as error:
        result.fail(error)
        raise _Stopped from None


@dataclass(slots=True)
class _Bar:
    """A bar for repeats of which at least `least` are made: what comes after them has no known end."""

    progress: Progress
    task: str
    least: int
    unit: str
    done: int = 0

    def __post_init__(self) -> None:
        self.progress.start(self.task, self.least, self.unit)

    def advance(self) -> None:
        """One more is made."""
        self.done += 1
        if self.done == self.least + 1:
            self.progress.start(f"{self.task}, until it is steady", 0)
        self.progress.advance(1)


@dataclass(slots=True)
class _Turns:
    """One test of several artifacts, a round at a time."""

    records: list[_Record]
    engines: list[Engine]
    results: Sequence[ArtifactResult]
    energy: Energy
    ratios: list[list[float]] = field(default_factory=list)
    """Of each whole round: the others over the first."""

    def once(self) -> list[float]:
        """A round, all of it on the cores that its first turn was given: the others' ratios to the first.

        Threads stay on their cores, and one core can be slower than another for long, half as fast where its twin
        works for somebody else: of 30 comparisons of a file with itself, 5 saw a difference, on the same cores none.
        """
        order = list(range(len(self.records)))
        if len(self.ratios) % 2:
            order.reverse()
        rates = dict.fromkeys(order, 0.0)
        place = everywhere = allowed()
        for index in order:
            pid = self.engines[index].pid
            confine(pid, place)
            before = thread_times(pid)
            with _blamed(self.results[index]):
                rates[index] = self.records[index].take(self.engines[index], self.energy)
            if index == order[0] and len(used := ran_on(pid, before) & everywhere) >= self.records[index].test.threads:
                place = used
            # OpenMP's threads spin for some 10 ms after their work: the next one would have that many cores less
            wait_for_rest(pid)
        self.ratios.append([rates[index] / rates[0] for index in range(1, len(order))])
        return self.ratios[-1]


def _comparisons(turns: Iterable[_Turns], paths: Sequence[str], within: float) -> Iterator[Comparison]:
    for turn in turns:
        for index, other in enumerate(paths[1:]):
            if turn.ratios:
                ratios = Series.of([row[index] for row in turn.ratios], "ratio", within)
                yield Comparison(test=turn.records[0].test, first=paths[0], other=other, ratios=ratios)


class _OwnWatch(Watch):
    """A Watch that is told of the processes that do our work as they come."""

    def __init__(self) -> None:
        self.own: list[int] = []
        super().__init__(lambda: self.own)


@contextlib.contextmanager
def _watched(results: Sequence[ArtifactResult]) -> Iterator[_OwnWatch]:
    """Watch for others who use the processor; however the block ends, what they did is in the results."""
    watch = _OwnWatch()
    try:
        yield watch
    finally:
        disturbance = watch.stop()
        for result in results:
            result.disturbance = disturbance


@contextlib.contextmanager
def _reported(plan: Plan, result: ArtifactResult, engine: Engine, records: Sequence[_Record]) -> Iterator[None]:
    """However the block ends, put what was measured into the result."""
    try:
        yield
    finally:
        result.tests = [record.result(plan.effort.within) for record in records if record.repeats]
        result.memory = engine.memory()


def _warm_up(engine: Engine, tests: Sequence[SpeedTest], name: str, progress: Progress) -> None:
    """Each test once, of generation one token, as llama-bench does: pages, caches and clocks are then up."""
    progress.start(f"{name}: warm-up", len(tests), "tests")
    for test in tests:
        short = SpeedTest(n_gen=1, n_depth=test.n_depth, threads=test.threads) if test.n_gen else test
        engine.repeat(short)
        progress.advance(1)
    progress.finish()


def _run_scenarios(plan: Plan, result: ArtifactResult, engine: Engine | None, progress: Progress) -> None:
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
        except (UsageError, CheckpointError, SecurityError):
            continue
        finally:
            progress.finish()


def _measure_starts(plan: Plan, result: ArtifactResult, progress: Progress) -> None:
    """Cold and warm starts in turns."""
    times: dict[bool, list[StartTimes]] = {True: [], False: []}
    starter = plan.starter
    # a start takes long beside what it measures, and the spread of process starts does not shrink for ever
    effort = replace(plan.effort, most=max(plan.effort.least, min(MOST_STARTS, plan.effort.most)))
    bar = _Bar(progress, f"{plan.file.path.name}: starts, cold and warm", 2 * effort.least, "starts")

    def take(cold: bool) -> tuple[float]:
        found = starter.start(cold=cold)
        times[cold].append(found)
        return (float(found.total_ns),)

    try:
        tasks = [Task(partial(take, True)), Task(partial(take, False))]
        run_rounds(tasks, effort, bar.advance)
    finally:
        result.starts = [_starts(found, effort.within) for found in times.values() if found]
        progress.finish()


def _starts(times: Sequence[StartTimes], within: float) -> StartResult:
    def series(ns: Iterable[int]) -> Series:
        return Series.of([value / NS_PER_MS for value in ns], "ms", within)

    shares = [found.resident for found in times if found.resident is not None]
    return StartResult(
        cold=times[0].cold,
        resident=(max if times[0].cold else min)(shares) if len(shares) == len(times) else None,
        process=series(found.process_ns for found in times),
        load=series(found.load_ns for found in times),
        first_token=series(found.first_token_ns for found in times),
        total=series(found.total_ns for found in times),
    )
