"""Bench: what a device will feel of an artifact. Joins headers, runtime, scenarios, certificates, targets and gates."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from efficli.bench.figures import ArtifactResult, BenchResult
from efficli.bench.rounds import Effort
from efficli.bench.scenario import load_scenario, scenario_names
from efficli.bench.suite import Energy, Plan, measure, measure_in_turns
from efficli.bench.wording import count
from efficli.errors import EffiError, MissingExtra, UnsupportedError, UsageError
from efficli.ops.child import ChildError
from efficli.ops.energy import EnergyMeter, NoMeter, open_meter
from efficli.ops.hardware import cpu_name, usable_memory
from efficli.ops.process import memory_of
from efficli.ops.worker import Limits
from efficli.pipeline.bench_predict import predict_file
from efficli.pipeline.bench_quality import Base, Gates, recorded_quality
from efficli.pipeline.bench_request import BenchFile, BenchRequest, model_files, open_file
from efficli.progress import Progress, Silent
from efficli.target import Target, load_target


def bench(
    artifacts: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    *,
    n_prompt: Sequence[int] | None = None,
    n_gen: Sequence[int] | None = None,
    depth: Sequence[int] | None = None,
    threads: Sequence[int] | None = None,
    ctx: int | None = None,
    cache_type_k: str = "f16",
    cache_type_v: str = "f16",
    flash_attn: str = "auto",
    repetitions: int = 5,
    max_repetitions: int = 30,
    patience: float = 20.0,
    starts: bool = True,
    scenarios: Sequence[str] = (),
    compare: bool = False,
    base: str | None = None,
    text: str | os.PathLike[str] | None = None,
    max_kld: float | None = None,
    min_top1: float | None = None,
    max_bytes: int | None = None,
    targets: Sequence[str] = (),
    time_limit: float = 600.0,
    memory_limit: int | None = None,
    power_command: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    dry_run: bool = False,
    into: BenchResult | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure artifacts (directories or GGUF files) with their real runtime, each in child processes.

    Every figure is repeated `repetitions` times and on, to `max_repetitions` or for `patience` seconds, until its
    median's 95 % interval is within 5 %. `starts`: cold and warm starts of fresh processes. `compare`: all
    artifacts in turns, with the ratios of the others to the first. `scenarios`: names, "all", or paths of YAML files.
    `base`, `text`: measure quality against that model; else the certificate beside the file is read. `time_limit` holds
    for each repeat, in seconds, `memory_limit` for the process that runs the model, in bytes (without one: the
    machine's). `into` is filled as the run goes on, so that a KeyboardInterrupt loses nothing.

    An artifact that cannot be measured has a `failure` and the others go on. Errors that concern all, usage above all,
    are raised, before anything runs.
    """
    named = [name for word in scenarios for name in (scenario_names() if word == "all" else (word,))]
    request = BenchRequest(
        n_prompt=_tuple(n_prompt),
        n_gen=_tuple(n_gen),
        depth=_tuple(depth),
        threads=_tuple(threads),
        ctx=ctx,
        cache_type_k=cache_type_k,
        cache_type_v=cache_type_v,
        flash_attn=flash_attn,
        effort=Effort(least=repetitions, most=max_repetitions, patience=patience),
        scenarios=tuple(load_scenario(name) for name in dict.fromkeys(named)),
        seed=seed,
    )
    request.check()
    if compare and named:
        raise UsageError("--compare and --scenario: scenarios are not run in turns", hint="run them without --compare")
    if not time_limit > 0:  # NaN too
        raise UsageError(f"--time-limit {time_limit:g}, expected more than 0 seconds")
    if memory_limit is not None and memory_limit <= 0:
        raise UsageError(f"--memory-limit {memory_limit}, expected more than 0 bytes")
    if memory_limit is not None and memory_of(os.getpid()) is None:
        raise UnsupportedError("--memory-limit: this system does not tell what memory a process has")
    if text is not None and base is None:
        raise UsageError("--text without --base: there is no model to compare with", hint="--base MODEL")
    words = [artifacts] if isinstance(artifacts, str | os.PathLike) else list(artifacts)
    if len(words) < (2 if compare else 1) and not (compare and words and Path(words[0]).is_dir()):
        raise UsageError("--compare takes two artifacts or more" if compare else "no artifact to measure")
    result = BenchResult(machine={}) if into is None else into
    run = _Run(
        request=request,
        limits=Limits(memory=memory_limit or usable_memory(), files=memory_limit is not None, seconds=time_limit),
        starts=starts,
        targets=tuple(load_target(name) for name in targets),
        gates=Gates(max_kld=max_kld, min_top1=min_top1, max_bytes=max_bytes),
        result=result,
        progress=progress or Silent(),
    )
    began = time.monotonic()
    result.machine, result.effort = machine(), asdict(request.effort)
    try:
        run.open(words)
        if compare:
            run.agree()
        if dry_run:
            return result
        with ExitStack() as stack:
            if base is not None:
                run.base = Base.open(base, text, stack, trust_remote_code=trust_remote_code, progress=run.progress)
            with open_meter(power_command) as meter:
                run.measure(meter, compare)
            run.judge()
    except KeyboardInterrupt:
        result.interrupted = True
        raise
    finally:
        result.seconds = time.monotonic() - began
    return result


