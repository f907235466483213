"""What the paired benchmarks share: runs that are kept, alternating order, a time budget, limits, the result.

A benchmark is a list of steps. Each is measured once and written to WORK/runs.json at once, so a benchmark that was
killed goes on with the same command; runs of another machine, other versions or options are not mixed in. Two tools are
measured in pairs, A B then B A, and compared pair by pair: what disturbs the machine for minutes hits both of a pair.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import machine

from efficli.ops.statistics import Estimate, estimate
from efficli.ops.storage import replace_file

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
MINUTES = 60.0
LIMIT_NOT_MET, OUT_OF_TIME, INTERRUPTED = 1, 4, 130
"""Exit codes."""
QUIET_CORES = 0.15
"""Cores that other processes may take while speed is measured."""
_LOOK_S = 0.5
_SHOWN = 8
_NOT_CONDITIONS = ("work", "minutes", "results", "keep")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One run: its name in runs.json, and what measures it and returns its figures as JSON."""

    name: str
    run: Callable[[], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A figure held against a limit: its median must be from `least` to `most`."""

    name: str
    found: Estimate
    least: float | None = None
    most: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the median is within the limit."""
        value = self.found.median
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    @property
    def sure(self) -> bool:
        """Whether the median's whole interval is on the same side of the limit."""
        low, high = -math.inf if self.least is None else self.least, math.inf if self.most is None else self.most
        inside = low <= self.found.low and self.found.high <= high
        outside = self.found.high < low or self.found.low > high
        return inside if self.holds else outside

    @property
    def line(self) -> str:
        """What a person reads."""
        found, told = self.found, [f"at least {self.least:g}"] if self.least is not None else []
        told += [f"at most {self.most:g}"] if self.most is not None else []
        asked, verdict = " and ".join(told), "holds" if self.holds else "NOT MET"
        verdict += "" if self.sure else " (not sure: its interval reaches across)"
        return f"{verdict}: {self.name} {found.median:.3f} ({found.low:.3f} - {found.high:.3f}), {asked}, n = {found.n}"

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "name": self.name,
            **rounded(self.found),
            "least": self.least,
            "most": self.most,
            "holds": self.holds,
            "sure": self.sure,
        }


def rounded(found: Estimate) -> dict[str, Any]:
    """An estimate as plain data, to four places."""
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in found.to_json().items()}


