"""Plans of small files, and a run of `measure` that can be listened to and interrupted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from efficli.bench.engine import Repeat
from efficli.bench.figures import ArtifactResult, Comparison, Settings, SpeedTest
from efficli.bench.gguf_engine import GgufFile
from efficli.bench.gguf_session import open_session
from efficli.bench.rounds import Effort
from efficli.bench.suite import Energy, Plan, measure, measure_in_turns
from efficli.ops.worker import Limits
from efficli.progress import Silent

LIMITS = Limits(seconds=120)
QUICK = Effort(patience=0)
PROMPT, GEN = SpeedTest(n_prompt=40), SpeedTest(n_gen=12)
AT_DEPTH = SpeedTest(n_prompt=16, n_depth=100)


def plan_of(path: Path, *tests: SpeedTest, effort: Effort = QUICK, generates: bool = True, **options) -> Plan:
    values = {"limits": LIMITS, "starts": False, "scenarios": ()} | options
    return Plan(
        file=GgufFile(path=path, generates=generates),
        settings=Settings(ctx=200, threads=1),
        effort=effort,
        tests=tests,
        **values,
    )


NO_ENERGY = Energy(None)


def measured(plan: Plan, energy: Energy = NO_ENERGY) -> ArtifactResult:
    result = ArtifactResult(path=str(plan.file.path), settings=plan.settings, planned=plan.tests)
    measure(plan, result, energy=energy, progress=Silent())
    return result


@dataclass
class Heard:
    """Every repeat that the engines made, in order."""

    files: list[str] = field(default_factory=list)
    tests: list[SpeedTest] = field(default_factory=list)
    repeats: list[Repeat] = field(default_factory=list)
    pids: dict[str, int] = field(default_factory=dict)


class Interrupting(Silent):
    """Calls `do` at the so-manieth step of a task whose name has `word` in it."""

    def __init__(self, word: str, step: int, do: Callable[[], None]) -> None:
        super().__init__()
        self.word, self.left, self.do = word, step, do
        self.task = ""

    def start(self, task: str, total: float, unit: str = "") -> None:
        self.task = task

    def advance(self, amount: float) -> None:
        if self.word in self.task:
            self.left -= 1
            if self.left == 0:
                self.do()


def interrupt() -> None:
    raise KeyboardInterrupt


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def turns(*plans: Plan, progress: Silent | None = None) -> tuple[list[ArtifactResult], list[Comparison]]:
    results = [ArtifactResult(path=str(plan.file.path)) for plan in plans]
    comparisons: list[Comparison] = []
    with contextlib.suppress(KeyboardInterrupt):
        measure_in_turns(plans, results, comparisons, energy=NO_ENERGY, progress=progress or Silent())
    return results, comparisons


def open_or_leave(argument, progress):
    """As gguf_session.open_session, but a process that opens a file called "leaves" ends itself."""
    if "leaves" in argument["path"]:
        os.write(2, b"the library has had enough\n")
        os._exit(1)
    return open_session(argument, progress)