@dataclass(slots=True, kw_only=True)
class _Run:
    """One call of `bench`."""

    request: BenchRequest
    limits: Limits
    starts: bool
    targets: tuple[Target, ...]
    gates: Gates
    result: BenchResult
    progress: Progress
    files: list[tuple[BenchFile, Plan, ArtifactResult]] = field(default_factory=list)
    base: Base | None = None
    """What quality is measured against."""

    def open(self, artifacts: Sequence[str | os.PathLike[str]]) -> None:
        """Find the files, read their headers, plan."""
        for word in artifacts:
            found = ArtifactResult(path=os.fspath(word))
            try:
                paths = model_files(Path(word))
            except EffiError as error:
                found.fail(error)
                self.result.artifacts.append(found)
                continue
            for path in paths:
                self._open_one(ArtifactResult(path=str(path)))

    def _open_one(self, found: ArtifactResult) -> None:
        self.result.artifacts.append(found)
        with _noted(found):
            file = open_file(Path(found.path))
            tests = self.request.tests(file)
            found.settings = self.request.settings(file, tests)
            found.planned, found.planned_starts = tests, self.starts
            found.quality = recorded_quality(file.gguf.path, found.notes)
            scenarios = self.request.scenarios if file.generates else ()
            found.planned_scenarios = tuple(scenario.name for scenario in scenarios)
            found.notes += self._left_out(file, found)
            if not (tests or self.starts or scenarios):
                hint = None if file.generates else "an embedding model reads and does not write: --n-prompt N"
                raise UsageError(
                    "nothing to measure: no test, no start, no scenario", where=file.gguf.path.name, hint=hint
                )
            self._predict(file, found)
            plan = Plan(
                file=file.gguf,
                settings=found.settings,
                limits=self.limits,
                effort=self.request.effort,
                tests=tests,
                starts=self.starts,
                scenarios=scenarios,
            )
            self.files.append((file, plan, found))

    def _left_out(self, file: BenchFile, found: ArtifactResult) -> Iterator[str]:
        """What was asked for and is not done, or not in the way that one may expect."""
        if not file.generates:
            asked = {"depth": any(self.request.depth or ()), "scenario": bool(self.request.scenarios)}
            left_out = ", no ".join(["decode speed", *(what for what, is_asked in asked.items() if is_asked)])
            yield f"an embedding model: it reads and does not write, so there is no {left_out}"
        once = {"starts": self.starts, "scenarios": bool(found.planned_scenarios)}
        if found.settings and len(self.request.threads or ()) > 1 and any(once.values()):
            what = " and ".join(name for name, is_there in once.items() if is_there)
            yield f"{what} with {count(found.settings.threads, 'thread')}, the first of --threads"

    def agree(self) -> None:
        """Artifacts that take turns run the same tests: as long as the shortest context allows, and that all can do."""
        if len(self.result.artifacts) < 2:
            raise UsageError("--compare takes two artifacts or more")
        if not self.files:
            return
        most = min((file.trained_ctx for file, _, _ in self.files if file.trained_ctx), default=0)
        each = [self.request.tests(file, most) for file, _, _ in self.files]
        shared = tuple(test for test in each[0] if all(test in tests for tests in each))
        if not shared:
            raise UsageError("--compare: there is no test that all of these artifacts can do")
        for index, (file, plan, found) in enumerate(self.files):
            lost = [test.label for test in found.planned if test not in shared]
            if lost:
                found.notes.append(f"{', '.join(lost)} left out: not all of these artifacts can do it")
            found.planned, found.settings = shared, self.request.settings(file, shared)
            self.files[index] = file, replace(plan, tests=shared, settings=found.settings), found

    def _predict(self, file: BenchFile, found: ArtifactResult) -> None:
        if found.settings:
            # of the decode that the table sets beside the prediction
            depth = min((test.n_depth for test in found.planned if test.n_gen), default=0)
            size = file.gguf.path.stat().st_size
            found.predictions = [
                predict_file(target, file.header, size, found.settings, depth, found.memory) for target in self.targets
            ]

    def measure(self, source: EnergyMeter | NoMeter, in_turns: bool) -> None:
        """Run what was planned."""
        for _, _, found in self.files:
            found.energy_source = source.source
        energy = Energy(None if isinstance(source, NoMeter) else source)
        try:
            self._measure(energy, in_turns)
        finally:
            for _, _, found in self.files if energy.trouble else ():
                found.notes.append(f"joules end before the run did: {energy.trouble}")

    def _measure(self, energy: Energy, in_turns: bool) -> None:
        if in_turns and len(self.files) > 1:
            plans, results = [plan for _, plan, _ in self.files], [found for _, _, found in self.files]
            measure_in_turns(plans, results, self.result.comparisons, energy=energy, progress=self.progress)
            for file, _, found in self.files:
                self._predict(file, found)
            return
        for file, plan, found in self.files:
            with _noted(found):
                measure(plan, found, energy=energy, progress=self.progress)
                self._predict(file, found)

    def judge(self) -> None:
        """Quality against the base, and the gates."""
        good = [(file.gguf.path, found) for file, _, found in self.files if found.failure is None]
        if self.base is not None and good:
            threads = max(self.request.threads or (0,)) or None
            qualities = self.base.measure(
                [path for path, _ in good],
                threads=threads,
                seed=self.request.seed,
                stall_s=self.limits.seconds,
                progress=self.progress,
            )
            for (_, found), quality in zip(good, qualities, strict=True):
                with _noted(found):
                    if isinstance(quality, EffiError):
                        raise quality
                    found.quality = quality
        for path, found in good:
            if found.failure:
                continue
            with _noted(found):
                self.gates.check(path, found.quality)


@contextmanager
def _noted(found: ArtifactResult) -> Iterator[None]:
    """An error of this artifact becomes its failure: the others go on."""
    try:
        yield
    except (EffiError, ChildError) as error:
        found.fail(error)


def _tuple(values: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(dict.fromkeys(values))


def machine() -> dict[str, object]:
    """The class of this machine and what runs on it, without its name; MissingExtra where there is no runtime."""
    from efficli import __version__  # noqa: PLC0415 (the package imports this module)

    try:
        runtime = version("llama-cpp-python")
    except PackageNotFoundError as error:
        raise MissingExtra("llama-cpp-python", "gguf") from error
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu_info": cpu_name(),
        "cores": cores,
        "memory_bytes": usable_memory(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": {
            "efficli": __version__,
            "llama-cpp-python": runtime,
            "python": platform.python_version(),
        },
    }