def alternating(rounds: int, *sides: str) -> Iterator[tuple[int, str]]:
    """(round, side): A B, then B A, then A B again: neither is always the one that runs first."""
    for number in range(rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            yield number, side


def ratio(pairs: Sequence[tuple[float, float]]) -> Estimate:
    """Median and interval of first / second, pair by pair."""
    return estimate([first / second for first, second in pairs])


def arguments(description: str | None, name: str) -> argparse.ArgumentParser:
    """The options that every benchmark has; it adds its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = HERE.parent / "build" / "benchmarks" / name
    parser.add_argument("--work", type=Path, default=default, help="where runs and files are kept (%(default)s)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="stop before this is over (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result (%(default)s)")
    return parser


class Benchmark:
    """One benchmark's folder and its runs so far; `SystemExit` where the folder's runs are of other conditions."""

    def __init__(self, name: str, question: str, options: argparse.Namespace, *packages: str) -> None:
        self.name, self.question = name, question
        self.folder: Path = options.work.resolve()
        self.results, self._began, self._seconds = options.results, time.monotonic(), options.minutes * 60
        self.command = command_line(name)
        self.log, self._state = self.folder / "log.txt", self.folder / "runs.json"
        self.conditions = {
            "options": {name: value for name, value in vars(options).items() if name not in _NOT_CONDITIONS},
            "machine": machine.describe(),
            "versions": machine.versions(*packages),
        }
        self.runs: dict[str, dict[str, Any]] = {}
        self._made = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self.date = datetime.now(UTC).date().isoformat()
        if self._state.exists():
            self._go_on(json.loads(self._state.read_text(encoding="utf-8")))

    def _go_on(self, kept: dict[str, Any]) -> None:
        for name, now in self.conditions.items():
            if kept["conditions"][name] != now:
                raise SystemExit(
                    f"{self._state}: its runs are of other {name}: {kept['conditions'][name]}, now {now}\n"
                    "hint: delete that file to begin anew, or give another --work"
                )
        self.runs, self.date = kept["runs"], kept["date"]

    def measure(
        self, command: Sequence[str], environment: dict[str, str] | None = None, *, memory: bool = False
    ) -> dict[str, float]:
        """CPU and wall seconds of a command, and its peak `memory`; SystemExit where it fails. Its output is logged."""
        return machine.measure(list(command), log=self.log, environment=environment, memory=memory)

    def quietly(self, run: Callable[[], dict[str, Any]], wait: float) -> dict[str, Any]:
        """Run while others leave the machine alone: waited for, and run again where they did not, for `wait` seconds.

        What decides is the CPU time that other processes took, never the figures. The last run counts, with
        `others_cores` and the number of `attempts`: how far it was disturbed is told where the wait was in vain.
        """
        end, attempts, cores = time.monotonic() + wait, 0, math.inf
        figures: dict[str, Any] = {}
        while not attempts or (cores > QUIET_CORES and time.monotonic() < end):
            self._wait_for_quiet(end)
            others = machine.Others()
            figures = run()
            cores, attempts = others.cores(), attempts + 1
        return {**figures, "others_cores": round(cores, 3), "attempts": attempts}

    def _wait_for_quiet(self, end: float) -> None:
        cores = math.inf
        while cores > QUIET_CORES and time.monotonic() < end:
            others = machine.Others()
            time.sleep(_LOOK_S)
            cores = others.cores()

    def run(self, steps: Sequence[Step]) -> None:
        """Measure what is missing, in this order, each run kept at once.

        SystemExit(4) before the time is over, and SystemExit(130) where it was interrupted, both said with the way on.
        """
        try:
            for step in steps:
                if step.name in self.runs:
                    continue
                self._check_time(steps)
                began = time.monotonic()
                figures = step.run()
                spent = round(time.monotonic() - began, 3)
                self.runs[step.name] = {**figures, "step_s": spent, "load1": round(os.getloadavg()[0], 2)}
                self._made += 1
                self._save()
                print(f"{len(self.missing(steps)):4} to go after {step.name}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            self._stop("interrupted", steps, INTERRUPTED)

    def missing(self, steps: Sequence[Step]) -> list[str]:
        """Names of the steps without a run."""
        return [step.name for step in steps if step.name not in self.runs]

    def finish(self, limits: Sequence[Limit], **figures: Any) -> int:
        """Write results/NAME.json, say which limits hold; the exit code: 1 if one does not."""
        result = {
            "benchmark": self.name,
            "question": self.question,
            "command": self.command,
            "date": self.date,
            **self.conditions,
            "limits": [limit.to_json() for limit in limits],
            **figures,
            "runs": self.runs,
        }
        self.results.mkdir(parents=True, exist_ok=True)
        path = self.results / f"{self.name}.json"
        replace_file(path, json.dumps(result, indent=1) + "\n")
        self._state.unlink(missing_ok=True)  # the next call measures anew
        for limit in limits:
            print(limit.line)
        print(f"{path}: {sum(limit.holds for limit in limits)} of {len(limits)} limits hold")
        return 0 if all(limit.holds for limit in limits) else LIMIT_NOT_MET

    def _save(self) -> None:
        kept = {"conditions": self.conditions, "date": self.date, "runs": self.runs}
        replace_file(self._state, json.dumps(kept, indent=1))

    def _check_time(self, steps: Sequence[Step]) -> None:
        """Stop where a step as long as the longest so far would end too late; each call makes one at least."""
        longest = max((figures["step_s"] for figures in self.runs.values()), default=0.0)
        spent = time.monotonic() - self._began
        if self._made and spent + longest > self._seconds:
            self._stop(f"out of time after {spent / 60:.1f} of {self._seconds / 60:g} minutes", steps, OUT_OF_TIME)

    def _stop(self, why: str, steps: Sequence[Step], code: int) -> None:
        left = self.missing(steps)
        shown = ", ".join(left[:_SHOWN]) + (f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else "")
        print(f"{self.name}: {why}; {len(left)} of {len(steps)} runs are missing: {shown}", file=sys.stderr)
        print(f"hint: the same command goes on; what was measured is in {self._state}", file=sys.stderr)
        raise SystemExit(code)


def command_line(name: str) -> str:
    """The command that was typed, without the paths of this machine."""
    words, hidden = [], ("--work", "--results", "--build")
    for before, word in zip(["", *sys.argv[1:]], sys.argv[1:], strict=False):
        if before not in hidden and not word.startswith(hidden):
            words.append(word)
    return shlex.join(["python", f"benchmarks/{name}.py", *words])
